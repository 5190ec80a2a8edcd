"""The file or directory that merging or aligning writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mudsc_fast.checkpoints.checkpoint import Checkpoint
from mudsc_fast.checkpoints.directory import FORMAT_OF_SUFFIX, Format
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.io.writing import (
    TensorSize,
    Written,
    check_free,
    copy_companions,
    parse_size,
    write_checkpoint,
)

#: Maximum size of a shard, unless a single tensor is larger. Hugging Face has the same default.
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Output:
    """A file or directory to write.

    Attributes
    ----------
    path
        Absolute path that does not exist yet.
    format
        Format of the files, or None for that of the input.
    shard_bytes
        Maximum number of bytes of a file in a directory, or None for a single file.
    dtype
        Dtype of floating point tensors, or None to keep theirs.
    """

    path: Path
    format: Format | None
    shard_bytes: int | None
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls, path: str | os.PathLike[str], file_format: Format | None, shard_size: str | None, dtype: torch.dtype | None
    ) -> Output:
        """Return the output at a path. It is a file if the path has the suffix of a checkpoint, else a directory.

        Raises
        ------
        CheckpointError
            If the path exists, cannot be written, or does not fit the format or the shard size.
        """
        path = Path(os.path.abspath(path))
        check_free(path)
        by_name = FORMAT_OF_SUFFIX.get(path.suffix)
        if by_name is None:
            return cls(path, file_format, parse_size(shard_size or DEFAULT_SHARD_SIZE), dtype)
        if file_format not in (None, by_name):
            raise CheckpointError(
                f"{path}: this suffix means a {by_name} file, but the format is {file_format}: change one of them"
            )
        if shard_size is not None:
            raise CheckpointError(f"{path}: a single file has no shards: name a directory or leave out the shard size")
        return cls(path, by_name, None, dtype)

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """Return the dtype in which a tensor is written."""
        return self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype

    def write(
        self,
        path: Path,
        source: Checkpoint,
        tensor_of: Callable[[str], Tensor],
        ranks: Ranks | None = None,
        rank_of: Callable[[str], int] = lambda _: 0,
    ) -> Written:
        """Write a network with the tensor names of `source`, and copy the files beside the weights of `source`.

        Parameters
        ----------
        path
            Where to write it.
        source
            The network whose form the result has.
        tensor_of
            Computes the tensor of a given name.
        ranks, rank_of
            The processes that write together, and the rank that writes each tensor.
        """
        pieces = _in_order(source)
        # Pieces of one tensor are written in a row, so keeping the last tensor is enough.
        last: dict[str, Tensor] = {}

        def piece_of(stored: str) -> Tensor:
            piece = source.pieces[stored]
            if piece.view is None:
                return tensor_of(piece.name).to(sizes[stored].dtype)
            if piece.name not in last:
                last.clear()
                last[piece.name] = tensor_of(piece.name)
            return piece.of(last[piece.name]).to(sizes[stored].dtype)

        sizes = {}
        for stored in pieces:
            piece = source.pieces[stored]
            whole = source.tensors[piece.name]
            shape = tuple(whole.shape) if piece.view is None else piece.view[0]
            sizes[stored] = TensorSize(shape, self.dtype_of(whole))
        written = write_checkpoint(
            path,
            self.format or source.format,
            sizes,
            piece_of,
            shard_bytes=self.shard_bytes,
            weights_name=source.weights_name,
            extra_state=source.extra_state,
            versions=source.versions,
            metadata=source.metadata,
            ranks=ranks,
            rank_of=lambda stored: rank_of(source.pieces[stored].name),
        )
        is_first = ranks is None or ranks.rank == 0
        if self.shard_bytes is not None and source.path.is_dir() and is_first:
            copy_companions(source.path, path, source.config, self.dtype)
        return written


def _in_order(source: Checkpoint) -> Iterable[str]:
    """Return the names in the files, in an order that keeps the pieces of each tensor together."""
    first: dict[str, int] = {}
    for position, piece in enumerate(source.pieces.values()):
        first.setdefault(piece.name, position)
    return sorted(source.pieces, key=lambda stored: first[source.pieces[stored].name])
