"""Records the operators that a network runs on a batch, so that they can be run again step by step.

A tape is the list of operators that one forward pass dispatched, with the data flow between them. It is recorded below
autograd and therefore works for any model that runs, with Python control flow, functional calls and fused projections.
Unlike a module hook, it contains residual sums. Unlike a forward pass, it can stop at an operator, keep the values that
later operators need, and continue from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mudsc_fast._forward import Forward, HookError, preserve_training_mode, run_on_batch

#: What a value depends on: the batch, only parameters, or neither.
Source = Literal["data", "parameters", "constants"]

BATCH_NORMS = (
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)


@dataclass(frozen=True)
class Ref:
    """A value of the tape, given by its number."""

    value: int


@dataclass(frozen=True)
class Call:
    """An operator call. Its arguments are flattened, with a :class:`Ref` in place of each tensor."""

    operator: Any
    arguments: tuple[Any, ...]
    structure: pytree.TreeSpec
    outputs: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """Name of the operator without namespace and overload, e.g. ``"convolution"``."""
        name: str = self.operator.overloadpacket.__name__
        return name

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """Numbers of the values that the call reads."""
        return tuple(argument.value for argument in self.arguments if isinstance(argument, Ref))

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments by name, including defaults."""
        args, kwargs = self._call
        schema = self.operator._schema.arguments
        named = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        named |= {argument.name: value for argument, value in zip(schema, args, strict=False)}
        return named | dict(kwargs)

    def run(self, values: Mapping[int, Tensor], operator: Any = None) -> Any:
        """Call the operator, or another one with the same arguments, on the given values."""
        args, kwargs = self._call
        given = [
            values[a.value] if type(a) is Ref else [_given(v, values) for v in a] if type(a) is list else a
            for a in args
        ]
        return (operator or self.operator)(*given, **{name: _given(value, values) for name, value in kwargs.items()})

    @cached_property
    def _call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = pytree.tree_unflatten(list(self.arguments), self.structure)
        return args, kwargs


def _given(argument: Any, values: Mapping[int, Tensor]) -> Any:
    return values[argument.value] if isinstance(argument, Ref) else argument


