"""Where the units of derived nodes can be observed: the modules that a tensor with these units passes through."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from mudsc_fast.spec.axes import Role
from mudsc_fast.spec.infer.factors import Factor, product
from mudsc_fast.spec.infer.graph import Passed, Reading
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

    def __init__(self, model: nn.Module, reading: Reading) -> None:
        self._model = model
        self._ports = reading.ports
        self._found: dict[Key, dict[tuple[str, Port], list[_Candidate]]] = {}
        passed_at: dict[tuple[str, Port], list[Sequence[Passed]]] = {}
        for call in reading.calls:
            if call.path:
                passed_at.setdefault((call.path, "input"), []).append(call.inputs)
                passed_at.setdefault((call.path, "output"), []).append(call.outputs)
        #: The modules that compute with data, not only with weights as those of parametrizations do.
        self._with_data = {
            path for (path, _), calls in passed_at.items() if any(passed.from_data for call in calls for passed in call)
        }
        for (path, port), calls in passed_at.items():
            self._add(path, port, calls)

    def of(self, key: Key, uses: Sequence[Use]) -> list[Observation]:
        """Return where a node is best observed.

        This is the input of a layer that consumes it: the layer with most samples, and the last one of these. If no
        layer consumes it (queries and keys), it is the output of every layer that produces it, and otherwise the last
        place where it passes.
        """
        found = self._found.get(key, {})
        consumers = [self._owner(use) for use in uses if use.role == "consume"]
        read = [candidate for owner in consumers for candidate in found.get((owner, "input"), [])]
        if read:
            return [max(reversed(read), key=lambda candidate: candidate.samples).observation]
        written: dict[Observation, None] = {}
        for use in uses:
            if use.role == "produce" and use.ndim > 1 and use.compared:
                written |= dict.fromkeys([*self._projections(use), *self._states(use)])
                written |= dict.fromkeys(c.observation for c in found.get((self._owner(use), "output"), []))
        if written:
            return list(written)
        last = [candidate for candidates in found.values() for candidate in candidates]
        return [max(reversed(last), key=lambda candidate: candidate.samples).observation] if last else []

    def _add(self, path: str, port: Port, calls: Sequence[Sequence[Passed]]) -> None:
        """Note what passes a port of a module, if every call has one tensor there, and all calls are alike.

        The tensor must depend on the inputs of the model, and be the first one at that port.
        """
        if any(len(call) != 1 or not call[0].from_data for call in calls):
            return
        if any(call[0].view.shape not in self._ports.get((path, port), ()) for call in calls):
            return
        seen = [_observations(path, port, call[0].view) for call in calls]
        for key, candidates in seen[0].items():
            if all(other.get(key) == candidates for other in seen[1:]):
                self._found.setdefault(key, {})[path, port] = candidates

    def _projections(self, use: Use) -> list[Observation]:
        """Return the window of a node in the projections of ``torch.nn.MultiheadAttention``, which has no submodule."""
        path, _, name = use.tensor.rpartition(".")
        module = self._model.get_submodule(path)
        weights = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        if not isinstance(module, nn.MultiheadAttention) or name not in ("in_proj_weight", *weights):
            return []
        segment = use.segment
        start = segment.start + (weights.index(name) * module.embed_dim if name in weights else 0)
        return [Observation(path, "projection", -1, start, segment.width, segment.inner, segment.outer)]

    def _states(self, use: Use) -> list[Observation]:
        """Return the window of a node in the final states of a recurrent layer of PyTorch."""
        path, _, name = use.tensor.rpartition(".")
        module = self._model.get_submodule(path)
        found = re.fullmatch(r"weight_ih_l(\d+)(_reverse)?", name)
        if not isinstance(module, nn.RNNBase) or module.proj_size or found is None or use.position != 0:
            return []
        place = int(found[1]) * (2 if module.bidirectional else 1) + bool(found[2])
        return [Observation(path, "state", -1, place * module.hidden_size, module.hidden_size)]

    def _owner(self, use: Use) -> str:
        """Return the innermost module around a tensor that computes with data."""
        owner = use.tensor.rpartition(".")[0]
        while owner and owner not in self._with_data:
            owner = owner.rpartition(".")[0]
        return owner


def _observations(path: str, port: Port, view: View) -> Mapping[Key, list[_Candidate]]:
    """Return, for each node with units on an axis of a tensor, the places of these units."""
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
