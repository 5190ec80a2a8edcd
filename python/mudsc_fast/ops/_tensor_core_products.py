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
    """Return whether the kernel that reads features in their own layout takes these."""
    backend = _dispatch.backend_for("correlation", device.type, device.index)
    return backend == "cuda" and features[0].dtype in cuda.DTYPES and len({one.dtype for one in features}) == 1


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
    num_models = len(chunk)
    total = moments.num_samples + samples.count
    weight = moments.num_samples * (samples.count / total)
    for (i, j), own in zip(moments.pairs, moments.comoments, strict=True):
        product = samples.product(i, j)
        row_shift, column_shift = samples.mean(i) - moments.mean[i], samples.mean(j) - moments.mean[j]
        cuda.join(own, product, samples, i, j, weight * row_shift, column_shift)
    _note_range(moments, [samples.are_in_range(i) for i in range(num_models)])
    shift = torch.stack([samples.mean(i) for i in range(num_models)]) - moments.mean
    moments.squares += torch.stack([samples.squares(i) for i in range(num_models)]) + weight * shift * shift
    moments.mean += shift * (samples.count / total)
    moments.num_samples = total


def exchange(
    moments: Moments,
    chunk: list[tuple[Tensor, Tensor]],
    stays: list[bool],
    changes: tuple[Tensor, Tensor] | None,
) -> None:
    """Replace samples in the co-moments about the present mean.

    `changes`, if given, are [N, C] sums that the changes of each unit's sum and sum of squares are added to.
    """
    changed = [i for i in range(len(chunk)) if not stays[i]]
    for views, sign in zip(zip(*chunk, strict=True), (-1, 1), strict=True):
        samples = cuda.Samples(list(views))
        for (i, j), own in zip(moments.pairs, moments.comoments, strict=True):
            if stays[i] and stays[j]:
                continue
            product = samples.product(i, j)
            row_shift, column_shift = samples.mean(i) - moments.mean[i], samples.mean(j) - moments.mean[j]
            cuda.join(own, product, samples, i, j, samples.count * row_shift, column_shift, sign)
        if changed:
            _note_range(moments, [samples.are_in_range(i) for i in changed])
        if changes is not None:
            for i in changed:
                shift = samples.mean(i) - moments.mean[i]
                changes[0][i] += sign * samples.count * shift
                changes[1][i] += sign * (samples.squares(i) + samples.count * shift * shift)


def _note_range(moments: Moments, in_range: list[Tensor]) -> None:
    """Remember whether features that were not checked were in range."""
    if moments.in_range is not None:
        in_range = [*in_range, moments.in_range]
    moments.in_range = torch.stack(in_range).all()
