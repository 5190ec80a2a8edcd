"""Linear assignment: the best one-to-one pairing of rows and columns, with the dual values that prove it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from mudsc_fast import _arrays, _checks, _core
from mudsc_fast.kernels._assignment import INVALID, OPTIMAL, Arrays, Solution
from mudsc_fast.kernels.cpu import assignment as cpu
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.kernels.cuda import assignment as cuda
from mudsc_fast.kernels.reference import assignment as reference
from mudsc_fast.ops import _dispatch, _library
from mudsc_fast.ops._assignment_padding import Solve, solve_any_shape, solve_ragged, solve_with_threshold
from mudsc_fast.ops._assignment_result import Assignment, assignment_of_arrays
from mudsc_fast.ops.pairwise import PairwiseSimilarity, sample_rows, solve_without_matrix

__all__ = ["Assignment", "PairwiseSimilarity", "linear_assignment", "linear_sum_assignment"]

#: Numbers of rows or columns, one for each problem of a padded batch.
Counts = Sequence[int] | Tensor

#: Duals to start from that exceed the entries by this factor are not used: differences would lose the entries' digits.
_LARGEST_DUAL = 64.0
#: Rows whose entries stand for all in that check: to read all rows would take as long as the search.
_SAMPLED_ROWS = 8
#: Python does not cache attributes of a module with a `__getattr__`: looking this one up takes 5 % of a small call.
_ndarray = np.ndarray


@overload
def linear_assignment(
    similarity: _arrays.Array,
    *,
    maximize: bool | None = ...,
    threshold: float | None = ...,
    return_duals: Literal[True] = ...,
    warm_start: Assignment | None = ...,
    tolerance: float = ...,
) -> Assignment: ...
@overload
def linear_assignment(
    similarity: _arrays.Array,
    *,
    maximize: bool | None = ...,
    threshold: float | None = ...,
    return_duals: Literal[False],
    warm_start: Assignment | None = ...,
    tolerance: float = ...,
) -> Tensor: ...
@overload
def linear_assignment(
    similarity: PairwiseSimilarity,
    *,
    maximize: bool | None = ...,
    return_duals: Literal[True] = ...,
    warm_start: Assignment | None = ...,
    tolerance: float = ...,
) -> Assignment: ...
@overload
def linear_assignment(
    similarity: PairwiseSimilarity,
    *,
    maximize: bool | None = ...,
    return_duals: Literal[False],
    warm_start: Assignment | None = ...,
    tolerance: float = ...,
) -> Tensor: ...
@overload
def linear_assignment(
    similarity: Sequence[_arrays.Array],
    *,
    maximize: bool | None = ...,
    threshold: float | None = ...,
    return_duals: Literal[True] = ...,
) -> list[Assignment]: ...
@overload
def linear_assignment(
    similarity: Sequence[_arrays.Array],
    *,
    maximize: bool | None = ...,
    threshold: float | None = ...,
    return_duals: Literal[False],
) -> list[Tensor]: ...
@overload
def linear_assignment(
    similarity: _arrays.Array,
    *,
    maximize: bool | None = ...,
    threshold: float | None = ...,
    rows: Counts | None = ...,
    columns: Counts | None = ...,
    return_duals: Literal[True] = ...,
) -> list[Assignment]: ...
@overload
def linear_assignment(
    similarity: _arrays.Array,
    *,
    maximize: bool | None = ...,
    threshold: float | None = ...,
    rows: Counts | None = ...,
    columns: Counts | None = ...,
    return_duals: Literal[False],
) -> list[Tensor]: ...
def linear_assignment(
    similarity: _arrays.Array | Sequence[_arrays.Array] | PairwiseSimilarity,
    *,
    maximize: bool | None = None,
    threshold: float | None = None,
    rows: Counts | None = None,
    columns: Counts | None = None,
    return_duals: bool = True,
    warm_start: Assignment | None = None,
    tolerance: float = 0.0,
) -> Assignment | Tensor | list[Assignment] | list[Tensor]:
    """Assign each row its own column (each column its own row, if there are fewer) so that the sum is the largest.

    Parameters
    ----------
    similarity
        [..., n, m] tensor on any device, or array of any library; a floating-point type, integers (exact below 2**53)
        or bool. Leading axes are a batch, solved on several threads. With `maximize`, -inf forbids a pair; without,
        +inf.

        Or a list of [n_k, m_k] matrices on one device, which are solved in one call on several threads. Or a
        :class:`PairwiseSimilarity` of points, whose matrix is not stored.
    maximize
        Whether to maximize or minimize the sum. By default it is maximized, except for a :class:`PairwiseSimilarity` of
        distances.
    threshold
        Leave rows and columns unmatched unless their pair is better than this number: similarity above it, or cost
        below it with ``maximize=False``. The sum of the pairs' distances to the threshold is optimal. By default as
        many pairs as possible are made.
    rows, columns
        [batch] numbers of rows and columns of each problem in a padded [batch, n, m] tensor; the other entries may hold
        anything. Either may be left out if it is n or m everywhere.
    return_duals
        False to return only the columns, which saves time for small problems.
    warm_start
        An earlier result for a problem of the same shape. The search starts from its duals, so a similar problem is
        solved faster; the result is optimal in any case. Used for square problems whose entries are not much smaller
        than the duals.
    tolerance
        0 for an optimal assignment. A larger value lets the search end as soon as `gap` is at most this fraction of
        ``abs(objective)``; used for square problems with many rows, others are solved to optimality.

    Returns
    -------
    Assignment, or list of Assignment
        Tensors on the device of `similarity`; a list for a list of matrices and for a padded batch. With
        ``return_duals=False`` only `columns`, a tensor or a list of tensors. Of several optimal assignments it is the
        one scipy chooses for up to 128 rows or columns (without a threshold); beyond, equal rows get their columns in
        ascending order, unless columns are equal, too, of which the first are used. A constant matrix is assigned along
        its diagonal.

    Raises
    ------
    TypeError
        If `similarity` is of another type.
    ValueError
        If `similarity` has fewer than two axes, holds NaN or an infinity of the wrong sign, or if forbidden pairs leave
        no complete assignment; if `warm_start` has another shape, `tolerance` is negative or NaN, `threshold` is not
        finite, counts are out of range, or arguments are incompatible.

    Notes
    -----
    Source: Jonker and Volgenant, Computing 38 (1987); Crouse, IEEE Transactions on Aerospace and Electronic Systems 52
    (2016). Time O(n^2 m) at most; memory O(n + m) for each thread besides the input. The input is copied if it has more
    rows than columns and fewer than 1024 rows, is not contiguous (a square matrix may be contiguous by columns), comes
    with a threshold (in float64 unless its dtype can hold the threshold), or is on a device without kernels. On a CUDA
    device, up to 512 columns are assigned in scipy's order of choice; beyond, equally good choices may differ from
    those on the CPU, and `tolerance` has no effect.

    Examples
    --------
    >>> similarity = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.7, 0.2], [0.1, 0.3, 0.2]])
    >>> linear_assignment(similarity).columns
    tensor([0, 1, 2])
    >>> linear_assignment(similarity, threshold=0.5).columns
    tensor([ 0,  1, -1])
    """
    if isinstance(similarity, PairwiseSimilarity):
        return _solve_pairwise(similarity, maximize, threshold, rows, columns, return_duals, warm_start, tolerance)
    maximize = True if maximize is None else maximize
    traced = is_compiling() if type(similarity) is _ndarray else _library.traced(similarity)
    is_single = warm_start is None and rows is None and columns is None
    if not traced and is_single and tolerance == 0 and _dispatch.requested() is None:
        # Fast path for small matrices.
        solved = _core.solve_array(similarity, maximize, threshold, Assignment if return_duals else None)
        if solved is not None:
            return solved
    limit = _check_threshold(threshold)
    if isinstance(similarity, (list, tuple)) or not is_single or limit is not None:
        _check_compatible(similarity, limit, rows, columns, warm_start, tolerance)
    if isinstance(similarity, (list, tuple)):
        matrices = [_as_matrix(f"similarity[{index}]", matrix) for index, matrix in enumerate(similarity)]
        return _solve_list(matrices, maximize, limit, return_duals)
    values = _as_tensor("similarity", similarity)
    if values.ndim < 2:
        raise ValueError(f"similarity must be [..., n, m], got shape {list(values.shape)}")
    if rows is not None or columns is not None:
        return _solve_padded(values, rows, columns, maximize, limit, return_duals)
    if traced and warm_start is None:
        tensors = torch.ops.mudsc_fast.linear_assignment(values, maximize, tolerance, limit)
        found = Assignment(*tensors, limit)  # type: ignore[call-arg]
    else:
        share = _check_tolerance(tolerance)
        solution = _solve(values, maximize, _prices(warm_start, values), share, limit)
        _check_solved(solution, maximize)
        found = _as_assignment(solution, limit)
    return found if return_duals else found.columns


def linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Solve the linear sum assignment problem: a faster ``scipy.optimize.linear_sum_assignment``.

    Parameters
    ----------
    cost_matrix
        [n, m] array, anything that converts to one, or a tensor on any device.
    maximize
        Whether to maximize the sum instead of minimizing it.

    Returns
    -------
    row_ind, col_ind
        [min(n, m)] int64 row indices, ascending, and the columns assigned to them: tensors on the device of a tensor,
        otherwise arrays. Of several optimal assignments, it is the one scipy chooses for up to 128 rows or columns;
        beyond, it may be another.

    Raises
    ------
    ValueError
        As scipy: "expected a matrix (2-D array)", "matrix contains invalid numeric entries" (NaN, or an infinity that
        is infinitely good) or "cost matrix is infeasible".
    TypeError
        If the entries are not real numbers.
    """
    # Fast path for small matrices.
    if _dispatch.requested() is None:
        indices = _core.assign_array(cost_matrix, maximize)
        if indices is not None:
            return indices
    return _assign_any(cost_matrix, maximize)


