"""Ridge regression, with the ridge chosen on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast._checks import is_finite
from mudsc_fast.refitting.gram import Moments, symmetric_product

#: Penalties below this multiple of float32's precision, relative to the norm of the gram matrix, need float64.
_FLOAT32_MARGIN = 64.0


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
        The ridge of the solution: the chosen one, or a larger one if it is too small to factorize the matrix. None if
        it is best not to change the layer.
    error_before, error_after
        Mean over the samples of the squared residual, summed over the outputs.
    """

    weight: Tensor
    bias: Tensor
    ridge: float | None
    error_before: float
    error_after: float


def solve(
    fitted: Moments,
    held_out: Moments,
    whole: Moments,
    ridges: Sequence[float],
    *,
    has_bias: bool,
    first: float | None = None,
) -> Solution:
    """Return the change of a layer that minimizes its residuals.

    Minimizes E |r - D h - b|^2 + ridge * trace(G) / inputs * |D|^2 for residuals r, inputs h and G = E[h h^T]. If there
    is a bias b, moments are central and the bias is not penalized. Of several ridges, the one with the smallest error
    on the held-out samples is used. If the error without a change is smaller, the layer does not change. The final fit
    uses all samples and float64. The fits that are compared use float32 where their penalty is large enough for its
    precision.

    Parameters
    ----------
    fitted, held_out, whole
        Moments of the two parts of the samples, of which the second may be empty, and of all samples.
    ridges
        The values to choose from.
    has_bias
        Whether the layer has a bias.
    first
        The ridge to try first. By default the middle one.
    """
    parts = [part if has_bias else part.about_zero() for part in (fitted, held_out, whole)]
    trials = _Trials(parts[0], parts[1], has_bias=has_bias) if fitted.count and held_out.count else None
    chosen = _choose_ridge(ridges, None if trials is None else trials.error, first)
    before = _unchanged_error(parts[2])
    if chosen is None:
        nothing = torch.zeros_like(parts[2].cross).transpose(1, 2)
        return Solution(nothing, torch.zeros_like(parts[2].mean_residuals), None, before, before)
    chosen, solution = _first_finite(
        chosen, lambda ridge: _solved(parts[2].gram, parts[2].cross, _penalty(parts[2], ridge))
    )
    weight = solution.transpose(1, 2)
    after = _fitted_error(parts[2], _penalty(parts[2], chosen), weight)
    return Solution(weight, _bias(parts[2], weight, has_bias), chosen, before, after)


def solve_few(
    fitted: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    ridges: Sequence[float],
    *,
    has_bias: bool,
    first: float | None = None,
) -> Solution:
    """Return what :func:`solve` does, for fewer samples than inputs: with products of samples instead of inputs.

    The weight (H^T H + p I)^-1 H^T R is H^T (H H^T + p I)^-1 R for inputs H and residuals R, one row a sample.

    Parameters
    ----------
    fitted, held_out
        Inputs and residuals of the two parts of the samples, [samples, numbers]. The second part may be empty.
    ridges, has_bias, first
        As for :func:`solve`.
    """
    inputs, residuals = (torch.cat(parts) for parts in zip(fitted, held_out, strict=True))
    residuals = residuals.double()
    count, (samples, size) = len(fitted[0]), inputs.shape
    shift = inputs.mean(0) if has_bias else inputs.new_zeros(size)
    inputs = inputs - shift
    products = symmetric_product(inputs)
    known, missing = residuals[:count], residuals[count:]
    part = _centered(products, count, has_bias)
    mean = known.mean(0) if has_bias and count else known.new_zeros(known.shape[1])

    def error(ridge: float | None) -> float:
        if ridge is None:
            return float(missing.square().sum() / len(missing))
        predicted = part[count:] @ _coefficients(part[:count], known - mean, ridge, size) + mean
        return float((missing - predicted).square().sum() / len(missing))

    chosen = _choose_ridge(ridges, error if 0 < count < samples else None, first)
    before = float(residuals.square().sum() / samples)
    if chosen is None:
        nothing = residuals.new_zeros(1, residuals.shape[1], size)
        return Solution(nothing, nothing[:, :, 0].clone(), None, before, before)
    whole = _centered(products, samples, has_bias)
    mean = residuals.mean(0) if has_bias else torch.zeros_like(mean)
    chosen, coefficients = _first_finite(chosen, lambda ridge: _coefficients(whole, residuals - mean, ridge, size))
    # The coefficients of centered residuals sum to 0, so that any shift of the inputs gives the same weight.
    weight = coefficients.T @ inputs.double()
    bias = mean - weight @ (shift.double() + inputs.mean(0, dtype=torch.float64)) if has_bias else mean
    after = float((residuals - mean - whole @ coefficients).square().sum() / samples)
    return Solution(weight[None], bias[None], chosen, before, after)


def _centered(products: Tensor, count: int, has_bias: bool) -> Tensor:
    """Return the first columns of a matrix of products of samples, about the mean of the first ones for a bias."""
    part = products[:, :count]
    if not has_bias or not count:
        return part
    means = part.mean(1)
    return part - means[:, None] - means[:count] + means[:count].mean()


