"""Checks of the arguments of the permute ops. Errors name the argument, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from mudsc_fast import _arrays, _checks
from mudsc_fast.unit_map import UnitMap


def check_tensors(tensors: Sequence[_arrays.Array]) -> list[Tensor]:
    """Return the tensors of all models if they can be merged: same shape, dtype and device, and no gradient."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"tensors must be a sequence of tensors, got {type(tensors).__name__}")
    if len(tensors) == 0:
        raise ValueError("tensors must hold at least one tensor, got none")
    # The compiler cannot trace is_neg, and does not need the shortcut.
    if not torch.compiler.is_compiling() and _are_mergeable(tensors):
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


def _are_mergeable(tensors: Sequence[object]) -> TypeGuard[Sequence[Tensor]]:
    """Return whether tensors pass all checks: a shortcut for most calls that formats no argument names."""
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


def check_groups(groups: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return the tensors of all groups if each group can be merged, and all have one dtype, device and length."""
    checked = [check_tensors(tensors) for tensors in groups]
    first = checked[0]
    for number, tensors in enumerate(checked):
        if len(tensors) != len(first):
            raise ValueError(
                f"groups[{number}] must have as many tensors as groups[0], {len(first)}, got {len(tensors)}"
            )
        if tensors[0].dtype != first[0].dtype or tensors[0].device != first[0].device:
            _check_same(f"groups[{number}]", tensors[0], "groups[0]", tensors[0].shape, first[0])
    return checked


def check_maps(maps: Mapping[int, UnitMap], tensors: list[Tensor]) -> dict[int, UnitMap]:
    """Return the maps by non-negative axis if they fit the tensors, of which there is one per model."""
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


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return one finite factor per tensor; 1 / count each by default."""
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise ValueError(f"weights must have one entry per tensor, {count}, got {len(weights)}")
    factors = [_checks.check_number(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    for i, factor in enumerate(factors):
        if abs(factor) == float("inf"):
            raise ValueError(f"weights[{i}] must be finite, got {factor}")
    return factors


def check_out(out: Tensor, tensors: list[Tensor], maps: Mapping[int, UnitMap]) -> None:
    """Raise an error unless the result can be written to `out`."""
    out = _checks.check_tensor("out", out)
    shape = list(tensors[0].shape)
    for axis, unit_map in maps.items():
        shape[axis] = unit_map.units_out
    _check_same("out", out, "the result", shape, tensors[0])
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires a gradient, which is not implemented: pass a tensor that requires none")
    if out.is_neg():
        raise ValueError("out must not be a view with the negative bit set: pass out.resolve_neg()")
    check_not_expanded("out", out)
    for i, tensor in enumerate(tensors):
        if _overlap(out, tensor):
            raise ValueError(f"out must not share memory with an input, got one that overlaps tensors[{i}]")


def check_not_expanded(argument: str, tensor: Tensor) -> None:
    """Raise ValueError if several entries share one place in memory."""
    if any(stride == 0 and length > 1 for stride, length in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"{argument} must have a place in memory for every entry, got an expanded tensor")


def check_bijection(argument: str, unit_map: UnitMap) -> None:
    """Raise ValueError unless a map contains every unit once."""
    if not unit_map.is_permutation or unit_map.units_in != unit_map.units_out:
        raise ValueError(f"{argument} must be a permutation to be applied in place, got one that changes the units")
    seen = torch.bincount(unit_map.index[0], minlength=unit_map.units_in)
    if bool((seen != 1).any()):
        unit = int((seen != 1).nonzero()[0])
        raise ValueError(
            f"{argument} must hold every unit once to be applied in place, got unit {unit} {seen[unit]} times"
        )


def _check_same(argument: str, tensor: Tensor, other: str, shape: Sequence[int], like: Tensor) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{argument} must have the shape of {other}, {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{argument} must have the dtype of {other}, {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{argument} must be on the device of {other}, {like.device}, got {tensor.device}")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether the memory ranges of two tensors overlap, from first to last entry, gaps included."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device:
        return False
    a_begin, a_end = _memory_range(a)
    b_begin, b_end = _memory_range(b)
    return a_begin < b_end and b_begin < a_end


def _memory_range(tensor: Tensor) -> tuple[int, int]:
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()
