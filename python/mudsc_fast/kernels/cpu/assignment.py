"""Dense exact assignment (csrc/cpu/assignment.cpp)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._assignment import Solution
from mudsc_fast.kernels.cpu._arguments import SCALAR_TYPES
from mudsc_fast.ops import _dispatch


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve [..., n, m] problems with 0 < n <= m; tensors of other devices are copied to the host and back."""
    *batch, rows, columns = similarity.shape
    values = similarity.detach().to("cpu").contiguous()
    start = None if prices is None else prices.to("cpu").contiguous()
    # Arrays are made in a fraction of the time that tensors take, which counts for small problems.
    column_of_row = np.empty((*batch, rows), np.int64)
    row_duals = np.empty((*batch, rows))
    column_duals = np.empty((*batch, columns))
    objective = np.empty(batch)
    gap = np.empty(batch)
    status = np.empty(batch, np.int32)
    _core.linear_assignment(
        isa=_dispatch.isa_level(),
        threads=_dispatch.threads(),
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
    return solution if similarity.device.type == "cpu" else solution.to(similarity.device)
