"""Exporting a model with ``torch.export``, without leaving a trace in it."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules import transformer

from mudsc_fast._forward import preserve_training_mode, without_attention_fast_path
from mudsc_fast.spec.observation import Port

#: Selects from the outputs of a model.
Outputs = Callable[[Any], Any]

#: Outputs of Hugging Face models that are only meant for the model itself.
_STATES = ("past_key_values", "hidden_states", "attentions", "encoder_hidden_states", "encoder_attentions")
_FEATURES = (
    "last_hidden_state",
    "pooler_output",
    "encoder_last_hidden_state",
    "text_model_output",
    "vision_model_output",
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes
    ----------
    program
        The exported program.
    ports
        For each submodule the shapes of the first tensor that it is called with, and of the first that it returns.
    """

    program: ExportedProgram
    ports: Mapping[tuple[str, Port], set[Shape]]


class ExportError(Exception):
    """The model cannot be exported; the message says why."""


def check_model(model: object) -> None:
    """Raise an error unless `model` is a module that can be traced where this is called.

    Raises
    ------
    TypeError
        If `model` is not a module, or compiled with TorchScript.
    RuntimeError
        If this is called while PyTorch traces or transforms the calling code.
    """
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TypeError(
            f"model must be a torch.nn.Module in Python, got {type(model).__name__} compiled with TorchScript: pass "
            "the module from before torch.jit.script or torch.jit.trace"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model must consist of modules in Python, but {name!r} is compiled with TorchScript: replace it by "
                "the module from before torch.jit.script or torch.jit.trace"
            )
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        raise RuntimeError(
            "a specification cannot be derived while torch.jit or torch.compile traces the calling code: derive it "
            "before, outside of the traced function"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a specification cannot be derived inside torch.vmap, torch.func.grad or another transform: derive it "
            "before, outside of the transformed function"
        )


def export(
    model: nn.Module,
    arguments: Sequence[Any],
    keywords: Mapping[str, Any],
    outputs: Outputs | None,
    *,
    training: bool = False,
) -> Exported:
    """Export a model in evaluation or training mode. The model is left as it was.

    Raises
    ------
    ExportError
        If the model cannot be exported.
    """
    ports: dict[tuple[str, Port], set[Shape]] = {}
    with ExitStack() as stack:
        stack.enter_context(preserve_training_mode(model))
        stack.enter_context(_preserve_attributes(model))
        stack.enter_context(_plain_attention())
        stack.enter_context(_without_report_of_failures())
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        # They are restored.
        warnings.filterwarnings("ignore", message=".*were assigned during export")
        model.train(training)
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(_input_hook(ports, name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_output_hook(ports, name)).remove)
        try:
            wrapped = _SelectedOutputs(model, outputs).train(training)
            return Exported(torch.export.export(wrapped, tuple(arguments), dict(keywords), strict=False), ports)
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise ExportError(f"{type(error).__name__}: {lines[0] if lines else ''}") from error


class _SelectedOutputs(nn.Module):
    """A model that returns only the tensors whose order matters."""

    def __init__(self, model: nn.Module, outputs: Outputs | None) -> None:
        super().__init__()
        self.wrapped = model
        self._outputs = _essential if outputs is None else outputs

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        chosen = self._outputs(self.wrapped(*arguments, **keywords))
        return tuple(tensors_in(chosen))


def _essential(result: Any) -> Any:
    """Leave out what Hugging Face models return besides their result: caches, hidden states, attention weights."""
    if not isinstance(result, Mapping):
        return result
    kept = {name: value for name, value in result.items() if name not in _STATES}
    further = {name: value for name, value in kept.items() if name not in _FEATURES}
    return further or kept


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def _input_hook(ports: dict[tuple[str, Port], set[Shape]], name: str) -> Callable[..., None]:
    def note(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        _note_first(ports, (name, "input"), [*arguments, *keywords.values()])

    return note


def _output_hook(ports: dict[tuple[str, Port], set[Shape]], name: str) -> Callable[..., None]:
    def note(_module: nn.Module, _arguments: tuple[Any, ...], result: Any) -> None:
        _note_first(ports, (name, "output"), result if isinstance(result, (list, tuple)) else [result])

    return note


def _note_first(ports: dict[tuple[str, Port], set[Shape]], key: tuple[str, Port], values: Sequence[Any]) -> None:
    first = next((value for value in values if isinstance(value, Tensor)), None)
    if first is not None:
        ports.setdefault(key, set()).add(tuple(first.shape))


@contextmanager
def _preserve_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules afterwards: tables that a model caches would else be fake tensors."""
    saved = [(module, dict(module.__dict__), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in saved:
            now = module.__dict__
            for name in [name for name in now if name not in attributes]:
                del now[name]
            for name, value in attributes.items():
                if now.get(name) is not value:
                    now[name] = value
            for container, kept in contents:
                _restore(container, kept)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, (dict, list))]


def _restore(container: Any, kept: Any) -> None:
    values, before = (c.values() if isinstance(c, dict) else c for c in (container, kept))
    if len(container) == len(kept) and all(a is b for a, b in zip(values, before, strict=True)):
        return
    container.clear()
    container.update(kept) if isinstance(container, dict) else container.extend(kept)


@contextmanager
def _without_report_of_failures() -> Iterator[None]:
    """Leave out graphs that PyTorch prints and traces that it logs on failure: the error that is raised says more."""
    logs = [
        logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")
    ]
    disabled = [log.disabled for log in logs]
    for log in logs:
        log.disabled = True
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, before in zip(logs, disabled, strict=True):
            log.disabled = before


def _hint_of_caller(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    del mask, size  # the signature is that of PyTorch
    return bool(is_causal)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Let the transformer layers of PyTorch run in operators that are all supported.

    They look at the values of a mask to find out whether it is causal, which cannot be exported. The answer only serves
    to choose a faster kernel, so the hint of the caller is taken instead.
    """
    detect = getattr(transformer, "_detect_is_causal_mask", None)
    if detect is not None:
        transformer._detect_is_causal_mask = _hint_of_caller
    try:
        with without_attention_fast_path():
            yield
    finally:
        if detect is not None:
            transformer._detect_is_causal_mask = detect
