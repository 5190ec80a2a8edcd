"""What assignment kernels return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray  # takes a millisecond to import

#: What the compiled solver returns of one matrix of a list: the columns [n], and in one array of float64 the objective,
#: the gap, row duals [n] and column duals [m].
Arrays: TypeAlias = "tuple[NDArray[Any], NDArray[Any]]"

#: Values of `Solution.status` (mudsc::AssignmentStatus in csrc/include/mudsc/assignment.hpp).
OPTIMAL, INVALID, INFEASIBLE = 0, 1, 2


@dataclass(frozen=True)
class Solution:
    """Solutions of [..., n, m] problems, n <= m, with the duals of :class:`mudsc_fast.Assignment`."""

    columns: Tensor  # [..., n] int64
    row_duals: Tensor  # [..., n] float64
    column_duals: Tensor  # [..., m] float64
    objective: Tensor  # [...] float64
    gap: Tensor  # [...] float64
    status: Tensor  # [...] int32, in host memory; if a problem is not optimal, its other values are undefined

    def to(self, device: torch.device) -> Solution:
        """Return the solution on a device, by one copy. The status, which is for the host to read, stays there."""
        if self.columns.device == device:
            return self
        tensors = (self.columns.view(torch.float64), self.row_duals, self.column_duals, self.objective, self.gap)
        moved = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
        parts = moved.split([tensor.numel() for tensor in tensors])
        columns, row_duals, column_duals, objective, gap = (
            part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)
        )
        return Solution(columns.view(torch.int64), row_duals, column_duals, objective, gap, self.status)
