"""mudsc_fast with the interfaces of other libraries, one module for each; none of these libraries is imported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mudsc_fast.compat import (
        lap,
        lapjv,
        lapsolver,
        mudsc,
        optax,
        pleas,
        rebasin,
        torch_lap_cuda,
        torch_linear_assignment,
        zipit,
    )
    from mudsc_fast.compat._patch import Patch, patch

__all__ = [
    "Patch",
    "lap",
    "lapjv",
    "lapsolver",
    "mudsc",
    "optax",
    "patch",
    "pleas",
    "rebasin",
    "torch_lap_cuda",
    "torch_linear_assignment",
    "zipit",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: most programs need one of these modules or none.
    if name in ("Patch", "patch"):
        return getattr(import_module("mudsc_fast.compat._patch"), name)
    if name in __all__:
        return import_module(f"mudsc_fast.compat.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
