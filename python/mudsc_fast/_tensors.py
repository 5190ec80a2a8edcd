"""Tensors with several names or in pieces, and comparisons of tensors of any dtype."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_INT_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Piece:
    """What a tensor in a file is: a tensor of the network, or a part of one.

    Attributes
    ----------
    name
        Name of the tensor of the network.
    view
        Shape, strides and offset of the part; None for the whole tensor.
    """

    name: str
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the piece of a tensor of the network, as a view."""
        return tensor if self.view is None else tensor.contiguous().as_strided(*self.view)


def without_entries(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same names, shapes and floating-point dtypes on the meta device.

    They tell what can be told without opening files again.
    """
    return {
        name: torch.empty(
            tensor.shape,
            dtype=tensor.dtype if tensor.is_floating_point() or tensor.is_complex() else torch.int64,
            device="meta",
        )
        for name, tensor in tensors.items()
    }


class Padded(Mapping[str, Tensor]):
    """The tensors of one network, plus tensors of others under names that it does not have."""

    def __init__(self, own: Mapping[str, Tensor], networks: Sequence[Mapping[str, Tensor]]) -> None:
        self._own = own
        self._all = list(networks)
        self._names = dict.fromkeys(name for tensors in self._all for name in tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        for tensors in (self._own, *self._all):
            if name in tensors:
                return tensors[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def with_metadata(tensors: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with the versions of the modules that another one carries (``_metadata``).

    Modules that changed between versions of a library load an old state dict by them.
    """
    return with_versions(tensors, getattr(original, "_metadata", None))


def with_versions(tensors: Mapping[str, Any], versions: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a state dict with the versions of its modules, if these are known."""
    result = OrderedDict(tensors)
    if versions:
        result._metadata = OrderedDict(copy.deepcopy(dict(versions)))  # type: ignore[attr-defined]
    return result


def tied_tensors(state_dicts: Sequence[Mapping[str, Tensor]]) -> list[tuple[str, ...]]:
    """Return the names of each tensor that has several in every model: an embedding table that is the output layer too.

    A tensor that only some of the models share between names is not among them: its names have values of their own.
    """
    held = [dict(state_dict) for state_dict in state_dicts]  # so that no two tensors read from a file share an address
    names: dict[tuple[object, ...], list[str]] = {}
    for name, first in held[0].items():
        if first.numel():
            names.setdefault(tuple(_place(tensors[name]) for tensors in held), []).append(name)
    return [tuple(tied) for tied in names.values() if len(tied) > 1]


def _place(tensor: Tensor) -> tuple[object, ...]:
    if tensor.is_meta:  # of another process: names of one tensor have one such tensor
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def same_values(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors of any dtype are the same, NaN included."""
    if first is second:
        return True
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(as_integers(first), as_integers(second))


def as_integers(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor of any dtype, because not all dtypes can be compared or indexed, and NaN != NaN."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.detach().view(_INT_OF_WIDTH[tensor.itemsize])
