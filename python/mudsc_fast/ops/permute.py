"""Re-indexing of units: the weighted sum of several models' tensors, each in its own order of units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import torch
from torch import Tensor

from mudsc_fast import _checks, _core
from mudsc_fast.kernels.cpu import permute as cpu
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.ops import _arrays, _dispatch, _library

#: Kernels index units with 32 bits; the value behind the last unit stands for "none".
_MOST_UNITS = 2**31 - 2


@dataclass(frozen=True, eq=False)
class UnitMap:
    """How the units along one axis of N models become the units of the result.

    Made by :meth:`permutation` (every output unit is one input unit) or :meth:`clusters` (every output unit
    is a sum of input units). A map holds its own copy of the indices.

    Attributes
    ----------
    index
        Permutation: [N, units_out] int64, the input unit of each output unit.
        Clusters: [N, units_in] int64, the output unit that each input unit is added to.
    units_in, units_out
        Length of the axis before and after.
    is_permutation
        Whether every output unit is one input unit. It need not be a bijection: any selection qualifies.
    scale
        Clusters only: [units_out] float64 factor of each sum, or None for 1.
    """

    index: Tensor
    units_in: int
    units_out: int
    is_permutation: bool
    scale: Tensor | None = None

    @cached_property
    def members(self) -> tuple[Tensor, Tensor]:
        """The input units of each output unit, as kernels that run over output units read them.

        [members] int32, all models one after the other, sorted by output unit; and [N, units_out + 1] int32, where the
        members of each output unit begin.
        """
        models, device = self.num_models, self.index.device
        if self.is_permutation:
            starts = torch.arange(self.units_out + 1, device=device).repeat(models, 1)
            order = self.index
        else:
            order = torch.argsort(self.index, dim=1, stable=True)
            ends = torch.arange(self.units_out + 1, device=device).repeat(models, 1)
            starts = torch.searchsorted(self.index.gather(1, order), ends)
        starts += torch.arange(models, device=device)[:, None] * order.shape[1]
        return order.flatten().to(torch.int32), starts.to(torch.int32)

    @property
    def num_models(self) -> int:
        """Number N of models."""
        return self.index.size(0)

    @cached_property
    def on_cpu(self) -> tuple[Tensor, Tensor | None]:
        """Index and scale as the CPU's kernels read them: contiguous and in the host's memory."""
        scale = None if self.scale is None else self.scale.to("cpu").contiguous()
        return self.index.to("cpu").contiguous(), scale

    def of_model(self, model: int) -> UnitMap:
        """Return the map of one of the models by itself."""
        return UnitMap(self.index[model : model + 1], self.units_in, self.units_out, self.is_permutation, self.scale)

    @classmethod
    def permutation(cls, index: _arrays.Array, *, units_in: int | None = None) -> UnitMap:
        """Return the map under which output unit k of model i is its input unit ``index[i, k]``.

        Parameters
        ----------
        index
            [N, K] int64 with entries in [0, units_in); repeats and omissions are allowed.
        units_in
            Length of the axis that is gathered from; K where not given.

        Raises
        ------
        TypeError
            If `index` is not an int64 tensor or `units_in` not an int.
        ValueError
            If `index` is not [N, K] with N >= 1, or an entry is out of range (its value and place are named).
        """
        index = _check_index("index", index)
        length = int(index.shape[1]) if units_in is None else _checks.check_int("units_in", units_in, 0)
        _check_units("units_in", length)
        _check_units("the number of columns of index", int(index.shape[1]))
        _check_range("index", index, length)
        return cls(index.clone(), length, int(index.shape[1]), True)._made_ready()

    @classmethod
    def clusters(cls, cluster_of_unit: _arrays.Array, num_clusters: int, scale: _arrays.Array | None = None) -> UnitMap:
        """Return the map under which output unit k of model i is a scaled sum of the model's input units.

        ``out[k] = scale[k] * sum of input units c with cluster_of_unit[i, c] == k``; a cluster without units
        gives 0.

        Parameters
        ----------
        cluster_of_unit
            [N, C] int64 with entries in [0, num_clusters).
        num_clusters
            K, the length of the axis in the result.
        scale
            [K] finite factors of any float dtype, kept in float64; None for 1.

        Raises
        ------
        TypeError
            If `cluster_of_unit` is not an int64 tensor, `num_clusters` no int or `scale` not a float tensor.
        ValueError
            If a shape is wrong, an entry of `cluster_of_unit` is out of range (its value and place are named)
            or `scale` is not finite.
        """
        cluster_of_unit = _check_index("cluster_of_unit", cluster_of_unit)
        num_clusters = _checks.check_int("num_clusters", num_clusters, 0)
        _check_units("num_clusters", num_clusters)
        _check_units("the number of columns of cluster_of_unit", int(cluster_of_unit.shape[1]))
        _check_range("cluster_of_unit", cluster_of_unit, num_clusters)
        if scale is not None:
            scale = _arrays.as_tensor("scale", scale)
            _checks.check_float("scale", scale)
            if scale.shape != (num_clusters,):
                raise ValueError(f"scale must be [num_clusters] = [{num_clusters}], got {list(scale.shape)}")
            _checks.check_finite("scale", scale)
            scale = scale.detach().to(torch.float64, copy=True)
        return cls(cluster_of_unit.clone(), int(cluster_of_unit.shape[1]), num_clusters, False, scale)._made_ready()

    def _made_ready(self) -> UnitMap:
        """Return this map, with all that kernels on its device read: made on the stream that the map is made on.

        Made at the first use, it would lack whatever orders other streams, or a graph that is captured, after the map.
        """
        if self.index.is_cuda:
            _ = self.members
        return self


def permute_merge(
    tensors: Sequence[_arrays.Array],
    maps: Mapping[int, UnitMap],
    *,
    weights: Sequence[float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of tensors, each re-indexed along every mapped axis.

    ``out = sum_i weights[i] * tensors[i][maps[axis] applied along each axis]``. One tensor with
    ``weights=[1.0]`` is how a single model is re-indexed; if its maps are permutations the result is a copy,
    exact bit for bit.

    Parameters
    ----------
    tensors
        N tensors, or arrays of other libraries, of one shape, dtype (float16, bfloat16, float32 or float64) and device,
        of any number of axes and any strides. On the CPU, those that are not contiguous are copied first.
    maps
        For each re-indexed axis (negative ones count from the end) its map. Other axes ride along; no map at
        all gives the weighted sum of the tensors. Up to two axes are done in one read of each tensor; with
        more, each axis costs a copy.
    weights
        N finite factors; 1/N each where not given.
    out
        Written and returned if given: the result's shape, the tensors' dtype and device, and apart from every
        tensor in memory.

    Returns
    -------
    Tensor
        The tensors' shape with ``units_out`` of its map on every mapped axis, in the tensors' dtype. Sums are
        accumulated in float32, those of float64 in float64, and rounded once.

    Raises
    ------
    TypeError
        For arguments of another type: tensors or maps that are none, integer or complex dtypes.
    ValueError
        If there are no tensors; they differ (the first that does is named); an axis is out of range or mapped
        twice; a map's number of models or length is not that of the tensors; `weights` has another length or
        is not finite; `out` does not fit or shares memory with a tensor; or a tensor requires a gradient
        while gradients are recorded: none are implemented, so call under ``torch.no_grad()`` or detach.
    """
    if not _library.traced(None) and _dispatch.requested() is None:
        # A small tensor is merged sooner than the general way below is gone through.
        merged = _merge_plain(tensors, maps, weights, out)
        if merged is not None:
            return merged
    checked = _check_tensors(tensors)
    by_axis = check_maps(maps, checked)
    factors = _check_weights(weights, len(checked))
    if _library.traced(checked[0]):
        return _traced_merge(checked, by_axis, factors, out)
    if out is not None:
        _check_out(out, checked, by_axis)
    # Not under no_grad, which takes a microsecond: where gradients are recorded, no tensor here requires one.
    return _dispatch.choose("permute", checked[0].device, _MERGES)(checked, by_axis, factors, out)


