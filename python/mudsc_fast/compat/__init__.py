"""mudsc_fast by the interfaces of other libraries, one module for each; none of these libraries is imported."""

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
