"""Which functions of other libraries :func:`mudsc_fast.patch` replaces, where they are defined, and by what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor

from mudsc_fast.compat import lap, lapjv, lapsolver, optax, torch_lap_cuda, torch_linear_assignment
from mudsc_fast.ops import assignment

#: The functions that were found in their libraries while a patch is active, by their documented names.
ORIGINALS: dict[str, Callable[..., Any]] = {}

_OPTAX = "optax.assignment.hungarian_algorithm"


@dataclass(frozen=True, eq=False)
class Replacement:
    """A function of another library and the one of mudsc_fast that replaces it."""

    name: str
    """The name by which the library documents it; `patch(functions=...)` takes it."""
    homes: tuple[tuple[str, str], ...]
    """Modules and names where it may be found once the library is loaded, the first one first."""
    function: Callable[..., Any]
    """The replacement. A separate object, so that names bound to functions of `compat` are not restored by mistake."""


def _replace(name: str, function: Any, *homes: str) -> Replacement:
    """Return the replacement of a function; `homes` are modules besides that of `name` that may have it."""
    module, _, attribute = name.rpartition(".")
    # A copy, because the call of a wrapper takes as long as a small problem. It is pickled by its name here.
    copy = FunctionType(function.__code__, function.__globals__, attribute, function.__defaults__)
    copy.__doc__, copy.__annotations__ = function.__doc__, function.__annotations__
    copy.__module__, copy.__qualname__ = __name__, name.replace(".", "_")
    globals()[copy.__qualname__] = copy
    return Replacement(name, tuple((home, attribute) for home in (*homes, module)), copy)


def _linear_sum_assignment(cost_matrix: Any, maximize: bool = False) -> tuple[Any, Any]:
    """Solve the linear sum assignment problem: mudsc_fast's replacement of scipy.optimize.linear_sum_assignment."""
    rows, columns = assignment.linear_sum_assignment(cost_matrix, maximize)
    # scipy returns arrays for tensors, which it reads as arrays.
    return (rows.cpu().numpy(), columns.cpu().numpy()) if isinstance(rows, Tensor) else (rows, columns)


def _hungarian_algorithm(cost_matrix: Any) -> Any:
    """Solve the linear assignment problem by mudsc_fast; while JAX traces, by optax's own function."""
    if optax.is_traced(cost_matrix):
        return ORIGINALS[_OPTAX](cost_matrix)
    return optax.hungarian_algorithm(cost_matrix)


REPLACEMENTS: tuple[Replacement, ...] = (
    _replace("scipy.optimize.linear_sum_assignment", _linear_sum_assignment),
    _replace("lap.lapjv", lap.lapjv, "lap._lapjv"),
    _replace("lap.lapjvx", lap.lapjvx, "lap._lapjvx"),
    _replace("lap.lapjvxa", lap.lapjvxa, "lap._lapjvx"),
    _replace("lap.lapjvx_batch", lap.lapjvx_batch, "lap._lapjvx_batch_wp"),
    _replace("lap.lapjvxa_batch", lap.lapjvxa_batch, "lap._lapjvx_batch_wp"),
    _replace("lap.lapmod", lap.lapmod, "lap._lapmod_wp", "lap.lapmod"),
    _replace("lapjv.lapjv", lapjv.lapjv),
    _replace("lapsolver.solve_dense", lapsolver.solve_dense, "lapsolverc"),
    _replace(
        "torch_linear_assignment.batch_linear_assignment",
        torch_linear_assignment.batch_linear_assignment,
        "torch_linear_assignment.assignment",
    ),
    _replace(
        "torch_linear_assignment.assignment_to_indices",
        torch_linear_assignment.assignment_to_indices,
        "torch_linear_assignment.assignment",
    ),
    _replace("torch_lap_cuda.solve_lap", torch_lap_cuda.solve_lap, "torch_lap_cuda.lap"),
    _replace(_OPTAX, _hungarian_algorithm, "optax.assignment._hungarian_algorithm"),
)
