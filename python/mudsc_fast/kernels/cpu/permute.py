"""Weighted sum of re-indexed tensors in one read of each (csrc/cpu/permute.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._permute import view_of
from mudsc_fast.kernels._scalar_types import SCALAR_TYPES
from mudsc_fast.kernels.cpu import _runtime
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.unit_map import UnitMap

#: From so many bytes on, a result's first touch costs more than the sum itself, and less on huge pages.
_HUGE_PAGES = 2**22


def permute_merge(
    tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], weights: Sequence[float], out: Tensor | None
) -> Tensor:
    """Return sum_i weights[i] * tensors[i] re-indexed along each axis of `maps` (non-negative axes).

    The kernel takes at most two mapped axes; more are rare, and the reference does them axis by axis.
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
        result = torch.empty_like(first)  # in half the time of the general form
    else:
        result = torch.empty(shape, dtype=first.dtype, device=first.device)
    view = view_of(first.shape, maps)
    rows, columns = _AxisMap(view.rows, view.row_map), _AxisMap(view.columns, view.column_map)
    # By position: of a small tensor, naming the arguments costs more than the sum.
    _core.permute_merge(
        _runtime.isa_level(),
        _runtime.threads(),
        SCALAR_TYPES[first.dtype],
        [tensor.data_ptr() for tensor in inputs],
        list(weights),
        view.outer,
        view.middle,
        view.inner,
        rows.arguments(),
        columns.arguments(),
        result.data_ptr(),
        out is not result and result.nbytes >= _HUGE_PAGES,
    )
    return result if out is None or out is result else out.copy_(result)


def permute_(tensor: Tensor, maps: Mapping[int, UnitMap]) -> None:
    """Re-index a tensor in place along each axis of `maps`, permutations all, of which the kernel takes two at a time.

    A tensor that is not contiguous is copied, permuted and copied back.
    """
    target = tensor.detach().contiguous()
    axes = sorted(maps)
    for pair in (axes[at : at + 2] for at in range(0, len(axes), 2)):
        view = view_of(target.shape, {axis: maps[axis] for axis in pair})
        rows, columns = _AxisMap(view.rows, view.row_map), _AxisMap(view.columns, view.column_map)
        _core.permute_in_place(
            isa=_runtime.isa_level(),
            threads=_runtime.threads(),
            dtype=SCALAR_TYPES[target.dtype],
            outer=view.outer,
            middle=view.middle,
            inner=view.inner,
            rows=rows.arguments(),
            columns=columns.arguments(),
            out=target.data_ptr(),
        )
    if target.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(target)


class _AxisMap:
    """One axis as the kernel reads it; holds the arrays whose addresses `arguments` gives."""

    # The numbers of mudsc::UnitMapKind (csrc/include/mudsc/permute.hpp).
    _IDENTITY, _GATHER, _CLUSTERS = 0, 1, 2

    def __init__(self, length: int, unit_map: UnitMap | None) -> None:
        self._length = length
        self._map = unit_map
        if unit_map is not None:
            self._index, self._scale = unit_map.on_cpu

    def arguments(self) -> tuple[int, int, int, int, int]:
        """Return the kind, the addresses of index and scale, and the lengths before and after."""
        if self._map is None:
            return self._IDENTITY, 0, 0, self._length, self._length
        kind = self._GATHER if self._map.is_permutation else self._CLUSTERS
        scale = 0 if self._scale is None else self._scale.data_ptr()
        return kind, self._index.data_ptr(), scale, self._map.units_in, self._map.units_out
