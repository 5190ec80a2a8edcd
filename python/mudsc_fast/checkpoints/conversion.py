"""Convert tensor names in files to the names that transformers uses in memory.

Hugging Face files keep the names and shapes with which a network was published. In memory, some tensors have other
names (DINOv2, ViT), and several may be stacked into one (the experts of Mixtral). A spec that is derived from the model
has the names in memory. To find which part of a tensor in memory each tensor in a file is, the model is converted for
saving without data: the converted tensors are views of the tensors in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mudsc_fast._tensors import Piece
from mudsc_fast.checkpoints.checkpoint import Checkpoint
from mudsc_fast.checkpoints.errors import CheckpointError


class AssembledTensors(Mapping[str, Tensor]):
    """Tensors that are assembled from pieces on access. A tensor that is a single whole piece is not copied.

    The last tensor is kept, because callers often ask for the same tensor several times in a row.

    Parameters
    ----------
    tensors
        The pieces by name.
    pieces
        For each piece, the part of a tensor that it is.
    shapes
        Shape of each tensor.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece], shapes: Mapping[str, torch.Size]
    ) -> None:
        self._tensors = tensors
        self._shapes = shapes
        self._last: tuple[str, Tensor] | None = None
        self._parts: dict[str, list[tuple[str, Piece]]] = {}
        for stored, piece in pieces.items():
            self._parts.setdefault(piece.name, []).append((stored, piece))

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        if parts[0][1].view is None:
            return self._tensors[parts[0][0]]
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        self._last = None  # frees its memory before the next tensor is allocated
        first = self._tensors[parts[0][0]]
        assembled = torch.empty(self._shapes[name], dtype=first.dtype, device=first.device)
        for stored, piece in parts:
            piece.of(assembled).copy_(self._tensors[stored])
        self._last = name, assembled
        return assembled

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def as_loaded(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Return a checkpoint whose tensors have the names and shapes that they have in a model of transformers.

    Parameters
    ----------
    checkpoint
        The network.
    model
        The model that its configuration describes, on the meta device.

    Raises
    ------
    CheckpointError
        If the tensors are not those of the model, or transformers converts them in a way that is not a view.
    """
    in_memory = model.state_dict()
    stored = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    if all(name in in_memory and tuple(in_memory[name].shape) == shape for name, shape in stored.items()):
        return checkpoint
    pieces = _pieces(model, in_memory)
    unknown = [name for name in stored if name not in pieces]
    if unknown:
        forward = _renamed(model, in_memory, stored)
        pieces = {**pieces, **forward}
        unknown = [name for name in stored if name not in pieces]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path}: {type(model).__name__} of transformers has no {unknown[0]!r} "
            f"({len(unknown)} of {len(stored)} tensors are unknown to it): leave them out with ignore='PATTERN', "
            "or give the spec as a .json file"
        )
    used = {name: pieces[name] for name in stored}
    _check_complete(checkpoint, used, in_memory)
    shapes = {name: tensor.shape for name, tensor in in_memory.items()}
    original = checkpoint.pieces
    return replace(
        checkpoint,
        tensors=AssembledTensors(checkpoint.tensors, used, shapes),
        pieces={name: used[piece.name] for name, piece in original.items()},
    )


def _check_complete(checkpoint: Checkpoint, used: Mapping[str, Piece], in_memory: Mapping[str, Tensor]) -> None:
    entries: dict[str, int] = {}
    for stored, piece in used.items():
        entries[piece.name] = entries.get(piece.name, 0) + checkpoint.tensors[stored].numel()
    for name, count in entries.items():
        if count != in_memory[name].numel():
            raise CheckpointError(
                f"{checkpoint.path}: the tensors of {name!r} have {count} entries, expected "
                f"{in_memory[name].numel()}: the weights do not fit config.json"
            )


class _WithoutCopies(TorchDispatchMode):
    """Replace clones by the cloned tensors, so that views can be recognized by their storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0]
        return func(*args, **(kwargs or {}))


def _pieces(model: nn.Module, in_memory: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Return for each tensor that transformers would save which part of a tensor in memory it is."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5, tensors have the same names in files and in memory
        return {name: Piece(name) for name in in_memory}
    name_of_storage: dict[int, str] = {}
    for name, tensor in in_memory.items():
        name_of_storage.setdefault(tensor.untyped_storage()._cdata, name)
    with _WithoutCopies():  # type: ignore[no-untyped-call]
        saved = revert_weight_conversion(model, dict(in_memory))
    pieces = {}
    for stored, tensor in saved.items():
        source = name_of_storage.get(tensor.untyped_storage()._cdata)
        if source is None:
            continue
        whole = in_memory[source]
        if tensor.shape == whole.shape and tensor.stride() == whole.stride() and not tensor.storage_offset():
            # Each of several tied tensors keeps its own name.
            pieces[stored] = Piece(stored if stored in in_memory else source)
        else:
            pieces[stored] = Piece(source, (tuple(tensor.shape), tensor.stride(), tensor.storage_offset()))
    return pieces


def _renamed(model: nn.Module, in_memory: Mapping[str, Tensor], stored: Mapping[str, Any]) -> dict[str, Piece]:
    """Return the pieces of tensors that transformers renames on loading and saves under their new names."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        return {}
    conversions = get_model_conversion_mapping(model)
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    renamings = [conversion for conversion in conversions if not isinstance(conversion, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, list[str]] = {}
    for name in stored:
        loaded, _ = rename_source_key(name, renamings, converters, prefix, dict(in_memory))
        found.setdefault(loaded, []).append(name)
    return {
        names[0]: Piece(loaded)
        for loaded, names in found.items()
        if len(names) == 1 and loaded in in_memory and tuple(in_memory[loaded].shape) == stored[names[0]]
    }
