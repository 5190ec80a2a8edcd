"""The solver that PLeaS takes as its argument ``lsa_solver``."""

from __future__ import annotations

from torch import Tensor

from mudsc_fast.ops.assignment import linear_assignment


def lsa_solver(A: Tensor, maximize: bool = True) -> Tensor:  # noqa: N803 - the name that callers use
    """Return the column assigned to each row of a similarity matrix.

    Parameters
    ----------
    A
        [n, m] with n <= m, on any device.
    maximize
        Whether to maximize the sum, as PLeaS does, or to minimize it.

    Returns
    -------
    Tensor
        [n] int64 on the device of `A`.

    Raises
    ------
    ValueError
        If `A` has another shape or no assignment.
    """
    if A.ndim != 2 or A.shape[0] > A.shape[1]:
        raise ValueError(f"A must be [n, m] with n <= m, got shape {list(A.shape)}")
    return linear_assignment(A, maximize=maximize).columns