def _merge_plain_group(
    groups: Sequence[Sequence[Tensor]], maps: Sequence[Mapping[int, UnitMap]], weights: Sequence[float] | None
) -> list[Tensor] | None:
    first, results = groups[0], []
    for tensors, of_group in zip(groups, maps, strict=True):
        merged = _merge_plain(tensors, of_group, weights, None)
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


def permute_merge_group(
    groups: Sequence[Sequence[Tensor]],
    maps: Sequence[Mapping[int, UnitMap]],
    *,
    weights: Sequence[float] | None = None,
) -> list[Tensor]:
    """Return :func:`permute_merge` of many groups of tensors: where a launch is what it costs, in one.

    On a GPU this is for a layer's biases and norms and other tensors of up to about a million entries.

    Parameters
    ----------
    groups
        For each result its N tensors, as for :func:`permute_merge`; all groups of one dtype and device.
    maps
        For each group its maps.
    weights
        N finite factors, of all groups; 1/N each where not given.

    Returns
    -------
    list of Tensor
        One result per group.

    Raises
    ------
    TypeError, ValueError
        As :func:`permute_merge`; if groups differ in dtype, device or number of tensors; or if there is not one
        mapping per group.
    """
    if len(groups) != len(maps):
        raise ValueError(f"maps must have one entry per group, {len(groups)}, got {len(maps)}")
    if len(groups) == 0:
        return []
    if not _library.traced(None) and _dispatch.requested() is None:
        merged = _merge_plain_group(groups, maps, weights)
        if merged is not None:
            return merged
    checked = [_check_tensors(tensors) for tensors in groups]
    first = checked[0]
    for number, tensors in enumerate(checked):
        if len(tensors) != len(first):
            raise ValueError(
                f"groups[{number}] must have as many tensors as groups[0], {len(first)}, got {len(tensors)}"
            )
        if tensors[0].dtype != first[0].dtype or tensors[0].device != first[0].device:
            _check_same(f"groups[{number}]", tensors[0], "groups[0]", tensors[0].shape, first[0])
    by_axis = [check_maps(of_group, tensors) for of_group, tensors in zip(maps, checked, strict=True)]
    factors = _check_weights(weights, len(first))
    kernel = _dispatch.choose("permute", first[0].device, _GROUP_MERGES)
    with torch.no_grad():
        return kernel(checked, by_axis, factors)


