"""The functions of the package torch-linear-assignment, by name, argument and result.

Verified against torch-linear-assignment 0.1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast.compat._costs import solve_batch_tensor


def batch_linear_assignment(cost: Tensor) -> Tensor:
    """Solve a batch of problems at the least cost.

    Parameters
    ----------
    cost
        [B, W, T]: the cost of each task for each worker, on any device.

    Returns
    -------
    Tensor
        [B, W] int64: the task of each worker, or -1.

    Raises
    ------
    ValueError
        If `cost` has another number of axes, holds NaN or -inf, or has no complete assignment.
    """
    if cost.ndim != 3:
        raise ValueError(f"Need 3-dimensional tensor with shape (B, W, T), got {list(cost.shape)}")
    found: Tensor = solve_batch_tensor("cost", cost)
    return found


def assignment_to_indices(assignment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the workers with a task, and their tasks, both [B, K], of a [B, W] assignment.

    Raises
    ------
    ValueError
        If the problems of the batch have different numbers of pairs.
    """
    if assignment.shape[0] == 0:
        none = torch.zeros(0, 0, dtype=torch.int64, device=assignment.device)
        return none, none
    matched = assignment >= 0
    pairs = matched.sum(1)
    if bool((pairs != pairs[0]).any()):
        raise ValueError(f"Inconsistent matching sizes, got {pairs.tolist()}")
    shape = (len(assignment), int(pairs[0]))
    return matched.nonzero()[:, 1].reshape(shape), assignment[matched].reshape(shape)