def _assign_any(cost_matrix: Any, maximize: bool) -> tuple[Any, Any]:
    shares_memory = hasattr(cost_matrix, "__dlpack__") and not isinstance(cost_matrix, np.ndarray)
    if shares_memory or isinstance(cost_matrix, PairwiseSimilarity):
        values = _as_tensor("cost_matrix", cost_matrix)
    else:
        array = np.asarray(cost_matrix)
        values = _as_tensor("cost_matrix", array.astype(np.float64) if array.dtype == object else array)
    if values.ndim != 2:
        raise ValueError(f"expected a matrix (2-D array), got a {values.ndim} array")
    solution = _solve(values, maximize)
    if bool(solution.status.any()):
        invalid = bool((solution.status == INVALID).any())
        raise ValueError("matrix contains invalid numeric entries" if invalid else "cost matrix is infeasible")
    rows, columns = _as_assignment(solution, None).indices()
    return (rows, columns) if isinstance(cost_matrix, Tensor) else (rows.cpu().numpy(), columns.cpu().numpy())


def _solve(
    similarity: Tensor,
    maximize: bool,
    prices: Tensor | None = None,
    tolerance: float = 0.0,
    threshold: float | None = None,
) -> Solution:
    """Solve [..., n, m] problems of any shape."""
    if similarity.numel() == 0:
        return _empty_solution(similarity)
    _device.refuse_capture("linear_assignment", similarity.device)
    backend = _dispatch.backend_for("assignment", similarity.device.type, similarity.device.index)
    if threshold is None:
        return solve_any_shape(similarity, _kernel(backend, maximize, prices, tolerance))
    if backend == "cpu":
        return cpu.solve_each(similarity, maximize, threshold)
    return solve_with_threshold(similarity, maximize, threshold, _kernel(backend, maximize))


