"""Dense exact assignment (csrc/cpu/assignment.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._assignment import Solution
from mudsc_fast.kernels.cpu._arguments import SCALAR_TYPES
from mudsc_fast.ops import _dispatch


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve [batch, n, m] problems with 0 < n <= m; tensors of other devices are copied to the host and back."""
    batch, rows, columns = similarity.shape
    device = similarity.device
    values = similarity.detach().to("cpu").contiguous()
    start = None if prices is None else prices.to("cpu").contiguous()
    solution = Solution(
        columns=torch.empty(batch, rows, dtype=torch.int64),
        row_duals=torch.empty(batch, rows, dtype=torch.float64),
        column_duals=torch.empty(batch, columns, dtype=torch.float64),
        objective=torch.empty(batch, dtype=torch.float64),
        gap=torch.empty(batch, dtype=torch.float64),
        status=torch.empty(batch, dtype=torch.int32),
    )
    _core.linear_assignment(
        isa=_dispatch.isa_level(),
        threads=_dispatch.threads(),
        dtype=SCALAR_TYPES[values.dtype],
        values=values.data_ptr(),
        batch=batch,
        rows=rows,
        columns=columns,
        maximize=maximize,
        tolerance=tolerance,
        prices=0 if start is None else start.data_ptr(),
        column_of_row=solution.columns.data_ptr(),
        row_duals=solution.row_duals.data_ptr(),
        column_duals=solution.column_duals.data_ptr(),
        objective=solution.objective.data_ptr(),
        gap=solution.gap.data_ptr(),
        status=solution.status.data_ptr(),
    )
    return solution.to(device)
