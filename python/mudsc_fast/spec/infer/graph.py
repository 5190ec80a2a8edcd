"""Reading the exported graph of a model: the value of every node as a view, and the submodule it belongs to."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from mudsc_fast.spec.infer import operators, views
from mudsc_fast.spec.infer.export import Exported, ExportError, Outputs, Shape, export
from mudsc_fast.spec.infer.factors import Factor, freeze, unify
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.views import View
from mudsc_fast.spec.observation import Port

#: Higher-order operators that run a part of the graph.
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


@dataclass(frozen=True)
class Passed:
    """A tensor that enters or leaves a submodule. `from_data` says whether it depends on the inputs of the model."""

    view: View
    from_data: bool


@dataclass(frozen=True)
class ModuleCall:
    """One call of a submodule: the tensors that come from elsewhere, and those that are read elsewhere."""

    path: str
    inputs: list[Passed] = field(default_factory=list)
    outputs: list[Passed] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """What was read from the graph of a model.

    Attributes
    ----------
    tensors
        For each tensor of the state dict that the model computes with, the factors of its axes.
    first_name
        For each tensor of the state dict the first name of the same tensor, which differs if it is tied.
    buffers
        The tensors that are buffers.
    unused
        The parameters that the model does not compute with.
    calls
        The calls of submodules in evaluation mode, in order.
    ports
        As for :class:`Exported`.
    record
        What else was learned.
    """

    tensors: Mapping[str, Sequence[Factor]]
    first_name: Mapping[str, str]
    buffers: frozenset[str]
    unused: Sequence[str]
    calls: Sequence[ModuleCall]
    ports: Mapping[tuple[str, Port], set[Shape]]
    record: Record


def read(model: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any], outputs: Outputs | None) -> Reading:
    """Export a model and follow the factors of all axes through its graph.

    Layers that do not run in evaluation mode are followed in training mode.

    Raises
    ------
    ValueError
        If the model cannot be exported in evaluation mode, or has layers that do not run in evaluation mode and
        cannot be exported in training mode.
    """
    try:
        exported = export(model, arguments, keywords, outputs)
    except ExportError as error:
        message = f"model must be one that torch.export can export with example_inputs, got {error}"
        raise ValueError(message) from error.__cause__
    reader = _ModelReader(model)
    calls = reader.read(exported)
    unused = reader.unused()
    if unused:
        try:
            reader.read(export(model, arguments, keywords, outputs, training=True))
        except ExportError as error:
            _refuse_unused_layers(model, unused, error)
        unused = reader.unused()
    return Reading(reader.tensors(), reader.first_name, reader.buffers, unused, calls, exported.ports, reader.record)


def _refuse_unused_layers(model: nn.Module, unused: Sequence[str], error: ExportError) -> None:
    """Raise an error if unused parameters are layers. Single vectors, such as mask tokens, only keep their order."""
    shapes = {name: tensor.shape for name, tensor in _state(model).items()}
    layers = [name for name in unused if sum(length > 1 for length in shapes[name]) > 1]
    if layers:
        raise ValueError(
            f"model must be one that torch.export can export in training mode too, because it has layers that it does "
            f"not use in evaluation mode ({_listed(layers)}), got {error}. Pass example_inputs that the model accepts "
            "in training mode (e.g. a batch of two), or remove these layers from the model"
        ) from error.__cause__


class _ModelReader:
    """Reads the graphs of one model in several modes, with the same factors for its tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.record = Record()
        self.first_name = _first_names(model)
        self.buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
        self._dtypes = {name: tensor.dtype for name, tensor in _state(model).items()}
        self._bases: dict[str, View] = {}
        self._owners: dict[str, set[str]] = {}
        for name, first in self.first_name.items():
            self._owners.setdefault(first, set()).add(name.rpartition(".")[0])

    def read(self, exported: Exported) -> list[ModuleCall]:
        """Follow all values through a graph. Return the calls of submodules."""
        program = exported.program
        reader = _GraphReader(self.record, self._owners)
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        given = program.graph_signature.input_specs
        values = [self._input(node, spec) for node, spec in zip(placeholders, given, strict=True)]
        from_data = [spec.kind == InputKind.USER_INPUT for spec in given]
        results = reader.walk(program.graph_module, values, from_data)
        for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
            if not isinstance(result, View):
                continue
            factors = views.factors_of_view(result)
            updated = self._bases.get(self.first_name.get((spec.target or "").removeprefix("wrapped."), ""))
            if spec.kind == OutputKind.USER_OUTPUT:
                for factor in factors:
                    freeze(factor, "it is an output of the model")
            elif updated is not None and result.shape == updated.shape:
                for mine, other in zip(updated.base.axes, factors, strict=True):
                    unify(mine, other)
        return reader.module_calls()

    def tensors(self) -> dict[str, Sequence[Factor]]:
        """Return the axes of the tensors that the model computes with."""
        used = {tensor for tensor, _ in self.record.roles}
        return {name: self._bases[first].base.axes for name, first in self.first_name.items() if first in used}

    def unused(self) -> list[str]:
        """Return the parameters that the model has not computed with so far."""
        used = {tensor for tensor, _ in self.record.roles}
        return [
            name
            for name, first in self.first_name.items()
            if first not in used and name not in self.buffers and self._dtypes[name].is_floating_point
        ]

    def _input(self, node: fx.Node, spec: Any) -> View:
        shape = _shapes(node)[0] if _shapes(node) else ()
        name = (spec.target or "").removeprefix("wrapped.")
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            if spec.kind == InputKind.USER_INPUT:
                return views.frozen(shape, f"it has the order of {_described_input(node.name)}")
            return views.fixed(shape, f"it has the order of constant {name!r}")
        kind = "parameter" if spec.kind == InputKind.PARAMETER else "buffer"
        if name not in self.first_name:
            return views.fixed(shape, f"it has the order of {kind} {name!r}, which is not in the state dict")
        first = self.first_name[name]
        if first not in self._bases:
            dtype = self._dtypes[first]
            reason = f"it has the order of {kind} {first!r}, which holds {dtype}"
            fixed = not dtype.is_floating_point
            axes = [Factor(length, frozen=fixed, reason=reason if fixed else None) for length in shape]
            self._bases[first] = views.whole(axes, first)
        return self._bases[first]