def permute_(tensor: Tensor, maps: Mapping[int, UnitMap]) -> Tensor:
    """Re-index one tensor in place, so that a model can be permuted in the memory it takes.

    ``tensor = tensor[maps[axis] applied along each axis]``, exact bit for bit. On the CPU a contiguous tensor needs a
    scratch of a few lines (an entry of the first mapped axis) per thread, on a GPU one of at most 64 MB.

    Parameters
    ----------
    tensor
        float16, bfloat16, float32 or float64, of any number of axes, each entry with a place of its own in memory.
    maps
        For each re-indexed axis (negative ones count from the end) a map of one model that is a permutation: every
        unit once.

    Returns
    -------
    Tensor
        `tensor`.

    Raises
    ------
    TypeError
        For arguments of another type, as in :func:`permute_merge`.
    ValueError
        If a map is of several models, of another length than the axis or no permutation, an axis is out of range or
        mapped twice, `tensor` is expanded, or it requires a gradient while gradients are recorded.
    """
    checked = _check_tensors([tensor])
    _check_places("tensor", tensor)
    by_axis = check_maps(maps, checked)
    for axis, unit_map in by_axis.items():
        _check_bijection(f"maps[{axis}]", unit_map)
    kernel = _dispatch.choose("permute", tensor.device, _IN_PLACE)
    with torch.no_grad():
        kernel(tensor, by_axis)
    return tensor


