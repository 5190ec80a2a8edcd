"""Dense exact assignment (csrc/cpu/assignment.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._assignment import OPTIMAL, Arrays, Solution
from mudsc_fast.kernels._scalar_types import SCALAR_TYPES
from mudsc_fast.kernels.cpu import _runtime

if TYPE_CHECKING:
    from numpy.typing import NDArray  # takes a millisecond to import

_NUMPY_DTYPES = (torch.float32, torch.float64)

#: Beyond this many columns, the choice between equally good assignments may differ from scipy's.
MAX_ORDERED_COLUMNS = 128

#: Rows that the duals of columns are computed over at a time, so that intermediate results fit a cache.
BLOCK = 64


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve [..., n, m] problems with 0 < n <= m; tensors of other devices are copied to the host and back."""
    *batch, rows, columns = similarity.shape
    device = similarity.device
    values = similarity.detach().to("cpu")
    if not values.is_contiguous():
        if columns > MAX_ORDERED_COLUMNS and _is_column_major(values):
            return _solve_transposed(values.mT, maximize, prices, tolerance).to(device)
        if prices is None and tolerance == 0 and values.dtype in _NUMPY_DTYPES:
            return solve_each(values, maximize).to(device)
    solved = _core.linear_assignment(
        values=_bits(values.reshape(-1, rows, columns)),
        dtype=SCALAR_TYPES[values.dtype],
        maximize=maximize,
        tolerance=tolerance,
        prices=None if prices is None else prices.to("cpu").reshape(-1, columns).contiguous().numpy(),
        isa=_runtime.isa_level(),
        threads=_runtime.threads(),
    )
    column_of_row, row_duals, column_duals, objective, gap, status = map(torch.from_numpy, solved)
    solution = Solution(
        columns=column_of_row.view(*batch, rows),
        row_duals=row_duals.view(*batch, rows),
        column_duals=column_duals.view(*batch, columns),
        objective=objective.view(batch),
        gap=gap.view(batch),
        status=status.view(batch),
    )
    return solution if device.type == "cpu" else solution.to(device)


def solve_each(similarity: Tensor, maximize: bool, threshold: float | None = None) -> Solution:
    """Solve [..., n, m] problems of any layout and shape, each as a matrix of a list."""
    *batch, rows, columns = similarity.shape
    matrices = list(similarity.reshape(-1, rows, columns))
    solved, statuses = solve_list(matrices, maximize, threshold, return_duals=True)
    assigned, numbers = (torch.from_numpy(np.stack(parts)) for parts in zip(*solved, strict=True))
    objective, gap, row_duals, column_duals = numbers.split([1, 1, rows, columns], dim=1)
    return Solution(
        columns=assigned.view(*batch, rows),
        row_duals=row_duals.reshape(*batch, rows),
        column_duals=column_duals.reshape(*batch, columns),
        objective=objective.reshape(batch),
        gap=gap.reshape(batch),
        status=torch.tensor(statuses, dtype=torch.int32).view(batch),
    ).to(similarity.device)


@overload
def solve_list(
    matrices: Sequence[Tensor], maximize: bool, threshold: float | None, return_duals: Literal[True]
) -> tuple[list[Arrays], list[int]]: ...
@overload
def solve_list(
    matrices: Sequence[Tensor], maximize: bool, threshold: float | None, return_duals: bool
) -> tuple[list[Arrays] | list[NDArray[Any]], list[int]]: ...
def solve_list(
    matrices: Sequence[Tensor], maximize: bool, threshold: float | None, return_duals: bool
) -> tuple[list[Arrays] | list[NDArray[Any]], list[int]]:
    """Solve matrices of any shapes and layouts on threads; return their arrays or only columns, and the statuses."""
    with_entries = [_readable(matrix) for matrix in matrices if matrix.numel() > 0]
    solved, statuses = _core.solve_list(
        arrays=with_entries,
        maximize=maximize,
        threshold=threshold,
        return_duals=return_duals,
        isa=_runtime.isa_level(),
        threads=_runtime.threads(),
    )
    if len(with_entries) == len(matrices):
        return solved, statuses
    answers, codes = iter(solved), iter(statuses)
    every: list[Any] = []
    for matrix in matrices:
        if matrix.numel() > 0:
            every.append(next(answers))
            continue
        columns = np.full(matrix.shape[0], -1)
        every.append((columns, np.zeros(2 + sum(matrix.shape))) if return_duals else columns)
    return every, [next(codes) if matrix.numel() > 0 else OPTIMAL for matrix in matrices]


def _readable(matrix: Tensor) -> NDArray[Any]:
    """Return a matrix as an array of float32 or float64 with positive strides, without a copy where possible."""
    values = matrix.detach().to("cpu")
    if values.dtype not in _NUMPY_DTYPES:
        values = values.float()
    return (values if min(values.stride()) > 0 else values.contiguous()).numpy()


def _bits(values: Tensor) -> NDArray[Any]:
    """Return contiguous values as an array; one of int16 for the types that NumPy does not have."""
    contiguous = values.contiguous()
    return (contiguous if values.dtype in _NUMPY_DTYPES else contiguous.view(torch.int16)).numpy()


def _is_column_major(values: Tensor) -> bool:
    return values.shape[-2] == values.shape[-1] and values.mT.is_contiguous()


def _solve_transposed(by_columns: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve square problems that are given transposed, and transpose the solutions: a copy would take longer."""
    start = None if prices is None else _best_prices(by_columns, maximize, prices.to("cpu"))
    solution = solve(by_columns, maximize, start, tolerance)
    if bool(solution.status.any()):
        return solution
    return Solution(
        columns=solution.columns.argsort(-1),
        row_duals=solution.column_duals,
        column_duals=solution.row_duals,
        objective=solution.objective,
        gap=solution.gap,
        status=solution.status,
    )


def _best_prices(values: Tensor, maximize: bool, prices: Tensor) -> Tensor:
    """Return the [..., m] best duals of columns beside [..., n] given ones of rows, in the precision of `values`."""
    blocks = []
    for rows, row_prices in zip(values.split(BLOCK, -2), prices.to(values.dtype).split(BLOCK, -1), strict=True):
        surplus = rows - row_prices.unsqueeze(-1)
        blocks.append(surplus.amax(-2) if maximize else surplus.amin(-2))
    stacked = torch.stack(blocks)
    best = stacked.amax(0) if maximize else stacked.amin(0)
    return best.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
