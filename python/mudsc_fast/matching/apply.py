"""Applying matchings to tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mudsc_fast._checks import FLOAT_DTYPES
from mudsc_fast._tensors import as_integers, tied_tensors, with_metadata
from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.ops.permute import UnitMap, permute_merge, permute_merge_group
from mudsc_fast.spec.axes import Axis, Segment
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: How the units of an axis are re-indexed; None leaves them unchanged.
MapOfAxis = Callable[[Axis], UnitMap | None]


def merge_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    matching: Mapping[str, NodeMatching],
    model_weights: Sequence[float],
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Return the weighted mean of all models after re-indexing every axis by its node's matching.

    Tensors that are not in `spec` are averaged in their own order. Integer tensors (counters, index tables) are those
    of the first model. `names` are the tensors to merge, by default all. A tensor that has several names in every model
    is merged once.

    Raises
    ------
    ValueError
        If `spec` orders the axes of one tensor differently under two of its names.
    """

    def map_of(axis: Axis) -> UnitMap | None:
        return matching[axis.node].unit_map(axis.role, model_weights) if axis.node in matching else None

    merged: dict[str, Tensor] = {}
    vectors: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    chosen = list(state_dicts[0] if names is None else names)
    main_name = _main_names(state_dicts, spec, chosen)
    for name in chosen:
        if main_name.get(name, name) != name:
            continue
        first = state_dicts[0][name]
        layout = spec.layouts.get(name, ())
        if not (first.is_floating_point() or first.is_complex()):
            merged[name] = first.detach().clone()
        elif first.ndim == 1 and not first.is_complex() and all(len(segments) == 1 for segments in layout):
            vectors.setdefault((first.dtype, first.device), []).append(name)
        else:
            tensors = [state_dict[name].detach() for state_dict in state_dicts]
            merged[name] = reindex(tensors, layout, map_of, model_weights)
    # Biases and norms are many and small, so they are merged in one call.
    for alike in vectors.values():
        splits = [split_axes(state_dicts[0][name].shape, spec.layouts.get(name, ()), map_of) for name in alike]
        groups = [
            [state_dict[name].detach().reshape(split.shape) for state_dict in state_dicts]
            for name, split in zip(alike, splits, strict=True)
        ]
        results = permute_merge_group(groups, [split.maps for split in splits], weights=model_weights)
        merged.update({name: result.flatten() for name, result in zip(alike, results, strict=True)})
    return {name: merged[main_name.get(name, name)] for name in chosen}


def _main_names(
    state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec, chosen: Sequence[str]
) -> dict[str, str]:
    """Return for each tensor with several names the name to merge it by: the first in the spec, or the first of all."""
    main_name = {}
    for tied in tied_tensors([{name: state_dict[name] for name in chosen} for state_dict in state_dicts]):
        layouts = {name: spec.layouts[name] for name in tied if name in spec.layouts}
        first = next(iter(layouts), tied[0])
        for name, layout in layouts.items():
            if _mapped(layout) != _mapped(layouts[first]):
                raise ValueError(
                    f"{first!r} and {name!r} are one tensor in every model, but spec permutes their axes differently"
                )
        main_name.update(dict.fromkeys(tied, first))
    return main_name


def _mapped(layout: Sequence[Sequence[Segment]]) -> list[tuple[int, int, str]]:
    """Return the axes of a layout that have nodes."""
    return [
        (position, segment.start, segment.axis.node)
        for position, segments in enumerate(layout)
        for segment in segments
        if segment.axis is not None
    ]


def task_tensors(
    state_dict: Mapping[str, Tensor],
    model: int,
    spec: PermutationSpec,
    matching: Mapping[str, NodeMatching],
    shared: Iterable[str],
    names: Iterable[str],
) -> dict[str, Tensor]:
    """Return tensors that one model keeps, re-indexed to fit the merged tensors.

    If a node occurs in the tensors `shared`, its axes follow the matching. The axes of other nodes keep their order,
    except that groups tied to the groups of a merged node follow those groups.

    Parameters
    ----------
    state_dict, model
        One model's tensors and its number.
    spec, matching
        The axes map and how the units of all models correspond.
    shared
        The tensors that were merged.
    names
        The tensors to return.
    """
    merged = {
        segment.axis.node
        for name in shared
        for segments in spec.layouts.get(name, ())
        for segment in segments
        if segment.axis is not None
    }
    partner = {node: other for bundle in spec.bundles for node in bundle for other in bundle if other in merged}
    units = spec.units(state_dict)

    def map_of(axis: Axis) -> UnitMap | None:
        if axis.node in merged:
            return matching[axis.node].task_map(axis.role, model)
        if axis.node not in partner:
            return None
        order = matching[partner[axis.node]].group_order(spec.groups(axis.node).count, model)
        within = torch.arange(units[axis.node], device=order.device).view(len(order), -1)
        return UnitMap.permutation(within[order].reshape(1, -1))

    return {
        name: reindex([state_dict[name].detach()], spec.layouts[name], map_of, [1.0])
        if name in spec.layouts and _is_averaged(state_dict[name])
        else state_dict[name].detach().clone()
        for name in names
    }


