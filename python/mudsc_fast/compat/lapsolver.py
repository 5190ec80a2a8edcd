"""The function of the package lapsolver, which also serves as a solver of motmetrics.

Verified against lapsolver 1.1.0 and motmetrics 1.4.0. For metrics of trackers::

    with motmetrics.lap.set_default_solver(mudsc_fast.compat.lapsolver.solve_dense):
        ...
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mudsc_fast.compat._costs import as_costs, solve_edges


def solve_dense(costs: Any) -> tuple[Any, Any]:
    """Return the rows and columns of as many pairs as possible, at the least total cost.

    Parameters
    ----------
    costs
        [n, m] array, or anything that converts to one. NaN and infinite entries mean that there is no such pair.

    Returns
    -------
    rids, cids
        [k] int32: row and column of each pair, in the order of the rows.

    Raises
    ------
    TypeError, ValueError
        If `costs` is not a matrix of real numbers.
    """
    rows, columns = solve_edges(as_costs("costs", costs))
    return rows.astype(np.int32), columns.astype(np.int32)
