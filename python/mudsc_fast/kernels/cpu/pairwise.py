"""Assignment of points without their matrix (csrc/cpu/pairwise_assignment.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._assignment import OPTIMAL, Solution
from mudsc_fast.kernels.cpu import _runtime

#: The solver takes problems of at least so many columns (kMinPairwiseColumns in csrc/include/mudsc/assignment.hpp).
MIN_COLUMNS = 768


def solve(
    x: Tensor, y: Tensor, squared_distance: bool, maximize: bool, prices: Tensor | None, tolerance: float
) -> Solution | None:
    """Assign [n, d] and [m, d] float32 points, 0 < n <= m; None if float32 cannot hold sums of the entries."""
    solved = _core.pairwise_assignment(
        x=x.numpy(),
        y=y.numpy(),
        squared_distance=squared_distance,
        maximize=maximize,
        tolerance=tolerance,
        prices=None if prices is None else prices.contiguous().numpy(),
        isa=_runtime.isa_level(),
        threads=_runtime.threads(),
    )
    if solved is None:
        return None
    columns, row_duals, column_duals, objective, gap = solved
    return Solution(
        columns=torch.from_numpy(columns),
        row_duals=torch.from_numpy(row_duals),
        column_duals=torch.from_numpy(column_duals),
        objective=torch.tensor(objective, dtype=torch.float64),
        gap=torch.tensor(gap, dtype=torch.float64),
        status=torch.tensor(OPTIMAL, dtype=torch.int32),
    )
