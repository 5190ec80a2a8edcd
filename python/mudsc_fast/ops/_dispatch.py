"""The one place that chooses a kernel: by op, device, environment and the caller's request."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from mudsc_fast.kernels import _triton
from mudsc_fast.kernels.cuda import _device, _self_test

Kernel = TypeVar("Kernel")

#: The backends that serve an op on each type of device, best first. A backend is omitted if it would be slower.
#: "cpu" on another device than the CPU copies to the host and back.
KERNELS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "assignment": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "cpu", "reference"), "other": ("cpu", "reference")},
    "zip": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "cpu", "reference"), "other": ("cpu", "reference")},
    "correlation": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference"), "other": ("reference",)},
    "correlation.finalize": {
        "cpu": ("cpu", "reference"),
        "cuda": ("cuda", "triton", "reference"),
        "other": ("reference",),
    },
    "permute": {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference"), "other": ("reference",)},
}

_NAMES = sorted({name for by_device in KERNELS.values() for names in by_device.values() for name in names})

_requested: ContextVar[str | None] = ContextVar("mudsc_fast_backend", default=None)


def backends() -> tuple[str, ...]:
    """Return the names of the backends that can be used here: "cuda" only if it was built and finds a device."""
    return tuple(name for name in _NAMES if not _unusable_reason(name))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the enclosed code on the named backend.

    Parameters
    ----------
    name
        One of :func:`backends`, e.g. ``"reference"``.

    Raises
    ------
    ValueError
        If there is no such backend. An op that has no kernel of that backend raises when it is called.
    """
    _check_backend_name("backend", name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def backend_for(op: str, device_type: str, index: int | None = None) -> str:
    """Return the name of the current backend of `op` on the device of that type and index, or on any."""
    named = KERNELS[op].get(device_type, KERNELS[op]["other"])
    wanted = _requested.get()
    if wanted is None:
        wanted = os.environ.get("MUDSC_BACKEND") or None
        if wanted is not None:
            _check_backend_name("the environment variable MUDSC_BACKEND", wanted)
    if wanted is None:
        for name in named:
            reason = _unusable_reason(name, index, op)
            if not reason:
                return name
            if index is not None:
                _warn_once(name, index, reason)
    served = [name for name in named if not _unusable_reason(name, index, op)]
    if wanted not in served:
        reason = _unusable_reason(wanted, index, op) if wanted in named else ""
        raise ValueError(
            f"backend {wanted!r} has no {op} kernel for {device_type} tensors{f' ({reason})' if reason else ''}; "
            f"available: {', '.join(served)}"
        )
    return wanted


#: Returns the backend that the enclosing `use_backend` names, or None.
requested = _requested.get


def choose(op: str, device: torch.device, kernels: Mapping[str, Kernel]) -> Kernel:
    """Return the kernel of `kernels` (by backend) that serves `op` on `device`."""
    return kernels[backend_for(op, device.type, device.index)]


def _unusable_reason(name: str, index: int | None = None, op: str | None = None) -> str:
    """Return why a backend cannot be used (on a CUDA device, for an op, if given); empty if it can."""
    if name == "cuda":
        reason = _device.unavailable_reason(index)
        return reason if reason or index is None or op is None else _self_test.failure(op, index)
    return _triton.unavailable_reason(index) if name == "triton" else ""


#: Backends and devices of which a warning was issued.
_warned: set[tuple[str, int]] = set()


def _warn_once(name: str, index: int, reason: str) -> None:
    """Warn, once, that a CUDA tensor is served by a slower backend than this build or installation was made for."""
    if (name, index) in _warned:
        return
    _warned.add((name, index))
    if name == "cuda" and not _device.is_built():
        return  # the user's choice at installation, shown by `mudsc-fast info`
    if name == "triton" and not _triton.is_installed():
        return
    warnings.warn(
        f"mudsc_fast does not use its {'CUDA' if name == 'cuda' else 'Triton'} kernels on cuda:{index}, "
        f"and falls back to slower ones: {reason}",
        stacklevel=2,
    )


def _check_backend_name(argument: str, name: str) -> None:
    # Only "cuda" asks whether there is a device: after that, processes forked later cannot use one.
    if name not in _NAMES or _unusable_reason(name):
        raise ValueError(f"{argument} must be one of {', '.join(backends())}, got {name!r}")
