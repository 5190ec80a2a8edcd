"""Linear assignment: the best one-to-one pairing of rows and columns, with the dual values that prove it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from mudsc_fast import _arrays, _checks, _core
from mudsc_fast.kernels._assignment import INVALID, Solution
from mudsc_fast.kernels.cpu import assignment as cpu
from mudsc_fast.kernels.cuda import assignment as cuda
from mudsc_fast.kernels.reference import assignment as reference
from mudsc_fast.ops import _dispatch, _library

_NUMPY_DTYPES = (torch.float32, torch.float64)

#: Duals to start from that exceed the entries so many times are not used: differences would lose the entries' digits.
_LARGEST_DUAL = 64.0
#: Rows whose entries stand for all in that: to read all would take as long as the search.
_SAMPLED_ROWS = 8


@dataclass(frozen=True)
class Assignment:
    """An optimal assignment and its certificate.

    For a maximised problem ``row_duals[i] + column_duals[j] >= similarity[i, j]`` for all i and j, with equality for
    pairs that are assigned; rows and columns without a partner have dual 0 and no dual of the longer side is negative.
    The sum of all duals, ``objective + gap``, therefore bounds every assignment. Minimised, the inequalities and the
    sign of the gap turn: the bound is ``objective - gap``. Duals are float64; float32 input is exact in it.

    Attributes
    ----------
    columns
        [..., n] int64: the column of each row, -1 for a row without one (only if n > m).
    objective
        [...] float64: sum of the assigned entries.
    row_duals
        [..., n] float64.
    column_duals
        [..., m] float64.
    gap
        [...] float64: distance of the objective to the dual bound; 0 up to the rounding of its sum, never negative.
    """

    columns: Tensor
    objective: Tensor
    row_duals: Tensor
    column_duals: Tensor
    gap: Tensor


def linear_assignment(
    similarity: _arrays.Array,
    *,
    maximize: bool = True,
    warm_start: Assignment | None = None,
    tolerance: float = 0.0,
) -> Assignment:
    """Assign every row a column of its own (every column a row, if there are fewer) so that the sum is the largest.

    Parameters
    ----------
    similarity
        [..., n, m] tensor on any device, or array of any library; a floating-point type, integers (exact below 2**53)
        or bool. Leading axes are a batch, solved on several threads. With `maximize`, -inf forbids a pair; without,
        +inf.
    maximize
        Whether the sum is maximised or minimised.
    warm_start
        An earlier result for a problem of the same shape: its duals start the search, so that a similar problem is
        solved sooner. The result is optimal whatever they are. Used for square problems, and where duals are not much
        larger than entries.
    tolerance
        0 for an optimal assignment. Else the search may end as soon as `gap` is proven to be at most this share of the
        magnitude of `objective`; used for square problems of many rows, others are solved to the end.

    Returns
    -------
    Assignment
        Of tensors, on the device of `similarity`. Of several optimal assignments, that of scipy's function for up to
        128 rows or columns; beyond, rows that are equal in every entry get their columns in ascending order, and of
        columns that are equal the first are used. A constant matrix is assigned along its diagonal.

    Raises
    ------
    TypeError
        If `similarity` is of another type.
    ValueError
        If `similarity` has fewer than two axes, holds NaN or an infinity of the forbidden sign, if forbidden pairs
        leave no assignment, if `warm_start` is of another shape, or if `tolerance` is negative or NaN.

    Notes
    -----
    Source: Jonker and Volgenant, Computing 38 (1987); Crouse, IEEE Transactions on Aerospace and Electronic Systems 52
    (2016). Time O(n^2 m) at most; memory O(n + m) for each thread besides the input, which is copied if it has
    more rows than columns, lies neither row by row nor (if square) column by column, or is on a device without kernels.
    On a CUDA device up to 512 columns are assigned in scipy's order of choice; beyond, equally good choices may be
    others than on the CPU. The search is there always to the end.
    """
    traced = _library.traced(similarity)
    if not traced and warm_start is None and tolerance == 0 and _dispatch.requested() is None:
        # A small matrix is solved sooner than the general way below is gone through.
        solved = _core.solve_array(similarity.numpy() if _is_plain(similarity) else similarity, maximize)
        if solved is not None:
            return Assignment(*map(torch.from_numpy, solved))
    values = _as_tensor("similarity", similarity)
    if values.ndim < 2:
        raise ValueError(f"similarity must be [..., n, m], got shape {list(values.shape)}")
    if traced and warm_start is None:
        return Assignment(*torch.ops.mudsc_fast.linear_assignment(values, maximize, tolerance))
    rows, columns = values.shape[-2:]
    share = _checks.check_number("tolerance", tolerance)
    if share < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    prices = _prices(warm_start, values)
    solution = _solve(values.mT if rows > columns else values, maximize, prices, share)
    if bool(solution.status.any()):
        if bool((solution.status == INVALID).any()):
            raise ValueError(f"similarity must not hold NaN or {'+inf' if maximize else '-inf'}")
        raise ValueError("similarity is infeasible: forbidden pairs leave no assignment")
    if rows <= columns:
        return Assignment(solution.columns, solution.objective, solution.row_duals, solution.column_duals, solution.gap)
    row_of_column = solution.columns
    assigned = torch.full(values.shape[:-1], -1, dtype=torch.int64, device=values.device)
    order = torch.arange(columns, device=values.device).expand(row_of_column.shape)
    assigned.scatter_(-1, row_of_column, order)
    return Assignment(assigned, solution.objective, solution.column_duals, solution.row_duals, solution.gap)


def linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Solve the linear sum assignment problem: ``scipy.optimize.linear_sum_assignment``, faster.

    Parameters
    ----------
    cost_matrix
        [n, m] array, anything that converts to one, or a tensor on any device.
    maximize
        Whether to maximise the sum instead of minimising it.

    Returns
    -------
    row_ind, col_ind
        [min(n, m)] int64 row indices, ascending, and the columns assigned to them: tensors on the device of a tensor,
        else arrays. Of several optimal assignments the one that scipy chooses for up to 128 rows
        or columns; beyond, perhaps another.

    Raises
    ------
    ValueError
        As scipy: "expected a matrix (2-D array)", "matrix contains invalid numeric entries" (NaN, or an infinity that
        is infinitely good) or "cost matrix is infeasible".
    TypeError
        If the entries are not real numbers.
    """
    # A small matrix is solved sooner than the general way is gone through.
    if _dispatch.requested() is None:
        indices = _core.assign_array(cost_matrix, maximize)
        if indices is not None:
            return indices
        if _is_plain(cost_matrix):
            indices = _core.assign_array(cost_matrix.numpy(), maximize)
            if indices is not None:
                return torch.from_numpy(indices[0]), torch.from_numpy(indices[1])
    return _assign_any(cost_matrix, maximize)


