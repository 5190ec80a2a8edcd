"""Exact assignment in CUDA (csrc/cuda/assignment_batch.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast.kernels._assignment import Solution
from mudsc_fast.kernels.cpu import assignment as cpu
from mudsc_fast.kernels.cuda import _device

#: Up to so many columns a problem is one block's work, whatever the batch.
MOST_COLUMNS_OF_A_BLOCK = 512


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve [batch, n, m] problems with 0 < n <= m, exactly whatever the tolerance."""
    rows, columns = similarity.shape[1:]
    with _device.launching_on(similarity.device) as launch:
        fits = _device.extension().assignment_batch_fits(rows, columns, *launch)
        if fits and columns <= MOST_COLUMNS_OF_A_BLOCK:
            return _solve_batch(similarity.detach().contiguous(), maximize, prices, launch)
    return cpu.solve(similarity, maximize, prices, tolerance)


def _solve_batch(values: Tensor, maximize: bool, prices: Tensor | None, launch: _device.Launch) -> Solution:
    batch, rows, columns = values.shape
    start = None if prices is None else prices.contiguous()
    solution = Solution(
        columns=values.new_empty(batch, rows, dtype=torch.int64),
        row_duals=values.new_empty(batch, rows, dtype=torch.float64),
        column_duals=values.new_empty(batch, columns, dtype=torch.float64),
        objective=values.new_empty(batch, dtype=torch.float64),
        gap=values.new_empty(batch, dtype=torch.float64),
        status=values.new_empty(batch, dtype=torch.int32),
    )
    _device.extension().assignment_batch(
        dtype=_device.SCALAR_TYPES[values.dtype],
        values=values.data_ptr(),
        batch=batch,
        rows=rows,
        columns=columns,
        maximize=maximize,
        prices=0 if start is None else start.data_ptr(),
        column_of_row=solution.columns.data_ptr(),
        row_duals=solution.row_duals.data_ptr(),
        column_duals=solution.column_duals.data_ptr(),
        objective=solution.objective.data_ptr(),
        gap=solution.gap.data_ptr(),
        status=solution.status.data_ptr(),
        **launch._asdict(),
    )
    return solution
