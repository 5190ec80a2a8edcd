"""How the permute kernels see their arguments: axes, the sizes of accesses, and which arguments they serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from mudsc_fast.kernels._permute import view_of
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.unit_map import UnitMap

# How an axis is re-indexed: not at all, by one input unit each, or by the members of clusters.
IDENTITY, GATHER, CLUSTERS = (tl.constexpr(kind) for kind in range(3))

#: Bytes that one thread reads or writes at once: the widest access.
VECTOR_BYTES = 16
WARPS = 4
VECTORS_PER_THREAD = 4
#: Largest number of models that a kernel is compiled for. More are rare, and left to the reference.
_MAX_MODELS = 16
#: Lengths of lines are 32-bit numbers.
_MAX_ITEMS = 2**31 - 2**16
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_copy(maps: Mapping[int, UnitMap], weights: Sequence[float]) -> bool:
    """Return whether the result is one model's tensor, re-indexed and otherwise unchanged."""
    return len(weights) == 1 and weights[0] == 1 and all(unit_map.is_permutation for unit_map in maps.values())


def serves(tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], copied: bool) -> bool:
    """Return whether the kernels take these arguments; others are left to the reference."""
    first = tensors[0]
    if len(maps) > 2 or len(tensors) > _MAX_MODELS or (first.dtype == torch.float64 and not copied):
        return False
    view = view_of(first.shape, maps)
    items_out = (view.columns if view.column_map is None else view.column_map.units_out) * view.inner
    return max(view.columns * view.inner, items_out) <= _MAX_ITEMS


@dataclass(frozen=True)
class Axis:
    """One axis as the kernels read it."""

    kind: int
    units_out: int
    index: Tensor | None = None
    offsets: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, unit_map: UnitMap | None, length: int, like: Tensor) -> Axis:
        """Return an axis of a length and its map, with indices on the device of `like`."""
        if unit_map is None:
            return cls(IDENTITY.value, length)
        if unit_map.index.device != like.device and _device.is_capturing(like.device):
            raise RuntimeError(
                f"a UnitMap on {unit_map.index.device} cannot be used while a CUDA graph is captured, because its "
                f"indices would be copied: make it from an index on {like.device}"
            )
        index, offsets = (part.to(like.device) for part in unit_map.members)
        if unit_map.is_permutation:
            return cls(GATHER.value, unit_map.units_out, index)
        scale = None if unit_map.scale is None else unit_map.scale.to(like.device, torch.float32)
        return cls(CLUSTERS.value, unit_map.units_out, index, offsets, scale)

    def addresses(self) -> list[int]:
        """Return the addresses of index, offsets and scale; 0 for none."""
        return [0 if part is None else part.data_ptr() for part in (self.index, self.offsets, self.scale)]


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's device, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
