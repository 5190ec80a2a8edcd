"""The one place that chooses a kernel: by op, device, environment and the caller's request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TypeVar

import torch

from mudsc_fast.kernels.cuda import _device

Kernel = TypeVar("Kernel")

_ON_CUDA = ("triton", "reference") if find_spec("triton") else ("reference",)

#: Which back ends serve an op on a type of device, best first. A back end that is not named does not pay there.
#: "cpu" on another device than the CPU copies to the host and back.
KERNELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "assignment": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "cpu", "reference"), "other": ("cpu", "reference")},
    "zip": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "cpu", "reference"), "other": ("cpu", "reference")},
    "correlation": {"cpu": ("cpu", "reference"), "cuda": ("cuda", *_ON_CUDA), "other": ("reference",)},
    "correlation.finalize": {"cpu": ("cpu", "reference"), "cuda": ("cuda", *_ON_CUDA), "other": ("reference",)},
    "permute": {"cpu": ("cpu", "reference"), "cuda": _ON_CUDA, "other": ("reference",)},
}

_NAMES = sorted({name for by_device in KERNELS.values() for names in by_device.values() for name in names})

_requested: ContextVar[str | None] = ContextVar("mudsc_fast_backend", default=None)


def backends() -> tuple[str, ...]:
    """Return the names of all back ends that can be used here: "cuda" only where it was built and finds a device."""
    return tuple(filter(_is_usable, _NAMES))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the enclosed code on the named back end.

    Parameters
    ----------
    name
        One of :func:`backends`, e.g. ``"reference"``.

    Raises
    ------
    ValueError
        If there is no such back end; an op that has no kernel of that back end raises when it is called.
    """
    _check_backend_name("backend", name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def backend_for(op: str, device_type: str, index: int | None = None) -> str:
    """Return the name of the back end that would serve `op` on a device of that type, or on one of them, now."""

    def is_usable(name: str) -> bool:
        return _is_usable(name, index)

    named = KERNELS[op].get(device_type, KERNELS[op]["other"])
    requested = _requested.get()
    if requested is None:
        requested = os.environ.get("MUDSC_BACKEND") or None
        if requested is not None:
            _check_backend_name("the environment variable MUDSC_BACKEND", requested)
    if requested is None:
        return next(filter(is_usable, named))
    served = tuple(filter(is_usable, named))
    if requested not in served:
        raise ValueError(
            f"backend {requested!r} has no {op} kernel for {device_type} tensors; available: {', '.join(served)}"
        )
    return requested


#: Returns the back end that the enclosing `use_backend` names, or None.
requested = _requested.get


def choose(op: str, device: torch.device, kernels: Mapping[str, Kernel]) -> Kernel:
    """Return the kernel of `kernels` (by back end) that serves `op` on `device`."""
    return kernels[backend_for(op, device.type, device.index)]


def _is_usable(name: str, index: int | None = None) -> bool:
    return name != "cuda" or not _device.unavailable_reason(index)


def _check_backend_name(argument: str, name: str) -> None:
    # Whether there is a device is asked for "cuda" only: the answer keeps processes forked later from using one.
    if name not in _NAMES or not _is_usable(name):
        raise ValueError(f"{argument} must be one of {', '.join(backends())}, got {name!r}")