def _kernel(backend: str, maximize: bool, prices: Tensor | None = None, tolerance: float = 0.0) -> Solve:
    solve = {"cuda": cuda.solve, "cpu": cpu.solve, "reference": reference.solve}[backend]
    return lambda wide: solve(wide, maximize, prices, tolerance)


def _empty_solution(similarity: Tensor) -> Solution:
    *batch, rows, columns = similarity.shape
    none = torch.zeros(batch, dtype=torch.float64, device=similarity.device)
    return Solution(
        columns=torch.full((*batch, rows), -1, dtype=torch.int64, device=similarity.device),
        row_duals=none[..., None].expand(*batch, rows).clone(),
        column_duals=none[..., None].expand(*batch, columns).clone(),
        objective=none,
        gap=none.clone(),
        status=torch.zeros(batch, dtype=torch.int32, device="cpu"),
    )


def _solve_pairwise(
    similarity: PairwiseSimilarity,
    maximize: bool | None,
    threshold: float | None,
    rows: Counts | None,
    columns: Counts | None,
    return_duals: bool,
    warm_start: Assignment | None,
    tolerance: float,
) -> Assignment | Tensor:
    for name, value in (("threshold", threshold), ("rows", rows), ("columns", columns)):
        if value is not None:
            raise ValueError(f"{name} is incompatible with a PairwiseSimilarity; pass similarity.dense()")
    maximize = not similarity.is_cost if maximize is None else maximize
    share = _check_tolerance(tolerance)
    prices = _prices(warm_start, similarity)
    solution = solve_without_matrix(similarity, maximize, prices, share)
    if solution is None:
        solution = _solve(similarity.dense(), maximize, prices, share)
        _check_solved(solution, maximize)
    found = _as_assignment(solution, None)
    return found if return_duals else found.columns


