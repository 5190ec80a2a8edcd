"""The function of the package torch-lap-cuda, by name, argument and result.

Follows the source of torch-lap-cuda 0.0.3, which needs a GPU; this function takes tensors on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast.compat._costs import solve_batch_tensor


def solve_lap(cost_matrix: Tensor, device: torch.device | str | int | None = None) -> Tensor:
    """Solve square problems at the least cost.

    Parameters
    ----------
    cost_matrix
        [N, N] or [B, N, N].
    device
        The device of the result; by default that of `cost_matrix`.

    Returns
    -------
    Tensor
        [N] or [B, N] int64: the column of each row.

    Raises
    ------
    TypeError
        If `cost_matrix` is not a tensor.
    ValueError
        If it is not square, holds NaN or -inf, or has no complete assignment.
    """
    if not isinstance(cost_matrix, Tensor):
        raise TypeError(f"cost_matrix must be a torch.Tensor, got {type(cost_matrix).__name__}")
    if cost_matrix.ndim not in (2, 3) or cost_matrix.shape[-1] != cost_matrix.shape[-2]:
        raise ValueError(f"cost_matrix must be [N, N] or [B, N, N], got shape {list(cost_matrix.shape)}")
    found: Tensor = solve_batch_tensor("cost_matrix", cost_matrix)
    return found if device is None else found.to(device)
