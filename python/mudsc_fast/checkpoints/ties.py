"""Tied tensors that are stored once in some files and twice in others, or that are tied in some networks only.

Files often leave out an output layer that is the embedding table. Ties are found by comparing contents, as
``from_pretrained`` of transformers does: if the configuration ties two tensors but the file holds different values for
them, they are not tied.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mudsc_fast._tensors import Piece
from mudsc_fast.checkpoints.checkpoint import Checkpoint
from mudsc_fast.checkpoints.compatibility import TABLES

#: Names of output layers that may be tied to an embedding table.
_HEADS = re.compile(
    r"(^|\.)(lm_head|embed_out|proj_out|output_projection|output|predictions\.decoder|vocab_projector)\.weight$"
)

_LOGGER = logging.getLogger(__name__)

_FLAG = "tie_word_embeddings"

_FIRST_ENTRIES = 1024


class TensorsWithAliases(Mapping[str, Tensor]):
    """The tensors of another mapping, with some left out and some also available under a second name.

    Parameters
    ----------
    tensors
        The tensors.
    aliases
        For each second name, the name in `tensors`.
    dropped
        Names to leave out.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], dropped: frozenset[str] = frozenset()
    ) -> None:
        self._tensors = tensors
        self._aliases = aliases
        self._dropped = dropped

    def __contains__(self, name: object) -> bool:
        return name not in self._dropped and (name in self._aliases or name in self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._dropped:
            raise KeyError(name)
        return self._tensors[self._aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._tensors if name not in self._dropped)
        yield from self._aliases

    def __len__(self) -> int:
        return sum(1 for _ in self)


def with_common_ties(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the networks with the same ties: tensors that are tied in all stay tied, others are stored separately.

    The merged network has the form of the first network. If an output layer is not tied in some network, the first
    network gets a copy of its table as an output layer, and its configuration no longer ties them.
    """
    result = list(checkpoints)
    names = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors))
    for name in names:
        stored = [name in checkpoint.tensors for checkpoint in result]
        if all(stored):
            if _HEADS.search(name):
                result = _with_common_flag(result, name)
            continue
        tables = [_table_of(checkpoint, name, result) for checkpoint in result]
        if any(not there and table is None for there, table in zip(stored, tables, strict=True)):
            continue  # missing in a network and not tied there: checked later
        free = any(there and table is None for there, table in zip(stored, tables, strict=True))
        if free or stored[0]:
            result = [
                checkpoint if there else _with_alias(checkpoint, name, table or "")
                for checkpoint, there, table in zip(result, stored, tables, strict=True)
            ]
        else:
            result = [
                _without(checkpoint, name) if there else checkpoint
                for checkpoint, there in zip(result, stored, strict=True)
            ]
        if free:
            if not stored[0]:
                _LOGGER.warning(
                    "%r is tied to another tensor in %s, but not in all networks: the output stores both",
                    name,
                    checkpoints[0].path,
                )
            result = [_untied(checkpoint) for checkpoint in result]
    return result


def _with_common_flag(checkpoints: list[Checkpoint], name: str) -> list[Checkpoint]:
    """Untie the configurations of networks that all store an output layer, unless it equals the table in all."""
    flags = {checkpoint.config.get(_FLAG) for checkpoint in checkpoints if checkpoint.config is not None}
    if flags <= {False}:
        return checkpoints
    if all(_equal_table(checkpoint, name) is not None for checkpoint in checkpoints):
        return checkpoints
    return [_untied(checkpoint) for checkpoint in checkpoints]


def _table_of(checkpoint: Checkpoint, name: str, checkpoints: Sequence[Checkpoint]) -> str | None:
    """Return the name of the tensor that `name` is tied to in a network, None if it is not tied."""
    if name in checkpoint.tensors:
        return _equal_table(checkpoint, name)
    for other in checkpoints:
        table = _equal_table(other, name) if name in other.tensors else None
        if table is not None and table in checkpoint.tensors:
            return table
    if not _HEADS.search(name) or (checkpoint.config or {}).get(_FLAG, True) is False:
        return None
    shape = next(other.tensors[name].shape for other in checkpoints if name in other.tensors)
    tables = [table for table in checkpoint.tensors if TABLES.search(table)]
    tables = [table for table in tables if checkpoint.tensors[table].shape == shape]
    return tables[0] if len(tables) == 1 else None


def _equal_table(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the name of another tensor of a network with the same values, None if there is none."""
    tensor = checkpoint.tensors[name]
    if tensor.ndim != 2:
        return None
    candidates = [
        other for other in checkpoint.tensors if other != name and (TABLES.search(other) or _HEADS.search(other))
    ]
    return next((other for other in candidates if _equal(tensor, checkpoint.tensors[other])), None)


def _equal(first: Tensor, other: Tensor) -> bool:
    if first.shape != other.shape or first.dtype != other.dtype:
        return False
    start, other_start = (tensor.reshape(-1)[:_FIRST_ENTRIES] for tensor in (first, other))
    return torch.equal(start, other_start) and torch.equal(first, other)


def _with_alias(checkpoint: Checkpoint, name: str, table: str) -> Checkpoint:
    pieces = {**checkpoint.pieces, name: Piece(name)}
    return replace(checkpoint, tensors=TensorsWithAliases(checkpoint.tensors, {name: table}), pieces=pieces)


def _without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    pieces = {stored: piece for stored, piece in checkpoint.pieces.items() if piece.name != name}
    tensors = TensorsWithAliases(checkpoint.tensors, {}, frozenset((name,)))
    return replace(checkpoint, tensors=tensors, pieces=pieces)


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.config is None:
        return checkpoint
    return replace(checkpoint, config={**checkpoint.config, _FLAG: False})
