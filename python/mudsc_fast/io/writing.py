"""Write checkpoints tensor by tensor, atomically.

Files are written under a hidden name in the directory of their destination, and renamed when they are complete and
flushed to disk. A failure leaves no partial output behind. A process that is killed cannot clean up; the next one that
writes the same output does.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import shutil
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mudsc_fast._files import atomic_write, torch_save
from mudsc_fast.checkpoints.directory import FORMAT_OF_SUFFIX, WEIGHTS_NAME, Format
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.checkpoints.safetensors_file import NAME_OF_DTYPE
from mudsc_fast.distributed.ranks import Ranks

try:
    import fcntl
except ImportError:  # on Windows, where nothing is removed
    fcntl = None  # type: ignore[assignment]

_LOGGER = logging.getLogger(__name__)

#: A file in the directory of an unfinished output that the process which writes it keeps locked.
_LOCK_NAME = "lock"

#: Maximum number of files that are flushed at once, and number of bytes after which the disk begins to write a file.
_MAX_FLUSHED, _FLUSHED_BYTES = 16, 2**23

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

#: Files of a directory that are not copied: weights, indices of shards, and descriptions of a single network.
_NOT_COPIED = (*FORMAT_OF_SUFFIX, ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".md")

#: An index of the shards of a variant: model.safetensors.index.fp16.json.
_VARIANT_INDEX = re.compile(r"\.index\.[\w-]+\.json$")

#: Folders that sentence-transformers keeps beside the weights: 1_Pooling, 2_Dense, 3_Normalize.
_MODULE_FOLDER = re.compile(r"\d+_\w+")

#: Keys of metadata with hashes of the weights, which are wrong after merging.
_HASH = re.compile(r"hash|sha256|md5", re.IGNORECASE)


@dataclass(frozen=True)
class TensorSize:
    """Shape and dtype of a tensor that is not computed yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's entries."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """The files that were written, and the number of bytes of their tensors."""

    files: tuple[str, ...]
    num_bytes: int


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as ``"5GB"``, ``"200 MiB"`` or ``"1000"``.

    Raises
    ------
    ValueError
        If the text is not a size, or the size is below one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(
            f"expected a size such as 200MB, a positive number with B, KB, MB, GB, KiB, MiB or GiB, got {text!r}"
        )
    return int(float(match[1]) * unit)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or directory, which is renamed to `target` at the end of the ``with`` block.

    If the block fails, the temporary path is removed.

    Raises
    ------
    CheckpointError
        If `target` exists, its directory does not exist, or it cannot be written.
    """
    check_free(target)
    _remove_abandoned(target)
    try:
        # In a new directory, so that the path is free, and on the file system of the target, so that it can be renamed.
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        lock = (temporary / _LOCK_NAME).open("wb")
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        _try_lock(lock)
        written = temporary / target.name
        yield written
        _flush([*written.rglob("*"), written] if written.is_dir() else [written])
        check_free(target)
        written.rename(target)
        _flush([target.parent])
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        lock.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes left of the same output: the directories whose lock nobody holds."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        try:
            with (left / _LOCK_NAME).open("rb+") as lock:
                if not _try_lock(lock):
                    continue
        except OSError:  # not such a directory, or of another user
            continue
        _LOGGER.info("removing %s, which a killed run left", left)
        shutil.rmtree(left, ignore_errors=True)


def _try_lock(file: IO[bytes]) -> bool:
    """Lock a file for as long as this process has it open; return False if another process has locked it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked, or on a file system without locks
        return False
    return True


