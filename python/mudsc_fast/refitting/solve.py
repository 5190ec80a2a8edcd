"""Ridge regression, with the ridge chosen on held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.refitting.gram import Moments


@dataclass(frozen=True)
class Solution:
    """The change to add to a layer.

    Attributes
    ----------
    weight
        [groups, outputs, inputs], float64.
    bias
        [groups, outputs], float64. Zeros if the layer has no bias.
    ridge
        The chosen ridge. None if no change is better than any.
    error_before, error_after
        Mean over the samples of the squared residual, summed over the outputs.
    """

    weight: Tensor
    bias: Tensor
    ridge: float | None
    error_before: float
    error_after: float


def solve(fitted: Moments, held_out: Moments, ridges: Sequence[float], *, has_bias: bool) -> Solution:
    """Return the change of a layer that minimizes its residuals.

    Minimizes E |r - D h - b|^2 + ridge * trace(G) / inputs * |D|^2 for residuals r, inputs h and G = E[h h^T]. If there
    is a bias b, moments are central and the bias is not penalized. Of several ridges, the one with the smallest error
    on the held-out samples is used, or no change at all if that error is smaller still. The final fit uses all samples.

    Parameters
    ----------
    fitted, held_out
        Moments of the two parts of the samples. The second part may be empty.
    ridges
        The values to choose from.
    has_bias
        Whether the layer has a bias.
    """
    both = fitted.joined(held_out)
    parts = [part if has_bias else part.about_zero() for part in (fitted, held_out, both)]

    def held_out_error(ridge: float | None) -> float:
        if ridge is None:
            return _present_error(parts[1])
        return _error(parts[1], *_change(parts[0], ridge, has_bias))

    chosen = _choose_ridge(ridges, held_out_error if fitted.count and held_out.count else None)
    before = _present_error(parts[2])
    if chosen is None:
        groups, size = both.mean.shape
        nothing = both.mean.new_zeros(groups, size - both.inputs, both.inputs)
        return Solution(nothing, nothing[:, :, 0].clone(), None, before, before)
    change = _change(parts[2], chosen, has_bias)
    return Solution(*change, chosen, before, _fitted_error(parts[2], chosen, change[0]))


def solve_few(fitted: Tensor, held_out: Tensor, inputs: int, ridges: Sequence[float], *, has_bias: bool) -> Solution:
    """Return what :func:`solve` does, for fewer samples than inputs: with products of samples instead of inputs.

    The weight (H^T H + p I)^-1 H^T R is H^T (H H^T + p I)^-1 R for inputs H and residuals R, one row a sample.

    Parameters
    ----------
    fitted, held_out
        The two parts of the samples, [samples, inputs + outputs]: inputs, then residuals. The second may be empty.
    inputs
        Number of inputs.
    ridges, has_bias
        As for :func:`solve`.
    """
    rows = torch.cat([fitted, held_out]).double()
    part, rest = _Kernel(rows[: len(fitted)], inputs, has_bias), rows[len(fitted) :]

    def held_out_error(ridge: float | None) -> float:
        residuals = rest[:, inputs:]
        if ridge is not None:
            residuals = residuals - part.predict(rest[:, :inputs], part.coefficients(ridge))
        return float(residuals.square().sum() / len(rest))

    chosen = _choose_ridge(ridges, held_out_error if len(fitted) and len(rest) else None)
    whole = _Kernel(rows, inputs, has_bias)
    before = float(rows[:, inputs:].square().sum() / len(rows))
    if chosen is None:
        nothing = rows.new_zeros(1, rows.shape[1] - inputs, inputs)
        return Solution(nothing, nothing[:, :, 0].clone(), None, before, before)
    coefficients = whole.coefficients(chosen)
    weight = coefficients.T @ whole.inputs
    bias = whole.mean[inputs:] - weight @ whole.mean[:inputs]
    after = float((whole.residuals - whole.products @ coefficients).square().sum() / len(rows))
    return Solution(weight[None], bias[None], chosen, before, after)


class _Kernel:
    """Samples about their mean (about zero without a bias), and the products of their inputs."""

    def __init__(self, rows: Tensor, inputs: int, has_bias: bool) -> None:
        self.mean = rows.mean(0) if has_bias else rows.new_zeros(rows.shape[1])
        centered = rows - self.mean
        self.inputs, self.residuals = centered[:, :inputs], centered[:, inputs:]
        self.products = self.inputs @ self.inputs.T

    def coefficients(self, ridge: float) -> Tensor:
        """Return [samples, outputs], the share of each sample in the weight."""
        penalty = ridge * float(self.products.trace()) / self.inputs.shape[1]
        penalized = self.products.clone()
        penalized.diagonal().add_(penalty if penalty > 0 else 1.0)
        return torch.cholesky_solve(self.residuals, torch.linalg.cholesky(penalized))

    def predict(self, inputs: Tensor, coefficients: Tensor) -> Tensor:
        """Return the change of the outputs for other inputs."""
        width = self.inputs.shape[1]
        return (inputs - self.mean[:width]) @ self.inputs.T @ coefficients + self.mean[width:]


def _choose_ridge(ridges: Sequence[float], held_out_error: Callable[[float | None], float] | None) -> float | None:
    """Return the ridge of the smallest held-out error, found by descent from the middle value. None for no change."""
    ordered = sorted(ridges)
    place = len(ordered) // 2
    if held_out_error is None or len(ordered) == 1:
        return ordered[place]
    errors: dict[int, float] = {}

    def error(at: int) -> float:
        if at not in errors:
            errors[at] = held_out_error(ordered[at])
        return errors[at]

    for step in (-1, 1):
        while 0 <= place + step < len(ordered) and error(place + step) < error(place):
            place += step
    return ordered[place] if error(place) < held_out_error(None) else None


def _penalty(moments: Moments, ridge: float) -> Tensor:
    """Return [groups], the penalty on squared changes of a weight, in units of the products."""
    inputs = moments.inputs
    penalty = ridge * moments.products[:, :inputs, :inputs].diagonal(dim1=1, dim2=2).mean(1)
    # If no input varies, any positive penalty leaves the weights unchanged.
    return torch.where(penalty > 0, penalty, 1.0)


def _change(moments: Moments, ridge: float, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Return the changes of weight and bias that minimize the penalized error."""
    inputs = moments.inputs
    gram, cross = moments.products[:, :inputs, :inputs], moments.products[:, :inputs, inputs:]
    penalized = gram.clone()
    penalized.diagonal(dim1=1, dim2=2).add_(_penalty(moments, ridge)[:, None])
    weight = torch.cholesky_solve(cross, torch.linalg.cholesky(penalized)).transpose(1, 2)
    mean_inputs, mean_residuals = moments.mean[:, :inputs], moments.mean[:, inputs:]
    bias = mean_residuals - (weight @ mean_inputs[..., None])[..., 0]
    return weight, bias if has_bias else torch.zeros_like(bias)


