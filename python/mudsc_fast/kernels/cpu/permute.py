"""Weighted sum of re-indexed tensors in one read of each (csrc/cpu/permute.cpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._permute import view_of
from mudsc_fast.kernels.cpu._arguments import SCALAR_TYPES
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.ops import _dispatch

if TYPE_CHECKING:
    from mudsc_fast.ops.permute import UnitMap

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
    return _Plan(tensors[0], maps).merge(tensors, weights, out)


def permute_merge_group(
    groups: Sequence[Sequence[Tensor]], maps: Sequence[Mapping[int, UnitMap]], weights: Sequence[float]
) -> list[Tensor]:
    """Return :func:`permute_merge` of each group of tensors by its maps.

    Groups that follow one another are often alike, as the biases and norms of a layer are: they share their plan.
    """
    merged = []
    plan, planned_shape, planned_maps = None, None, None
    for tensors, by_axis in zip(groups, maps, strict=True):
        if len(by_axis) > 2:
            merged.append(reference.permute_merge(tensors, by_axis, weights, None))
            continue
        shape = tensors[0].shape
        if plan is None or shape != planned_shape or by_axis != planned_maps:
            plan, planned_shape, planned_maps = _Plan(tensors[0], by_axis), shape, by_axis
        merged.append(plan.merge(tensors, weights, None))
    return merged


class _Plan:
    """What the kernel is told of tensors of one shape, dtype and device under the same maps, of at most two axes."""

    def __init__(self, like: Tensor, maps: Mapping[int, UnitMap]) -> None:
        self._shape = list(like.shape)
        for axis, unit_map in maps.items():
            self._shape[axis] = unit_map.units_out
        self._keeps_shape = self._shape == list(like.shape)
        self._dtype, self._device, self._scalar_type = like.dtype, like.device, SCALAR_TYPES[like.dtype]
        self._outer, rows, row_map, self._middle, columns, column_map, self._inner = view_of(like.shape, maps)
        self._rows, self._columns = _AxisMap(rows, row_map), _AxisMap(columns, column_map)
        self._row_arguments, self._column_arguments = self._rows.arguments(), self._columns.arguments()
        self._isa, self._threads = _dispatch.isa_level(), _dispatch.threads()

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor | None) -> Tensor:
        """Return the weighted sum of the re-indexed tensors."""
        inputs = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
        if out is not None and out.is_contiguous():
            result = out
        elif self._keeps_shape:
            result = torch.empty_like(inputs[0])  # in half the time of the general form
        else:
            result = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        # By position: of a small tensor, naming the arguments costs more than the sum.
        _core.permute_merge(
            self._isa,
            self._threads,
            self._scalar_type,
            [tensor.data_ptr() for tensor in inputs],
            list(weights),
            self._outer,
            self._middle,
            self._inner,
            self._row_arguments,
            self._column_arguments,
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
            isa=_dispatch.isa_level(),
            threads=_dispatch.threads(),
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