def _assign_any(cost_matrix: Any, maximize: bool) -> tuple[Any, Any]:
    if hasattr(cost_matrix, "__dlpack__") and not isinstance(cost_matrix, np.ndarray):
        values = _as_tensor("cost_matrix", cost_matrix)
    else:
        array = np.asarray(cost_matrix)
        values = _as_tensor("cost_matrix", array.astype(np.float64) if array.dtype == object else array)
    if values.ndim != 2:
        raise ValueError(f"expected a matrix (2-D array), got a {values.ndim} array")
    rows, columns = values.shape
    transposed = rows > columns
    solution = _solve(values.T if transposed else values, maximize, None, 0.0)
    if bool(solution.status.any()):
        invalid = bool((solution.status == INVALID).any())
        raise ValueError("matrix contains invalid numeric entries" if invalid else "cost matrix is infeasible")
    partner = solution.columns
    order = torch.arange(len(partner), device=values.device)
    if transposed:
        row_indices, by_row = partner.sort()
        indices = (row_indices, order[by_row])
    else:
        indices = (order, partner)
    return indices if isinstance(cost_matrix, Tensor) else (indices[0].cpu().numpy(), indices[1].cpu().numpy())


def _solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    if similarity.numel() == 0:
        *batch, rows, columns = similarity.shape
        none = torch.zeros(batch, dtype=torch.float64, device=similarity.device)
        return Solution(
            columns=torch.zeros(*batch, rows, dtype=torch.int64, device=similarity.device),
            row_duals=none[..., None].expand(*batch, rows).clone(),
            column_duals=none[..., None].expand(*batch, columns).clone(),
            objective=none,
            gap=none.clone(),
            status=torch.zeros(batch, dtype=torch.int32, device=similarity.device),
        )
    kernels = {"cuda": cuda.solve, "cpu": cpu.solve, "reference": reference.solve}
    kernel = _dispatch.choose("assignment", similarity.device, kernels)
    return kernel(similarity, maximize, prices, tolerance)