def _present_error(moments: Moments) -> float:
    """Return the mean of |r|^2 over the samples."""
    inputs = moments.inputs
    squares = moments.products.diagonal(dim1=1, dim2=2)[:, inputs:].sum() / moments.count
    return float(squares + moments.mean[:, inputs:].square().sum())


def _fitted_error(moments: Moments, ridge: float, weight: Tensor) -> float:
    """Return the error of the change fitted to these moments, without a further product with the gram matrix.

    The weight D satisfies D (G + penalty I) = C^T for the products C of inputs and residuals, so that the error
    tr(R - 2 D C + D G D^T) is tr(R) - tr(D C) - penalty |D|^2. The bias makes up for all means.
    """
    inputs = moments.inputs
    squares = moments.products.diagonal(dim1=1, dim2=2)[:, inputs:].sum()
    cross = moments.products[:, :inputs, inputs:]
    explained = (weight * cross.transpose(1, 2)).sum() + (_penalty(moments, ridge) * weight.square().sum((1, 2))).sum()
    return float(((squares - explained) / moments.count).clamp(min=0))


def _error(moments: Moments, weight: Tensor, bias: Tensor) -> float:
    """Return the mean of |r - D h - b|^2 over the samples."""
    inputs = moments.inputs
    gram, cross = moments.products[:, :inputs, :inputs], moments.products[:, :inputs, inputs:]
    squares = moments.products.diagonal(dim1=1, dim2=2)[:, inputs:].sum()
    squares = squares - 2 * (weight * cross.transpose(1, 2)).sum() + ((weight @ gram) * weight).sum()
    rest = moments.mean[:, inputs:] - (weight @ moments.mean[:, :inputs, None])[..., 0] - bias
    return float((squares / moments.count + rest.square().sum()).clamp(min=0))
