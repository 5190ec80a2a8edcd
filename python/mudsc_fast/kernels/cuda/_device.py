"""The extension with the CUDA kernels, the devices it was built for, and where to launch kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mudsc_fast import _core


class Launch(NamedTuple):
    """Where kernels run: a device by its index, and a queue of work on it."""

    device: int
    stream: int


@cache
def unavailable_reason(index: int | None = None) -> str:
    """Return why no CUDA kernel can run on the device of that index, or on any device; empty if they can."""
    try:
        return str(extension().unavailable_reason(-1 if index is None else index))
    except ImportError as error:
        return f"not built: {_core.cuda_problem}" if _core.cuda_problem else str(error)


@cache
def is_built() -> bool:
    """Return whether the package was built with the CUDA kernels."""
    try:
        extension()
    except ImportError:
        return False
    return True


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the current stream of a device."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str, device: torch.device) -> None:
    """Raise RuntimeError if a CUDA graph is being captured: `what` makes the host wait for the device."""
    if device.type == "cuda" and is_capturing(device):
        raise RuntimeError(
            f"{what} makes the host wait for the device, which a CUDA graph cannot record: call it outside of the "
            "capture (permute_merge and CorrelationAccumulator.update can be captured)"
        )


def code_for(capability: tuple[int, int], architectures: str) -> Literal["machine code", "PTX", ""]:
    """Return the kind of code that a build for `architectures` has for devices of a compute capability.

    Parameters
    ----------
    capability
        Major and minor version, such as (8, 6).
    architectures
        As in CMAKE_CUDA_ARCHITECTURES: "80;90a-real" is machine code and PTX for 8.0 and machine code for 9.0a.

    Returns
    -------
    str
        Machine code runs on devices of the same major version and the same or a later minor version; PTX is compiled by
        the driver at first use, for any later device. Empty if neither is there.
    """
    has_ptx = False
    for number, suffix, kind in re.findall(r"(\d+)([af]?)(-real|-virtual)?", architectures):
        built = divmod(int(number), 10)
        if kind != "-virtual" and (
            built == capability if suffix else built[0] == capability[0] and built <= capability
        ):
            return "machine code"
        has_ptx |= kind != "-real" and not suffix and built <= capability
    return "PTX" if has_ptx else ""


def build_description() -> str:
    """Return for which CUDA and which devices the kernels were built, or why they were not."""
    try:
        module = extension()
    except ImportError:
        return f"off ({unavailable_reason()})"
    toolkit, driver = (f"{version // 1000}.{version % 1000 // 10}" if version else "" for version in module.versions())
    built = f"built with CUDA {toolkit} for {', '.join(module.architectures.split(';'))}"
    built += f", driver for CUDA {driver}" if driver else ", no driver"
    reason = unavailable_reason()
    return f"off ({reason}); {built}" if reason else f"on; {built}"


def device_description(index: int) -> str:
    """Return whether the CUDA kernels run on the device of that index, and from what code."""
    reason = unavailable_reason(index)
    if reason:
        return f"off ({reason})"
    if code_for(torch.cuda.get_device_capability(index), extension().architectures) == "PTX":
        return "on (compiled from PTX by the driver, which takes some seconds at first use)"
    return "on"


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
    """Return uninitialized memory of that many bytes, aligned for every type."""
    return torch.empty((size + 15) // 16, 2, dtype=torch.int64, device=device)