# ---- problems of several sizes --------------------------------------------------------------------------------------


def _solve_list(
    matrices: list[Tensor], maximize: bool, threshold: float | None, return_duals: bool
) -> list[Assignment] | list[Tensor]:
    if not matrices:
        return []
    device = matrices[0].device
    for index, matrix in enumerate(matrices):
        if matrix.device != device:
            raise ValueError(f"similarity[{index}] must be on {device} like similarity[0], got {matrix.device}")
    if _library.traced(matrices[0]):
        found = [linear_assignment(matrix, maximize=maximize, threshold=threshold) for matrix in matrices]
        return found if return_duals else [assignment.columns for assignment in found]
    _device.refuse_capture("linear_assignment", device)
    if _dispatch.backend_for("assignment", device.type, device.index) == "cpu":
        return _solve_list_on_cpu(matrices, maximize, threshold, return_duals)
    counts = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
    dtype = torch.float64 if any(matrix.dtype != matrices[0].dtype for matrix in matrices) else matrices[0].dtype
    rows, columns = (max(sizes) for sizes in zip(*counts, strict=True))
    padded = matrices[0].new_zeros((len(matrices), rows, columns), dtype=dtype)
    for index, matrix in enumerate(matrices):
        padded[index, : matrix.shape[0], : matrix.shape[1]] = matrix
    return _solve_padded_on_device(padded, counts, maximize, threshold, return_duals)


def _solve_padded(
    values: Tensor,
    rows: Counts | None,
    columns: Counts | None,
    maximize: bool,
    threshold: float | None,
    return_duals: bool,
) -> list[Assignment] | list[Tensor]:
    if values.ndim != 3:
        raise ValueError(f"similarity must be [batch, n, m] with rows= or columns=, got shape {list(values.shape)}")
    _device.refuse_capture("linear_assignment", values.device)
    batch, n, m = values.shape
    counts = list(zip(_check_counts("rows", rows, batch, n), _check_counts("columns", columns, batch, m), strict=True))
    backend = _dispatch.backend_for("assignment", values.device.type, values.device.index)
    if backend == "cpu" or _library.traced(values):
        matrices = [values[index, :row_count, :column_count] for index, (row_count, column_count) in enumerate(counts)]
        return _solve_list(matrices, maximize, threshold, return_duals)
    return _solve_padded_on_device(values, counts, maximize, threshold, return_duals)