class Tape:
    """The operators of one forward pass, in an order in which they can run.

    Attributes
    ----------
    calls
        The calls that depend on the batch.
    prelude
        The calls that depend only on parameters, e.g. the transpose of a weight.
    batch_values
        The values of the batch's tensors, in the order of its leaves.
    parameters
        The values of tensors of the state dict, with their names.
    constants
        Values that depend on neither the batch nor parameters.
    shapes
        Shape of each value.
    sources
        What each value depends on.
    memory_of
        For each value, the first value that shares its memory. The result of an in-place operator is a new value with
        memory of its own.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.prelude: list[Call] = []
        self.batch_values: list[int] = []
        self.parameters: dict[int, str] = {}
        self.constants: dict[int, Tensor] = {}
        self.shapes: list[tuple[int, ...]] = []
        self.sources: list[Source] = []
        self.memory_of: list[int] = []

    def signature(self) -> list[str]:
        """Return the names of the operators, to compare the tapes of two networks."""
        return [str(call.operator) for call in self.calls]

    def consumers(self) -> dict[int, list[int]]:
        """Return, for each value, the calls that read it, once for each read."""
        found: dict[int, list[int]] = {}
        for index, call in enumerate(self.calls):
            for value in call.inputs:
                found.setdefault(value, []).append(index)
        return found

    def producers(self) -> dict[int, int]:
        """Return, for each computed value, the call that computes it."""
        return {v: index for index, call in enumerate(self.calls) for v in call.outputs if v is not None}

    def reordered(self, order: Sequence[int]) -> Tape:
        """Return the tape with its calls in another order."""
        tape = Tape()
        tape.__dict__.update(self.__dict__)
        tape.calls = [self.calls[index] for index in order]
        return tape

    def last_uses(self) -> list[int]:
        """Return, for each value, the position of the last call that reads or computes it; -1 for none."""
        last = [-1] * len(self.shapes)
        for position, call in enumerate(self.calls):
            for value in (*call.inputs, *(v for v in call.outputs if v is not None)):
                last[value] = position
        return last


def shallow_first(tape: Tape, is_layer: Callable[[Call], bool]) -> list[int]:
    """Return an order of the calls that computes the shorter branch of each sum first.

    A shortcut is then known when the last layer of the other branch is fitted, in whatever order the model runs them.
    """
    producers = tape.producers()
    depth: list[int] = []
    for call in tape.calls:
        before = max((depth[producers[v]] for v in call.inputs if v in producers), default=0)
        depth.append(before + is_layer(call))
    order: list[int] = []
    done = [False] * len(tape.calls)
    computed = {v for call in tape.calls for v in call.outputs if v is not None}
    read = {v for call in tape.calls for v in call.inputs}
    results = [i for i, call in enumerate(tape.calls) if read.isdisjoint(v for v in call.outputs if v is not None)]
    stack: list[tuple[int, bool]] = [(index, False) for index in reversed(results)]
    while stack:
        index, ready = stack.pop()
        if done[index]:
            continue
        if ready:
            done[index] = True
            order.append(index)
            continue
        stack.append((index, True))
        needed = {producers[v] for v in tape.calls[index].inputs if v in computed}
        stack.extend((other, False) for other in sorted(needed, key=lambda i: (-depth[i], -i)) if not done[other])
    return order


def record(
    model: nn.Module, batch: Any, index: int, forward: Forward | None, keep: Callable[[Call], bool] | None
) -> tuple[Tape, dict[int, Tensor]]:
    """Run a model on batch `index` on its device, and return the tape and the results of the calls to keep.

    Meanwhile all activations of this batch stay in memory. Results that the model overwrites later are not returned.

    Raises
    ------
    ValueError
        If the model writes in place in a way that cannot be replayed.
    """
    tensors = model.state_dict(keep_vars=True)
    recorder = _Recorder({id(tensor): name for name, tensor in reversed(list(tensors.items()))}, batch)
    with preserve_training_mode(model), torch.no_grad(), recorder:
        model.eval()
        run_on_batch(model, batch, index, next(iter(tensors.values())).device, forward)
    tape = recorder.finish()
    return tape, {} if keep is None else recorder.results([call for call in tape.calls if keep(call)])


class _Recorder(TorchDispatchMode):
    """Records every operator. The result of an in-place operator becomes a new value."""

    def __init__(self, names: Mapping[int, str], batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._tape = Tape()
        self._calls: list[Call] = []
        self._alive: list[Tensor] = []  # all values, kept alive so that ids stay unique
        self._value_of: dict[int, int] = {}
        self._storage_of: list[int] = []
        self._writes: list[tuple[int, int, int]] = []  # call, storage, value of the result
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor):
                self._tape.batch_values.append(self._new(leaf, "data"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record a call while it runs."""
        if func is torch.ops.aten.as_strided_.default and not kwargs and _keeps_values(*args):
            return func(*args)
        flat, structure = pytree.tree_flatten((args, kwargs or {}))
        arguments = tuple(Ref(self._value(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in flat)
        written = _written_arguments(func, args, kwargs or {})
        for tensor in written:
            value = self._value(tensor)
            if self._tape.sources[value] == "constants":
                self._tape.constants[value] = tensor.clone()
        result = func(*args, **(kwargs or {}))
        sources = {self._tape.sources[argument.value] for argument in arguments if isinstance(argument, Ref)}
        source: Source = "data" if "data" in sources else "parameters" if "parameters" in sources else "constants"
        operator = _functional(func) if written else func
        outputs: list[int | None] = []
        for leaf in pytree.tree_leaves(result):
            if not isinstance(leaf, Tensor):
                outputs.append(None)
            elif any(leaf is argument for argument in flat) and not written:
                outputs.append(self._value(leaf))  # the operator returned one of its arguments
            else:
                outputs.append(self._new(leaf, source))
                self._note_memory(outputs[-1], arguments, written)
        if written and source != "constants":
            if operator is None or len(written) > 1 or not any(result is tensor for tensor in written):
                raise HookError(
                    f"refit cannot replay the in-place operator {func} that the model runs: use its out-of-place "
                    "variant, or pass a forward that runs only the layers to refit"
                )
            self._writes.append((len(self._calls), self._storage_of[self._value(written[0])], outputs[0] or 0))
        if source != "constants":
            self._calls.append(Call(operator, arguments, structure, tuple(outputs)))
        return result

    def finish(self) -> Tape:
        """Return the tape, after a check that no value is read that was overwritten through another one."""
        for position, storage, left in self._writes:
            for call in self._calls[position + 1 :]:
                for value in call.inputs:
                    stale = value < left and self._storage_of[value] == storage
                    if stale and self._tape.sources[value] != "constants":
                        raise ValueError(
                            f"refit cannot replay the in-place operator {self._calls[position].operator}, because the "
                            "model later reads the memory that it overwrites through another view: use the "
                            "out-of-place variant, or pass a forward that runs only the layers to refit"
                        )
        tape = self._tape
        for call in self._calls:
            outputs = [value for value in call.outputs if value is not None]
            if outputs and all(tape.sources[value] == "parameters" for value in outputs):
                tape.prelude.append(call)
            elif outputs:
                tape.calls.append(call)
        return tape

    def results(self, calls: Sequence[Call]) -> dict[int, Tensor]:
        """Return the results of calls by value number, except those that were overwritten later."""
        last_write = {storage: left for _, storage, left in self._writes}
        values = [value for call in calls for value in call.outputs if value is not None]
        return {v: self._alive[v] for v in values if v >= last_write.get(self._storage_of[v], 0)}

    def _note_memory(self, value: int | None, arguments: Sequence[Any], written: Sequence[Tensor]) -> None:
        """Record which value the output of a call shares its memory with."""
        if value is None or written:
            return
        for argument in arguments:
            if isinstance(argument, Ref) and self._storage_of[argument.value] == self._storage_of[value]:
                self._tape.memory_of[value] = self._tape.memory_of[argument.value]

    def _value(self, tensor: Tensor) -> int:
        known = self._value_of.get(id(tensor))
        if known is not None:
            return known
        name = self._names.get(id(tensor))
        value = self._new(tensor, "constants" if name is None else "parameters")
        if name is not None:
            self._tape.parameters[value] = name
        return value

    def _new(self, tensor: Tensor, source: Source) -> int:
        value = len(self._tape.shapes)
        self._tape.shapes.append(tuple(tensor.shape))
        self._tape.sources.append(source)
        self._tape.memory_of.append(value)
        self._storage_of.append(tensor.untyped_storage()._cdata)
        self._value_of[id(tensor)] = value
        self._alive.append(tensor)
        if source == "constants":
            self._tape.constants[value] = tensor
        return value


def _keeps_values(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    """Return whether a tensor keeps its shape and values under other strides.

    AdaptiveAvgPool2d(1) changes the strides of the axes of length 1 if its input is in the layout channels_last.
    """
    same = (now == then for length, now, then in zip(size, tensor.stride(), stride, strict=True) if length > 1)
    return tuple(tensor.shape) == tuple(size) and offset in (None, tensor.storage_offset()) and all(same)


def _written_arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the arguments that an operator modifies."""
    if not func._schema.is_mutable:
        return []
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    written: list[Tensor] = []
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.extend(v for v in pytree.tree_leaves(named.get(argument.name)) if isinstance(v, Tensor))
    return written


def _functional(func: Any) -> Any:
    """Return the out-of-place variant of an in-place operator. None if there is none."""
    name = func.overloadpacket.__name__
    packet = getattr(getattr(torch.ops, func.namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, func._overloadname, None)
