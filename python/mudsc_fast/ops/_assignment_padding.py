"""Thresholds and problems of several sizes by a solver of equal-sized dense problems, in PyTorch.

For devices whose solver takes batches of one shape; on the CPU the compiled solver does the same with less memory
(csrc/bindings/assignment_matrix.hpp, where the method is explained).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mudsc_fast.kernels._assignment import Solution

#: Solves [batch, n, m] problems with n <= m.
Solve = Callable[[Tensor], Solution]


def clip(values: Tensor, maximize: bool, threshold: float) -> Tensor:
    """Return the values, clipped at the threshold; float64 if their dtype cannot represent it."""
    if float(torch.tensor(threshold, dtype=values.dtype, device="cpu")) != threshold:
        values = values.double()
    return values.clamp(min=threshold) if maximize else values.clamp(max=threshold)


def solve_any_shape(values: Tensor, solve: Solve) -> Solution:
    """Solve [..., n, m] problems by a solver for n <= m: transposed, if there are more rows than columns."""
    n, m = values.shape[-2:]
    return solve(values) if n <= m else transpose_solution(solve(values.mT), n)


def transpose_solution(solution: Solution, n: int) -> Solution:
    """Return the solutions of [..., n, m] problems, n > m, given those of their transposes."""
    *batch, m = solution.columns.shape
    device = solution.columns.device
    # Columns without a row, which a threshold leaves, go to a place behind the last one, and so does what is undefined
    # because the problem has no solution.
    row_of_column = torch.where((solution.columns < 0) | (solution.columns > n), n, solution.columns)
    columns = torch.full((*batch, n + 1), -1, dtype=torch.int64, device=device)
    columns.scatter_(-1, row_of_column, torch.arange(m, device=device).expand_as(row_of_column))
    return replace(solution, columns=columns[..., :n], row_duals=solution.column_duals, column_duals=solution.row_duals)


def solve_with_threshold(values: Tensor, maximize: bool, threshold: float, solve: Solve) -> Solution:
    """Solve [..., n, m] problems in which only pairs that are better than the threshold may be assigned."""
    clipped = clip(values, maximize, threshold)
    return solve_any_shape(clipped, lambda wide: _take_threshold(solve(wide), wide, maximize, threshold))


def solve_ragged(
    values: Tensor, rows: Tensor, columns: Tensor, maximize: bool, threshold: float | None, solve: Solve
) -> Solution:
    """Solve [batch, n, m] problems of which the first rows[k] rows and columns[k] columns count.

    The result has [batch, n] columns and row duals and [batch, m] column duals, of which the rest is undefined.
    """
    n, m = values.shape[1:]
    if threshold is not None:
        # An entry at the threshold is the same as no pair.
        clipped = clip(values, maximize, threshold)
        beyond_rows = (torch.arange(n, device=values.device) >= rows[:, None])[:, :, None]
        beyond_columns = (torch.arange(m, device=values.device) >= columns[:, None])[:, None, :]
        padded = clipped.masked_fill(beyond_rows | beyond_columns, threshold)
        return solve_any_shape(padded, lambda wide: _take_threshold(solve(wide), wide, maximize, threshold))
    solution = solve_any_shape(_pad(values, rows, columns, maximize), solve)
    cropped = replace(
        solution,
        columns=solution.columns[:, :n],
        row_duals=solution.row_duals[:, :n],
        column_duals=solution.column_duals[:, :m],
    )
    return _without_padding(cropped, values, rows, columns, maximize)


def _take_threshold(solution: Solution, clipped: Tensor, maximize: bool, threshold: float) -> Solution:
    """Return the solution of problems with a threshold, n <= m, given that of the clipped ones."""
    sign = -1.0 if maximize else 1.0
    limit = sign * threshold
    columns = solution.columns.clamp(0, clipped.shape[-1] - 1)  # undefined where a problem has no solution
    cost = sign * clipped.gather(-1, columns[..., None]).squeeze(-1).double()
    paired = cost < limit
    u, v = sign * solution.row_duals, sign * solution.column_duals
    # With more columns than rows some have no row and dual 0, which is the maximum but for rounding.
    square = clipped.shape[-2] == clipped.shape[-1]
    shift = v.amax(-1, keepdim=True) if square else torch.zeros_like(v[..., :1])
    u = torch.where(paired, (u - limit + shift).clamp(max=0.0), 0.0)
    at_limit = torch.zeros_like(v, dtype=torch.bool).scatter(-1, columns, ~paired)
    v = torch.where(at_limit, 0.0, (v - shift).clamp(max=0.0))
    slack = cost - limit - u - v.gather(-1, columns)
    return Solution(
        columns=torch.where(paired, columns, -1),
        row_duals=sign * u + 0.0,
        column_duals=sign * v + 0.0,
        objective=sign * torch.where(paired, cost, 0.0).sum(-1) + 0.0,
        gap=torch.where(paired, slack, 0.0).sum(-1).clamp(min=0.0),
        status=solution.status,
    )


def _without_padding(solution: Solution, values: Tensor, rows: Tensor, columns: Tensor, maximize: bool) -> Solution:
    """Return the solution of the part of each problem that counts."""
    n, m = values.shape[1:]
    sign = -1.0 if maximize else 1.0
    real_row = torch.arange(n, device=values.device) < rows[:, None]
    real_column = torch.arange(m, device=values.device) < columns[:, None]
    assigned = torch.where(real_row & (solution.columns < columns[:, None]), solution.columns, -1)
    # A column without a partner may have been taken by padding at a price. All columns' duals are moved so that its
    # dual, the largest, is 0, and the rows' duals the other way; likewise for a row without a partner.
    u, v = sign * solution.row_duals, sign * solution.column_duals
    largest_u = torch.where(real_row, u, -torch.inf).amax(-1)
    largest_v = torch.where(real_column, v, -torch.inf).amax(-1)
    shift = torch.where(rows < columns, largest_v, torch.where(rows > columns, -largest_u, 0.0))
    shift = shift.nan_to_num(0.0, 0.0, 0.0)[:, None]  # of problems without rows or columns
    paired, chosen = assigned >= 0, assigned.clamp(min=0)
    taken = torch.zeros_like(v, dtype=torch.int64).scatter_add(-1, chosen, paired.long()) > 0
    u = torch.where(paired, u + shift, 0.0)
    v = torch.where(taken, v - shift, 0.0)
    cost = sign * values.gather(-1, chosen[..., None]).squeeze(-1).double()
    slack = torch.where(paired, cost - u - v.gather(-1, chosen), 0.0)
    return Solution(
        columns=assigned,
        row_duals=sign * u + 0.0,
        column_duals=sign * v + 0.0,
        objective=sign * torch.where(paired, cost, 0.0).sum(-1) + 0.0,
        gap=slack.sum(-1).clamp(min=0.0),
        status=solution.status,
    )


def _pad(values: Tensor, rows: Tensor, columns: Tensor, maximize: bool) -> Tensor:
    """Return the problems with entries for rows and columns that do not count, so that the others' optimum is kept.

    Of a problem with no more rows than columns, rows must not take padded columns, and padded rows take any column at
    no cost; of one with more rows, the other way round. If both kinds occur, all are padded to a square.
    """
    n, m = values.shape[1:]
    wide = rows <= columns
    if bool(wide.any()) and not bool(wide.all()):
        size = max(n, m)
        values = torch.nn.functional.pad(values, (0, size - m, 0, size - n))
        n = m = size
    padded_row = (torch.arange(n, device=values.device) >= rows[:, None])[:, :, None]
    padded_column = (torch.arange(m, device=values.device) >= columns[:, None])[:, None, :]
    forbidden = torch.where(wide[:, None, None], ~padded_row & padded_column, padded_row & ~padded_column)
    values = torch.where(padded_row | padded_column, 0.0, values)
    return values.masked_fill(forbidden, -torch.inf if maximize else torch.inf)
