"""The function of the package lapjv, by name, argument and result.

Verified against lapjv 1.3.29. It works in float32 unless told otherwise; here input is solved exactly as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mudsc_fast.compat._costs import as_costs
from mudsc_fast.ops.assignment import linear_assignment


def lapjv(
    cost_matrix: Any,
    verbose: bool = False,  # noqa: ARG001
    disable_avx: bool = False,  # noqa: ARG001
    force_doubles: bool = False,
) -> tuple[Any, Any, tuple[float, Any, Any]]:
    """Assign the columns of a square matrix to its rows at the least cost.

    Parameters
    ----------
    cost_matrix
        [n, n] array, or anything that converts to one.
    verbose, disable_avx
        Not used.
    force_doubles
        Whether the duals are float64 rather than float32.

    Returns
    -------
    row_ind, col_ind, (cost, u, v)
        [n] int32: the column of each row, and the row of each column; the total cost, and the duals of rows and columns
        with ``u[i] + v[j] <= cost[i, j]``, up to their rounding.

    Raises
    ------
    ValueError
        If `cost_matrix` is not square, is empty, holds NaN or -inf, or has no complete assignment.
    """
    costs = as_costs("cost_matrix", cost_matrix)
    if costs.shape[0] != costs.shape[1] or costs.size == 0:
        raise ValueError(f'"cost_matrix" must be a square 2D numpy array, got shape {list(costs.shape)}')
    try:
        result = linear_assignment(costs, maximize=False)
    except ValueError as error:
        raise ValueError(str(error).replace("similarity", "cost_matrix")) from None
    columns = result.columns.numpy().astype(np.int32)
    rows = np.empty_like(columns)
    rows[columns] = np.arange(len(columns), dtype=np.int32)
    kind = np.float64 if force_doubles else np.float32
    u, v = result.row_duals.numpy().astype(kind), result.column_duals.numpy().astype(kind)
    return columns, rows, (float(result.objective), u, v)
