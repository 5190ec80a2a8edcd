"""Partial merges: find the tensors that the tasks share and those that each task keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mudsc_fast._similar_names import similar_names
from mudsc_fast._tensors import tied_tensors
from mudsc_fast.spec.permutation_spec import PermutationSpec

_MAX_LISTED = 10


@dataclass(frozen=True)
class Division:
    """The tensors of a partial merge.

    Attributes
    ----------
    task_heads
        Names of the tensors in the task heads, which are not compared.
    comparable
        The specification without the task heads, which is matched.
    shared
        Names of the tensors that are merged into one trunk, in the order of the state dict.
    per_task
        Names of the tensors that each task keeps for itself.
    """

    task_heads: frozenset[str]
    comparable: PermutationSpec
    shared: tuple[str, ...]
    per_task: tuple[str, ...]


def divide(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    stop_at: Sequence[str],
    task_heads: Sequence[str],
) -> Division:
    """Divide the tensors of the models into shared ones and those that each task keeps.

    Parameters
    ----------
    state_dicts
        The models' tensors.
    spec
        The axes map.
    stop_at
        The last layers to merge: nodes, tensor names, or prefixes of names that end before a dot. Among the tensors
        that nodes connect to a stop, those up to the stop, in the order of the spec, are shared. Without a stop, and in
        parts that are not connected to one, all tensors are shared. A tensor without a node is treated like the one
        before it. A tensor with several names is shared if one of its names is.
    task_heads
        Tensors to keep per task: names, or prefixes of names that end before a dot.

    Raises
    ------
    ValueError
        If an entry of `stop_at` or `task_heads` names nothing, `task_heads` contains some but not all names of a
        tensor, or no node is left to match.
    """
    names = tuple(state_dicts[0])
    for head in task_heads:
        if not any(_begins(name, head) for name in names):
            raise ValueError(
                f"task_heads names {head!r}, but no tensor name begins with it; {similar_names(head, names)}"
            )
    own = {name for name in names if any(_begins(name, head) for head in task_heads)} | _unequal_heads(
        state_dicts, spec
    )
    comparable = spec.without(own) if own else spec
    trunk = _trunk(spec, stop_at)
    in_trunk = True
    merged = set()
    for name in names:
        in_trunk = trunk.get(name, in_trunk)
        if in_trunk and name not in own:
            merged.add(name)
    for tied in tied_tensors(state_dicts) if len(merged) < len(names) else ():
        if own.intersection(tied) and not own.issuperset(tied):
            raise ValueError(
                f"task_heads must name all of {', '.join(map(repr, tied))} or none: they are the same tensor"
            )
        if merged.intersection(tied):
            merged.update(tied)
    shared = [name for name in names if name in merged]
    return Division(frozenset(own), comparable, tuple(shared), tuple(name for name in names if name not in merged))


def _unequal_heads(state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec) -> set[str]:
    """Return all tensors of the output layers whose sizes differ between the models."""
    heads = set()
    for name, tensor in state_dicts[0].items():
        shapes = [state_dict[name].shape for state_dict in state_dicts]
        if all(shape == tensor.shape for shape in shapes) or not _produces_nothing(spec, name):
            continue
        layout = spec.layouts.get(name, ())
        mapped = [i for i, segments in enumerate(layout) if any(segment.axis is not None for segment in segments)]
        if all(len(shape) == tensor.ndim and all(shape[i] == tensor.shape[i] for i in mapped) for shape in shapes):
            heads.add(name)
    modules = {name.rpartition(".")[0] for name in heads} - {""}
    return heads | {
        name for name in state_dicts[0] if name.rpartition(".")[0] in modules and _produces_nothing(spec, name)
    }


def _produces_nothing(spec: PermutationSpec, name: str) -> bool:
    return all(
        segment.axis is None or segment.axis.role == "consume"
        for segments in spec.layouts.get(name, ())
        for segment in segments
    )


def _trunk(spec: PermutationSpec, stop: Sequence[str]) -> dict[str, bool]:
    """Return for each tensor with a node whether it is the stop of its part or comes before it."""
    order = {name: position for position, name in enumerate(spec.layouts)}
    part_of = _linked_parts(spec)
    last_of_part: dict[str, int] = {}
    for entry in stop:
        named = [name for name in _stop_tensors(spec, entry) if name in part_of]
        if not named:
            raise ValueError(
                f"stop_at must name a node, or begin the name of a tensor that has one, got {entry!r}; nodes: "
                + ", ".join(spec.nodes[:_MAX_LISTED])
                + (", ..." if len(spec.nodes) > _MAX_LISTED else "")
                + f"; {similar_names(entry, list(part_of), spec.nodes)}"
            )
        last = max(named, key=order.__getitem__)
        part = part_of[last]
        last_of_part[part] = max(order[last], last_of_part.get(part, -1))
    return {name: order[name] <= last_of_part.get(part, order[name]) for name, part in part_of.items()}


def _stop_tensors(spec: PermutationSpec, entry: str) -> list[str]:
    """Return the tensors that a stop selects by a prefix of their names, or by a node that their layers produce."""
    if entry not in spec.nodes:
        return [name for name in spec.layouts if _begins(name, entry)]
    uses = [use for use in spec.uses(entry) if use.axis.role == "produce" and use.axis.compared]
    # The running statistics of a norm follow its weights and belong to it.
    modules = {use.tensor.rpartition(".")[0] for use in uses} - {""}
    tensors = {use.tensor for use in uses}
    return [name for name in spec.layouts if name in tensors or name.rpartition(".")[0] in modules]


def _linked_parts(spec: PermutationSpec) -> dict[str, str]:
    """Return, for each tensor with a node, the first tensor of its part: the set of tensors connected by nodes."""
    part_of: dict[str, str] = {}
    for node in spec.nodes:
        tensors = [use.tensor for use in spec.uses(node)]
        joined = {part_of.get(name, name) for name in tensors}
        first = next(name for name in spec.layouts if name in joined)
        part_of.update(dict.fromkeys(tensors, first))
        part_of.update({name: first for name, part in part_of.items() if part in joined})
    return part_of


def _begins(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(beginning + ".")
