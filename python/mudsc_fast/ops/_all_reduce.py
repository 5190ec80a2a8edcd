"""Sums of the moments of all processes of a torch.distributed group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from mudsc_fast.ops._moments import Moments


def all_reduce(
    moments: Moments,
    configuration: dict[str, Any],
    out_of_range: str,
    group: torch.distributed.ProcessGroup | None,
) -> None:
    """Add the samples of all processes to `moments` in each, after checking that their configurations are equal.

    `out_of_range` is the message of the error that is raised if features of a process were not in range.
    """
    own_state = (configuration, moments.num_samples, moments.is_in_range())
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, own_state, group=group)
    for rank, (theirs, _, in_range) in enumerate(gathered):
        if not in_range:
            raise ValueError(f"{out_of_range} in rank {rank}")
        if theirs != gathered[0][0]:
            raise ValueError(
                f"all processes must have the configuration of rank 0, {gathered[0][0]}, got {theirs} in rank {rank}"
            )
    total = sum(num_samples for _, num_samples, _ in gathered)
    if total == 0:
        return
    mean = moments.mean * (moments.num_samples / total)
    torch.distributed.all_reduce(mean, group=group)
    moments.center_about(mean, total)
    torch.distributed.all_reduce(moments.squares, group=group)
    torch.distributed.all_reduce(moments.comoments, group=group)
