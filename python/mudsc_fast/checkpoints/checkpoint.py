"""Read checkpoints: safetensors and ``torch.save`` files, and directories of shards such as those of Hugging Face.

Tensors are views of memory-mapped files. Opening a checkpoint reads no weights, and pages that are read later belong to
the file cache, which the operating system frees when memory runs short.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mudsc_fast._tensors import Piece
from mudsc_fast.checkpoints.directory import (
    FORMAT_OF_SUFFIX,
    WEIGHTS_NAME,
    Format,
    Weights,
    find_weights,
    resolve_hub_cache,
)
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.checkpoints.names import plain_names
from mudsc_fast.checkpoints.safetensors_file import SafetensorsFile
from mudsc_fast.checkpoints.torch_file import open_torch_file

_LOGGER = logging.getLogger(__name__)

_EXPECTED = "a .safetensors file, a file of torch.save with a state dict, or a directory with one of them"

#: Number of entries of each tensor that are compared to tell whether two sets of weights are the same.
_COMPARED_ENTRIES = 1024


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each a view of a mapped file, created on access.

    Parameters
    ----------
    shards
        The open files, as mappings from names to tensors.
    shard_of
        For each name, the shard that holds the tensor.
    """

    def __init__(self, shards: Mapping[str, Mapping[str, Tensor]], shard_of: Mapping[str, str]) -> None:
        self._shards = shards
        self._shard_of = shard_of

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self._shard_of[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)