def _solve_list_on_cpu(
    matrices: list[Tensor], maximize: bool, threshold: float | None, return_duals: bool
) -> list[Assignment] | list[Tensor]:
    device = matrices[0].device
    solved, statuses = cpu.solve_list(matrices, maximize, threshold, return_duals)
    for index, status in enumerate(statuses):
        _check_status(f"similarity[{index}]", status, maximize)
    if not return_duals:
        return [torch.from_numpy(columns).to(device) for columns in cast("list[Any]", solved)]
    found = [assignment_of_arrays(arrays, threshold) for arrays in cast("list[Arrays]", solved)]
    if device.type == "cpu":
        return found
    return [
        Assignment(
            one.columns.to(device),
            one.objective.to(device),
            one.row_duals.to(device),
            one.column_duals.to(device),
            one.gap.to(device),
            threshold,
        )
        for one in found
    ]


def _solve_padded_on_device(
    values: Tensor, counts: list[tuple[int, int]], maximize: bool, threshold: float | None, return_duals: bool
) -> list[Assignment] | list[Tensor]:
    if values.numel() == 0:
        solution = _empty_solution(values)
    else:
        rows, columns = torch.tensor(counts, device=values.device).unbind(1)
        backend = _dispatch.backend_for("assignment", values.device.type, values.device.index)
        solution = solve_ragged(values, rows, columns, maximize, threshold, _kernel(backend, maximize))
    for index, status in enumerate(solution.status.tolist()):
        _check_status(f"similarity[{index}]", status, maximize)
    assigned = [solution.columns[index, :row_count] for index, (row_count, _) in enumerate(counts)]
    if not return_duals:
        return assigned
    return [
        Assignment(
            assigned[index],
            solution.objective[index],
            solution.row_duals[index, :row_count],
            solution.column_duals[index, :column_count],
            solution.gap[index],
            threshold,
        )
        for index, (row_count, column_count) in enumerate(counts)
    ]


# ---- arguments and results ------------------------------------------------------------------------------------------


def _as_assignment(solution: Solution, threshold: float | None) -> Assignment:
    return Assignment(
        solution.columns,
        solution.objective,
        solution.row_duals,
        solution.column_duals,
        solution.gap,
        threshold,
    )


def _check_solved(solution: Solution, maximize: bool) -> None:
    if bool(solution.status.any()):
        invalid = bool((solution.status == INVALID).any())
        _check_status("similarity", INVALID if invalid else int(solution.status.max()), maximize)


def _check_status(argument: str, status: int, maximize: bool) -> None:
    if status == INVALID:
        raise ValueError(f"{argument} must not hold NaN or {'+inf' if maximize else '-inf'}")
    if status != OPTIMAL:
        raise ValueError(
            f"{argument} is infeasible: forbidden pairs leave no assignment; pass threshold= to leave rows and columns "
            "unmatched"
        )


def _check_threshold(threshold: object) -> float | None:
    if threshold is None:
        return None
    number = _checks.check_number("threshold", threshold)
    if abs(number) == float("inf"):
        raise ValueError(f"threshold must be finite, got {number}; leave it out to make as many pairs as possible")
    return number


def _check_tolerance(tolerance: float) -> float:
    share = _checks.check_number("tolerance", tolerance)
    if share < 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    return share


def _check_compatible(
    similarity: object,
    threshold: float | None,
    rows: object,
    columns: object,
    warm_start: object,
    tolerance: float,
) -> None:
    is_list = isinstance(similarity, (list, tuple))
    if is_list and (rows is not None or columns is not None):
        raise ValueError("rows and columns are counts of a padded tensor and incompatible with a list of matrices")
    for name, given in (("warm_start", warm_start is not None), ("tolerance", tolerance != 0)):
        if given and (is_list or rows is not None or columns is not None):
            raise ValueError(f"{name} is incompatible with problems of several sizes; solve them one by one")
        if given and threshold is not None:
            raise ValueError(f"{name} and threshold are incompatible; leave out one of them")


