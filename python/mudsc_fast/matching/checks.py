"""Checks of the tensors of several networks before they are matched and merged."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast._checks import FLOAT_DTYPES, check_finite, check_tensor
from mudsc_fast._tensors import same_values
from mudsc_fast.matching.partial import Division
from mudsc_fast.spec.permutation_spec import PermutationSpec

_logger = logging.getLogger(__name__)

#: Two tensors whose entries have at least this correlation are considered a weight and its moving average.
_COPY_CORRELATION = 0.7
#: Minimum number of entries for that comparison.
_MIN_COMPARED, _MAX_COMPARED = 64, 4096


def check_compatible(state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec, division: Division) -> None:
    """Check that networks with tensors of the same names and dtypes can be matched, without reading the entries.

    Raises
    ------
    ValueError
        If shapes differ, other than those of task heads, or the spec does not fit.
    TypeError
        If a tensor is of a dtype that cannot be averaged.
    """
    _check_same_shapes(state_dicts, spec, division)
    for state_dict in state_dicts:
        spec.units(state_dict)
    check_dtypes(state_dicts, spec, division)


def check_entries(state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec, names: Container[str]) -> float:
    """Check that all entries of the tensors with some names are finite, and return their largest magnitude.

    Of several processes each checks some tensors.

    Raises
    ------
    ValueError
        If an entry is not finite.
    """
    largest = 0.0
    for index, state_dict in enumerate(state_dicts):
        for name in spec.layouts:
            if name in names:
                described = f"{name!r} of models[{index}]"
                largest = max(largest, check_finite(described, check_tensor(described, state_dict[name])))
    return largest


def warn_of_unnamed(state_dict: Mapping[str, Tensor], spec: PermutationSpec, division: Division) -> None:
    """Warn of tensors that the spec does not name although they seem to hold an entry for each unit, or weights."""
    omitted = _omitted_companions(state_dict, spec, division)
    if omitted:
        _logger.warning(
            "spec does not name %d tensors that seem to belong to units which it permutes: %s. They are averaged in "
            "their own order; name them in the spec if each entry belongs to a unit",
            len(omitted),
            ", ".join(f"{name!r} (beside {other!r})" for name, other in list(omitted.items())[:5]),
        )
    copies = _copies_of_weights(state_dict, spec)
    if copies:
        _logger.warning(
            "%d tensors look like copies of weights (moving averages?) that the spec does not name: %s. They are "
            "averaged in their own order and fall out of sync with the weights: name them in the spec like the "
            "weights, or recompute them after the merge",
            len(copies),
            ", ".join(f"{name!r} of {weight!r}" for name, weight in list(copies.items())[:5]),
        )


def check_dtypes(state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec, division: Division) -> None:
    """Check that the tensors to merge can be averaged, or are the same in all networks.

    Counters (integers without axes) and tables of integers that are the same everywhere become those of the first
    network.

    Raises
    ------
    TypeError
        If a tensor holds quantized weights.
    """
    differing = []
    for name in division.shared:
        tensors = [state_dict[name] for state_dict in state_dicts]
        first = tensors[0]
        if first.dtype in FLOAT_DTYPES or first.is_complex() or (first.ndim == 0 and not first.is_floating_point()):
            continue
        named = any(segment.axis is not None for axis in spec.layouts.get(name, ()) for segment in axis)
        is_extra = name.rpartition(".")[2] == "_extra_state"
        same = all(same_values(first, other) for other in tensors[1:])
        if first.is_floating_point() or (named and first.dtype != torch.bool) or _is_packed(first, same, is_extra):
            raise TypeError(
                f"{name!r} has dtype {first.dtype} and cannot be averaged: quantized weights must be dequantized to a "
                "floating-point dtype first (with their scales), and the merged network quantized again"
            )
        if not same and not is_extra:
            differing.append(name)
    if differing:
        _logger.warning(
            "%d tensors of integers differ between the models and cannot be averaged; the result has those of the "
            "first model: %s",
            len(differing),
            ", ".join(map(repr, differing[:5])),
        )


def _is_packed(tensor: Tensor, same: bool, is_extra: bool) -> bool:
    """Whether integers that differ between networks are of a type in which weights are stored, not positions."""
    return not same and not is_extra and tensor.dtype not in (torch.int64, torch.bool)


def _check_same_shapes(state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec, division: Division) -> None:
    for name, tensor in state_dicts[0].items():
        for index, other in enumerate(state_dicts):
            if name in division.task_heads or other[name].shape == tensor.shape:
                continue
            differ = f"{name!r} has shape {tuple(other[name].shape)} in models[{index}], but {tuple(tensor.shape)} in "
            differ += "models[0]: "
            layout = spec.layouts.get(name, ())
            hidden = tensor.ndim != other[name].ndim or any(
                segment.axis is not None and tensor.shape[axis] != other[name].shape[axis]
                for axis, segments in enumerate(layout)
                for segment in segments
            )
            if hidden:
                raise ValueError(differ + "only networks of the same widths and depths can be merged")
            raise ValueError(differ + "name it in task_heads to keep it per task")


def _omitted_companions(state_dict: Mapping[str, Tensor], spec: PermutationSpec, division: Division) -> dict[str, str]:
    """Return 1-D tensors that the spec does not name, beside a tensor with the same number of units on its first axis.

    These are the other tensors of a layer whose weight has units on its first axis (biases, running statistics), and
    the tensors of a norm, which has no other ones, after such a layer.
    """
    omitted: dict[str, str] = {}
    previous: str | None = None
    producer: dict[str, str] = {}
    for name in spec.layouts:
        if _produces_on_first_axis(spec, name):
            producer.setdefault(name.rpartition(".")[0], name)
    vectors: dict[str, bool] = {}
    for name, tensor in state_dict.items():
        module = name.rpartition(".")[0]
        vectors[module] = vectors.get(module, True) and tensor.ndim < 2
    for name, tensor in state_dict.items():
        if tensor.ndim > 1:
            previous = name if name in spec.layouts else None
        if name in spec.layouts or tensor.ndim != 1 or len(tensor) < 2 or not tensor.is_floating_point():
            continue
        if name in division.per_task:
            continue
        module = name.rpartition(".")[0]
        beside = producer.get(module) if module else None
        if beside is None and vectors[module] and previous is not None and _produces_on_first_axis(spec, previous):
            beside = previous
        if beside is not None and state_dict[beside].shape[0] == len(tensor):
            omitted[name] = beside
    return omitted


def _produces_on_first_axis(spec: PermutationSpec, name: str) -> bool:
    """Tell whether all of the first axis of a tensor are units that it produces."""
    layout = spec.layouts[name]
    if not layout or len(layout[0]) != 1:
        return False
    axis = layout[0][0].axis
    return axis is not None and axis.role == "produce"


def _copies_of_weights(state_dict: Mapping[str, Tensor], spec: PermutationSpec) -> dict[str, str]:
    """Return the tensors that the spec does not name although they hold nearly the values of one that it does."""
    matched: dict[tuple[int, ...], list[str]] = {}
    for name, layout in spec.layouts.items():
        if any(segment.axis is not None for segments in layout for segment in segments):
            matched.setdefault(tuple(state_dict[name].shape), []).append(name)
    copies = {}
    for name, tensor in state_dict.items():
        if name in spec.layouts or tensor.dtype not in FLOAT_DTYPES or tensor.numel() < _MIN_COMPARED:
            continue
        if tensor.is_meta:  # on another process
            continue
        candidates = [
            weight
            for weight in matched.get(tuple(tensor.shape), ())
            if state_dict[weight] is not tensor and not state_dict[weight].is_meta
        ]
        for weight in sorted(candidates, key=lambda weight: weight.rpartition(".")[2] not in name):
            if _correlation(tensor, state_dict[weight]) > _COPY_CORRELATION:
                copies[name] = weight
                break
    return copies


def _correlation(first: Tensor, second: Tensor) -> float:
    """Return the correlation of some entries of two tensors of one shape."""
    step = max(1, first.numel() // _MAX_COMPARED)
    a, b = (tensor.detach().flatten()[::step].double() for tensor in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0
