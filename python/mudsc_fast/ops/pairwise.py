"""Similarities and distances between points, for an assignment that never stores their matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mudsc_fast import _arrays, _checks
from mudsc_fast.kernels._assignment import Solution
from mudsc_fast.kernels.cpu import pairwise as cpu
from mudsc_fast.kernels.reference import pairwise as reference
from mudsc_fast.ops import _dispatch
from mudsc_fast.ops._assignment_padding import transpose_solution

Kind: TypeAlias = Literal["correlation", "cosine", "sqeuclidean"]

#: Bound on the entries, far enough from the largest float32 for sums of duals.
_MAX_ENTRY = 1e34
#: Entries of the largest matrix that is made where a solver needs it (256 MB).
_MAX_MATRIX = 2**26
#: Points whose norms are computed at a time in float64.
_BLOCK = 4096


@dataclass(frozen=True, eq=False, repr=False, init=False)
class PairwiseSimilarity:
    """The matrix of similarities or distances between two sets of points, computed from their features when needed.

    :func:`linear_assignment` solves it like the matrix, with duals and gap, in memory proportional to ``(n + m) * d``
    instead of ``n * m``.

    Parameters
    ----------
    x, y
        [n, d] and [m, d] tensors in host memory, or arrays of any library: one point or feature vector per row, of a
        floating-point type or integers, finite.
    kind
        What an entry is, for rows a of x and b of y:

        - ``"correlation"``: Pearson's correlation of a and b over the d features, 0 if either is constant
        - ``"cosine"``: ``a @ b / (norm(a) * norm(b))``, 0 if either is zero
        - ``"sqeuclidean"``: ``((a - b) ** 2).sum()``, a cost: :func:`linear_assignment` minimizes the sum by default

    Attributes
    ----------
    x, y
        [n, d] and [m, d] float32: the features that entries are computed from, normalized for correlation and cosine.
    kind
        As given.

    Raises
    ------
    TypeError
        If `x` or `y` is not an array of real numbers.
    ValueError
        If `x` or `y` is not [n, d] with the same d >= 1 (2 for correlation), holds NaN or infinity, or is not in host
        memory; if the distances are too large for float32; or if `kind` is unknown.

    Notes
    -----
    Features are rounded to float32, after normalization. An entry is the float32 sum over the features in order,
    ``sum += (a[k] - b[k]) ** 2`` or ``sum += a[k] * b[k]``, so it is the same whenever it is computed. Distances of
    equal points are exactly 0, and none is negative. float64 points that float32 cannot hold are moved first, so that
    the middle of their range is zero, which keeps the digits of points that are far from zero. float32 points of
    "sqeuclidean" share their memory.

    Examples
    --------
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> y = torch.tensor([[0.1, 0.9], [0.1, 0.1], [0.9, 0.0]])
    >>> linear_assignment(PairwiseSimilarity(x, y, "sqeuclidean")).columns
    tensor([1, 2, 0])
    """

    x: Tensor
    y: Tensor
    kind: Kind

    def __init__(self, x: _arrays.Array, y: _arrays.Array, kind: Kind) -> None:
        _checks.check_choice("kind", kind, get_args(Kind))
        points = [_as_points(name, value) for name, value in (("x", x), ("y", y))]
        features = [point.shape[1] for point in points]
        if features[0] != features[1]:
            raise ValueError(f"x and y must have the same number of features, got {features[0]} and {features[1]}")
        least = 2 if kind == "correlation" else 1
        if features[0] < least:
            raise ValueError(f"x and y must have at least {least} features for {kind!r}, got {features[0]}")
        if kind == "sqeuclidean":
            points = _as_float32(points)
        else:
            points = [_normalized(point, centered=kind == "correlation") for point in points]
        for name, value in (("x", points[0]), ("y", points[1]), ("kind", kind)):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrix, [n, m]."""
        return torch.Size((self.x.shape[0], self.y.shape[0]))

    @property
    def is_cost(self) -> bool:
        """Whether small entries are good: True for "sqeuclidean"."""
        return self.kind == "sqeuclidean"

    def dense(self) -> Tensor:
        """Return the [n, m] float32 matrix, each entry exactly as :func:`linear_assignment` computes it."""
        return reference.entries(self.x, self.y, self.is_cost)

    def __repr__(self) -> str:
        n, m = self.shape
        return f"PairwiseSimilarity({self.kind!r}, shape=[{n}, {m}], features={self.x.shape[1]})"