def _check_counts(argument: str, counts: Counts | None, batch: int, size: int) -> list[int]:
    if counts is None:
        return [size] * batch
    given = counts.tolist() if hasattr(counts, "tolist") else list(counts)
    if not isinstance(given, list) or len(given) != batch:
        length = len(given) if isinstance(given, list) else "a single number"
        raise ValueError(f"{argument} must hold one number for each of {batch} problems, got {length}")
    for index, count in enumerate(given):
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
            raise TypeError(f"{argument}[{index}] must be an int, got {type(count).__name__}")
        if not 0 <= count <= size:
            raise ValueError(f"{argument}[{index}] must be between 0 and {size}, got {count}")
    return [int(count) for count in given]


def _as_matrix(argument: str, value: object) -> Tensor:
    matrix = _as_tensor(argument, value)
    if matrix.ndim != 2:
        raise ValueError(f"{argument} must be a matrix [n, m], got shape {list(matrix.shape)}")
    return matrix


def _as_tensor(argument: str, value: object) -> Tensor:
    if isinstance(value, PairwiseSimilarity):
        raise TypeError(
            f"{argument} must be a matrix, got a PairwiseSimilarity, which only linear_assignment takes; pass dense()"
        )
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub" or value.dtype.itemsize > 8:
            raise TypeError(f"{argument} must hold real numbers of at most 64 bits, got dtype {value.dtype}")
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        # torch has no unsigned types beyond 8 bits; all become float64, as in scipy.
        widened = native if native.dtype.kind == "f" else native.astype(np.float64)
        # Contiguous by rows or by columns, the solver reads an array where it is.
        shareable = widened.flags.writeable and widened.flags.forc
        value = torch.from_numpy(widened if shareable else np.array(widened, order="C"))
    tensor = _arrays.as_tensor(argument, value)
    if tensor.is_complex():
        raise TypeError(f"{argument} must hold real numbers, got dtype {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.detach() if tensor.dtype in _checks.FLOAT_DTYPES else tensor.detach().to(torch.float64)


def _prices(warm_start: Assignment | None, values: Tensor | PairwiseSimilarity) -> Tensor | None:
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
    if values.shape[-2] != values.shape[-1] or values.shape.numel() == 0:
        return None
    step = max(1, values.shape[-2] // _SAMPLED_ROWS)
    sample = sample_rows(values, step) if isinstance(values, PairwiseSimilarity) else values[..., ::step, :]
    duals = warm_start.column_duals.to(sample.device, torch.float64)
    largest = sample.to(torch.float64).abs().nan_to_num(posinf=0.0).amax((-2, -1))
    serve = duals.abs().amax(-1) <= _LARGEST_DUAL * largest  # not where a dual is NaN
    return torch.where(serve[..., None], duals, 0.0) if bool(serve.any()) else None


# ---- as torch sees it -----------------------------------------------------------------------------------------------


def _linear_assignment(
    similarity: Tensor, maximize: bool, tolerance: float, threshold: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = linear_assignment(similarity, maximize=maximize, tolerance=tolerance, threshold=threshold)
    return found.columns, found.objective, found.row_duals, found.column_duals, found.gap


def _linear_assignment_fake(
    similarity: Tensor,
    maximize: bool,  # noqa: ARG001
    tolerance: float,  # noqa: ARG001
    threshold: float | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *batch, rows, columns = similarity.shape
    numbers = [similarity.new_empty(shape, dtype=torch.float64) for shape in (batch, [*batch, rows], [*batch, columns])]
    assigned = similarity.new_empty([*batch, rows], dtype=torch.int64)
    return assigned, numbers[0], numbers[1], numbers[2], similarity.new_empty(batch, dtype=torch.float64)


_library.define(
    "linear_assignment(Tensor similarity, bool maximize, float tolerance, float? threshold=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_assignment,
    _linear_assignment_fake,
)
