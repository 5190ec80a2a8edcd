"""Modules from checkpoints: what running a network needs, for its activations and to compare its outputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import Rewindable, run_on_batch
from mudsc_fast._huggingface import class_of_config, random_inputs
from mudsc_fast.io.checkpoint import Checkpoint, CheckpointError

#: Outputs of Hugging Face's models whose order is fixed; hidden states follow the units.
_ORDERED_OUTPUTS = ("logits", "prediction_logits", "logits_per_image", "image_embeds", "text_embeds")


def import_function(argument: str, text: str) -> Callable[[], Any]:
    """Return the function that e.g. ``"my_package.my_module:my_function"`` names; modules beside the user are found.

    Raises
    ------
    CheckpointError
        If the text is of another form, or the module or the function does not exist or cannot be imported.
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
    """Tell whatever the enclosed code raises as a CheckpointError, which names the cause."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} failed: {type(error).__name__}: {error}") from error


def load_model(
    checkpoint: Checkpoint, build: Callable[[], nn.Module] | None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a module with a checkpoint's tensors.

    Parameters
    ----------
    checkpoint
        The network.
    build
        Makes the module; if None, transformers does, by ``config.json``.
    dtype
        Dtype of the module, by default that of the tensors.

    Raises
    ------
    CheckpointError
        If there is neither `build` nor a configuration, transformers is missing, or the tensors do not fit.
    """
    if build is None:
        return _load_by_transformers(checkpoint, dtype)
    model = built(build)
    try:
        # Assigned, not copied: the parameters are views of the file.
        model.load_state_dict(dict(checkpoint.tensors), assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path}: does not fit the model: {error}") from error
    return (model if dtype is None else model.to(dtype)).eval()


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the module that the user's function makes.

    Raises
    ------
    CheckpointError
        If it fails or returns something else.
    """
    with users_code("the model function"):
        model = build()
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"the model function must return a torch.nn.Module, got {type(model).__name__}")
    return model


def output_difference(
    before: Checkpoint, after: Checkpoint, build: Callable[[], nn.Module] | None, batches: Rewindable | None
) -> tuple[float, float] | str:
    """Return the largest difference of two networks' outputs on a small batch and the largest output, in float32.

    Where they cannot be computed, say why.
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
    if batch is not None:
        with users_code("the model"):
            seen: list[Any] = []
            handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
            run_on_batch(model, batch, torch.device("cpu"), None)
            handle.remove()
        output = seen[0]
        if not isinstance(output, Tensor):
            return f"the model returns no tensor, but {type(output).__name__}"
        return [output.float()]
    inputs = random_inputs(model)
    if not inputs:
        return f"there is no batch for {type(model).__name__}"
    result = model(**inputs)
    ordered = [result[name] for name in _ORDERED_OUTPUTS if name in result]
    return ordered or f"{type(model).__name__} returns nothing whose order is fixed"


def _load_by_transformers(checkpoint: Checkpoint, dtype: torch.dtype | None) -> nn.Module:
    if checkpoint.config is None:
        raise CheckpointError(f"{checkpoint.path}: has no config.json: name a function that builds the model (--model)")
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{checkpoint.path}: running this network needs transformers: pip install 'mudsc-fast[huggingface]'"
        ) from error
    kind = class_of_config(transformers, checkpoint.config)
    with _quiet(transformers), users_code(f"loading {checkpoint.path} by transformers"):
        model: nn.Module = kind.from_pretrained(
            checkpoint.path, dtype="auto" if dtype is None else dtype, local_files_only=True
        )
    return model.eval()


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from reporting progress while the enclosed code runs."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