def permute_state_dict(
    state_dict: Mapping[str, Tensor], spec: PermutationSpec, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a network with the units of some nodes in another order. The outputs stay the same.

    Parameters
    ----------
    state_dict
        Tensors by name; not modified.
    spec
        The axes map of the network.
    permutations
        For each node to reorder, a permutation [units] int64: unit k of the result is unit ``permutation[k]``.

    Raises
    ------
    ValueError
        If a node is unknown, the spec does not fit, an entry is not a permutation of the node's units, splits a group
        of units, or orders groups differently than a node that they are tied to, or the state dict has one tensor
        under two names whose axes the spec permutes differently.
    """
    units = spec.units(state_dict)
    _main_names([state_dict], spec, list(state_dict))  # raises if tied tensors would get different orders
    for node, permutation in permutations.items():
        if node not in units:
            raise ValueError(f"permutations names the node {node!r}, which spec does not have")
        expected = torch.arange(units[node], device=permutation.device)
        if permutation.shape != expected.shape or not torch.equal(permutation.sort().values, expected):
            raise ValueError(f"permutations[{node!r}] must be a permutation of {units[node]} units")
    _check_groups(spec, units, permutations)

    def map_of(axis: Axis) -> UnitMap | None:
        return UnitMap.permutation(permutations[axis.node][None]) if axis.node in permutations else None

    def permuted(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):  # extra state of a module
            return copy.deepcopy(value)
        tensor, layout = value.detach(), spec.layouts.get(name)
        if layout is None:
            return tensor.clone()
        if _is_averaged(tensor):
            return reindex([tensor], layout, map_of, [1.0])
        for position, segments in enumerate(layout):
            tensor = _permute_axis(tensor, position, segments, permutations)
        return tensor.clone()

    return with_metadata({name: permuted(name, value) for name, value in state_dict.items()}, state_dict)


def reindex(
    tensors: Sequence[Tensor], layout: Sequence[Sequence[Segment]], map_of: MapOfAxis, weights: Sequence[float]
) -> Tensor:
    """Return the weighted sum of tensors, each re-indexed along the axes of `layout`.

    Parameters
    ----------
    tensors
        One tensor per model, of one shape.
    layout
        For each axis its segments, as in :attr:`PermutationSpec.layouts`. Further axes are not re-indexed.
    map_of
        Returns how the units of an axis are re-indexed.
    weights
        One factor per model.
    """
    if tensors[0].is_complex():
        # Real and imaginary parts become two more entries of each unit, on a new last axis.
        parts = [torch.view_as_real(tensor.resolve_conj()) for tensor in tensors]
        return torch.view_as_complex(reindex(parts, layout, map_of, weights).contiguous())
    for position, segments in enumerate(layout):
        if len(segments) > 1:
            parts = []
            for segment in segments:
                assert segment.width is not None  # only a single segment has the width of its axis
                windows = [tensor.narrow(position, segment.start, segment.width) for tensor in tensors]
                whole = [*layout[:position], (Segment(segment.axis),), *layout[position + 1 :]]
                parts.append(reindex(windows, whole, map_of, weights))
            return torch.cat(parts, position)
    split = split_axes(tensors[0].shape, layout, map_of)
    result = permute_merge([tensor.reshape(split.shape) for tensor in tensors], split.maps, weights=weights)
    joined, begin = [], 0
    for factors in split.factors:
        joined.append(math.prod(result.shape[begin : begin + factors]))
        begin += factors
    return result.reshape(joined)


@dataclass(frozen=True)
class Split:
    """A tensor's shape with each re-indexed axis split into (outer, units, inner), the maps, and factors per axis."""

    shape: list[int]
    maps: dict[int, UnitMap]
    factors: list[int]


def split_axes(shape: Sequence[int], layout: Sequence[Sequence[Segment]], map_of: MapOfAxis) -> Split:
    """Return the view of a tensor in which the axes that `map_of` re-indexes hold nothing but units."""
    split = Split([], {}, [])
    for position, length in enumerate(shape):
        axis = layout[position][0].axis if position < len(layout) else None
        unit_map = None if axis is None else map_of(axis)
        if axis is None or unit_map is None:
            lengths = [length]
        else:
            split.maps[len(split.shape) + 1] = unit_map
            lengths = [axis.outer, length // (axis.outer * axis.inner), axis.inner]
        split.shape.extend(lengths)
        split.factors.append(len(lengths))
    return split


def _is_averaged(tensor: Tensor) -> bool:
    """Return whether :func:`reindex` supports the dtype of a tensor."""
    return tensor.dtype in FLOAT_DTYPES or tensor.is_complex()


def _permute_axis(
    tensor: Tensor, position: int, segments: Sequence[Segment], permutations: Mapping[str, Tensor]
) -> Tensor:
    """Return a tensor of any dtype with the units on one axis in another order."""
    order = torch.arange(tensor.shape[position], device=tensor.device)
    for segment in segments:
        axis = segment.axis
        if axis is None or axis.node not in permutations:
            continue
        width = tensor.shape[position] if segment.width is None else segment.width
        window = order[segment.start : segment.start + width].view(axis.outer, -1, axis.inner)
        window.copy_(window[:, permutations[axis.node].to(order.device)])
    return as_integers(tensor).index_select(position, order).view(tensor.dtype)


def _check_groups(spec: PermutationSpec, units: Mapping[str, int], permutations: Mapping[str, Tensor]) -> None:
    for nodes in spec.bundles:
        orders = {}
        for node in nodes:
            size = units[node] // spec.groups(node).count
            order = permutations[node] if node in permutations else torch.arange(units[node], device="cpu")
            order = order.view(-1, size) // size
            if not torch.equal(order, order[:, :1].expand(order.shape)):
                raise ValueError(f"permutations[{node!r}] must keep the units of a group of {size} together")
            orders[node] = order[:, 0].tolist()
        if any(order != orders[nodes[0]] for order in orders.values()):
            raise ValueError(f"permutations must order the groups of {', '.join(map(repr, nodes))} in the same way")
