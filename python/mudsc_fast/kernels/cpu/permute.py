"""Weighted sum of re-indexed tensors in one read of each (csrc/cpu/permute.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels.cpu import _runtime
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.unit_map import UnitMap


def permute_merge(
    tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], weights: Sequence[float], out: Tensor | None
) -> Tensor:
    """Return sum_i weights[i] * tensors[i] re-indexed along each axis of `maps` (non-negative axes).

    The kernel takes at most two mapped axes. More are rare, and the reference handles them one axis at a time.
    """
    if len(maps) > 2:
        return reference.permute_merge(tensors, maps, weights, out)
    inputs = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
    first = inputs[0]
    shape = list(first.shape)
    for axis, unit_map in maps.items():
        shape[axis] = unit_map.units_out
    if out is not None and out.is_contiguous():
        result = out
    elif shape == list(first.shape):
        result = torch.empty_like(first)  # takes half the time of torch.empty with a shape, dtype and device
    else:
        result = torch.empty(shape, dtype=first.dtype, device=first.device)
    _core.permute_merge(
        inputs, dict(maps), list(weights), result, out is not result, _runtime.isa_level(), _runtime.threads()
    )
    return result if out is None or out is result else out.copy_(result)


def permute_(tensor: Tensor, maps: Mapping[int, UnitMap]) -> None:
    """Re-index a tensor in place along each axis of `maps`, which are all permutations.

    The kernel takes two axes at a time. A tensor that is not contiguous is copied, permuted and copied back.
    """
    target = tensor.detach().contiguous()
    axes = sorted(maps)
    for pair in (axes[at : at + 2] for at in range(0, len(axes), 2)):
        _core.permute_in_place(target, {axis: maps[axis] for axis in pair}, _runtime.isa_level(), _runtime.threads())
    if target.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(target)