@contextmanager
def common_path(target: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield one temporary path to all processes, and rename it to `target` when all have finished the ``with`` block.

    If the block fails in a process, or a process dies, the other processes remove what was written.

    Raises
    ------
    CheckpointError
        As :func:`atomic_path`; also if some process cannot see the directory.
    """
    if ranks.alone:
        with atomic_path(target) as temporary:
            yield temporary
        return
    path = Path()
    try:
        with ExitStack() as stack:
            with ranks.step("creating the output"):
                if ranks.rank == 0:
                    path = stack.enter_context(atomic_path(target))
            path = ranks.broadcast_object(path, "creating the output")
            with ranks.step("creating the output"):
                if not path.parent.is_dir():
                    raise CheckpointError(f"{target.parent}: must be on a file system that all processes share")
            yield path
            with ranks.step("completing the output"):
                if ranks.rank == 0:
                    stack.close()
    except BaseException:
        if path.name:
            shutil.rmtree(path.parent, ignore_errors=True)
        raise


def check_free(target: Path) -> None:
    """Raise a CheckpointError if `target` exists or there is no directory to write it in."""
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: already exists: give another output")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: no such directory: create it to write {target.name} in it")


def write_checkpoint(
    path: Path,
    kind: Format,
    sizes: Mapping[str, TensorSize],
    tensor_of: Callable[[str], Tensor],
    *,
    shard_bytes: int | None = None,
    weights_name: str | None = None,
    extra_state: Mapping[str, Any] | None = None,
    versions: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    ranks: Ranks | None = None,
    rank_of: Callable[[str], int] = lambda _: 0,
) -> Written:
    """Write tensors to a file or, if `shard_bytes` is given, as shards to a new directory.

    If several processes write together, all of them call this function. Each process writes the shards of its tensors,
    and rank 0 writes everything else.

    Parameters
    ----------
    path
        The file or the directory.
    kind
        The format.
    sizes
        Names, shapes and dtypes of all tensors.
    tensor_of
        Computes the tensor of a given name. It is called once per name; at most two results are in memory at a time.
    shard_bytes
        Maximum number of bytes of tensors in a file. A larger tensor gets its own file.
    weights_name
        Name of the single file in a directory. The names of shards are made from it. By default it is the name that
        transformers uses.
    extra_state, versions
        Entries of a state dict that are not tensors, and its ``_metadata``, for torch files.
    metadata
        Strings to keep in a safetensors file. Hashes are left out, because the weights have changed.
    ranks, rank_of
        The processes, by default only this one, and the rank that writes each tensor to a shard.

    Raises
    ------
    OSError
        If a file cannot be written.
    CheckpointError
        If the format cannot hold a dtype or the extra state.
    """
    total = sum(size.num_bytes for size in sizes.values())
    if kind == "safetensors":
        stateful = [name for name, value in (extra_state or {}).items() if value is not None]
        if stateful:
            raise CheckpointError(
                f"{stateful[0]!r} is not a tensor, and safetensors files hold only tensors: write a .pt file, or a "
                "directory with --format torch"
            )
        texts = {key: text for key, text in (metadata or {}).items() if not _HASH.search(key)}

        def write(file: Path, names: Sequence[str]) -> None:
            _write_safetensors(file, names, sizes, tensor_of, texts)
    else:

        def write(file: Path, names: Sequence[str]) -> None:
            first = names[:1] == list(sizes)[:1]
            _write_torch(file, names, sizes, tensor_of, (extra_state or {}) if first else {}, dict(versions or {}))

    ranks = Ranks() if ranks is None else ranks
    if shard_bytes is None:
        with ranks.step("writing the output"):
            if ranks.rank == 0:
                write(path, list(sizes))
        return Written((path.name,), total)
    with ranks.step("writing the output"):
        if ranks.rank == 0:
            path.mkdir()
    shards = _shards(sizes, shard_bytes, rank_of)
    stem, suffix = _name_in_format(weights_name, kind)
    shard_of: dict[str, str] = {}
    files, own = [], []
    with ranks.step("writing the output"):
        for number, (rank, names) in enumerate(shards, start=1):
            file = stem + (f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "") + suffix
            if rank % ranks.size == ranks.rank:
                write(path / file, names)
                own.append(path / file)
            shard_of.update(dict.fromkeys(names, file))
            files.append(file)
        if not ranks.alone:
            _flush(own)  # here, so that the ranks wait for the disk at the same time
        if len(shards) > 1 and ranks.rank == 0:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
            write_json(path / f"{stem}{suffix}.index.json", index)
    return Written(tuple(files), total)


def _name_in_format(weights_name: str | None, kind: Format) -> tuple[str, str]:
    """Return the stem and the suffix of the weights file in a format."""
    if weights_name is None or (weights_name in WEIGHTS_NAME.values()):
        weights_name = WEIGHTS_NAME[kind]
    stem, suffix = os.path.splitext(weights_name)
    if FORMAT_OF_SUFFIX[suffix] != kind:
        suffix = os.path.splitext(WEIGHTS_NAME[kind])[1]
    return stem, suffix


def copy_companions(
    source: Path, destination: Path, config: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> None:
    """Copy the files beside the weights, such as the configuration and the tokenizer, to another directory.

    Parameters
    ----------
    source, destination
        The directories. Weights, hidden files and the model card are not copied. The only folders that are copied are
        those of sentence-transformers (``1_Pooling``, ``2_Dense``), including their weights.
    config
        Content of the new ``config.json``, if there is one.
    dtype
        If given, ``config.json`` names it as the dtype of the weights.
    """
    for entry in sorted(source.iterdir()):
        if entry.is_dir() and _MODULE_FOLDER.fullmatch(entry.name) and (source / "modules.json").exists():
            shutil.copytree(entry, destination / entry.name)
        elif _is_companion(entry):
            shutil.copyfile(entry, destination / entry.name)
    config_file = destination / "config.json"
    if config is None or not config_file.exists():
        return
    changed = dict(config)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        for key in [key for key in ("dtype", "torch_dtype") if key in changed] or ["torch_dtype"]:
            changed[key] = name
    if changed != json.loads(config_file.read_text(encoding="utf-8")):
        write_json(config_file, changed)


def _is_companion(entry: Path) -> bool:
    return (
        entry.is_file()
        and not entry.name.startswith(".")
        and not entry.name.endswith(_NOT_COPIED)
        and not _VARIANT_INDEX.search(entry.name)
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, TensorSize], most: int, rank_of: Callable[[str], int]) -> list[tuple[int, list[str]]]:
    """Return the tensors of each shard, with the rank that writes it."""
    shards: list[tuple[int, list[str]]] = []
    filled = 0
    for name in sorted(sizes, key=rank_of):  # a stable order: that of `sizes` for each rank
        rank, size = rank_of(name), sizes[name].num_bytes
        if not shards or shards[-1][0] != rank or (shards[-1][1] and filled + size > most):
            shards.append((rank, []))
            filled = 0
        shards[-1][1].append(name)
        filled += size
    return shards or [(0, [])]


def _write_safetensors(
    path: Path,
    names: Sequence[str],
    sizes: Mapping[str, TensorSize],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, tensor by tensor.

    The header has the offset of each tensor. These follow from the sizes alone, so tensors are written one by one.
    """
    # Wide dtypes first, so that each tensor begins at a multiple of its item size.
    order = sorted(names, key=lambda name: -sizes[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for name in order:
        size = sizes[name]
        if size.dtype not in NAME_OF_DTYPE:
            raise CheckpointError(
                f"{name!r} has dtype {size.dtype}, which safetensors files cannot hold: write a .pt file, or a "
                "directory with --format torch"
            )
        end = begin + size.num_bytes
        header[name] = {
            "dtype": NAME_OF_DTYPE[size.dtype],
            "shape": list(size.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = end = file.tell()
        for part in _contents(order, sizes, tensor_of):
            end += file.write(part)
            if end - begin >= _FLUSHED_BYTES:
                _start_flush(file, begin, end)
                begin = end


def _write_torch(
    path: Path,
    names: Sequence[str],
    sizes: Mapping[str, TensorSize],
    tensor_of: Callable[[str], Tensor],
    extra_state: Mapping[str, Any],
    versions: Mapping[str, Any],
) -> None:
    """Write a state dict as ``torch.save`` does.

    ``torch.save`` takes all tensors at once, so each is first written to a scratch file and mapped from there.
    """
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=path.parent) as scratch:
        mapped: OrderedDict[str, Any] = OrderedDict()
        for number, (name, part) in enumerate(zip(names, _contents(names, sizes, tensor_of), strict=True)):
            size = sizes[name]
            file = Path(scratch) / str(number)
            file.write_bytes(part)
            entries = torch.Size(size.shape).numel()
            flat = torch.from_file(str(file), shared=False, size=entries, dtype=size.dtype) if entries else None
            mapped[name] = (
                torch.empty(size.shape, dtype=size.dtype, device="cpu") if flat is None else flat.view(size.shape)
            )
        mapped.update(extra_state)
        if versions:
            mapped._metadata = OrderedDict(versions)  # type: ignore[attr-defined]  # as of Module.state_dict
        with path.open("wb") as output:
            torch_save(mapped, output)


def _contents(
    names: Iterable[str], sizes: Mapping[str, TensorSize], tensor_of: Callable[[str], Tensor]
) -> Iterator[memoryview]:
    for name in names:
        tensor = tensor_of(name)
        assert (tuple(tensor.shape), tensor.dtype) == (sizes[name].shape, sizes[name].dtype)
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _start_flush(file: IO[bytes], begin: int, end: int) -> None:
    """Let the disk begin to write a part of a file, if the system has a call for it, without waiting for it."""
    file.flush()
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def _flush(paths: Sequence[Path]) -> None:
    """Flush files and directories to disk, at once, because the file system then commits many in one step."""

    def flush(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(_MAX_FLUSHED) as pool:
        list(pool.map(flush, paths))