class _GraphReader:
    """Walks a graph and its parts. Keeps the value of each node and the module calls it belongs to."""

    def __init__(self, record: Record, owners: Mapping[str, set[str]]) -> None:
        self._record = record
        self._owners = owners
        self._calls: dict[str, ModuleCall] = {}
        self._stack_of: dict[fx.Node, tuple[str, ...]] = {}
        self._from_data: set[fx.Node] = set()

    def module_calls(self) -> list[ModuleCall]:
        return list(self._calls.values())

    def walk(self, module: fx.GraphModule, inputs: Sequence[Any], from_data: Sequence[bool]) -> list[Any]:
        """Follow all values through a graph and return its results."""
        values: dict[fx.Node, Any] = {}
        given = iter(zip(inputs, from_data, strict=True))
        written = _written_in_place(module.graph)
        results: list[Any] = []
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node], depends = next(given)
                if depends:
                    self._from_data.add(node)
            elif node.op == "get_attr":
                shapes = _shapes(node)
                values[node] = views.frozen(shapes[0]) if shapes else _attribute(module, str(node.target))
            elif node.op == "output":
                flat, _ = torch.utils._pytree.tree_flatten(node.args[0])
                results = [values[n] if isinstance(n, fx.Node) else n for n in flat]
            else:
                if any(source in self._from_data for source in node.all_input_nodes):
                    self._from_data.add(node)
                self._follow_modules(node, values)
                value = self._value(node, values)
                # An operator that writes into a part of a tensor makes its repeated entries differ.
                values[node] = self._record.solid(value) if node in written and isinstance(value, View) else value
        return results

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Return the value of a node: a view, a list of views, or None."""
        arguments: Any = fx.node.map_arg(node.args, lambda n: values[n])
        keywords: Any = fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.target is operator.getitem:
            container, index = arguments
            return container[index] if isinstance(container, list) and index < len(container) else None
        shapes = _shapes(node)
        if getattr(node.target, "__name__", "") in _WRAPPERS:
            place = next(i for i, value in enumerate(arguments) if isinstance(value, fx.GraphModule))
            sources = node.args[place + 1 :]
            return self.walk(arguments[place], arguments[place + 1 :], [n in self._from_data for n in sources])
        if not shapes:
            return None
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            unnamed = {str(place): value for place, value in enumerate(arguments)} | dict(keywords)
            return operators.opaque(
                self._record,
                Call(getattr(node.target, "__name__", str(node.target)), node.name, self._path(node), unnamed, shapes),
            )
        named = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        named |= {argument.name: value for argument, value in zip(schema.arguments, arguments, strict=False)}
        named |= keywords
        space, _, name = schema.name.partition("::")
        call = Call(f"{space}.{name}", node.name, self._path(node), named, shapes, _used_results(node))
        if _is_sized_by_data(node) or any(map(_is_sized_by_data, node.all_input_nodes)):
            return operators.opaque(self._record, call)
        if all(0 in shape for shape in shapes):
            return [views.frozen(shape) for shape in shapes] if len(shapes) > 1 else views.frozen(shapes[0])
        result = operators.apply(
            self._record, call, name if space == "aten" else schema.name, _is_pointwise(node.target)
        )
        if isinstance(result, View) and isinstance(node.meta["val"], (list, tuple)):
            # Only the first result of a norm or an attention is followed. The others serve the backward pass.
            return [result] if call.used <= {0} else operators.opaque(self._record, call)
        return result

    def _follow_modules(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Record the values that a node carries into its module calls, and out of others."""
        stack = node.meta.get("nn_module_stack") or {}
        self._stack_of[node] = tuple(stack)
        for key, (path, _) in stack.items():
            self._calls.setdefault(key, ModuleCall(str(path).removeprefix("wrapped").removeprefix(".")))
        for source in node.all_input_nodes:
            value = values.get(source)
            if not isinstance(value, View):
                continue
            passed = Passed(value, source in self._from_data)
            inside = self._stack_of.get(source, ())
            owners = self._owners.get(value.base.tensor or "", ())
            for key in self._stack_of[node]:
                if key not in inside and not any(_is_within(owner, self._calls[key].path) for owner in owners):
                    _add(self._calls[key].inputs, passed)
            for key in inside:
                if key not in self._stack_of[node]:
                    _add(self._calls[key].outputs, passed)

    def _path(self, node: fx.Node) -> str:
        stack = self._stack_of.get(node, ())
        return self._calls[stack[-1]].path if stack else ""


