"""What every assignment kernel returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    status: Tensor  # [...] int32; the rest of a problem that is not optimal is undefined

    def to(self, device: torch.device) -> Solution:
        """Return the solution on a device."""
        return Solution(**{name: value.to(device) for name, value in vars(self).items()})
