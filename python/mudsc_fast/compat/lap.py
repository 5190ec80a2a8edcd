"""The functions of lap and lapx (module ``lap``), by name, argument and result.

Verified against lap 0.5.13 and lapx 0.11.1. Objectives are the same; of several optimal assignments another may be
chosen. Differences: NaN and -inf raise an error, where these packages return something undefined; a pair whose cost
equals the limit stays unmatched, where either is optimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mudsc_fast import _core
from mudsc_fast.compat._costs import as_costs, solve_complete
from mudsc_fast.ops import _dispatch
from mudsc_fast.ops.assignment import linear_assignment

__all__ = ["lapjv", "lapjvx", "lapjvx_batch", "lapjvxa", "lapjvxa_batch", "lapmod"]

#: Up to this many rows, missing entries of a sparse problem are infinite in the dense one; beyond, they are a large
#: finite cost, on which the solver for large problems is faster.
_MAX_INFINITE = 256

Array = NDArray[Any]


def lapjv(
    cost: Array, extend_cost: bool = False, cost_limit: float = np.inf, return_cost: bool = True
) -> tuple[Any, ...]:
    """Return the total cost, the column of each row and the row of each column.

    Parameters
    ----------
    cost
        [n, m] array to minimize; +inf forbids a pair.
    extend_cost
        Whether n and m may differ.
    cost_limit
        Pairs with at least this cost stay unmatched: each unmatched row or column costs half the limit. With a finite
        limit, n and m may differ.
    return_cost
        Whether to return the total cost.

    Returns
    -------
    opt, x, y
        Sum of the matched pairs' costs (inf if a forbidden pair had to be used), [n] int32 columns and [m] int32 rows;
        -1 for unmatched ones.

    Raises
    ------
    TypeError
        If `cost` is not a NumPy array of real numbers.
    ValueError
        If `cost` is not a matrix, not square without `extend_cost` and limit, or holds NaN or -inf; if `cost_limit` is
        NaN or -inf.
    """
    # Fast path for small matrices.
    if _dispatch.requested() is None and extend_cost in (False, True):
        threshold = None if cost_limit == np.inf else cost_limit
        found = _core.assign_both_ways(cost, threshold, not extend_cost and threshold is None)
        if found is not None:
            return found if return_cost else found[1:]
    costs = _checked(cost, extend_cost, cost_limit)
    columns = _columns(costs, cost_limit)
    rows = np.flatnonzero(columns >= 0)
    x, y = columns.astype(np.int32), np.full(costs.shape[1], -1, np.int32)
    y[columns[rows]] = rows
    return (_total(costs, rows, columns[rows]), x, y) if return_cost else (x, y)


def lapjvx(
    cost: Array, extend_cost: bool = False, cost_limit: float = np.inf, return_cost: bool = True
) -> tuple[Any, ...]:
    """Return the total cost, the matched rows and their columns; arguments and errors are those of :func:`lapjv`.

    Returns
    -------
    opt, rows, columns
        [k] int64 and [k] int32, in the order of the rows.
    """
    found = lapjv(cost, extend_cost, cost_limit, return_cost)
    columns = found[-2]
    rows = np.flatnonzero(columns >= 0)
    return (*found[:-2], rows, columns[rows])


def lapjvxa(cost: Array, extend_cost: bool = False, cost_limit: float = np.inf, return_cost: bool = True) -> Any:
    """Return the total cost and the matched pairs; arguments and errors are those of :func:`lapjv`.

    Returns
    -------
    opt, pairs
        [k, 2] int32: row and column of each pair. Only the pairs if `return_cost` is False.
    """
    *opt, rows, columns = lapjvx(cost, extend_cost, cost_limit, return_cost)
    pairs = np.stack([rows.astype(np.int32), columns], axis=1)
    return (*opt, pairs) if return_cost else pairs


def lapjvx_batch(
    costs: Any,
    extend_cost: bool = False,
    cost_limit: float = np.inf,
    return_cost: bool = True,
    n_threads: int | None = 0,  # noqa: ARG001 - torch.set_num_threads sets the number of threads
) -> tuple[Any, ...]:
    """Solve a batch of [batch, n, m] costs in one call; other arguments are those of :func:`lapjv`.

    Returns
    -------
    totals, rows, columns
        [batch] float64, and two lists with one int64 array for each problem. `n_threads` is not used: the number of
        threads is ``torch.get_num_threads()``.
    """
    batch = as_costs("costs", costs, axes=3)
    _check_limit(batch.shape[1:], extend_cost, cost_limit)
    every = _columns_of_list(list(batch), cost_limit)
    rows = [np.flatnonzero(columns >= 0) for columns in every]
    columns = [of_problem[kept] for of_problem, kept in zip(every, rows, strict=True)]
    if not return_cost:
        return rows, columns
    return np.array([_total(*problem) for problem in zip(batch, rows, columns, strict=True)]), rows, columns


def lapjvxa_batch(
    costs: Any,
    extend_cost: bool = False,
    cost_limit: float = np.inf,
    return_cost: bool = True,
    n_threads: int | None = 0,
) -> Any:
    """Solve a batch as :func:`lapjvx_batch`, and return totals and a list of [k, 2] int64 pairs, or only the pairs."""
    *totals, rows, columns = lapjvx_batch(costs, extend_cost, cost_limit, return_cost, n_threads)
    pairs = [np.stack(problem, axis=1) for problem in zip(rows, columns, strict=True)]
    return (*totals, pairs) if return_cost else pairs


def lapmod(
    n: int,
    cc: Any,
    ii: Any,
    kk: Any,
    fast: bool = True,  # noqa: ARG001 - chooses between two programs of one result
    return_cost: bool = True,
    fp_version: int | None = None,  # noqa: ARG001
) -> tuple[Any, ...]:
    """Solve a sparse square problem in CSR form: ``cost[i, kk[ii[i]:ii[i+1]]] == cc[ii[i]:ii[i+1]]``.

    The problem is solved as a dense one, in 8 n^2 bytes. `fast` and `fp_version` are not used.

    Returns
    -------
    opt, x, y
        As :func:`lapjv`; the total is inf if the entries allow no complete assignment.

    Raises
    ------
    ValueError
        If the arrays do not describe a square matrix of finite costs.
    """
    size = index(n)
    values, starts, columns = (np.asarray(part) for part in (cc, ii, kk))
    _check_sparse(size, values, starts, columns)
    rows = np.repeat(np.arange(size), np.diff(starts))
    largest = float(np.abs(values).max(initial=0.0))
    missing = np.inf if size <= _MAX_INFINITE else 2 * size * (largest + 1.0) + 1.0
    dense = np.full((size, size), missing)
    dense[rows, columns] = values
    row_indices, column_indices = solve_complete(dense)
    x, y = (np.full(size, -1, np.int32) for _ in range(2))
    x[row_indices], y[column_indices] = column_indices, row_indices
    if not return_cost:
        return x, y
    chosen = dense[row_indices, column_indices]
    return float("inf") if (chosen == missing).any() else float(chosen.sum()), x, y


def _checked(cost: Any, extend_cost: bool, cost_limit: float) -> Array:
    if not isinstance(cost, np.ndarray):
        raise TypeError(f"cost must be a numpy.ndarray, got {type(cost).__name__}")
    costs = as_costs("cost", cost)
    _check_limit(costs.shape, extend_cost, cost_limit)
    return costs


def _check_limit(shape: Sequence[int], extend_cost: bool, cost_limit: float) -> None:
    if np.isnan(cost_limit) or cost_limit == -np.inf:
        raise ValueError(f"cost_limit must be finite or positive infinity, got {cost_limit}")
    if shape[0] != shape[1] and 0 not in shape and not extend_cost and cost_limit == np.inf:
        raise ValueError(
            f"Square cost array expected, got shape {list(shape)}. If cost is intentionally non-square, pass "
            "extend_cost=True or set a finite cost_limit."
        )


def _columns(costs: Array, cost_limit: float) -> Array:
    """Return the column of each row, -1 for unmatched ones."""
    return _columns_of_list([costs], cost_limit)[0]


def _columns_of_list(matrices: list[Array], cost_limit: float) -> list[Array]:
    threshold = None if cost_limit == np.inf else float(cost_limit)
    try:
        found = linear_assignment(matrices, maximize=False, threshold=threshold, return_duals=False)
        return [columns.numpy() for columns in found]
    except ValueError as error:
        if "infeasible" not in str(error):
            raise ValueError(str(error).replace("similarity", "cost")) from None
    every = []
    for costs in matrices:
        columns = np.full(costs.shape[0], -1)
        rows, partners = solve_complete(costs)
        columns[rows] = partners
        every.append(columns)
    return every


def _total(costs: Array, rows: Array, columns: Array) -> float:
    return float(costs[rows, columns].sum(dtype=np.float64))


def _check_sparse(size: int, values: Array, starts: Array, columns: Array) -> None:
    if size <= 0:
        raise ValueError(f"n must be at least 1, got {size}")
    if values.ndim != 1 or starts.shape != (size + 1,) or columns.shape != values.shape:
        raise ValueError(
            f"cc and kk must be 1-dimensional and equally long, and ii have n + 1 = {size + 1} entries; got shapes "
            f"{list(values.shape)}, {list(columns.shape)} and {list(starts.shape)}"
        )
    if values.dtype.kind not in "fiub" or starts.dtype.kind not in "iu" or columns.dtype.kind not in "iu":
        raise ValueError(
            f"cc must hold real numbers, ii and kk integers; got {values.dtype}, {starts.dtype} and {columns.dtype}"
        )
    if starts[0] != 0 or starts[-1] != len(values) or (np.diff(starts.astype(np.int64)) < 0).any():
        raise ValueError(f"ii must start at 0, end at len(cc) = {len(values)} and not decrease")
    if len(columns) and (columns.min() < 0 or columns.max() >= size):
        raise ValueError(f"kk must be between 0 and {size - 1}, got {columns.min()} to {columns.max()}")
    if not np.isfinite(values).all():
        raise ValueError("cc must be finite")
    ends = starts[1:-1].astype(np.int64)
    increasing = np.diff(columns.astype(np.int64)) > 0
    increasing[ends[(ends > 0) & (ends < len(columns))] - 1] = True  # from one row to the next
    if not increasing.all():
        raise ValueError("kk must increase within each row")
