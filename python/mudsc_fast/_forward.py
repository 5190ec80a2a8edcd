"""Running a model on the batches of a user's data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: Runs a model on one batch, e.g. ``lambda model, batch: model(batch["pixels"])``.
Forward = Callable[[nn.Module, Any], object]

#: What messages add for those who can pass `forward`, which the command has no option for.
FORWARD_HINT = ", or forward=, e.g. forward=lambda model, batch: model(batch['image'])"

_MAX_LISTED = 8


class HookError(ValueError):
    """An error of a hook of this package in a model that runs on a batch, with a message that needs no addition."""


def run_on_batch(model: nn.Module, batch: Any, index: int, device: torch.device, forward: Forward | None) -> object:
    """Move a batch to `device`, run a model on it, and return the result.

    Without `forward`, a tensor is the model's only argument, and a dict holds its keyword arguments. Of a tuple or
    list, only the first entry is used, in the same way. `index` is the number of the batch, for error messages.

    Raises
    ------
    TypeError
        If there is no `forward` and the batch is neither, or the model raises it, or the batch has another dtype.
    ValueError
        If the model cannot run on the batch, e.g. because of its shape.
    """
    moved = to_device(batch, device)
    content = moved if forward is not None else inputs_of(moved)
    # torch's fast path for attention hands nested tensors to the modules inside, which cannot be observed.
    with without_attention_fast_path(), explain_failure(model, content, index, forward):
        if forward is not None:
            return forward(model, content)
        return model(**content) if isinstance(content, Mapping) else model(content)


@contextmanager
def explain_failure(model: nn.Module, batch: Any, index: int, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Convert the errors of a model that runs on a batch to errors that name the batch and say what to do."""
    try:
        yield
    except (HookError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # the user's code may raise anything
        if forward is None and isinstance(error, RuntimeError):
            _check_dtype(model, batch, error)
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{type(model).__name__} cannot run on batch {index} ({_describe(batch)}): "
            f"{type(error).__name__}: {error}. "
            + (f"Pass batches that the model takes{FORWARD_HINT}" if forward is None else "Change data or forward")
        ) from error


def _describe(batch: Any) -> str:
    """Return the shapes and dtypes of the tensors in a batch."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, Mapping):
        entries = [f"{name!r}: {_describe(value)}" for name, value in batch.items()]
        brackets = "{}"
    elif isinstance(batch, (tuple, list)):
        entries = [_describe(value) for value in batch]
        brackets = "()"
    else:
        return type(batch).__name__
    more = ", ..." if len(entries) > _MAX_LISTED else ""
    return brackets[0] + ", ".join(entries[:_MAX_LISTED]) + more + brackets[1]


def _check_dtype(model: nn.Module, inputs: Tensor | Mapping[str, Any], error: RuntimeError) -> None:
    """Raise a TypeError if a model failed on floating point numbers of another dtype than its parameters."""
    values = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
    given = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
    own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(given) == len(own) == 1 and given != own:
        dtype, expected = given.pop(), own.pop()
        raise TypeError(
            f"data must hold tensors of the models' dtype {expected}, got {dtype} ({error}): convert the batches, e.g. "
            f"batch.to({expected}), or the models"
        ) from error


def check_batches(data: object) -> None:
    """Check that data is an iterable of batches, not one batch.

    Raises
    ------
    TypeError
        If it is not.
    """
    if isinstance(data, (Tensor, Mapping, nn.Module)):
        raise TypeError(
            f"data must be an iterable of batches, such as a list or a DataLoader, got one {type(data).__name__}"
            + ("" if isinstance(data, nn.Module) else ": pass [data] if it is one batch")
        )
    if isinstance(data, (list, tuple)) and _is_labeled_batch(data):
        raise TypeError(
            "data must be an iterable of batches, such as a list or a DataLoader, got inputs and their labels: pass "
            "[data] if it is one batch"
        )
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise TypeError(
            f"data must be an iterable of batches, such as a list or a DataLoader, got {type(data).__name__}"
        )


def _is_labeled_batch(data: Sequence[object]) -> bool:
    """Return whether data is one batch (inputs, labels). No model runs on both as batches: they differ in rank."""
    if len(data) != 2:
        return False
    inputs, labels = data
    return (
        isinstance(inputs, Tensor)
        and isinstance(labels, Tensor)
        and inputs.is_floating_point()
        and labels.dtype in (torch.int64, torch.int32)
        and labels.ndim == 1 < inputs.ndim
        and len(labels) == len(inputs)
    )


def inputs_of(batch: Any) -> Tensor | Mapping[str, Any]:
    """Return the part of a batch that the model is called with: its only argument, or keyword arguments.

    Raises
    ------
    TypeError
        If the batch is neither a tensor nor a dict nor a tuple or list that begins with one.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(inputs, (Mapping, Tensor)):
        return inputs
    raise TypeError(
        "data must yield tensors, dicts of keyword arguments, or tuples that begin with one of these, "
        f"got {type(batch).__name__}"
        + (f" of {type(inputs).__name__}" if inputs is not batch else "")
        + ". For other batches pass forward=, e.g. forward=lambda model, batch: model(batch.image)"
    )


class Rewindable(Iterable[Any]):
    """Batches whose first batch can be read in advance, even if they can be iterated over only once."""

    def __init__(self, batches: Iterable[Any]) -> None:
        check_batches(batches)
        self._batches = batches
        self._first: list[Any] = []
        self._behind_first: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._behind_first is not None:
            rest, self._behind_first = self._behind_first, None
            yield self._first[0]
            yield from rest
            return
        for batch in self._batches:
            if not self._first:
                self._first.append(batch)
            yield batch

    def __len__(self) -> int:
        """Return the number of batches. Raises a TypeError if the data has no length."""
        return len(self._batches)  # type: ignore[arg-type]

    def first(self) -> Any:
        """Return the first batch without consuming it.

        Raises
        ------
        ValueError
            If there is none.
        """
        if not self.has_first():
            raise ValueError("data must yield at least one batch, got none")
        return self._first[0]

    def has_first(self) -> bool:
        """Return whether there is a batch."""
        if not self._first:
            rest = iter(self._batches)
            for batch in rest:
                self._first.append(batch)
                self._behind_first = rest
                break
        return bool(self._first)


@contextmanager
def preserve_training_mode(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every submodule, training or evaluation, after the enclosed code."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def to_device(value: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; containers keep their types.

    Objects with a method ``to`` (such as ``BatchEncoding`` and ``PackedSequence``) are moved by it, and named tuples,
    dataclasses, mappings, tuples and lists entry by entry. Everything else stays as it is.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields") and not hasattr(value, "to"):
        return type(value)(*(to_device(item, device) for item in value))
    if not isinstance(value, type) and callable(getattr(value, "to", None)):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return _move_mapping(value, device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(moved, field.name, to_device(getattr(value, field.name), device))
        return moved
    return value


def _move_mapping(value: Mapping[Any, Any], device: torch.device) -> Mapping[Any, Any]:
    moved = {key: to_device(item, device) for key, item in value.items()}
    if type(value) is dict or not isinstance(value, MutableMapping):
        return moved
    copied = copy.copy(value)
    copied.update(moved)
    return copied


@contextmanager
def without_attention_fast_path() -> Iterator[None]:
    """Let ``torch.nn.MultiheadAttention`` and transformer layers run their modules and plain operators."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
