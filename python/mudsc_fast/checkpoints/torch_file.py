"""Read one file of ``torch.save``: a state dict, or a training checkpoint that contains one."""

from __future__ import annotations

import argparse
import contextlib
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mudsc_fast.checkpoints.errors import CheckpointError

_LOGGER = logging.getLogger(__name__)

#: Keys under which training scripts save the state dict of the network, in order of preference.
_USUAL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
)

#: Maximum depth of a state dict in nested dicts: {"checkpoint": {"model": state_dict}} has two levels.
_MAX_DEPTH = 3

_ESCAPE_CODES = re.compile(r"\x1b\[[0-9;]*m")
_UNSUPPORTED_CLASS = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class TorchFile:
    """Content of one file of ``torch.save``.

    Attributes
    ----------
    tensors
        The tensors by name.
    extra_state
        Entries of the state dict that are not tensors, as ``get_extra_state`` of a module may return them.
    versions
        The ``_metadata`` of the state dict, with the version of each module's format. Empty if the file has none.
    """

    tensors: dict[str, Tensor]
    extra_state: dict[str, Any]
    versions: dict[str, Any]


def open_torch_file(path: Path) -> TorchFile:
    """Map a file of ``torch.save`` into memory with ``weights_only=True``, so that no code in it runs.

    Raises
    ------
    CheckpointError
        If the file is incomplete, contains Python objects that ``weights_only`` refuses, or has no state dict.
    """
    content = _load(path)
    key, state_dict = _find_state_dict(path, content)
    if key:
        _LOGGER.info("%s: reading the state dict at %r", path, key)
    tensors = {name: value.detach() for name, value in state_dict.items() if isinstance(value, Tensor)}
    return TorchFile(
        tensors,
        {name: value for name, value in state_dict.items() if not isinstance(value, Tensor)},
        dict(getattr(state_dict, "_metadata", None) or {}),
    )


def _load(path: Path) -> Any:
    try:
        mapped = zipfile.is_zipfile(path)  # as torch.save writes since PyTorch 1.6; older files are read into memory
        if mapped and _is_torchscript(path):
            raise CheckpointError(
                f"{path}: is a TorchScript archive, which contains code: save its weights with "
                "torch.save(torch.jit.load(path).state_dict(), new_path) and give that file"
            )
        with _harmless_classes():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_why_not_loaded(error)}") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        first_line = (_ESCAPE_CODES.sub("", str(error)).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a complete file of torch.save: {first_line}") from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


@contextlib.contextmanager
def _harmless_classes() -> Iterator[None]:
    """Allow classes of plain data that training scripts save beside the weights.

    These are command line arguments (``argparse.Namespace``) and NumPy numbers and arrays. Constructing them runs no
    code of the file.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):  # cannot allow functions by name
        yield
        return
    core: Any = np._core if hasattr(np, "_core") else np.core
    multiarray = core.multiarray
    kinds = {type(np.dtype(kind)) for kind in (*np.typecodes["AllInteger"], *np.typecodes["Float"], "?")}
    scalar = multiarray.scalar
    # The module of these functions has different names in NumPy 1 and 2.
    functions = [
        (function, f"numpy.{module}.multiarray.{name}")
        for module in ("core", "_core")
        for name, function in (("scalar", scalar), ("_reconstruct", multiarray._reconstruct))
    ]
    with torch.serialization.safe_globals([argparse.Namespace, np.ndarray, np.dtype, *kinds, *functions]):
        yield


def _why_not_loaded(error: Exception) -> str:
    text = _ESCAPE_CODES.sub("", str(error))
    unsupported = _UNSUPPORTED_CLASS.search(text)
    if unsupported:
        return (
            f"contains a Python object of the class {unsupported[1]}. Files are read with weights_only=True, so that "
            "no code in them runs. If you trust the file, load it with torch.load(path, weights_only=False) and save "
            "only the state dict of the network: torch.save(model.state_dict(), new_path)"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    detail = next((line for line in lines if "Error:" in line), lines[0] if lines else type(error).__name__)
    return f"not a complete file of torch.save: {detail.partition('Error: ')[2] or detail}"


def _find_state_dict(path: Path, content: Any) -> tuple[str, Mapping[str, Any]]:
    """Return the state dict and the keys that lead to it, joined by dots."""
    keys: list[str] = []
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, Mapping):
            break
        if _is_state_dict(content):
            return ".".join(keys), content
        nested = {str(key): value for key, value in content.items() if _holds_state_dict(value)}
        if not nested:
            break
        key = next((key for key in _USUAL_KEYS if key in nested), next(iter(nested)))
        if len(nested) > 1:
            if key not in _USUAL_KEYS:
                raise CheckpointError(
                    f"{path}: contains several state dicts, at {', '.join(map(repr, nested))}: save the one to use in "
                    f"a separate file, e.g. torch.save(torch.load(path)[{key!r}], new_path)"
                )
            others = ", ".join(repr(other) for other in nested if other != key)
            _LOGGER.warning("%s: using the state dict at %r; the file also contains %s", path, key, others)
        keys.append(key)
        content = nested[key]
    if isinstance(content, Mapping) and not content:
        raise CheckpointError(f"{path}: contains no tensors")
    raise CheckpointError(f"{path}: expected a state dict (tensors by name), got {_described(content)}")


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    """Return whether a mapping is a state dict: it has only tensors by name and the extra state of modules."""
    return (
        any(isinstance(value, Tensor) for value in content.values())
        and all(isinstance(name, str) for name in content)
        and all(isinstance(value, Tensor) or _is_extra_state(name) for name, value in content.items())
    )


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"


def _holds_state_dict(value: Any, depth: int = 1) -> bool:
    if not isinstance(value, Mapping):
        return False
    return _is_state_dict(value) or (
        depth < _MAX_DEPTH and any(_holds_state_dict(entry, depth + 1) for entry in value.values())
    )


def _described(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    for name, value in content.items():
        if not isinstance(name, str):
            return f"a dict with the key {name!r}"
        if not isinstance(value, Tensor) and not _is_extra_state(name):
            return f"{type(value).__name__} at {name!r}"
    return "a dict without tensors"
