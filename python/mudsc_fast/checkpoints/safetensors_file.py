"""Read one safetensors file through memory maps.

The format (https://huggingface.co/docs/safetensors): the length and the text of a JSON header with the dtype, shape and
position of each tensor, then the entries of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from mudsc_fast.checkpoints.errors import CheckpointError

#: The dtypes that files are written with, and their names in the header.
NAME_OF_DTYPE = {
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
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}

_DTYPE_OF_NAME = {name: dtype for dtype, name in NAME_OF_DTYPE.items()}


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one safetensors file, by name. Each tensor is mapped on access.

    Raises
    ------
    CheckpointError
        If the file cannot be read or is incomplete.
    """

    def __init__(self, path: Path) -> None:
        import safetensors  # imported here because only reading files needs it

        try:
            file: Any = safetensors.safe_open(path, "pt")  # checks the header and the length of the file
            with path.open("rb") as content:
                length = int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(length))
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from error
        self._path, self._begin = path, 8 + length
        self._described: dict[str, dict[str, Any]] = {name: header[name] for name in file.keys()}  # noqa: SIM118
        #: Tensors in use. While one is in use, its name gives the same object, so that ties can be found by identity.
        self._used: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        self.metadata: dict[str, str] = dict(file.metadata() or {})

    def __contains__(self, name: object) -> bool:
        return name in self._described

    def __getitem__(self, name: str) -> Tensor:
        described = self._described[name]
        tensor = self._used.get(name)
        if tensor is None:
            try:
                tensor = self._used[name] = self._mapped(name, **described)
            except Exception as error:  # safetensors raises several types for dtypes that this torch does not have
                raise CheckpointError(f"{self._path}: the tensor {name!r} cannot be read: {error}") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._described)

    def __len__(self) -> int:
        return len(self._described)

    def _mapped(self, name: str, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> Tensor:
        """Return a tensor with a map of its own, so that the pages that were read are unmapped when it is freed."""
        known = _DTYPE_OF_NAME.get(dtype)
        if known is None:
            import safetensors

            file: Any = safetensors.safe_open(self._path, "pt")
            tensor: Tensor = file.get_tensor(name)
            return tensor
        # Not by safetensors, which reads the header again for each tensor: that takes six times as long. The storage
        # holds this tensor alone, since a deep copy or torch.save copies the whole storage.
        begin, end = (self._begin + offset for offset in data_offsets)
        storage = torch.UntypedStorage.from_file(str(self._path), False, end)[begin:end]
        entries = torch.empty(0, dtype=torch.uint8).set_(storage)
        if begin % known.itemsize:
            entries = entries.clone()  # most operators need aligned entries
        return entries.view(known).view(shape)
