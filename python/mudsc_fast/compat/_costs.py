"""Costs with the semantics of other assignment libraries: missing edges, and problems without a complete assignment."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mudsc_fast.ops.assignment import linear_assignment, linear_sum_assignment

Indices = NDArray[np.int64]


def as_costs(argument: str, cost: Any, axes: int = 2) -> NDArray[Any]:
    """Return real numbers as a float32 or float64 array.

    Raises
    ------
    TypeError
        If `cost` does not hold real numbers.
    ValueError
        If it has another number of axes.
    """
    array = np.asarray(cost)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{argument} must hold real numbers, got dtype {array.dtype}")
    if array.ndim != axes:
        raise ValueError(f"{axes}-dimensional array expected for {argument}, got shape {list(array.shape)}")
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def solve_complete(cost: NDArray[Any]) -> tuple[Indices, Indices]:
    """Return rows and columns of min(n, m) pairs with the fewest missing edges (+inf), then at minimum cost.

    Raises
    ------
    ValueError
        If an entry is NaN or -inf.
    """
    if np.isposinf(cost).any():
        try:
            return linear_sum_assignment(cost)
        except ValueError as error:
            if "infeasible" not in str(error):
                raise
        cost = _with_expensive_edges(cost)
    return linear_sum_assignment(cost)


def solve_edges(cost: NDArray[Any]) -> tuple[Indices, Indices]:
    """Return the rows and columns of the pairs with an edge in that assignment; others are missing edges."""
    edges = np.isfinite(cost)
    rows, columns = solve_complete(cost if edges.all() else np.where(edges, cost, np.inf))
    kept = edges[rows, columns]
    return rows[kept], columns[kept]


def solve_batch_tensor(argument: str, cost: Any) -> Any:
    """Return the [..., n] columns of [..., n, m] costs in a tensor; errors name `argument`."""
    try:
        return linear_assignment(cost, maximize=False, return_duals=False)
    except ValueError as error:
        raise ValueError(str(error).replace("similarity", argument)) from None


def _with_expensive_edges(cost: NDArray[Any]) -> NDArray[np.float64]:
    """Return costs in which one missing edge costs more than any change of all other pairs."""
    exact = cost.astype(np.float64)
    finite = np.abs(exact[np.isfinite(exact)])
    return np.where(np.isposinf(exact), 2 * min(exact.shape) * (finite.max(initial=0.0) + 1.0) + 1.0, exact)
