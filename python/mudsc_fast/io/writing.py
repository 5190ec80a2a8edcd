"""Writing checkpoints, tensor by tensor and all or nothing.

What is written lies under a hidden name beside its destination, in the same file system, until it is complete and has
reached the disk; then it is renamed. No failure leaves a part of the output behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mudsc_fast._files import atomic_write
from mudsc_fast.io.checkpoint import FORMAT_OF_SUFFIX, WEIGHTS_NAME, CheckpointError, Format

_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

#: Directories' files that hold weights or belong to them, or describe one network only.
_NOT_COPIED = (*FORMAT_OF_SUFFIX, ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".md")


@dataclass(frozen=True)
class TensorSize:
    """Shape and dtype of a tensor that is yet to be computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's entries."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What was written: the files that hold tensors, and the tensors' bytes."""

    files: tuple[str, ...]
    num_bytes: int


def parse_size(text: str) -> int:
    """Return the bytes that e.g. ``"5GB"``, ``"200 MiB"`` or ``"1000"`` stand for.

    Raises
    ------
    ValueError
        If it is none of these, or below 1.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"a size must be a positive number with B, KB, MB, GB, KiB, MiB or GiB, got {text!r}")
    return int(float(match[1]) * unit)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a path to write a file or a directory at; after the enclosed code it is renamed to `target`.

    If the enclosed code fails, what it wrote is removed.

    Raises
    ------
    CheckpointError
        If `target` exists, its directory does not, or it cannot be written.
    """
    check_free(target)
    try:
        # A directory of its own, so that nothing else is ever at the path; beside the target, to be renamed.
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        written = temporary / target.name
        yield written
        for path in [*written.rglob("*"), written] if written.is_dir() else [written]:
            _flush(path)
        check_free(target)
        written.rename(target)
        _flush(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raise a CheckpointError if `target` exists or there is no directory to write it in."""
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: exists; name an output that does not")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: no such directory to write {target.name} in")


def write_checkpoint(
    path: Path,
    kind: Format,
    sizes: Mapping[str, TensorSize],
    tensor_of: Callable[[str], Tensor],
    *,
    shard_bytes: int | None = None,
) -> Written:
    """Write tensors to a file, or where `shard_bytes` is given as shards to a new directory.

    Parameters
    ----------
    path
        The file or the directory.
    kind
        The format.
    sizes
        Names, shapes and dtypes of all tensors.
    tensor_of
        Computes a tensor by its name; called once for each. At most two results are in memory at a time.
    shard_bytes
        The most bytes of tensors in a file; a larger tensor has a file of its own.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    write = _write_safetensors if kind == "safetensors" else _write_torch
    total = sum(size.num_bytes for size in sizes.values())
    if shard_bytes is None:
        write(path, list(sizes), sizes, tensor_of)
        return Written((path.name,), total)
    path.mkdir()
    shards = _shards(sizes, shard_bytes)
    stem, suffix = os.path.splitext(WEIGHTS_NAME[kind])
    shard_of: dict[str, str] = {}
    files = []
    for number, names in enumerate(shards, start=1):
        file = stem + (f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "") + suffix
        write(path / file, names, sizes, tensor_of)
        shard_of.update(dict.fromkeys(names, file))
        files.append(file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
        write_json(path / f"{WEIGHTS_NAME[kind]}.index.json", index)
    return Written(tuple(files), total)


def copy_companions(source: Path, destination: Path, dtype: torch.dtype | None) -> None:
    """Copy what lies beside the weights, configuration and tokenizer above all, to another directory.

    Parameters
    ----------
    source, destination
        The directories. Weights, subdirectories, hidden files and the model's card are left out.
    dtype
        Written to ``config.json`` as the dtype of the weights, if given.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_NOT_COPIED):
            shutil.copyfile(file, destination / file.name)
    config_file = destination / "config.json"
    if dtype is not None and config_file.exists():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        name = str(dtype).removeprefix("torch.")
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
            config[key] = name
        write_json(config_file, config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file; one that cannot be written whole is as it was."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, TensorSize], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size.num_bytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size.num_bytes
    return shards


def _write_safetensors(
    path: Path, names: Sequence[str], sizes: Mapping[str, TensorSize], tensor_of: Callable[[str], Tensor]
) -> None:
    """Write the format of https://huggingface.co/docs/safetensors: length and text of a JSON header, then the entries.

    The header says where each tensor lies, and follows from the sizes alone: so no tensor waits in memory for others.
    """
    # Wide entries first, so that each tensor begins at a multiple of its entries' size.
    order = sorted(names, key=lambda name: -sizes[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        size = sizes[name]
        if size.dtype not in _SAFETENSORS_NAMES:
            raise CheckpointError(f"{name!r} has dtype {size.dtype}, which cannot be written")
        end = begin + size.num_bytes
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[size.dtype],
            "shape": list(size.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in _contents(order, sizes, tensor_of):
            file.write(part)


def _write_torch(
    path: Path, names: Sequence[str], sizes: Mapping[str, TensorSize], tensor_of: Callable[[str], Tensor]
) -> None:
    """Write a state dict as ``torch.save`` does.

    It takes all tensors at once, so they are first written to files of their own and mapped.
    """
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=path.parent) as scratch:
        mapped: dict[str, Tensor] = {}
        for number, (name, part) in enumerate(zip(names, _contents(names, sizes, tensor_of), strict=True)):
            size = sizes[name]
            file = Path(scratch) / str(number)
            file.write_bytes(part)
            entries = torch.Size(size.shape).numel()
            flat = torch.from_file(str(file), shared=False, size=entries, dtype=size.dtype) if entries else None
            mapped[name] = (
                torch.empty(size.shape, dtype=size.dtype, device="cpu") if flat is None else flat.view(size.shape)
            )
        with path.open("wb") as output:
            try:
                torch.save(mapped, output)
            except RuntimeError as error:  # torch's writer, after the file refused a part
                raise OSError(0, str(error).splitlines()[0]) from error


def _contents(
    names: Iterable[str], sizes: Mapping[str, TensorSize], tensor_of: Callable[[str], Tensor]
) -> Iterator[memoryview]:
    for name in names:
        tensor = tensor_of(name)
        assert (tuple(tensor.shape), tensor.dtype) == (sizes[name].shape, sizes[name].dtype)
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _flush(path: Path) -> None:
    """Wait until a file or a directory has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
