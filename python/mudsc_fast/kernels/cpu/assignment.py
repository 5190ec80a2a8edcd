"""Dense exact assignment (csrc/cpu/assignment.cpp)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._assignment import Solution
from mudsc_fast.kernels._scalar_types import SCALAR_TYPES
from mudsc_fast.kernels.cpu import _runtime

#: Beyond this many columns the choice between equally good assignments need not be that of scipy's function.
MOST_IN_ORDER = 128

#: Rows that the duals of columns are found over at a time, so that what lies between fits a cache.
BLOCK = 64


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve [..., n, m] problems with 0 < n <= m; tensors of other devices are copied to the host and back."""
    *batch, rows, columns = similarity.shape
    device = similarity.device
    values = similarity.detach().to("cpu")
    if columns > MOST_IN_ORDER and _lies_by_columns(values):
        return _solve_transposed(values.mT, maximize, prices, tolerance).to(device)
    values = values.contiguous()
    start = None if prices is None else prices.to("cpu").contiguous()
    # Arrays are made in a fraction of the time that tensors take, which counts for small problems.
    column_of_row = np.empty((*batch, rows), np.int64)
    row_duals = np.empty((*batch, rows))
    column_duals = np.empty((*batch, columns))
    objective = np.empty(batch)
    gap = np.empty(batch)
    status = np.empty(batch, np.int32)
    _core.linear_assignment(
        isa=_runtime.isa_level(),
        threads=_runtime.threads(),
        dtype=SCALAR_TYPES[values.dtype],
        values=values.data_ptr(),
        batch=status.size,
        rows=rows,
        columns=columns,
        maximize=maximize,
        tolerance=tolerance,
        prices=0 if start is None else start.data_ptr(),
        column_of_row=column_of_row.ctypes.data,
        row_duals=row_duals.ctypes.data,
        column_duals=column_duals.ctypes.data,
        objective=objective.ctypes.data,
        gap=gap.ctypes.data,
        status=status.ctypes.data,
    )
    arrays = (column_of_row, row_duals, column_duals, objective, gap, status)
    solution = Solution(*map(torch.from_numpy, arrays))
    return solution if device.type == "cpu" else solution.to(device)


def _lies_by_columns(values: Tensor) -> bool:
    rows, columns = values.shape[-2:]
    return rows == columns and not values.is_contiguous() and values.mT.is_contiguous()


def _solve_transposed(by_columns: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve square problems that are given transposed, and turn the solutions: a copy would take longer."""
    start = None if prices is None else _best_prices(by_columns, maximize, prices.to("cpu"))
    solution = solve(by_columns, maximize, start, tolerance)
    if bool(solution.status.any()):
        return solution
    return Solution(
        columns=solution.columns.argsort(-1),
        row_duals=solution.column_duals,
        column_duals=solution.row_duals,
        objective=solution.objective,
        gap=solution.gap,
        status=solution.status,
    )


def _best_prices(values: Tensor, maximize: bool, prices: Tensor) -> Tensor:
    """Return the [..., m] best duals of columns beside [..., n] given ones of rows, in the precision of `values`."""
    blocks = []
    for rows, row_prices in zip(values.split(BLOCK, -2), prices.to(values.dtype).split(BLOCK, -1), strict=True):
        surplus = rows - row_prices.unsqueeze(-1)
        blocks.append(surplus.amax(-2) if maximize else surplus.amin(-2))
    stacked = torch.stack(blocks)
    best = stacked.amax(0) if maximize else stacked.amin(0)
    return best.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