def _check_bijection(argument: str, unit_map: UnitMap) -> None:
    if not unit_map.is_permutation or unit_map.units_in != unit_map.units_out:
        raise ValueError(f"{argument} must be a permutation to be applied in place, got one that changes the units")
    seen = torch.bincount(unit_map.index[0], minlength=unit_map.units_in)
    if bool((seen != 1).any()):
        unit = int((seen != 1).nonzero()[0])
        raise ValueError(
            f"{argument} must hold every unit once to be applied in place, got unit {unit} {seen[unit]} times"
        )


def _check_places(argument: str, tensor: Tensor) -> None:
    if any(stride == 0 and length > 1 for stride, length in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{argument} must have a place in memory for every entry, got an expanded tensor")


def _check_index(argument: str, value: object) -> Tensor:
    index = _arrays.as_tensor(argument, value)
    if index.dtype != torch.int64:
        raise TypeError(f"{argument} must have dtype int64, got {str(index.dtype).removeprefix('torch.')}")
    if index.ndim != 2 or index.shape[0] == 0:
        raise ValueError(f"{argument} must be [num_models, units] with num_models >= 1, got {list(index.shape)}")
    return index


def _check_units(argument: str, count: int) -> None:
    if count > _MOST_UNITS:
        raise ValueError(f"{argument} must be at most {_MOST_UNITS}, got {count}")


def _check_range(argument: str, index: Tensor, length: int) -> None:
    bad = ((index < 0) | (index >= length)).nonzero()
    if len(bad):
        model, unit = bad[0].tolist()
        value = index[model, unit].item()
        raise ValueError(f"{argument} must have entries in [0, {length}), got {value} at ({model}, {unit})")


def _check_tensors(tensors: Sequence[_arrays.Array]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"tensors must be a sequence of tensors, got {type(tensors).__name__}")
    if len(tensors) == 0:
        raise ValueError("tensors must hold at least one tensor, got none")
    # A compiler cannot trace the question of the negative bit, and has no use for a shorter way.
    if not torch.compiler.is_compiling() and _are_alike(tensors):
        return list(tensors)
    checked = [_arrays.as_tensor(f"tensors[{i}]", tensor) for i, tensor in enumerate(tensors)]
    first = checked[0]
    for i, tensor in enumerate(checked):
        _checks.check_float(f"tensors[{i}]", tensor)
        _check_same(f"tensors[{i}]", tensor, "tensors[0]", first.shape, first)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"tensors[{i}] requires a gradient, which is not implemented: "
                "call under torch.no_grad() or pass tensor.detach()"
            )
    return checked


