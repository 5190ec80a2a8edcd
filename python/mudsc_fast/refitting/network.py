"""Computes a network's forward pass step by step, from its tape.

This costs less than the model's own forward pass: BatchNorm is folded into the convolution before it, and element-wise
operators run in place where nothing else reads their input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mudsc_fast._forward import Forward
from mudsc_fast.refitting.tape import BATCH_NORMS, Call, Ref, Tape, record

#: Layouts of tensors with channels, by their number of axes.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

#: Operators that have an in-place variant, named with a trailing underscore.
_IN_PLACE = ("add", "gelu", "hardswish", "hardtanh", "mul", "relu", "sigmoid", "silu", "tanh")


class Network:
    """A network whose forward pass is computed step by step, over several batches.

    Parameters
    ----------
    model
        The network. Its tensors may change in place; after a change, call :meth:`weights_changed`.
    batches
        The batches, already on the model's device.
    forward
        Runs the model on a batch, if calling the model with the batch is not enough.
    keep
        Returns whether to keep an operator's results when the forward pass of a batch is recorded. :meth:`recorded`
        returns them. By default, none are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        forward: Forward | None,
        keep: Callable[[Call], bool] | None = None,
    ) -> None:
        self.model = model
        self._tensors = model.state_dict(keep_vars=True)
        self._leaves = [[v for v in pytree.tree_leaves(batch) if isinstance(v, Tensor)] for batch in batches]
        tapes: dict[object, Tape] = {}
        self.tapes: list[Tape] = []
        self._recorded: dict[int, dict[int, Tensor]] = {}
        self._folded: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for index, batch in enumerate(batches):
            key = _signature(batch)
            if key not in tapes:
                tapes[key], self._recorded[index] = record(model, batch, index, forward, keep)
            self.tapes.append(tapes[key])

    def use(self, tapes: Sequence[Tape]) -> None:
        """Use other tapes, e.g. the same ones in another order."""
        self.tapes = list(tapes)
        self._steps = {id(tape): _Steps(tape) for tape in tapes}
        self._fixed = {id(tape): self._fixed_values(tape) for tape in tapes}

    def fixed(self, batch: int) -> Mapping[int, Tensor]:
        """Return the values that do not depend on the data: parameters, values computed from them, and constants."""
        return self._fixed[id(self.tapes[batch])]

    def start(self, batch: int) -> dict[int, Tensor]:
        """Return the values that are known before the first call."""
        return dict(zip(self.tapes[batch].batch_values, self._leaves[batch], strict=True))

    def recorded(self, batch: int) -> Mapping[int, Tensor]:
        """Return the values that were kept when the batch's forward pass was recorded; none for most batches."""
        return self._recorded.get(batch, {})

    def forget_recorded(self, batch: int) -> None:
        """Free what :meth:`recorded` returns."""
        self._recorded.pop(batch, None)

    def weights_changed(self) -> None:
        """Discard everything that was computed from the network's tensors."""
        self._folded.clear()

    def advance(
        self,
        batch: int,
        values: Mapping[int, Tensor],
        begin: int,
        end: int,
        observe: Mapping[int, Callable[[Tensor], None]] | None = None,
    ) -> dict[int, Tensor]:
        """Compute the calls from `begin` to `end` (exclusive), and return the values that later calls read.

        The given values are not modified. `observe` maps values to functions that are called with them as soon as
        they are computed. A function must not keep the value, because later calls may overwrite it.
        """
        tape = self.tapes[batch]
        steps, fixed = self._steps[id(tape)], self._fixed[id(tape)]
        live = {**fixed, **values}
        position = begin
        while position < end:
            call = tape.calls[position]
            observed = observe is not None and call.outputs[0] in observe
            if position in steps.folded and position + 1 < end and not observed:
                norm = tape.calls[position + 1]
                key = (id(tape), position)
                if key not in self._folded:
                    self._folded[key] = _fold(call, norm, live)
                results: list[Any] = [_convolve(call, live, *self._folded[key])]
                call, position = norm, position + 1
            else:
                in_place = position in steps.overwriting and call.inputs[0] not in values
                results = pytree.tree_leaves(_run(call, live, in_place))
            for value, result in zip(call.outputs, results, strict=False):
                if value is not None:
                    live[value] = result
                    if observe and value in observe:
                        observe[value](result)
            for value in steps.done_at[position]:
                live.pop(value, None)
            position += 1
        return {value: tensor for value, tensor in live.items() if value not in fixed and steps.last[value] >= end}

    def _fixed_values(self, tape: Tape) -> dict[int, Tensor]:
        values = dict(tape.constants)
        values |= {value: self._tensors[name].detach() for value, name in tape.parameters.items()}
        for call in tape.prelude:
            results = pytree.tree_leaves(call.run(values))
            values |= {value: r for value, r in zip(call.outputs, results, strict=True) if value is not None}
        return values


