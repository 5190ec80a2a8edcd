"""Finds the layers of a recorded network that can be fitted, and the target of each.

A layer is an operator that is linear in a parameter. It is fitted to what the parents compute at its *target*: its own
output, the output of the BatchNorm that follows it, or the last residual sum in which its output is the only unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mudsc_fast.refitting.tape import BATCH_NORMS, Call, Ref, Tape

Kind = Literal["linear", "convolution", "norm"]

_OTHER_NORMS = ("native_layer_norm", "native_group_norm")
#: Operators that only move data, and whose effect can be undone.
_REARRANGEMENTS = (
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "permute",
    "transpose",
    "t",
    "clone",
    "contiguous",
    "squeeze",
    "unsqueeze",
    "flatten",
    "unflatten",
    "roll",
    "alias",
    "detach",
)


@dataclass(frozen=True)
class Step:
    """An operator between a layer's output and its target: it moves data, adds a value, or multiplies by a factor."""

    kind: Literal["move", "add", "scale"]
    call: Call
    #: The value that is added, or the factor.
    other: int | float | None = None


@dataclass
class Layer:
    """A layer to fit, as recorded in one tape.

    Attributes
    ----------
    name
        The parameter's name without a trailing ``.weight``.
    kind
        Type of the operator.
    position
        Position of the call in the tape.
    weight, bias
        The values that are fitted. The bias may be one that a separate addition after the layer adds.
    norm
        The BatchNorm that follows the layer, if any. Layer and BatchNorm are fitted together.
    target
        The value that is compared with the parents'.
    steps
        The operators between the output (of the BatchNorm, if any) and the target.
    """

    name: str
    kind: Kind
    position: int
    call: Call
    input: int
    output: int
    weight: int
    bias: int | None
    norm: Call | None = None
    target: int = -1
    #: Position after the call that computes the target.
    end: int = -1
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Skipped:
    """A parameter that is not fitted, and the reason."""

    name: str
    reason: str


def is_layer_call(call: Call) -> bool:
    """Return whether an operator may be linear in a parameter, judged by its name."""
    return call.name in ("addmm", "mm", "linear", "convolution")


def may_be_target(call: Call) -> bool:
    """Return whether the result of an operator may be the target of a layer, judged by its name."""
    return is_layer_call(call) or call.name in (*BATCH_NORMS, *_OTHER_NORMS, "add")


def find_layers(tape: Tape, fixed: Mapping[int, Tensor]) -> tuple[list[Layer], list[Skipped]]:
    """Return the layers of a tape in the order of its calls, and the parameters that cannot be fitted."""
    finder = _Finder(tape, fixed)
    return finder.layers(), finder.skipped


