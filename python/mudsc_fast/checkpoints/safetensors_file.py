"""Read one safetensors file through a memory map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from mudsc_fast.checkpoints.errors import CheckpointError


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file, by name. Each tensor is read on access.

    Raises
    ------
    CheckpointError
        If the file cannot be read or is incomplete.
    """

    def __init__(self, path: Path) -> None:
        import safetensors  # imported here because only reading files needs it

        try:
            file: Any = safetensors.safe_open(path, "pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from error
        self._path = path
        #: Tensors in use. While one is in use, its name gives the same object, so that ties can be found by identity.
        self._used: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self._names: list[str] = list(file.keys())
        self._known = set(self._names)
        self.metadata: dict[str, str] = dict(file.metadata() or {})

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        used = self._used.get(name)
        if used is not None:
            return used
        import safetensors

        try:
            # Each tensor has its own map, so that the pages that were read are unmapped when the tensor is freed.
            file: Any = safetensors.safe_open(self._path, "pt")
            tensor: Tensor = file.get_tensor(name)
        except Exception as error:  # safetensors raises several types for dtypes that this torch does not have
            raise CheckpointError(f"{self._path}: the tensor {name!r} cannot be read: {error}") from error
        self._used[name] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
