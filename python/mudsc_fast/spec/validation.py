"""Checks of a specification against the tensors and modules of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mudsc_fast._similar_names import similar_names
from mudsc_fast.spec.axes import Layout, TensorAxis
from mudsc_fast.spec.groups import Groups
from mudsc_fast.spec.observation import Observation

#: Similar names are searched for at most this many names: more are not typing errors, and the search takes time.
_MAX_SUGGESTIONS = 3


def count_units(use: TensorAxis, shape: Sequence[int]) -> int:
    """Return the number of units on an axis of a tensor of this shape."""
    length = shape[use.position] if use.segment.width is None else use.segment.width
    return length // (use.axis.inner * use.axis.outer)


def tensor_problems(
    layouts: Mapping[str, Layout],
    uses: Mapping[str, Sequence[TensorAxis]],
    groups: Mapping[str, Groups],
    state_dict: Mapping[str, Tensor],
) -> list[str]:
    """Return one message for each way in which a specification does not fit the tensors."""
    # Each tensor is read once, as mappings of files make it on access.
    shapes = {name: tuple(state_dict[name].shape) for name in layouts if name in state_dict}
    by_tensor = {name: _layout_problems(name, layout, shapes.get(name)) for name, layout in layouts.items()}
    missing = [name for name in layouts if name not in shapes]
    for name in missing if len(missing) <= _MAX_SUGGESTIONS else ():
        by_tensor[name] = [f"{problem}; {similar_names(name, state_dict)}" for problem in by_tensor[name]]
    problems = [problem for found in by_tensor.values() for problem in found]
    for node, where in uses.items():
        fitting = [use for use in where if not by_tensor[use.tensor]]
        if not fitting:
            continue
        first = fitting[0]
        expected = count_units(first, shapes[first.tensor])
        problems += [
            f"{use} has {count_units(use, shapes[use.tensor])} units, but node {node!r} has {expected} units on {first}"
            for use in fitting
            if count_units(use, shapes[use.tensor]) != expected
        ]
        if expected % groups[node].count:
            problems.append(f"node {node!r} has {expected} units, which {groups[node].count} groups do not divide")
    return problems


def observation_problems(
    node: str, observation: Observation, module: nn.Module | None, num_units: int | None
) -> list[str]:
    """Return one message for each reason why `node` cannot be observed there.

    `module` is None if the model has no submodule of that name, `num_units` is None if it is not known.
    """
    if module is None:
        return [f"node {node!r} is observed at module {observation.module!r}, which the model does not have"]
    problems = port_problems(node, observation, module)
    if observation.width is not None and num_units is not None:
        expected = observation.outer * num_units * observation.inner
        if observation.width != expected:
            problems.append(
                f"node {node!r} has {num_units} units, but is observed at {observation.width} entries of the "
                f"{observation.port} of {observation.module!r}, {expected} expected"
            )
    return problems


def port_problems(node: str, observation: Observation, module: nn.Module) -> list[str]:
    """Return one message if a module does not have the observed port."""
    needed = {"projection": nn.MultiheadAttention, "state": nn.RNNBase}.get(observation.port)
    if needed is None or isinstance(module, needed):
        return []
    return [
        f"spec observes node {node!r} at the {observation.port} of {observation.module!r}, which must be a "
        f"torch.nn.{needed.__name__}, got {type(module).__name__}"
    ]


def _layout_problems(tensor: str, layout: Layout, shape: tuple[int, ...] | None) -> list[str]:
    if shape is None:
        return [f"spec names the tensor {tensor!r}, which the models do not have"]
    if len(shape) < len(layout):
        return [f"spec gives {len(layout)} axes to {tensor!r}, which has {len(shape)}: shape {shape}"]
    problems = []
    for position, segments in enumerate(layout):
        covered = sum(shape[position] if segment.width is None else segment.width for segment in segments)
        if covered != shape[position]:
            problems.append(
                f"axis {position} of {tensor!r} has length {shape[position]}, but its windows cover {covered}"
            )
            continue
        for segment in segments:
            width = shape[position] if segment.width is None else segment.width
            if segment.axis is not None and width % (segment.axis.inner * segment.axis.outer):
                problems.append(
                    f"axis {position} of {tensor!r} holds {width} entries of node {segment.axis.node!r}, not a "
                    f"multiple of inner * outer = {segment.axis.inner * segment.axis.outer}"
                )
    return problems
