"""Co-moments on a CUDA device: one kernel reads features in their own layout, multiplies them and sums them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast.kernels.cuda import correlation as cuda
from mudsc_fast.ops import _dispatch
from mudsc_fast.ops._features import Samples
from mudsc_fast.ops._moments import Moments
from mudsc_fast.unit_map import UnitMap


def serves(features: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether the kernel that reads features in their own layout supports these."""
    backend = _dispatch.backend_for("correlation", device.type, device.index)
    if backend != "cuda" or len({one.dtype for one in features}) != 1:
        return False
    return cuda.serves(device, features[0].dtype)


def reads_in_order_of(maps: Mapping[int, UnitMap], features: Sequence[Tensor], units_axis: int) -> bool:
    """Return whether the kernel reads features in the order of one map faster than re-indexed copies."""
    # If samples are adjacent, the product would read a 32-byte sector per number, again for each of its tiles.
    axis, unit_map = next(iter(maps.items()))
    return unit_map.is_permutation and axis < units_axis and all(one.stride(axis) != 1 for one in features)


def chunk_samples(units: int) -> int:
    """Return how many samples to add at a time."""
    return cuda.chunk_samples(units)


def add(moments: Moments, chunk: list[Samples]) -> None:
    """Add some samples of each model; the host does not wait for the device."""
    samples = cuda.Samples(
        [one.view for one in chunk], [None if one.outer is None else one.outer.members for one in chunk]
    )
    moments.in_range = samples.add_to(
        moments.mean, moments.squares, moments.comoments, moments.pairs, moments.num_samples, moments.in_range
    )
    moments.num_samples += samples.count


def exchange(
    moments: Moments,
    chunk: list[tuple[Tensor, Tensor]],
    stays: list[bool],
    changes: tuple[Tensor, Tensor] | None,
) -> None:
    """Replace samples in the co-moments about the present mean.

    `changes`, if given, are [N, C] sums that the changes of each unit's sum and sum of squares are added to.
    """
    for views, sign in zip(zip(*chunk, strict=True), (-1, 1), strict=True):
        samples = cuda.Samples(list(views))
        moments.in_range, batch = samples.exchange_in(
            moments.mean, moments.squares, moments.comoments, moments.pairs, stays, sign, moments.in_range
        )
        if changes is None:
            continue
        for i in range(len(chunk)):
            if not stays[i]:
                _, shift, squares = batch[i]
                changes[0][i] += sign * samples.count * shift
                changes[1][i] += sign * (squares + samples.count * shift * shift)
