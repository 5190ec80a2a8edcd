"""Weighted sums of several models' tensors, each re-indexed in the order of its own units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast import _arrays, _core
from mudsc_fast.kernels.cpu import permute as cpu
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.ops import _dispatch, _library, _merge_arguments
from mudsc_fast.unit_map import UnitMap

__all__ = ["UnitMap", "permute_", "permute_merge", "permute_merge_group"]


def permute_merge(
    tensors: Sequence[_arrays.Array],
    maps: Mapping[int, UnitMap],
    *,
    weights: Sequence[float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of tensors, each re-indexed along every mapped axis.

    ``out = sum_i weights[i] * tensors[i][maps[axis] applied along each axis]``. To re-index a single model, pass one
    tensor and ``weights=[1.0]``; if its maps are permutations, the result is an exact copy, bit for bit.

    Parameters
    ----------
    tensors
        N tensors, or arrays of other libraries, of the same shape, dtype (float16, bfloat16, float32 or float64) and
        device, with any number of axes and any strides. On the CPU, tensors that are not contiguous are copied first.
    maps
        The map of each re-indexed axis; negative axes count from the end. Axes without a map stay as they are. An
        empty mapping gives the weighted sum of the tensors. Up to two axes are re-indexed in one read of each tensor;
        with more, every axis costs a copy.
    weights
        N finite factors; 1/N each by default.
    out
        Tensor that receives the result. It must have the shape of the result and the dtype and device of the tensors,
        and must not share memory with any of them.

    Returns
    -------
    Tensor
        The shape of the tensors, with ``units_out`` of the map on each mapped axis, in their dtype. Sums are computed
        in float32 (float64 for float64 tensors) and rounded once.

    Raises
    ------
    TypeError
        If an argument has the wrong type: not tensors or UnitMaps, or tensors of an integer or complex dtype.
    ValueError
        If there are no tensors; they differ in shape, dtype or device (the first that differs is named); an axis is out
        of range or mapped twice; the number of models or the length of a map does not match the tensors; `weights` has
        the wrong length or is not finite; `out` does not fit or shares memory with a tensor; or a tensor requires a
        gradient while gradients are recorded. The op has no gradient: call it under ``torch.no_grad()`` or pass
        ``tensor.detach()``.
    """
    if not _library.traced(None) and _dispatch.requested() is None:
        # For small tensors the general path below takes longer than the sum itself.
        merged = _try_fast_merge(tensors, maps, weights, out)
        if merged is not None:
            return merged
    checked = _merge_arguments.check_tensors(tensors)
    by_axis = _merge_arguments.check_maps(maps, checked)
    factors = _merge_arguments.check_weights(weights, len(checked))
    if _library.traced(checked[0]):
        return _traced_merge(checked, by_axis, factors, out)
    if out is not None:
        _merge_arguments.check_out(out, checked, by_axis)
    # No no_grad here, which takes a microsecond: the checks reject tensors that require a gradient.
    return _dispatch.choose("permute", checked[0].device, _MERGES)(checked, by_axis, factors, out)


def permute_merge_group(
    groups: Sequence[Sequence[Tensor]],
    maps: Sequence[Mapping[int, UnitMap]],
    *,
    weights: Sequence[float] | None = None,
) -> list[Tensor]:
    """Return :func:`permute_merge` of several groups of tensors, in a single launch on a GPU.

    A group can be anything from a bias to a weight matrix: all tensors of a layer, or of a network, fit in one call.

    Parameters
    ----------
    groups
        For each result its N tensors, as for :func:`permute_merge`. All groups have the same dtype and device.
    maps
        The maps of each group.
    weights
        N finite factors, the same for all groups; 1/N each by default.

    Returns
    -------
    list of Tensor
        One result per group.

    Raises
    ------
    TypeError, ValueError
        As :func:`permute_merge`; also if groups differ in dtype, device or number of tensors, or if the number of
        mappings differs from the number of groups.
    """
    if len(groups) != len(maps):
        raise ValueError(f"maps must have one entry per group, {len(groups)}, got {len(maps)}")
    if len(groups) == 0:
        return []
    if not _library.traced(None) and _dispatch.requested() is None:
        merged = _try_fast_merge_group(groups, maps, weights)
        if merged is not None:
            return merged
    checked = _merge_arguments.check_groups(groups)
    by_axis = [_merge_arguments.check_maps(of_group, tensors) for of_group, tensors in zip(maps, checked, strict=True)]
    first = checked[0]
    factors = _merge_arguments.check_weights(weights, len(first))
    kernel = _dispatch.choose("permute", first[0].device, _GROUP_MERGES)
    with torch.no_grad():
        return kernel(checked, by_axis, factors)