def _is_plain(value: Any) -> TypeGuard[Tensor]:
    """Return whether the value is a tensor that numpy sees without a copy."""
    if type(value) is not Tensor or not value.is_cpu or value.dtype not in _NUMPY_DTYPES:
        return False
    return value.layout == torch.strided and not value.requires_grad and not value.is_neg()


def _as_tensor(argument: str, value: object) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub" or value.dtype.itemsize > 8:
            raise TypeError(f"{argument} must hold real numbers of at most 64 bits, got dtype {value.dtype}")
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        # torch has no unsigned types beyond 8 bits; all become float64, as in scipy.
        widened = native if native.dtype.kind == "f" else native.astype(np.float64)
        # Row by row or column by column, the solver takes an array as it lies.
        as_it_lies = widened.flags.writeable and widened.flags.forc
        writable = widened if as_it_lies else np.array(widened, order="C")
        value = torch.from_numpy(writable)
    tensor = _arrays.as_tensor(argument, value)
    if tensor.is_complex():
        raise TypeError(f"{argument} must hold real numbers, got dtype {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.detach() if tensor.dtype in _checks.FLOAT_DTYPES else tensor.detach().to(torch.float64)


def _prices(warm_start: Assignment | None, values: Tensor) -> Tensor | None:
    if warm_start is None:
        return None
    if not isinstance(warm_start, Assignment):
        raise TypeError(f"warm_start must be an Assignment, got {type(warm_start).__name__}")
    expected = (*values.shape[:-2], values.shape[-1])
    if warm_start.column_duals.shape != expected:
        raise ValueError(
            f"warm_start must be of a problem of shape {list(values.shape)}, got column duals of shape "
            f"{list(warm_start.column_duals.shape)}"
        )
    if values.shape[-2] != values.shape[-1] or values.numel() == 0:
        return None
    duals = warm_start.column_duals.to(values.device, torch.float64)
    sample = values[..., :: max(1, values.shape[-2] // _SAMPLED_ROWS), :].to(torch.float64).abs()
    largest = sample.nan_to_num(posinf=0.0).amax((-2, -1))
    serve = duals.abs().amax(-1) <= _LARGEST_DUAL * largest  # not where a dual is NaN
    return torch.where(serve[..., None], duals, 0.0) if bool(serve.any()) else None


def _linear_assignment(
    similarity: Tensor, maximize: bool, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = linear_assignment(similarity, maximize=maximize, tolerance=tolerance)
    return found.columns, found.objective, found.row_duals, found.column_duals, found.gap


def _linear_assignment_fake(
    similarity: Tensor,
    maximize: bool,  # noqa: ARG001
    tolerance: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *batch, rows, columns = similarity.shape
    numbers = [similarity.new_empty(shape, dtype=torch.float64) for shape in (batch, [*batch, rows], [*batch, columns])]
    assigned = similarity.new_empty([*batch, rows], dtype=torch.int64)
    return assigned, numbers[0], numbers[1], numbers[2], similarity.new_empty(batch, dtype=torch.float64)


_library.define(
    "linear_assignment(Tensor similarity, bool maximize, float tolerance) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_assignment,
    _linear_assignment_fake,
)
