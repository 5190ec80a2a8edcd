"""optax's assignment function, by name, argument and result; the arrays of JAX stay on their device.

Verified against optax 0.2.8 with jax 0.10.2. JAX is not imported: a caller with a JAX array has already imported it.
Under ``jax.jit`` there are no values to solve; :func:`mudsc_fast.patch` calls optax's own function there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from mudsc_fast.ops.assignment import linear_sum_assignment


def hungarian_algorithm(cost_matrix: Any) -> tuple[Any, Any]:
    """Return the rows and columns of min(n, m) pairs at the least cost.

    Parameters
    ----------
    cost_matrix
        [n, m] array of JAX, or of another library.

    Returns
    -------
    i, j
        Row and column of each pair, in the order of the rows: arrays of JAX on the device of `cost_matrix`, of the type
        that JAX gives integers, if it is one; otherwise as from :func:`mudsc_fast.linear_sum_assignment`.

    Raises
    ------
    TypeError
        If `cost_matrix` is traced by JAX.
    ValueError
        If it is not a matrix, holds NaN or -inf, or has no complete assignment.
    """
    if is_traced(cost_matrix):
        raise TypeError("cost_matrix is traced by JAX and has no values: call outside jax.jit, or use optax's function")
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(cost_matrix, jax.Array):
        return linear_sum_assignment(cost_matrix)
    costs: Tensor = torch.utils.dlpack.from_dlpack(cost_matrix)
    integers = torch.int64 if jax.config.jax_enable_x64 else torch.int32
    rows, columns = linear_sum_assignment(costs)
    return jax.dlpack.from_dlpack(rows.to(integers)), jax.dlpack.from_dlpack(columns.to(integers))


def is_traced(value: object) -> bool:
    """Return whether JAX traces the value, so that it has no entries yet."""
    return any(base.__name__ == "Tracer" and base.__module__.startswith("jax") for base in type(value).__mro__)
