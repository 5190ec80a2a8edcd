"""The extension with the CUDA kernels, and where to launch them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The numbers of mudsc::ScalarType (csrc/include/mudsc/types.hpp).
SCALAR_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class Launch(NamedTuple):
    """Where kernels run: a device by its index, and a queue of work on it."""

    device: int
    stream: int


@cache
def unavailable_reason(index: int | None = None) -> str:
    """Return why no CUDA kernel can run on the device of that index, or on any; empty if they can."""
    try:
        return str(import_module("mudsc_fast._cuda").unavailable_reason(-1 if index is None else index))
    except ImportError:
        return "not built: no CUDA compiler when the package was installed"


def extension() -> Any:
    """Return the compiled module.

    Raises
    ------
    ImportError
        If this build has none.
    """
    return import_module("mudsc_fast._cuda")


@contextmanager
def launching_on(device: torch.device) -> Iterator[Launch]:
    """Make `device` current and yield its current stream; for the simulator, whose memory is the host's, none."""
    if device.type == "cpu":
        yield Launch(0, 0)
        return
    with torch.cuda.device(device):
        yield Launch(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)


def workspace(size: int, device: torch.device) -> Tensor:
    """Return uninitialised memory of that many bytes, aligned for every type."""
    return torch.empty((size + 15) // 16, 2, dtype=torch.int64, device=device)