def solve_without_matrix(
    pairwise: PairwiseSimilarity, maximize: bool, prices: Tensor | None, tolerance: float
) -> Solution | None:
    """Assign the points without storing the matrix; None if a solver needs the matrix, which is then small.

    Raises
    ------
    ValueError
        If the matrix is needed and large.
    """
    n, m = pairwise.shape
    solution = None
    if max(n, m) >= cpu.MIN_COLUMNS and min(n, m) > 0 and _dispatch.backend_for("assignment", "cpu") == "cpu":
        x, y = (pairwise.x, pairwise.y) if n <= m else (pairwise.y, pairwise.x)
        solution = cpu.solve(x, y, pairwise.is_cost, maximize, prices, tolerance)
        if solution is not None and n > m:
            solution = transpose_solution(solution, n)
    if solution is None and n * m > _MAX_MATRIX:
        reason = (
            "the backend 'reference' needs the matrix"
            if _dispatch.backend_for("assignment", "cpu") == "reference"
            else "all entries have magnitudes below 1e-28; multiply x and y by a large number"
        )
        raise ValueError(f"similarity of shape [{n}, {m}] is too large to store its matrix, and {reason}")
    return solution


def sample_rows(pairwise: PairwiseSimilarity, step: int) -> Tensor:
    """Return every `step`-th row of the matrix."""
    return reference.entries(pairwise.x[::step], pairwise.y, pairwise.is_cost)


# ---- features -------------------------------------------------------------------------------------------------------


def _as_points(argument: str, value: object) -> Tensor:
    points = _arrays.as_tensor(argument, value).detach()
    if points.dtype not in _checks.FLOAT_DTYPES:
        if points.is_complex() or points.dtype == torch.bool:
            raise TypeError(f"{argument} must hold real numbers, got dtype {str(points.dtype).removeprefix('torch.')}")
        points = points.to(torch.float64)
    if points.ndim != 2:
        raise ValueError(f"{argument} must be [points, features], got shape {list(points.shape)}")
    if points.device.type != "cpu":
        raise ValueError(f"{argument} must be in host memory, got a tensor on {points.device}; pass {argument}.cpu()")
    _checks.check_finite(argument, points)
    return points


def _as_float32(points: list[Tensor]) -> list[Tensor]:
    """Return points whose differences matter as contiguous float32, moved by their mean if float32 cannot hold them."""
    with_points = [point for point in points if len(point) > 0]
    if with_points:
        low = torch.stack([point.amin(0).double() for point in with_points]).amin(0)
        high = torch.stack([point.amax(0).double() for point in with_points]).amax(0)
        largest = float((high - low).square().sum())
        if largest > _MAX_ENTRY:
            raise ValueError(
                f"x and y must be so near that squared distances are at most {_MAX_ENTRY:g}, got up to {largest:g}; "
                "divide both by a large number"
            )
        if not all(_is_exact(point) for point in with_points):
            middle = low + (high - low) / 2
            points = [point.double() - middle for point in points]
    return [point.to(torch.float32).contiguous() for point in points]


def _is_exact(points: Tensor) -> bool:
    if points.dtype != torch.float64:
        return True
    return all(torch.equal(block, block.float().double()) for block in points.split(_BLOCK))


def _normalized(points: Tensor, centered: bool) -> Tensor:
    """Return points of norm 1 as float32, or 0 where nothing is left to normalize."""
    out = torch.empty(points.shape, dtype=torch.float32)
    for target, block in zip(out.split(_BLOCK), points.split(_BLOCK), strict=True):
        wide = block.double()
        peak = wide.abs().amax(1, keepdim=True)  # squares could overflow
        wide = wide / torch.where(peak > 0, peak, 1.0)
        if centered:
            is_constant = (wide == wide[:, :1]).all(1, keepdim=True)
            wide = torch.where(is_constant, 0.0, wide - wide.mean(1, keepdim=True))
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        target.copy_(wide / torch.where(norm > 0, norm, 1.0))
    return out
