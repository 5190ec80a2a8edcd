"""Reading a model's exported graph: every node's value as a view, and which submodule it belongs to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from mudsc_fast._forward import preserve_training_mode
from mudsc_fast.spec.infer import operators, views
from mudsc_fast.spec.infer.factors import Factor, freeze
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.views import View

#: Chooses among what a model returns.
Outputs = Callable[[Any], Any]

#: Operators that run a part of the graph, and which of their arguments that is.
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")

#: What the models of Hugging Face return for further use in themselves.
_STATES = ("past_key_values", "hidden_states", "attentions", "encoder_hidden_states", "encoder_attentions")
_FEATURES = (
    "last_hidden_state",
    "pooler_output",
    "encoder_last_hidden_state",
    "text_model_output",
    "vision_model_output",
)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a submodule: the tensors that come from elsewhere, and those that are read elsewhere."""

    path: str
    inputs: list[View] = field(default_factory=list)
    outputs: list[View] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """A model as it was read.

    Attributes
    ----------
    tensors
        For each tensor of the state dict that the model computes with, the factors of its axes.
    first_name
        For each of these, the name under which it comes first: another one where it is tied.
    calls
        The calls of submodules, in order.
    record
        What was learnt besides.
    """

    tensors: Mapping[str, Sequence[Factor]]
    first_name: Mapping[str, str]
    calls: Sequence[ModuleCall]
    record: Record


def read(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], outputs: Outputs | None) -> Reading:
    """Export a model and follow the factors of all axes through its graph."""
    exported = _export(model, arguments, keywords, outputs)
    first_name = _first_names(model)
    bases: dict[str, View] = {}
    record = Record()
    owners: dict[str, set[str]] = {}
    for name, first in first_name.items():
        owners.setdefault(first, set()).add(name.rpartition(".")[0])
    reader = _Reader(record, owners)
    values: list[View] = []
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for node, given in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        shape = _shapes(node)[0] if _shapes(node) else ()
        name = (given.target or "").removeprefix("wrapped.")
        if given.kind in (InputKind.PARAMETER, InputKind.BUFFER) and name in first_name:
            name = first_name[name]
            if name not in bases:
                bases[name] = views.whole([Factor(length) for length in shape], name)
                record.occurrences.append(tuple(bases[name].base.axes))
            values.append(bases[name])
        else:
            values.append(views.frozen(shape))
    for result in reader.walk(exported.graph_module, values):
        for factor in views.factors_of_view(result):
            freeze(factor)
    parameters = {name for name, value in model.named_parameters(remove_duplicate=False) if value.is_floating_point()}
    for name, view in bases.items():
        if name not in parameters and name not in record.statistics:
            for factor in view.base.axes:
                freeze(factor)
    computed_with = {tensor for tensor, _ in record.roles}
    tensors = {name: bases[first].base.axes for name, first in first_name.items() if first in computed_with}
    return Reading(tensors, first_name, reader.module_calls(), record)


class _Wrapped(nn.Module):
    """A model that returns only the tensors whose order counts."""

    def __init__(self, model: nn.Module, outputs: Outputs | None) -> None:
        super().__init__()
        self.wrapped = model
        self._outputs = _essential if outputs is None else outputs

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        chosen = self._outputs(self.wrapped(*arguments, **keywords))
        return tuple(_tensors_in(chosen))


def _essential(result: Any) -> Any:
    """Leave out what the models of Hugging Face return beside their result: caches, states, attention."""
    if not isinstance(result, Mapping):
        return result
    kept = {name: value for name, value in result.items() if name not in _STATES}
    further = {name: value for name, value in kept.items() if name not in _FEATURES}
    return further or kept


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def _export(
    model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], outputs: Outputs | None
) -> ExportedProgram:
    with preserve_training_mode(model), _plain_attention(), torch.no_grad():
        model.eval()
        try:
            return torch.export.export(_Wrapped(model, outputs), tuple(arguments), dict(keywords), strict=False)
        except Exception as error:
            raise ValueError(
                f"model must be one that torch.export can export with example_inputs, got {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            ) from error


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Let ``torch.nn.MultiheadAttention`` run in operators of which each is known."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return, for each name in the state dict, the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    """Return the shapes of a node's tensors; a length that depends on data counts as 1."""
    return [tuple(n if isinstance(n, int) else 1 for n in tensor.shape) for tensor in _examples(node)]


def _examples(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor)]


def _is_sized_by_data(node: fx.Node) -> bool:
    """Return whether a length depends on data, as that of what a mask chooses."""
    return any(not isinstance(length, int) for tensor in _examples(node) for length in tensor.shape)


