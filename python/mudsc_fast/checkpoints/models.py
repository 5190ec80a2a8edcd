"""Load modules from checkpoints to collect activations and to compare outputs."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import Rewindable, run_on_batch
from mudsc_fast._huggingface import class_of_config, ordered_outputs, quiet_transformers, random_inputs
from mudsc_fast.checkpoints.checkpoint import Checkpoint
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.checkpoints.names import is_derived, plain_names
from mudsc_fast.distributed.ranks import DistributedError, same_on_all

_LOGGER = logging.getLogger(__name__)


def import_function(argument: str, text: str) -> Callable[[], Any]:
    """Import a function by a name such as ``"my_package.my_module:my_function"``, also from the current directory.

    Raises
    ------
    CheckpointError
        If the text has another form, or the module or the function does not exist or cannot be imported.
    """
    module_name, _, function_name = text.partition(":")
    if not module_name or not function_name:
        raise CheckpointError(f"{argument} must be MODULE:FUNCTION, got {text!r}")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        with users_code(f"the import of {module_name!r} for {argument}"):
            module = importlib.import_module(module_name)
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise CheckpointError(f"{argument}: the module {module_name!r} has no function {function_name!r}")
    checked: Callable[[], Any] = function
    return checked


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Convert any exception in the ``with`` block to a CheckpointError that names the cause."""
    try:
        yield
    except (CheckpointError, DistributedError):
        raise
    except Exception as error:
        raise same_on_all(CheckpointError(f"{what} failed: {type(error).__name__}: {error}"), error) from error


def load_model(
    checkpoint: Checkpoint, build: Callable[[], nn.Module] | None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a module with the tensors of a checkpoint.

    Parameters
    ----------
    checkpoint
        The network.
    build
        A function that returns the module. If None, transformers builds it from ``config.json``.
    dtype
        Dtype of the module, by default that of the tensors.

    Raises
    ------
    CheckpointError
        If there is neither `build` nor a configuration, transformers is not installed, or the tensors do not fit.
    """
    if build is None:
        return _load_by_transformers(checkpoint, dtype)
    model = built(build)
    state_dict = _state_dict_for(model, checkpoint)
    try:
        # Assigned, not copied: the parameters are views of the file.
        model.load_state_dict(state_dict, assign=True)
    except (RuntimeError, ValueError, TypeError) as error:  # modules that load by version raise any of these
        raise CheckpointError(f"{checkpoint.path}: does not fit the model: {error}") from error
    return (model if dtype is None else model.to(dtype)).eval()


def _state_dict_for(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the tensors of a checkpoint under the names that the model uses.

    Tied tensors that are missing in the file are added. Counters and tables that only the file or only the model has
    are ignored. The versions of modules are those of the file; safetensors files have none and count as current.
    """
    expected = model.state_dict()
    stored_names = plain_names(expected)
    state_dict: OrderedDict[str, Any] = OrderedDict()
    for name, tensor in checkpoint.tensors.items():
        if name in stored_names or not is_derived(name):
            state_dict[stored_names.get(name, name)] = tensor
    state_dict.update({name: value for name, value in checkpoint.extra_state.items() if name in expected})
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for names in names_of.values():
        present = next((name for name in names if name in state_dict), None)
        if present is not None:
            state_dict.update({name: state_dict[present] for name in names if name not in state_dict})
    for name, value in expected.items():
        if name not in state_dict and is_derived(name):
            state_dict[name] = value
    versions = checkpoint.versions or getattr(expected, "_metadata", {})
    state_dict._metadata = OrderedDict(versions)  # type: ignore[attr-defined]  # as Module.state_dict does
    return state_dict


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """Call the user's function and return the module.

    Raises
    ------
    CheckpointError
        If the function fails or returns anything but a module.
    """
    with users_code("the model function"):
        model = build()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"the model function must return a torch.nn.Module, got {type(model).__name__}")
    return model


def output_difference(
    before: Checkpoint, after: Checkpoint, build: Callable[[], nn.Module] | None, batches: Rewindable | None
) -> tuple[float, float] | str:
    """Run two networks on a small batch in float32, and return the largest difference and the largest output.

    If the outputs cannot be computed, return the reason.
    """
    if build is not None and batches is None:
        return "there is no data to run the model on"
    if build is None:
        if before.config is None or after.config is None:
            return "the network has no config.json to build it by"
        try:
            import transformers  # noqa: F401 only whether it is there
        except ImportError:
            return "transformers is not installed"
    outputs = []
    for checkpoint in (before, after):
        model = load_model(checkpoint, build, torch.float32)
        with torch.inference_mode():
            found = _outputs(model, None if batches is None or build is None else batches.first())
        if isinstance(found, str):
            return found
        outputs.append(found)
    differences = [float((a - b).abs().max()) for a, b in zip(*outputs, strict=True)]
    return max(differences), max(float(a.abs().max()) for a in outputs[0])


def _outputs(model: nn.Module, batch: Any) -> list[Tensor] | str:
    """Return the outputs on a batch, or on random inputs if it is None, or the reason why they cannot be compared."""
    if batch is not None:
        seen: list[Any] = []
        with users_code("running the model on the data"):
            handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
            try:
                run_on_batch(model, batch, 0, torch.device("cpu"), None)
            finally:
                handle.remove()
        return _ordered(seen[0], model)
    inputs = random_inputs(model)
    if not inputs:
        return f"random inputs for {type(model).__name__} are not supported"
    with users_code("running the network on random inputs"):
        result = model(**inputs)
    return _ordered(result, model)


def _ordered(result: Any, model: nn.Module) -> list[Tensor] | str:
    """Return the outputs whose order does not change when units are permuted, in float32."""
    if isinstance(result, Tensor):
        return [result.float()]
    if not isinstance(result, Mapping):
        return f"{type(model).__name__} returns {type(result).__name__}, not a tensor"
    found = ordered_outputs(result)
    if found is result:
        return f"{type(model).__name__} returns no output whose order is known"
    return [output.float() for output in found]


def _load_by_transformers(checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    if checkpoint.config is None:
        raise CheckpointError(f"{checkpoint.path}: has no config.json: pass build=, a function that builds the model")
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{checkpoint.path}: running this network needs transformers: pip install transformers"
        ) from error
    kind = class_of_config(transformers, checkpoint.config)
    with quiet_transformers(), users_code(f"loading {checkpoint.path} by transformers"):
        model: nn.Module
        model, found = kind.from_pretrained(
            checkpoint.path,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        _LOGGER.warning(
            "%s: %s of %s are missing in the files, so transformers initialized them randomly: %s",
            checkpoint.path,
            "1 tensor" if len(missing) == 1 else f"{len(missing)} tensors",
            type(model).__name__,
            ", ".join(missing[:5]),
        )
    return model.eval()