class Progress:
    """Tracks how far each batch of several networks is computed, and keeps the values needed to continue.

    If these values exceed the memory, a batch is computed again from the last values that were kept.

    Parameters
    ----------
    networks
        The networks. All have the same batches.
    memory
        Maximum number of bytes of values, including :attr:`reserved`.
    """

    def __init__(self, networks: Sequence[Network], memory: int) -> None:
        self.networks, self.memory = networks, memory
        #: Bytes in use elsewhere.
        self.reserved = 0
        self._states: dict[tuple[int, int], tuple[int, dict[int, Tensor]]] = {
            (index, batch): (0, network.start(batch))
            for index, network in enumerate(networks)
            for batch in range(len(network.tapes))
        }
        self._sizes = dict.fromkeys(self._states, 0)

    def advance(
        self, network: int, batch: int, end: int, observe: Mapping[int, Callable[[Tensor], None]] | None = None
    ) -> dict[int, Tensor]:
        """Compute a network's calls up to a position, and return the values needed to continue from there."""
        position, values = self._states[network, batch]
        if position >= end:
            return values
        values = self.networks[network].advance(batch, values, position, end, observe)
        size = _bytes(values)
        total = self.reserved + sum(self._sizes.values()) - self._sizes[network, batch] + size
        if total <= self.memory or end >= len(self.networks[network].tapes[batch].calls):
            self._states[network, batch] = (end, values)
            self._sizes[network, batch] = size
        return values


class _Steps:
    """How the calls of a tape are computed.

    Attributes
    ----------
    last
        For each value, the position of the last call that reads or computes it; -1 for none.
    done_at
        For each call, the values that no later call reads. Those of a convolution that is folded with its BatchNorm are
        listed with the BatchNorm.
    folded
        Positions of convolutions that are computed together with the BatchNorm that follows.
    overwriting
        Positions of calls that may run in place.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape, self._consumers, self._producers = tape, tape.consumers(), tape.producers()
        self.last = tape.last_uses()
        self._sharing: dict[int, int] = {}
        for memory in tape.memory_of:
            self._sharing[memory] = self._sharing.get(memory, 0) + 1
        self.folded = {position for position in range(len(tape.calls)) if self._folds(position)}
        self.overwriting = {position for position in range(len(tape.calls)) if self._overwrites(position)}
        self.done_at: list[list[int]] = [[] for _ in tape.calls]
        for value, position in enumerate(self.last):
            if position >= 0:
                self.done_at[position + (position in self.folded)].append(value)

    def _folds(self, position: int) -> bool:
        call = self._tape.calls[position]
        if call.name != "convolution" or position + 1 >= len(self._tape.calls) or call.named["transposed"]:
            return False
        norm, output = self._tape.calls[position + 1], call.outputs[0]
        if norm.name not in BATCH_NORMS or norm.named.get("training", False) or output is None:
            return False
        tensors = [norm.named[key] for key in ("weight", "bias", "running_mean", "running_var")]
        tensors += [call.named[key] for key in ("weight", "bias") if call.named[key] is not None]
        known = all(isinstance(t, Ref) and self._tape.sources[t.value] == "parameters" for t in tensors)
        unread = all(self._consumers.get(value) is None for value in norm.outputs[1:] if value is not None)
        return known and unread and norm.named["input"] == Ref(output) and len(self._consumers[output]) == 1

    def _overwrites(self, position: int) -> bool:
        call = self._tape.calls[position]
        first = call.arguments[0] if call.arguments else None
        if call.name not in _IN_PLACE or not isinstance(first, Ref):
            return False
        value = first.value
        return (
            value in self._producers
            and self._tape.memory_of[value] == value
            and self._sharing[value] == 1
            and self.last[value] == position
            and call.inputs.count(value) == 1
            and self._tape.shapes[value] == self._tape.shapes[call.outputs[0] or 0]
        )


def _run(call: Call, live: Mapping[int, Tensor], in_place: bool) -> Any:
    first = live[call.inputs[0]] if in_place else None
    alike = first is not None and all(live[value].dtype == first.dtype for value in call.inputs)
    if not alike or first is None or not first.is_floating_point():
        return call.run(live)
    packet = getattr(torch.ops.aten, call.name + "_")
    return call.run(live, getattr(packet, call.operator._overloadname))


def _fold(call: Call, norm: Call, live: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a convolution folded with the BatchNorm that follows."""
    named = call.named
    weight = live[named["weight"].value]
    scale, shift = norm_affine(norm, live)
    if named["bias"] is not None:
        shift = shift + scale * live[named["bias"].value]
    folded = (weight * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight)
    layout = CHANNELS_LAST.get(weight.ndim) if _has_channels_last(live[named["input"].value]) else None
    return folded if layout is None else folded.contiguous(memory_format=layout), shift.to(weight)


def _has_channels_last(value: Tensor) -> bool:
    layout = CHANNELS_LAST.get(value.ndim)
    return layout is not None and value.is_contiguous(memory_format=layout)


def _convolve(call: Call, live: Mapping[int, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    rest = [call.named[argument.name] for argument in call.operator._schema.arguments[3:]]
    result: Tensor = call.operator(live[call.named["input"].value], weight, bias, *rest)
    return result


def norm_affine(norm: Call, live: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of a BatchNorm in evaluation mode."""
    named = norm.named
    mean, variance = live[named["running_mean"].value], live[named["running_var"].value]
    scale = live[named["weight"].value] / (variance + norm_epsilon(norm)).sqrt()
    return scale, live[named["bias"].value] - scale * mean


def norm_epsilon(norm: Call) -> float:
    """Return the number that a BatchNorm adds to the variance."""
    named = norm.named
    epsilon: float = named["eps"] if "eps" in named else named["epsilon"]  # the name that cuDNN and MIOpen use
    return epsilon


def _signature(batch: Any) -> object:
    leaves, structure = pytree.tree_flatten(batch)
    return (
        str(structure),
        tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else repr(v) for v in leaves),
    )


def _bytes(values: Mapping[int, Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in values.values()}
    return sum(storages.values())
