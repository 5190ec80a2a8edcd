"""Weighted sum of re-indexed tensors, one index_select or index_add_ at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast.unit_map import UnitMap

#: Scratch memory of a permutation in place.
_SCRATCH_BYTES = 64 << 20


def permute_merge(
    tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], weights: Sequence[float], out: Tensor | None
) -> Tensor:
    """Return sum_i weights[i] * tensors[i] re-indexed along each axis of `maps` (non-negative axes)."""
    first = tensors[0]
    if len(tensors) == 1 and weights[0] == 1 and all(unit_map.is_permutation for unit_map in maps.values()):
        # No arithmetic: a copy is exact for every value.
        total = _reindex(first.detach(), maps, 0)
        return total.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(total)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = _reindex(first.to(dtype), maps, 0) * weights[0]
    for model in range(1, len(tensors)):
        total += _reindex(tensors[model].to(dtype), maps, model) * weights[model]
    return total.to(first.dtype) if out is None else out.copy_(total)


def permute_(tensor: Tensor, maps: Mapping[int, UnitMap]) -> None:
    """Re-index a tensor in place along each axis of `maps`, which are all permutations.

    One axis after the other, in slabs across another axis, each through a scratch of at most _SCRATCH_BYTES.
    """
    target = tensor.detach()
    for axis, unit_map in maps.items():
        index = unit_map.index[0].to(target.device)
        others = [other for other in range(target.ndim) if other != axis]
        across = max(others, key=lambda other: target.shape[other], default=None)
        if across is None:
            target.copy_(target.index_select(axis, index))
            continue
        length = max(1, _SCRATCH_BYTES * target.shape[across] // max(target.nbytes, 1))
        for slab in target.split(length, across):
            slab.copy_(slab.index_select(axis, index))


def _reindex(tensor: Tensor, maps: Mapping[int, UnitMap], model: int) -> Tensor:
    for axis, unit_map in maps.items():
        index = unit_map.index[model].to(tensor.device)
        if unit_map.is_permutation:
            tensor = tensor.index_select(axis, index)
            continue
        shape = list(tensor.shape)
        shape[axis] = unit_map.units_out
        tensor = tensor.new_zeros(shape).index_add_(axis, index, tensor)
        if unit_map.scale is not None:
            along_axis = [-1 if other == axis else 1 for other in range(tensor.ndim)]
            tensor = tensor * unit_map.scale.to(tensor).reshape(along_axis)
    return tensor
