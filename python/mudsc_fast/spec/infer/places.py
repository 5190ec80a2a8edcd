"""Where the units of derived nodes can be observed: the modules through which a tensor with these units goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mudsc_fast.spec.axes import Role
from mudsc_fast.spec.infer.factors import Factor, product
from mudsc_fast.spec.infer.graph import ModuleCall
from mudsc_fast.spec.infer.nodes import Key, NodeSegment, segments_of
from mudsc_fast.spec.infer.views import View
from mudsc_fast.spec.observation import Observation, Port


@dataclass(frozen=True)
class Use:
    """A node's use of an axis of a tensor."""

    tensor: str
    position: int
    ndim: int
    segment: NodeSegment
    whole: bool
    role: Role
    compared: bool


@dataclass(frozen=True)
class _Candidate:
    observation: Observation
    samples: int


class Places:
    """The places at which each node can be observed."""

    def __init__(self, model: nn.Module, calls: Sequence[ModuleCall]) -> None:
        self._model = model
        self._found: dict[Key, dict[tuple[str, Port], list[_Candidate]]] = {}
        calls_of: dict[str, list[ModuleCall]] = {}
        for call in calls:
            if call.path:
                calls_of.setdefault(call.path, []).append(call)
        for path, repeated in calls_of.items():
            inputs, outputs = ([getattr(call, name) for call in repeated] for name in ("inputs", "outputs"))
            self._add(path, "input", inputs)
            self._add(path, "output", outputs)

    def of(self, key: Key, uses: Sequence[Use]) -> list[Observation]:
        """Return where a node is best observed.

        That is the input of a layer that consumes it: the one with most samples, the last of these. Where no layer does
        (queries and keys), it is the output of every layer that produces it; else wherever it passes last.
        """
        found = self._found.get(key, {})
        consumers = [self._owner(use) for use in uses if use.role == "consume"]
        read = [candidate for owner in consumers for candidate in found.get((owner, "input"), [])]
        if read:
            return [max(reversed(read), key=lambda candidate: candidate.samples).observation]
        written: dict[Observation, None] = {}
        for use in uses:
            if use.role == "produce" and use.ndim > 1 and use.compared:
                written |= dict.fromkeys(self._projections(use))
                written |= dict.fromkeys(c.observation for c in found.get((self._owner(use), "output"), []))
        if written:
            return list(written)
        last = [candidate for candidates in found.values() for candidate in candidates]
        return [max(reversed(last), key=lambda candidate: candidate.samples).observation] if last else []

    def _add(self, path: str, port: Port, views_of_calls: Sequence[Sequence[View]]) -> None:
        """Note what passes a port of a module, if every call has one tensor there, and all are alike."""
        if any(len(views) != 1 for views in views_of_calls):
            return
        seen = [_observations(path, port, views[0]) for views in views_of_calls]
        for key, candidates in seen[0].items():
            if all(other.get(key) == candidates for other in seen[1:]):
                self._found.setdefault(key, {})[path, port] = candidates

    def _projections(self, use: Use) -> list[Observation]:
        """Return the window of a node in what ``torch.nn.MultiheadAttention`` projects, which no submodule does."""
        module, _, name = use.tensor.rpartition(".")
        if name != "in_proj_weight" or not isinstance(self._model.get_submodule(module), nn.MultiheadAttention):
            return []
        segment = use.segment
        return [Observation(module, "projection", -1, segment.start, segment.width, segment.inner, segment.outer)]

    @staticmethod
    def _owner(use: Use) -> str:
        return use.tensor.rpartition(".")[0]


def _observations(path: str, port: Port, view: View) -> Mapping[Key, list[_Candidate]]:
    """Return, for each node with units on an axis of a tensor, where they are."""
    found: dict[Key, list[_Candidate]] = {}
    shape = view.shape
    for position in range(len(shape)):
        segments = _segments(view, position) or []
        for segment in segments:
            if segment.key:
                place = -1 if position == len(shape) - 1 else position
                start, width = (0, None) if len(segments) == 1 else (segment.start, segment.width)
                observation = Observation(path, port, place, start, width, segment.inner, segment.outer)
                samples = math.prod(shape) // shape[position] * segment.inner * segment.outer
                found.setdefault(segment.key, []).append(_Candidate(observation, samples))
    return found


def _segments(view: View, position: int) -> list[NodeSegment] | None:
    """Return the segments of an axis that consists of whole axes of the base, or of whole segments of one of them.

    Return None for any other axis: factors must not be refined any more.
    """
    pieces = list(view.axes[position])
    factors: list[Factor] = []
    while pieces:
        last = pieces.pop()
        axis, count = last.axis, last.count
        while pieces and pieces[-1].axis == axis and pieces[-1].step == last.step * count:
            count *= pieces.pop().count
        if axis is None or last.step != 1:
            return None
        factor = view.base.axes[axis]
        if count != factor.size:
            begin, end = view.offsets[axis], view.offsets[axis] + count
            inside = [s for s in segments_of(factor) if begin <= s.start and s.start + s.width <= end]
            whole = not factors and not pieces and sum(segment.width for segment in inside) == count
            return [replace(segment, start=segment.start - begin) for segment in inside] if whole else None
        factors.append(factor)
    return segments_of(product(factors[::-1]))