class _Finder:
    def __init__(self, tape: Tape, fixed: Mapping[int, Tensor]) -> None:
        self._tape, self._fixed = tape, fixed
        self._consumers = tape.consumers()
        self._producers = tape.producers()
        self._uses = self._uses_of_parameters()
        self.skipped: list[Skipped] = []

    def layers(self) -> list[Layer]:
        found: list[Layer] = []
        folded: set[int] = set()
        for position, call in enumerate(self._tape.calls):
            layer = None if position in folded else self._layer(position, call)
            if layer is None:
                continue
            self._follow(layer)
            if layer.norm is not None:
                folded.add(self._tape.calls.index(layer.norm))
            found.append(layer)
        kept = [layer for layer in found if self._is_fitable(layer)]
        fitted = {name for layer in kept for name in self.names_of(layer)}
        fitted |= {skipped.name for skipped in self.skipped}
        for name, calls in self._uses.items():
            if name not in fitted:
                self.skipped.append(Skipped(name, _reason(self._tape.calls[calls[0]])))
        return kept

    def names_of(self, layer: Layer) -> list[str]:
        """Return the names of all tensors of the state dict that fitting a layer changes."""
        values = [layer.weight, layer.bias]
        if layer.norm is not None:
            named = layer.norm.named
            values += [named[key].value for key in ("weight", "bias", "running_mean", "running_var")]
        return [self._tape.parameters[v] for value in values if value is not None for v in self._roots(value)]

    def _layer(self, position: int, call: Call) -> Layer | None:
        if call.name in ("addmm", "mm", "linear"):
            return self._linear(position, call)
        named = call.named
        if call.name == "convolution":
            kind: Kind = "convolution"
        elif call.name in (*BATCH_NORMS, *_OTHER_NORMS):
            kind = "norm"
        else:
            return None
        weight, bias = named["weight"], named["bias"]
        if not self._is_parameter(weight) or (bias is not None and not self._is_parameter(bias)):
            return None
        if call.name in BATCH_NORMS and not all(
            self._is_parameter(named[key]) for key in ("running_mean", "running_var")
        ):
            return None
        output = call.outputs[0]
        assert output is not None
        name = self._name(weight.value)
        bias_value = None if bias is None else bias.value
        return Layer(name, kind, position, call, named["input"].value, output, weight.value, bias_value)

    def _linear(self, position: int, call: Call) -> Layer | None:
        named = call.named
        if call.name == "linear":
            read, weight, bias = named["input"], named["weight"], named["bias"]
        elif call.name == "addmm":
            read, weight, bias = named["mat1"], named["mat2"], named["self"]
            if named["beta"] != 1 or named["alpha"] != 1 or not self._is_parameter(bias):
                return None
        else:
            read, weight, bias = named["self"], named["mat2"], None
        if not self._is_parameter(weight) or not isinstance(read, Ref) or self._is_parameter(read):
            return None
        output = call.outputs[0]
        assert output is not None
        bias_value = None if bias is None else bias.value
        return Layer(self._name(weight.value), "linear", position, call, read.value, output, weight.value, bias_value)

    def _follow(self, layer: Layer) -> None:
        """Find the target of a layer: the last value in which the layer's output is the only unknown."""
        value = layer.output
        steps: list[Step] = []
        layer.target, layer.end = value, layer.position + 1
        if layer.kind == "norm":
            return
        while True:
            consumers = self._consumers.get(value, [])
            if len(consumers) != 1:
                return
            call = self._tape.calls[consumers[0]]
            output = call.outputs[0]
            if output is None:
                return
            if value == layer.output and layer.norm is None and self._folds(call, value):
                layer.norm = call
                layer.target = value = output
                layer.end = consumers[0] + 1
                continue
            step = self._step(call, value, layer)
            if step is None:
                return
            value = output
            if step.kind == "add" and isinstance(step.other, int) and self._is_bias(step.other, layer, steps):
                layer.bias = step.other
            steps.append(step)
            if step.kind == "add":
                layer.target, layer.end, layer.steps = value, consumers[0] + 1, list(steps)

    def _folds(self, call: Call, value: int) -> bool:
        if call.name not in BATCH_NORMS:
            return False
        named = call.named
        tensors = [named.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
        return named["input"] == Ref(value) and all(self._is_parameter(tensor) for tensor in tensors)

    def _step(self, call: Call, value: int, layer: Layer) -> Step | None:
        if call.name in _REARRANGEMENTS:
            return Step("move", call)
        named = call.named
        operands = (named.get("self"), named.get("other"))
        if call.name not in ("add", "mul") or operands.count(Ref(value)) != 1:
            return None
        other = operands[1] if operands[0] == Ref(value) else operands[0]
        if call.name == "mul":
            if isinstance(other, (int, float)):
                return Step("scale", call, float(other))
            is_parameter = isinstance(other, Ref) and self._is_parameter(other)
            return Step("scale", call, other.value) if is_parameter and isinstance(other, Ref) else None
        if named.get("alpha", 1) != 1 or not isinstance(other, Ref):
            return None
        output = call.outputs[0]
        assert output is not None
        if self._tape.shapes[value] != self._tape.shapes[output] or not self._is_known_before(other.value, layer):
            return None
        return Step("add", call, other.value)

    def _is_known_before(self, value: int, layer: Layer) -> bool:
        return self._producers.get(value, -1) < layer.position

    def _is_bias(self, value: int, layer: Layer, steps: Sequence[Step]) -> bool:
        """Return whether the added value is the layer's own bias."""
        name = self._tape.parameters.get(value)
        return (
            layer.kind == "linear"
            and layer.bias is None
            and name is not None
            and self._tape.shapes[value] == self._tape.shapes[layer.output][-1:]
            and all(step.call.name in ("view", "_unsafe_view") for step in steps)
        )

    def _is_parameter(self, argument: Any) -> bool:
        return isinstance(argument, Ref) and self._tape.sources[argument.value] == "parameters"

    def _roots(self, value: int) -> list[int]:
        """Return the tensors of the state dict that a value is computed from."""
        made = {v: call for call in self._tape.prelude for v in call.outputs if v is not None}
        if value not in made:
            return [value] if value in self._tape.parameters else []
        return [root for source in made[value].inputs for root in self._roots(source)]

    def _name(self, value: int) -> str:
        roots = self._roots(value)
        return self._tape.parameters[roots[0]].removesuffix(".weight") if roots else "?"

    def _uses_of_parameters(self) -> dict[str, list[int]]:
        uses: dict[str, list[int]] = {}
        for position, call in enumerate(self._tape.calls):
            for value in call.inputs:
                if self._tape.sources[value] == "parameters":
                    for root in self._roots(value):
                        uses.setdefault(self._tape.parameters[root], []).append(position)
        return uses

    def _is_fitable(self, layer: Layer) -> bool:
        """Return whether the layer's tensors are parameters, or parts of parameters, that no other operator reads."""
        values = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        for value in values:
            roots = self._roots(value)
            name = self._tape.parameters[roots[0]] if roots else layer.name
            root = self._fixed[roots[0]] if roots else None
            tensor = self._fixed[value]
            if root is None or tensor.untyped_storage()._cdata != root.untyped_storage()._cdata:
                self.skipped.append(Skipped(name, "it is computed from other tensors"))
                return False
            if self._overlapping_uses(value) > 1:
                self.skipped.append(Skipped(name, "it is used more than once (tied or shared)"))
                return False
        return True

    def _overlapping_uses(self, value: int) -> int:
        own, place = self._fixed[value], _extent(self._fixed[value])
        count = 0
        for call in self._tape.calls:
            for other in call.inputs:
                tensor = self._fixed.get(other)
                if tensor is None or self._tape.sources[other] != "parameters":
                    continue
                if tensor.untyped_storage()._cdata == own.untyped_storage()._cdata:
                    begin, end = _extent(tensor)
                    count += begin < place[1] and place[0] < end
        return count


def undo(steps: Sequence[Step], shapes: Sequence[tuple[int, ...]], value: Tensor) -> Tensor:
    """Undo the steps that only move data, and return the value in the layout that it had before them."""
    for step in reversed(steps):
        if step.kind == "move":
            source = step.call.inputs[0]
            value = _undo_move(step.call, shapes[source], value)
    return value


def _undo_move(call: Call, shape: tuple[int, ...], value: Tensor) -> Tensor:
    named = call.named
    if call.name == "permute":
        dims = [dim % value.ndim for dim in named["dims"]]
        return value.permute([dims.index(axis) for axis in range(value.ndim)])
    if call.name == "transpose":
        return value.transpose(named["dim0"], named["dim1"])
    if call.name == "t":
        return value.t()
    if call.name == "roll":
        return torch.roll(value, [-shift for shift in named["shifts"]], named["dims"])
    return value.reshape(shape)


def output_entries(tape: Tape, weight: int, axis: int) -> tuple[str, int, Tensor]:
    """Return the tensor of the state dict, its axis, and the entries of that axis that an axis of a weight represents.

    The weight may be a transposed tensor or a slice of one: the same operations are applied to the entries' indices.
    """
    made: dict[int, Call] = {v: call for call in tape.prelude for v in call.outputs if v is not None}
    root = weight
    while root in made:
        root = made[root].inputs[0]
    if root == weight:
        return tape.parameters[root], axis, torch.arange(tape.shapes[root][axis])
    shape = tape.shapes[root]
    for position, length in enumerate(shape):
        numbers = torch.arange(length).view([-1 if i == position else 1 for i in range(len(shape))]).expand(shape)
        moved = _moved(tape, made, weight, root, numbers)
        along = moved[tuple(slice(None) if i == axis else 0 for i in range(moved.ndim))]
        if torch.equal(moved, along.view([-1 if i == axis else 1 for i in range(moved.ndim)]).expand(moved.shape)):
            return tape.parameters[root], position, along.clone()
    raise ValueError(f"axis {axis} of the weight computed from {tape.parameters[root]!r} is not one of its axes")


def _moved(tape: Tape, made: Mapping[int, Call], value: int, root: int, numbers: Tensor) -> Tensor:
    if value == root:
        return numbers
    call = made[value]
    moved = _moved(tape, made, call.inputs[0], root, numbers)
    results = pytree.tree_leaves(call.run({call.inputs[0]: moved}))
    result: Tensor = results[call.outputs.index(value)]
    return result


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the range of storage entries that a tensor spans: the first entry, and the one after the last."""
    begin = int(tensor.storage_offset())
    spans = ((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + int(sum(spans)) + 1 if tensor.numel() else begin


def _reason(call: Call) -> str:
    if "embedding" in call.name:
        return "it is an embedding table"
    if call.name in ("add", "mul", "sub", "div"):
        return "it is added or multiplied element-wise"
    if is_layer_call(call):
        return "another tensor of its layer is not fitted"
    return f"the operator {call.name} is not fitted"