def _are_alike(tensors: Sequence[object]) -> TypeGuard[Sequence[Tensor]]:
    """Return whether these can be merged as they are: what most calls pass, found without naming a single argument."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return False
    shape, dtype, device, recorded = first.shape, first.dtype, first.device, torch.is_grad_enabled()
    if dtype not in _checks.FLOAT_DTYPES or first.is_meta:
        return False
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.device != device:
            return False
        if tensor.dtype != dtype or tensor.shape != shape or tensor.is_neg() or (recorded and tensor.requires_grad):
            return False
    return True


def _check_same(argument: str, tensor: Tensor, other: str, shape: Sequence[int], like: Tensor) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{argument} must have the shape of {other}, {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{argument} must have the dtype of {other}, {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{argument} must be on the device of {other}, {like.device}, got {tensor.device}")


def check_maps(maps: Mapping[int, UnitMap], tensors: list[Tensor]) -> dict[int, UnitMap]:
    """Return maps by non-negative axis if they fit the tensors, one of each model."""
    if not isinstance(maps, Mapping):
        raise TypeError(f"maps must be a mapping from axis to UnitMap, got {type(maps).__name__}")
    shape = tensors[0].shape
    by_axis: dict[int, UnitMap] = {}
    for axis, unit_map in maps.items():
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"the axes of maps must be ints, got {type(axis).__name__}")
        if not isinstance(unit_map, UnitMap):
            raise TypeError(f"maps[{axis}] must be a UnitMap, got {type(unit_map).__name__}")
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"maps has axis {axis}, but the tensors have {len(shape)} axes")
        positive = axis % len(shape)
        if positive in by_axis:
            raise ValueError(f"maps has axis {positive} twice: as {positive} and as {positive - len(shape)}")
        if unit_map.num_models != len(tensors):
            raise ValueError(
                f"maps[{axis}] must be of as many models as there are tensors, "
                f"{len(tensors)}, got {unit_map.num_models}"
            )
        if unit_map.units_in != shape[axis]:
            raise ValueError(
                f"maps[{axis}] must take {shape[axis]} units, the tensors' length on axis {axis}, "
                f"got a map of {unit_map.units_in}"
            )
        by_axis[positive] = unit_map
    return by_axis


def _check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ValueError(f"weights must have one entry per tensor, {count}, got {len(weights)}")
    factors = [_checks.check_number(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    for i, factor in enumerate(factors):
        if abs(factor) == float("inf"):
            raise ValueError(f"weights[{i}] must be finite, got {factor}")
    return factors


def _check_out(out: Tensor, tensors: list[Tensor], maps: Mapping[int, UnitMap]) -> None:
    out = _checks.check_tensor("out", out)
    shape = list(tensors[0].shape)
    for axis, unit_map in maps.items():
        shape[axis] = unit_map.units_out
    _check_same("out", out, "the result", shape, tensors[0])
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires a gradient, which is not implemented: pass a tensor that requires none")
    if out.is_neg():
        raise ValueError("out must hold its entries as they are, got a view of negated entries")
    _check_places("out", out)
    for i, tensor in enumerate(tensors):
        if _spans_meet(out, tensor):
            raise ValueError(f"out must not share memory with an input, got one that overlaps tensors[{i}]")


def _spans_meet(a: Tensor, b: Tensor) -> bool:
    """Return whether the memory from first to last entry of two tensors overlaps, gaps included."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    a_begin, a_end = _span(a)
    b_begin, b_end = _span(b)
    return a_begin < b_end and b_begin < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _by_triton(
    tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], weights: Sequence[float], out: Tensor | None
) -> Tensor:
    from mudsc_fast.kernels.triton import permute  # takes a second to import, for CUDA tensors only

    return permute.permute_merge(tensors, maps, weights, out)


def _group_by_triton(
    groups: Sequence[Sequence[Tensor]], maps: Sequence[Mapping[int, UnitMap]], weights: Sequence[float]
) -> list[Tensor]:
    from mudsc_fast.kernels.triton import permute

    return permute.permute_merge_group(groups, maps, weights)


def _one_by_one(merge: _Merge) -> _GroupMerge:
    def merge_group(
        groups: Sequence[Sequence[Tensor]], maps: Sequence[Mapping[int, UnitMap]], weights: Sequence[float]
    ) -> list[Tensor]:
        return [merge(tensors, by_axis, weights, None) for tensors, by_axis in zip(groups, maps, strict=True)]

    return merge_group


#: permute_merge of what most calls pass; None for anything else, also where torch is too old to let it read tensors.
_merge_plain = _core.plain_permute_merge(torch, UnitMap) or (lambda tensors, maps, weights, out: None)  # noqa: ARG005

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
# On a GPU slabs by way of a scratch are what there is: lines that follow cycles would wait for one another.
_IN_PLACE = {"cpu": cpu.permute_, "triton": reference.permute_, "reference": reference.permute_}