def permute_(tensor: Tensor, maps: Mapping[int, UnitMap]) -> Tensor:
    """Re-index one tensor in place, so that a model is permuted without a second copy of it.

    ``tensor = tensor[maps[axis] applied along each axis]``, exact bit for bit. On the CPU a contiguous tensor needs a
    scratch of a few lines (one line is an entry of the first mapped axis) per thread, on a GPU one of at most 64 MB.

    Parameters
    ----------
    tensor
        float16, bfloat16, float32 or float64, with any number of axes. No two entries may share memory.
    maps
        The map of each re-indexed axis; negative axes count from the end. Each map is of one model and a permutation
        that contains every unit once.

    Returns
    -------
    Tensor
        `tensor`.

    Raises
    ------
    TypeError
        If an argument has the wrong type, as in :func:`permute_merge`.
    ValueError
        If a map is of several models, does not have the length of the axis or is not a permutation, an axis is out of
        range or mapped twice, `tensor` is expanded, or it requires a gradient while gradients are recorded.
    """
    checked = _merge_arguments.check_tensors([tensor])
    _merge_arguments.check_not_expanded("tensor", tensor)
    by_axis = _merge_arguments.check_maps(maps, checked)
    for axis, unit_map in by_axis.items():
        _merge_arguments.check_bijection(f"maps[{axis}]", unit_map)
    kernel = _dispatch.choose("permute", tensor.device, _IN_PLACE)
    with torch.no_grad():
        kernel(tensor, by_axis)
    return tensor


def _try_fast_merge_group(
    groups: Sequence[Sequence[Tensor]], maps: Sequence[Mapping[int, UnitMap]], weights: Sequence[float] | None
) -> list[Tensor] | None:
    first, results = groups[0], []
    for tensors, of_group in zip(groups, maps, strict=True):
        merged = _try_fast_merge(tensors, of_group, weights, None)
        if merged is None or len(tensors) != len(first) or merged.dtype is not first[0].dtype:
            return None
        results.append(merged)
    return results


def _traced_merge(
    tensors: list[Tensor], maps: Mapping[int, UnitMap], weights: list[float], out: Tensor | None
) -> Tensor:
    result: Tensor = torch.ops.mudsc_fast.permute_merge(
        tensors,
        list(maps),
        [unit_map.index for unit_map in maps.values()],
        [unit_map.units_in for unit_map in maps.values()],
        [unit_map.units_out for unit_map in maps.values()],
        [unit_map.is_permutation for unit_map in maps.values()],
        [unit_map.scale for unit_map in maps.values()],
        weights,
    )
    return result if out is None else out.copy_(result)


def _permute_merge(
    tensors: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor],
    units_in: Sequence[int],
    units_out: Sequence[int],
    are_permutations: Sequence[bool],
    scales: Sequence[Tensor | None],
    weights: Sequence[float],
) -> Tensor:
    maps = {
        axis: UnitMap(index, before, after, is_permutation, scale)
        for axis, index, before, after, is_permutation, scale in zip(
            axes, indices, units_in, units_out, are_permutations, scales, strict=True
        )
    }
    return permute_merge(tensors, maps, weights=weights)


def _permute_merge_fake(
    tensors: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor],  # noqa: ARG001
    units_in: Sequence[int],  # noqa: ARG001
    units_out: Sequence[int],
    are_permutations: Sequence[bool],  # noqa: ARG001
    scales: Sequence[Tensor | None],  # noqa: ARG001
    weights: Sequence[float],  # noqa: ARG001
) -> Tensor:
    shape = list(tensors[0].shape)
    for axis, length in zip(axes, units_out, strict=True):
        shape[axis] = length
    return tensors[0].new_empty(shape)


_library.define(
    "permute_merge(Tensor[] tensors, int[] axes, Tensor[] indices, SymInt[] units_in, SymInt[] units_out, "
    "bool[] are_permutations, Tensor?[] scales, float[] weights) -> Tensor",
    _permute_merge,
    _permute_merge_fake,
)


def _by_triton(
    tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], weights: Sequence[float], out: Tensor | None
) -> Tensor:
    from mudsc_fast.kernels.triton import permute  # importing triton takes a second; only CUDA tensors need it

    return permute.permute_merge(tensors, maps, weights, out)


def _group_by_triton(
    groups: Sequence[Sequence[Tensor]], maps: Sequence[Mapping[int, UnitMap]], weights: Sequence[float]
) -> list[Tensor]:
    from mudsc_fast.kernels.triton import permute_group

    return permute_group.permute_merge_group(groups, maps, weights)


def _one_by_one(merge: _Merge) -> _GroupMerge:
    def merge_group(
        groups: Sequence[Sequence[Tensor]], maps: Sequence[Mapping[int, UnitMap]], weights: Sequence[float]
    ) -> list[Tensor]:
        return [merge(tensors, by_axis, weights, None) for tensors, by_axis in zip(groups, maps, strict=True)]

    return merge_group


#: permute_merge for common arguments, in one call of C++. Returns None for all others, and always where torch is too
#: old to let C++ read tensors.
_try_fast_merge = _core.fast_permute_merge(torch, UnitMap) or (lambda tensors, maps, weights, out: None)  # noqa: ARG005

_Merge = Callable[[Sequence[Tensor], Mapping[int, UnitMap], Sequence[float], "Tensor | None"], Tensor]
_GroupMerge = Callable[[Sequence[Sequence[Tensor]], Sequence[Mapping[int, UnitMap]], Sequence[float]], list[Tensor]]
_MERGES: Mapping[str, _Merge] = {
    "cpu": cpu.permute_merge,
    "triton": _by_triton,
    "reference": reference.permute_merge,
}
_GROUP_MERGES: Mapping[str, _GroupMerge] = {
    "cpu": _one_by_one(cpu.permute_merge),
    "triton": _group_by_triton,
    "reference": _one_by_one(reference.permute_merge),
}
# There is no Triton kernel in place: lines that follow the cycles of a permutation would wait for one another. The
# reference goes through a scratch, one slab at a time.
_IN_PLACE = {"cpu": cpu.permute_, "triton": reference.permute_, "reference": reference.permute_}