class RenamedTensors(Mapping[str, Tensor]):
    """Some of the tensors of another mapping, under other names.

    Parameters
    ----------
    tensors
        The tensors.
    source
        For each name, the name in `tensors`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._source = source

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._source[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


@dataclass(frozen=True)
class Checkpoint:
    """A network in files.

    Attributes
    ----------
    path
        The file or directory.
    format
        ``"safetensors"`` or ``"torch"``.
    tensors
        The tensors by name, read on access. Prefixes that wrappers add to names (``torch.compile``, ``DataParallel``)
        are removed.
    config
        The content of ``config.json``, if `path` is a directory that has one.
    pieces
        For each name in the files, the tensor of `tensors`, or the part of one, that is stored under this name.
    weights_name
        Name of a directory's single weights file.
    extra_state
        Entries of the state dict that are not tensors, by name.
    versions
        For each module in a torch file, the version of its format (``_metadata`` of the state dict). Empty for
        safetensors.
    metadata
        Strings that a safetensors file holds beside the tensors.
    """

    path: Path
    format: Format
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    weights_name: str = WEIGHTS_NAME["safetensors"]
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class _Content:
    """Content of one file or of one set of shards."""

    tensors: Mapping[str, Tensor]
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Parameters
    ----------
    path
        One of:

        - a .safetensors file;
        - a .pt, .pth, .bin or .ckpt file of ``torch.save`` with a state dict, which may be inside a training
          checkpoint. It is loaded with ``weights_only=True``. Files from before PyTorch 1.6 cannot be mapped and are
          read into memory;
        - a directory with one such file, or with shards and their index. If it has several sets of weights, the one
          that ``from_pretrained`` of transformers reads is used, and the logger ``mudsc_fast.checkpoints`` warns of
          sets that differ from it.

    Raises
    ------
    CheckpointError
        If the file does not exist, is incomplete or is not a checkpoint, or if a shard or a tensor of an index is
        missing.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(resolve_hub_cache(path))
    if not path.exists():
        hint = ""
        if _is_hub_name(str(path)):
            hint = f"; to merge a model of the Hugging Face hub, download it first: hf download {path}"
        raise CheckpointError(f"{path}: no such file or directory{hint}")
    kind = FORMAT_OF_SUFFIX.get(path.suffix)
    if kind is None:
        raise CheckpointError(f"{path}: not a checkpoint: expected {_EXPECTED}")
    return _checkpoint(path, kind, _open_file(path, kind), None, WEIGHTS_NAME[kind])


def _is_hub_name(text: str) -> bool:
    """Tell whether a text looks like the name of a model on the Hugging Face hub, OWNER/NAME."""
    owner, _, name = text.partition("/")
    return bool(owner and name and "/" not in name and not owner.startswith(".") and not Path(owner).exists())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises
    ------
    CheckpointError
        If the file cannot be read or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _checkpoint(
    path: Path, kind: Format, content: _Content, config: Mapping[str, Any] | None, weights_name: str
) -> Checkpoint:
    stored_names = plain_names(content.tensors)
    renamed = any(name != stored for name, stored in stored_names.items())
    return Checkpoint(
        path,
        kind,
        RenamedTensors(content.tensors, stored_names) if renamed else content.tensors,
        config,
        {stored: Piece(name) for name, stored in stored_names.items()},
        weights_name,
        content.extra_state,
        content.versions,
        content.metadata,
    )


def _open_directory(path: Path) -> Checkpoint:
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    read, *unused = find_weights(path)
    content = _open_weights(path, read)
    for other in unused:
        _warn_of_difference(path, read, content.tensors, other)
    return _checkpoint(path, read.format, content, config, read.name)


def _open_weights(path: Path, weights: Weights) -> _Content:
    if weights.is_index:
        return _open_shards(path, weights.file, weights.format)
    return _open_file(path / weights.file, weights.format)


def _warn_of_difference(path: Path, read: Weights, tensors: Mapping[str, Tensor], other: Weights) -> None:
    """Warn if another set of weights in the directory is not the same as the one that is read."""
    try:
        others = _open_weights(path, other).tensors
    except CheckpointError as error:
        _LOGGER.warning(
            "%s: reading %s; %s in the same directory cannot be read (%s)", path, read.file, other.file, error
        )
        return
    differing = [name for name in tensors if name in others and not _look_alike(tensors[name], others[name])]
    if differing:
        _LOGGER.warning(
            "%s: reading %s, as transformers does; %s in the same directory holds different weights (%d of %d tensors "
            "differ, such as %r): remove the outdated file",
            path,
            read.file,
            other.file,
            len(differing),
            len(tensors),
            differing[0],
        )


def _look_alike(first: Tensor, other: Tensor) -> bool:
    """Compare the shapes of two tensors, and their first entries if their dtypes are equal."""
    if first.shape != other.shape or first.dtype != other.dtype:
        return first.shape == other.shape
    entries = [tensor.reshape(-1)[:_COMPARED_ENTRIES].contiguous().view(torch.uint8) for tensor in (first, other)]
    return torch.equal(*entries)


def _open_shards(path: Path, index_name: str, kind: Format) -> _Content:
    shard_of = read_json(path / index_name).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{path / index_name}: weight_map must map tensor names to file names")
    names = sorted(set(shard_of.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path / index_name}: shards must be in the same directory, got {outside[0]!r}")
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    shards = {name: _open_file(path / name, kind) for name in names}
    for tensor, shard in shard_of.items():
        if tensor not in shards[shard].tensors:
            raise CheckpointError(f"{path / shard}: the tensor {tensor!r} is missing, but {index_name} lists it here")
    return _Content(
        LazyTensors({name: shard.tensors for name, shard in shards.items()}, shard_of),
        {name: value for shard in shards.values() for name, value in shard.extra_state.items()},
        {name: value for shard in shards.values() for name, value in shard.versions.items()},
        next(iter(shards.values())).metadata if shards else {},
    )


def _open_file(path: Path, kind: Format) -> _Content:
    if kind == "safetensors":
        file = SafetensorsFile(path)
        content = _Content(file, metadata=file.metadata)
    else:
        loaded = open_torch_file(path)
        content = _Content(loaded.tensors, loaded.extra_state, loaded.versions)
    if len(content.tensors) == 0:
        raise CheckpointError(f"{path}: contains no tensors")
    return content
