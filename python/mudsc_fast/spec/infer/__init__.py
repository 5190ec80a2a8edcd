"""Specifications derived from a model: type inference on the axes of its tensors, over the graph that it exports.

`factors` is the algebra of axes, `views` follows data that is moved about, `operators` says what each ATen operator
does, `graph` reads an exported model, `nodes` and `places` turn what was found into a specification.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mudsc_fast.spec.infer.graph import Outputs, Reading, read
from mudsc_fast.spec.infer.nodes import Key, Part, parts_of, settle
from mudsc_fast.spec.infer.places import Places, Use
from mudsc_fast.spec.infer.record import Obstacle
from mudsc_fast.spec.permutation_spec import Axis, Entry, Groups, PermutationSpec, Role, Window

__all__ = ["Derivation", "Obstacle", "derive"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Derivation:
    """A derived specification, and what kept further units in their order.

    Attributes
    ----------
    spec
        The specification.
    obstacles
        The operators that froze axes, in the order of the graph.
    """

    spec: PermutationSpec
    obstacles: tuple[Obstacle, ...]


def derive(model: nn.Module, example_inputs: Any, *, outputs: Outputs | None = None) -> Derivation:
    """Derive the specification of a model; :meth:`PermutationSpec.from_model` tells of the arguments and errors."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    arguments, keywords = _inputs(model, example_inputs)
    reading = read(model, arguments, keywords, outputs)
    settle([factor for axes in reading.tensors.values() for factor in axes], reading.record.occurrences)
    uses = _uses(reading)
    if not uses:
        raise ValueError(
            "model must have units that may be permuted, but every axis keeps its order: "
            + ("; ".join(map(str, reading.record.obstacles)) or "all units are inputs or outputs")
        )
    for obstacle in reading.record.obstacles:
        _log.log(logging.INFO if obstacle.known else logging.WARNING, "%s", obstacle)
    names = _names(uses)
    places = Places(model, reading.calls)
    observe = {names[key]: places.of(key, where) for key, where in uses.items()}
    spec = PermutationSpec(_layouts(reading, uses, names), observe, _groups(names))
    return Derivation(spec, tuple(reading.record.obstacles))


def _inputs(model: nn.Module, example_inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the positional and the keyword arguments, on the model's device."""
    device = next((tensor.device for tensor in model.state_dict().values()), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and device is not None else value

    if isinstance(example_inputs, Tensor):
        return (moved(example_inputs),), {}
    if isinstance(example_inputs, Mapping):
        return (), {name: moved(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(map(moved, example_inputs)), {}
    raise TypeError(
        "example_inputs must be a tensor, a dict of keyword arguments or a tuple of positional ones, "
        f"got {type(example_inputs).__name__}"
    )


def _uses(reading: Reading) -> dict[Key, list[Use]]:
    """Return every place of every node."""
    uses: dict[Key, list[Use]] = {}
    for tensor, axes in reading.tensors.items():
        first = reading.first_name[tensor]
        for position, factor in enumerate(axes):
            parts = parts_of(factor)
            for part in parts:
                if part.key:
                    role: Role = "consume" if reading.record.roles.get((first, position)) == {"consume"} else "produce"
                    compared = first == tensor and tensor not in reading.record.statistics
                    use = Use(tensor, position, len(axes), part, len(parts) == 1, role, compared)
                    uses.setdefault(part.key, []).append(use)
    return uses


def _layouts(
    reading: Reading, uses: Mapping[Key, Sequence[Use]], names: Mapping[Key, str]
) -> dict[str, Sequence[Entry]]:
    """Return the axes map."""
    use_at = {(use.tensor, use.position, use.part.start): use for where in uses.values() for use in where}

    def axis(tensor: str, position: int, part: Part) -> Axis | None:
        use = use_at.get((tensor, position, part.start))
        if use is None:
            return None
        return Axis(names[part.key], use.role, part.inner, part.outer, use.compared)

    layouts: dict[str, Sequence[Entry]] = {}
    for tensor, axes in reading.tensors.items():
        entries: list[Entry] = []
        for position, factor in enumerate(axes):
            windows = [Window(axis(tensor, position, part), part.width) for part in parts_of(factor)]
            entries.append(windows[0].axis if len(windows) == 1 else windows)
        if any(entry is not None for entry in entries):
            while entries[-1] is None:
                entries.pop()
            layouts[tensor] = entries
    return layouts


def _names(uses: Mapping[Key, Sequence[Use]]) -> dict[Key, str]:
    """Name every node after the module that produces it first."""
    chosen: dict[str, list[Key]] = {}
    for key, where in uses.items():
        by_rank = sorted(where, key=_preference)
        tensor = by_rank[0].tensor
        chosen.setdefault(tensor.rpartition(".")[0] or tensor, []).append(key)
    return {
        key: name if len(keys) == 1 else f"{name}.{index}"
        for name, keys in chosen.items()
        for index, key in enumerate(keys)
    }


def _preference(use: Use) -> tuple[bool, bool, bool]:
    return use.role != "produce", use.ndim < 2, not use.tensor.endswith(".weight")


def _groups(names: Mapping[Key, str]) -> dict[str, Groups]:
    """Return the groups of nodes whose units move within their group, and of those that share the groups."""
    sharing: dict[Any, list[Key]] = {}
    for key in names:
        sharing.setdefault(key[0], []).append(key)
    groups = {}
    for first, keys in sharing.items():
        if len(keys) > 1 or len(keys[0]) > 1:
            tie = names[keys[0]] if len(keys) > 1 else None
            groups.update({names[key]: Groups(first.size, tie) for key in keys})
    return groups
