"""Whether the Triton kernels can be used."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

#: Oldest version that passes tuples of tensors to kernels.
_OLDEST = (3, 3)


@cache
def is_installed() -> bool:
    """Return whether Triton can be imported."""
    return find_spec("triton") is not None


def unavailable_reason(index: int | None = None) -> str:
    """Return why no Triton kernel can be used on the CUDA device of that index, or on any; empty if they can.

    The first call for a device compiles and launches a tiny kernel, which takes up to a second.
    """
    reason = _version_problem()
    return reason if reason or index is None else _compile_problem(index)


@cache
def _version_problem() -> str:
    if not is_installed():
        return "triton is not installed: pip install triton"
    try:
        installed = version("triton")
    except PackageNotFoundError:  # part of torch under another name, as recent as torch
        return ""
    if tuple(int(part) for part in installed.split(".")[:2]) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        return f"triton {installed} is older than {needed}: upgrade torch, which brings a newer triton along"
    return ""


@cache
def _compile_problem(index: int) -> str:
    """Return why Triton cannot compile or launch a kernel on a device; empty if it can."""
    try:
        from mudsc_fast.kernels.triton import probe

        probe.launch(torch.device("cuda", index))
    except Exception as error:  # the compiler, the linker or the driver may raise anything
        # Triton builds its launchers with a C compiler and Python's headers, which machines for serving often lack.
        return (
            f"triton cannot compile kernels ({type(error).__name__}: {error}); it needs a C compiler such as gcc and "
            "the headers of Python (the package python3-dev)"
        )
    return ""