def _described_input(placeholder: str) -> str:
    """Return the user's name of an input of the exported program."""
    if placeholder.startswith("keywords_"):
        return f"input {placeholder.removeprefix('keywords_')!r} of the model"
    return f"input {placeholder.removeprefix('arguments_')} of the model"


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return, for each name in the state dict, the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _state(model).items()}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict, without further state of another type."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _shapes(node: fx.Node) -> list[Shape]:
    """Return the shapes of the tensors of a node. A length that depends on data counts as 1."""
    return [tuple(n if isinstance(n, int) else 1 for n in tensor.shape) for tensor in _examples(node)]


def _examples(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor)]


def _is_sized_by_data(node: fx.Node) -> bool:
    """Return whether a length depends on data, e.g. on the number of entries that a mask selects."""
    return any(not isinstance(length, int) for tensor in _examples(node) for length in tensor.shape)


def _used_results(node: fx.Node) -> frozenset[int]:
    users = [user for user in node.users if user.target is operator.getitem and user.users]
    return frozenset(index for user in users if isinstance(index := user.args[1], int))


def _is_pointwise(target: Any) -> bool:
    """Return whether PyTorch tags an operator, or one of its overloads, as elementwise."""
    packet = target.overloadpacket
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def _is_within(module: str, path: str) -> bool:
    return path == "" or module == path or module.startswith(f"{path}.")


def _add(found: list[Passed], passed: Passed) -> None:
    for index, earlier in enumerate(found):
        if earlier.view is passed.view:
            found[index] = Passed(passed.view, earlier.from_data or passed.from_data)
            return
    found.append(passed)


def _attribute(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Return the values that are written to later, directly or through a view."""
    written = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.is_mutable and node.args:
            source = node.args[0]
            while isinstance(source, fx.Node):
                written.add(source)
                source = source.args[0] if source.args else None
    return written


def _listed(names: Sequence[str], max_names: int = 4) -> str:
    shown = ", ".join(map(repr, names[:max_names]))
    return shown if len(names) <= max_names else f"{shown} and {len(names) - max_names} more"