def _coefficients(products: Tensor, residuals: Tensor, ridge: float, size: int) -> Tensor:
    """Return [samples, outputs], the share of each sample in the weight."""
    penalty = ridge * products.diagonal().sum(0, keepdim=True) / size
    return _solved(products[None], residuals[None], torch.where(penalty > 0, penalty, 1.0))[0]


def _first_finite(ridge: float, solution_with: Callable[[float], Tensor]) -> tuple[float, Tensor]:
    """Multiply a ridge by 10 until its solution is finite, and return both."""
    while True:
        solution = solution_with(ridge)
        if is_finite(solution) or ridge > 1:
            return ridge, solution
        ridge *= 10


def _choose_ridge(
    ridges: Sequence[float], held_out_error: Callable[[float | None], float] | None, first: float | None
) -> float | None:
    """Return the ridge with the smallest held-out error, found by descent from the first one. None for no change."""
    ordered = sorted(ridges)
    place = ordered.index(first) if first in ordered else len(ordered) // 2
    if held_out_error is None or len(ordered) == 1:
        return ordered[len(ordered) // 2]
    errors: dict[int, float] = {}

    def error(at: int) -> float:
        if at not in errors:
            found = held_out_error(ordered[at])
            errors[at] = math.inf if math.isnan(found) else found
        return errors[at]

    for step in (-1, 1):
        while 0 <= place + step < len(ordered) and error(place + step) < error(place):
            place += step
    return ordered[place] if error(place) < held_out_error(None) else None


class _Trials:
    """Held-out errors of fits with several ridges, computed in float32 if that is precise enough."""

    def __init__(self, fitted: Moments, held_out: Moments, *, has_bias: bool) -> None:
        self._fitted, self._held_out, self._has_bias = fitted, held_out, has_bias
        self._single: tuple[Moments, Moments] | None = None
        norm = torch.linalg.matrix_norm(fitted.gram)
        self._smallest = _FLOAT32_MARGIN * torch.finfo(torch.float32).eps * norm

    def error(self, ridge: float | None) -> float:
        """Return the mean of |r - D h - b|^2 over the held-out samples for a ridge, or without a change for None."""
        if ridge is None:
            return _unchanged_error(self._held_out)
        penalty = _penalty(self._fitted, ridge)
        if bool((penalty >= self._smallest).all()):
            if self._single is None:
                self._single = self._fitted.to(torch.float32), self._held_out.to(torch.float32)
            found = self._error(*self._single, penalty.float())
            if math.isfinite(found):
                return found
        return self._error(self._fitted, self._held_out, penalty)

    def _error(self, fitted: Moments, held_out: Moments, penalty: Tensor) -> float:
        weight = _solved(fitted.gram, fitted.cross, penalty).transpose(1, 2)
        squares = held_out.squares.sum() - 2 * (weight * held_out.cross.transpose(1, 2)).sum()
        squares = squares + ((weight @ held_out.gram) * weight).sum()
        bias = _bias(fitted, weight, self._has_bias)
        rest = held_out.mean_residuals - (weight @ held_out.mean_inputs[..., None])[..., 0] - bias
        return float((squares / held_out.count + rest.square().sum()).clamp(min=0))


def _penalty(moments: Moments, ridge: float) -> Tensor:
    """Return [groups], the penalty on squared changes of a weight, in units of the products."""
    penalty = ridge * moments.gram.diagonal(dim1=1, dim2=2).mean(1)
    # If no input varies, any positive penalty leaves the weights unchanged.
    return torch.where(penalty > 0, penalty, 1.0)


def _solved(gram: Tensor, cross: Tensor, penalty: Tensor) -> Tensor:
    """Return [groups, inputs, outputs], the solution of (G + penalty I) X = C. NaN if that is not positive definite."""
    penalized = gram.clone()
    penalized.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    factor, info = torch.linalg.cholesky_ex(penalized)
    solution = torch.cholesky_solve(cross, factor)
    return torch.where((info == 0)[:, None, None], solution, torch.nan)


def _bias(moments: Moments, weight: Tensor, has_bias: bool) -> Tensor:
    if not has_bias:
        return torch.zeros_like(moments.mean_residuals)
    return moments.mean_residuals - (weight @ moments.mean_inputs[..., None])[..., 0]


def _unchanged_error(moments: Moments) -> float:
    """Return the mean of |r|^2 over the samples."""
    return float(moments.squares.sum() / moments.count + moments.mean_residuals.square().sum())


def _fitted_error(moments: Moments, penalty: Tensor, weight: Tensor) -> float:
    """Return the error of the change fitted to these moments, without a further product with the gram matrix.

    The weight D satisfies D (G + penalty I) = C^T for the products C of inputs and residuals, so that the error
    tr(R - 2 D C + D G D^T) is tr(R) - tr(D C) - penalty |D|^2. The bias makes up for all means.
    """
    explained = (weight * moments.cross.transpose(1, 2)).sum() + (penalty * weight.square().sum((1, 2))).sum()
    return float(((moments.squares.sum() - explained) / moments.count).clamp(min=0))
