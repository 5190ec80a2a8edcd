"""Deriving the arguments of a specification from a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mudsc_fast.spec.axes import Axis, Entry, Role, Window
from mudsc_fast.spec.groups import Groups
from mudsc_fast.spec.infer.export import Outputs, check_model
from mudsc_fast.spec.infer.graph import Reading, read
from mudsc_fast.spec.infer.nodes import Key, NodeSegment, segments_of, settle
from mudsc_fast.spec.infer.places import Places, Use
from mudsc_fast.spec.infer.record import Obstacle
from mudsc_fast.spec.infer.report import advice, explain, summarize, warn_of_frozen_tensors
from mudsc_fast.spec.observation import Observation

_log = logging.getLogger("mudsc_fast.spec.infer")


@dataclass(frozen=True)
class Derivation:
    """What was derived from a model.

    Attributes
    ----------
    axes, observe, groups
        The arguments of :class:`mudsc_fast.PermutationSpec`.
    obstacles
        The operators that froze axes, in the order of the graph.
    frozen_axes
        For each tensor that the model computes with, the axes that keep their order, and why.
    """

    axes: Mapping[str, Sequence[Entry]]
    observe: Mapping[str, Sequence[Observation]]
    groups: Mapping[str, Groups]
    obstacles: tuple[Obstacle, ...]
    frozen_axes: Mapping[str, Mapping[int, str]]


def derive(model: nn.Module, example_inputs: Any, *, outputs: Outputs | None = None) -> Derivation:
    """Derive the arguments of a model's specification, and what keeps other axes in their order.

    Parameters and errors are those of :meth:`mudsc_fast.PermutationSpec.from_model`.
    """
    check_model(model)
    arguments, keywords = _inputs(model, example_inputs)
    reading = read(model, arguments, keywords, outputs)
    settle(list(reading.tensors.values()), reading.record.occurrences)
    obstacles = tuple(reading.record.obstacles)
    frozen = explain(reading)
    uses = _uses(reading)
    if not uses:
        raise ValueError(
            "model must have units that can be permuted, but every axis keeps its order: "
            f"{summarize(frozen)}{advice(frozen)}"
        )
    for obstacle in obstacles:
        _log.log(logging.INFO if obstacle.known else logging.WARNING, "%s", obstacle)
    warn_of_frozen_tensors(model, reading, frozen)
    names = _names(uses)
    places = Places(model, reading)
    observe = {names[key]: places.of(key, where) for key, where in uses.items()}
    return Derivation(_layouts(reading, uses, names), observe, _groups(names), obstacles, frozen)


def _inputs(model: nn.Module, example_inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the positional and the keyword arguments, on the model's device."""
    device = next((value.device for value in model.state_dict().values() if isinstance(value, Tensor)), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    if isinstance(example_inputs, Tensor):
        return (moved(example_inputs),), {}
    if isinstance(example_inputs, Mapping):
        return (), {name: moved(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(map(moved, example_inputs)), {}
    raise TypeError(
        "example_inputs must be a tensor, a dict of keyword arguments or a tuple of positional arguments, "
        f"got {type(example_inputs).__name__}"
    )


def _uses(reading: Reading) -> dict[Key, list[Use]]:
    """Return every use of every node."""
    uses: dict[Key, list[Use]] = {}
    for tensor, axes in reading.tensors.items():
        first = reading.first_name[tensor]
        for position, factor in enumerate(axes):
            segments = segments_of(factor)
            for segment in segments:
                if segment.key:
                    role: Role = "consume" if reading.record.roles.get((first, position)) == {"consume"} else "produce"
                    # Buffers hold statistics, masks and constants: they follow the units.
                    compared = first == tensor and tensor not in reading.buffers
                    use = Use(tensor, position, len(axes), segment, len(segments) == 1, role, compared)
                    uses.setdefault(segment.key, []).append(use)
    return {key: _with_one_compared(where, reading) for key, where in uses.items()}


def _with_one_compared(uses: list[Use], reading: Reading) -> list[Use]:
    """Compare the buffers of a node that has no parameters."""
    if any(use.compared for use in uses):
        return uses
    return [replace(use, compared=reading.first_name[use.tensor] == use.tensor) for use in uses]


def _layouts(
    reading: Reading, uses: Mapping[Key, Sequence[Use]], names: Mapping[Key, str]
) -> dict[str, Sequence[Entry]]:
    """Return the axes map."""
    use_at = {(use.tensor, use.position, use.segment.start): use for where in uses.values() for use in where}

    def axis(tensor: str, position: int, segment: NodeSegment) -> Axis | None:
        use = use_at.get((tensor, position, segment.start))
        if use is None:
            return None
        return Axis(names[segment.key], use.role, segment.inner, segment.outer, use.compared)

    layouts: dict[str, Sequence[Entry]] = {}
    for tensor, axes in reading.tensors.items():
        entries: list[Entry] = []
        for position, factor in enumerate(axes):
            windows = [Window(axis(tensor, position, segment), segment.width) for segment in segments_of(factor)]
            entries.append(windows[0].axis if len(windows) == 1 else windows)
        if any(entry is not None for entry in entries):
            while entries[-1] is None:
                entries.pop()
            layouts[tensor] = entries
    return layouts


def _names(uses: Mapping[Key, Sequence[Use]]) -> dict[Key, str]:
    """Name every node after the first module that produces it."""
    chosen: dict[str, list[Key]] = {}
    for key, where in uses.items():
        by_rank = sorted(where, key=_preference)
        tensor = by_rank[0].tensor
        module = tensor.rpartition(".")[0].partition(".parametrizations.")[0]
        chosen.setdefault(module or tensor, []).append(key)
    return {
        key: name if len(keys) == 1 else f"{name}.{index}"
        for name, keys in chosen.items()
        for index, key in enumerate(keys)
    }


def _preference(use: Use) -> tuple[bool, bool, bool]:
    return use.role != "produce", use.ndim < 2, not use.tensor.endswith(".weight")


def _groups(names: Mapping[Key, str]) -> dict[str, Groups]:
    """Return the groups of nodes whose units move within their group, and of nodes that share these groups."""
    sharing: dict[Any, list[Key]] = {}
    for key in names:
        sharing.setdefault(key[0], []).append(key)
    groups = {}
    for first, keys in sharing.items():
        if len(keys) > 1 or len(keys[0]) > 1:
            tie = names[keys[0]] if len(keys) > 1 else None
            groups.update({names[key]: Groups(first.size, tie) for key in keys})
    return groups