class _Reader:
    """Walks graphs and keeps, for each node, its value and the module calls that it is part of."""

    def __init__(self, record: Record, owners: Mapping[str, set[str]]) -> None:
        self._record = record
        self._owners = owners
        self._calls: dict[str, ModuleCall] = {}
        self._stack_of: dict[fx.Node, tuple[str, ...]] = {}

    def module_calls(self) -> list[ModuleCall]:
        return list(self._calls.values())

    def walk(self, module: fx.GraphModule, inputs: Sequence[Any]) -> list[View]:
        """Follow all values through a graph and return its results."""
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        written = _written_in_place(module.graph)
        results: list[View] = []
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                shapes = _shapes(node)
                values[node] = views.frozen(shapes[0]) if shapes else _attribute(module, str(node.target))
            elif node.op == "output":
                flat, _ = torch.utils._pytree.tree_flatten(node.args[0])
                results = [values[n] for n in flat if isinstance(n, fx.Node) and isinstance(values[n], View)]
            else:
                self._follow_modules(node, values)
                value = self._value(node, values)
                # What is written to is no longer the same all along an axis.
                values[node] = self._record.solid(value) if node in written and isinstance(value, View) else value
        return results

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Return a node's value: a view, a list of views, or None."""
        arguments: Any = fx.node.map_arg(node.args, lambda n: values[n])
        keywords: Any = fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.target is operator.getitem:
            container, index = arguments
            return container[index] if isinstance(container, list) and index < len(container) else None
        shapes = _shapes(node)
        if getattr(node.target, "__name__", "") in _WRAPPERS:
            place = next(i for i, value in enumerate(arguments) if isinstance(value, fx.GraphModule))
            return self.walk(arguments[place], arguments[place + 1 :])
        if not shapes:
            return None
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            unnamed = {str(place): value for place, value in enumerate(arguments)} | dict(keywords)
            return operators.opaque(self._record, Call(str(node.target), node.name, self._path(node), unnamed, shapes))
        named = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        named |= {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=False)}
        named |= keywords
        space, _, name = schema.name.partition("::")
        call = Call(f"{space}.{name}", node.name, self._path(node), named, shapes)
        if _is_sized_by_data(node) or any(map(_is_sized_by_data, node.all_input_nodes)):
            return operators.opaque(self._record, call)
        if all(0 in shape for shape in shapes):
            return [views.frozen(shape) for shape in shapes] if len(shapes) > 1 else views.frozen(shapes[0])
        result = operators.apply(
            self._record, call, name if space == "aten" else schema.name, _is_pointwise(node.target)
        )
        if isinstance(result, View) and isinstance(node.meta["val"], (list, tuple)):
            # Of a norm's or an attention's results only the first is followed; the others are for training.
            alone = all(user.args[1] == 0 for user in node.users if user.target is operator.getitem and user.users)
            return [result] if alone else operators.opaque(self._record, call)
        return result

    def _follow_modules(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Note what a node carries into the module calls that it is part of, and out of others."""
        stack = node.meta.get("nn_module_stack") or {}
        self._stack_of[node] = tuple(stack)
        for key, (path, _) in stack.items():
            self._calls.setdefault(key, ModuleCall(str(path).removeprefix("wrapped").removeprefix(".")))
        for source in node.all_input_nodes:
            value = values.get(source)
            if not isinstance(value, View):
                continue
            inside = self._stack_of.get(source, ())
            owners = self._owners.get(value.base.tensor or "", ())
            for key in self._stack_of[node]:
                if key not in inside and not any(_is_within(owner, self._calls[key].path) for owner in owners):
                    _add(self._calls[key].inputs, value)
            for key in inside:
                if key not in self._stack_of[node]:
                    _add(self._calls[key].outputs, value)

    def _path(self, node: fx.Node) -> str:
        stack = self._stack_of.get(node, ())
        return self._calls[stack[-1]].path if stack else ""


def _is_pointwise(target: Any) -> bool:
    """Return whether PyTorch tags an operator, or another of its overloads, as one that works entry by entry."""
    packet = target.overloadpacket
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def _is_within(module: str, path: str) -> bool:
    return path == "" or module == path or module.startswith(f"{path}.")


def _add(found: list[View], value: View) -> None:
    if not any(value is earlier for earlier in found):
        found.append(value)


def _attribute(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Return the values that are written to later, by themselves or through a view."""
    written = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable and node.args:
            source = node.args[0]
            while isinstance(source, fx.Node):
                written.add(source)
                source = source.args[0] if source.args else None
    return written
