"""Reading checkpoints: safetensors and ``torch.save`` files, and directories of their shards, such as Hugging Face's.

Tensors are views of mapped files: a checkpoint takes no memory of its own until an entry is read, and the pages read
belong to the file cache, which the system takes back when memory runs short.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Format = Literal["safetensors", "torch"]

#: The format that a file's suffix stands for.
FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
}

#: The weights' file in a directory, by format; with shards, ``<name>.index.json`` says which holds what.
WEIGHTS_NAME: dict[Format, str] = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}

_WHAT_IS_READ = "a .safetensors file, a file of torch.save with a state dict, or a directory with one of them"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written, or merged with another; the message says why."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each a view of a mapped file that is made when it is asked for.

    Parameters
    ----------
    shards
        The files that hold the tensors, opened: mappings from names to tensors.
    shard_of
        For each name the shard that holds it.
    """

    def __init__(self, shards: Mapping[str, Mapping[str, Tensor]], shard_of: Mapping[str, str]) -> None:
        self._shards = shards
        self._shard_of = shard_of

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self._shard_of[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)


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
        The tensors by name, read when asked for.
    config
        What ``config.json`` says, if `path` is a directory that has one.
    """

    path: Path
    format: Format
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Parameters
    ----------
    path
        A .safetensors file; a .pt, .pth, .bin or .ckpt file with a state dict as ``torch.save`` writes it (loaded with
        ``weights_only=True``; files from before PyTorch 1.6 cannot be mapped and are read into memory); or a directory
        with ``model.safetensors`` or ``pytorch_model.bin``, or with shards of these and their index.

    Raises
    ------
    CheckpointError
        If there is no such file, it is no checkpoint, is cut short, or lacks a shard or a tensor of its index.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    kind = FORMAT_OF_SUFFIX.get(path.suffix)
    if kind is None:
        raise CheckpointError(f"{path}: not a checkpoint: expected {_WHAT_IS_READ}")
    return Checkpoint(path, kind, _open_file(path, kind))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises
    ------
    CheckpointError
        If the file cannot be read or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _open_directory(path: Path) -> Checkpoint:
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    for kind, name in WEIGHTS_NAME.items():
        if (path / f"{name}.index.json").exists():
            return Checkpoint(path, kind, _open_shards(path, f"{name}.index.json", kind), config)
        if (path / name).exists():
            return Checkpoint(path, kind, _open_file(path / name, kind), config)
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path}: holds an adapter, not a whole network: merge it into its base model first")
    raise CheckpointError(
        f"{path}: not a checkpoint: expected one of {', '.join(WEIGHTS_NAME.values())} or an index of their shards"
    )


def _open_shards(path: Path, index_name: str, kind: Format) -> LazyTensors:
    shard_of = read_json(path / index_name).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{path / index_name}: weight_map must map the tensors' names to files")
    names = sorted(set(shard_of.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path / index_name}: shards must lie in the same directory, got {outside[0]!r}")
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    shards = {name: _open_file(path / name, kind) for name in names}
    for tensor, shard in shard_of.items():
        if tensor not in shards[shard]:
            raise CheckpointError(f"{path / shard}: lacks the tensor {tensor!r}, which {index_name} says it holds")
    return LazyTensors(shards, shard_of)


def _open_file(path: Path, kind: Format) -> Mapping[str, Tensor]:
    tensors = _SafetensorsFile(path) if kind == "safetensors" else _open_torch_file(path)
    if len(tensors) == 0:
        raise CheckpointError(f"{path}: holds no tensors")
    return tensors


class _SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one file, by name."""

    def __init__(self, path: Path) -> None:
        import safetensors  # only those who read files pay for its import

        try:
            file: Any = safetensors.safe_open(path, "pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
        self._file = file
        self._names: list[str] = list(file.keys())
        self._known = set(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open_torch_file(path: Path) -> Mapping[str, Tensor]:
    try:
        content = _load_mapped(path)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: not a whole state dict file of torch.save: {first_line}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: must hold a state dict, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            nested = isinstance(value, Mapping) and all(isinstance(entry, Tensor) for entry in value.values())
            hint = f": save what it holds at {name!r} as a file of its own" if nested else ""
            raise CheckpointError(
                f"{path}: must hold a state dict, tensors by name, got {type(value).__name__} at {name!r}{hint}"
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def _load_mapped(path: Path) -> Any:
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"  # a zip archive, as torch.save writes since PyTorch 1.6
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
