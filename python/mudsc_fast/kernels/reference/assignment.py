"""Exact assignment in PyTorch: one shortest augmenting path per row, over the dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast.kernels._assignment import INFEASIBLE, INVALID, OPTIMAL, Solution


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None) -> Solution:
    """Solve [batch, n, m] problems with 0 < n <= m."""
    sign = -1.0 if maximize else 1.0
    solved = [
        _solve_one(sign * problem.to(torch.float64), None if prices is None else sign * prices[index])
        for index, problem in enumerate(similarity.detach())
    ]
    columns, row_duals, column_duals, status = (torch.stack(parts) for parts in zip(*solved, strict=True))
    chosen = similarity.to(torch.float64).gather(2, columns[..., None]).squeeze(2)
    objective = chosen.sum(1)
    slack = sign * chosen - column_duals.gather(1, columns) - row_duals
    return Solution(columns, sign * row_duals, sign * column_duals + 0.0, objective, slack.sum(1), status)


def _solve_one(cost: Tensor, prices: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the columns, row duals and column duals of a minimised problem, and its status."""
    rows, columns = cost.shape
    column_of_row = torch.full((rows,), -1, device=cost.device)
    row_of_column = torch.full((columns,), -1, device=cost.device)
    v = cost.new_zeros(columns) if prices is None or rows < columns else prices.clone()
    status = OPTIMAL if bool((cost > -torch.inf).all()) else INVALID
    for row in range(rows if status == OPTIMAL else 0):
        if not _augment(cost, row, column_of_row, row_of_column, v):
            status = INFEASIBLE
            break
    if status == OPTIMAL:
        _order_equal(cost, column_of_row, row_of_column)
    u = (cost - v).amin(1)
    return column_of_row.clamp_min(0), u, v, torch.tensor(status, dtype=torch.int32, device=cost.device)


def _augment(cost: Tensor, root: int, column_of_row: Tensor, row_of_column: Tensor, v: Tensor) -> bool:
    """Match `root` along a shortest path in reduced costs, by Dijkstra's search; False if there is none."""
    distance = torch.full_like(v, torch.inf)
    parent = torch.full_like(row_of_column, -1)
    done = torch.zeros_like(v, dtype=torch.bool)
    row, reached, sink = root, 0.0, -1
    while sink < 0:
        # Tight rows make the row's own dual the reduced cost of its column; the root's is its least.
        u = (cost[row] - v).min() if row == root else cost[row, column_of_row[row]] - v[column_of_row[row]]
        if bool(u == torch.inf):
            return False
        through = (cost[row] - v - u).clamp_min(0.0) + reached
        nearer = (through < distance) & ~done
        distance[nearer], parent[nearer] = through[nearer], row
        candidates = torch.where(done, torch.inf, distance)
        reached = float(candidates.min())
        if reached == torch.inf:
            return False
        ties = (candidates == reached).nonzero().flatten()
        unmatched = ties[row_of_column[ties] < 0]
        column = int(unmatched[0] if len(unmatched) else ties[0])
        done[column] = True
        if row_of_column[column] < 0:
            sink = column
        else:
            row = int(row_of_column[column])
    v[done] -= reached - distance[done]
    column = sink
    while True:
        row = int(parent[column])
        next_column = int(column_of_row[row])
        column_of_row[row], row_of_column[column] = column, row
        if row == root:
            return True
        column = next_column


def _order_equal(cost: Tensor, column_of_row: Tensor, row_of_column: Tensor) -> None:
    """Let equal rows take their columns in ascending order, and equal columns their rows; the first columns first."""
    _, group = torch.unique(cost, dim=0, return_inverse=True)
    for members in (torch.nonzero(group == g).flatten() for g in range(int(group.max()) + 1)):
        column_of_row[members] = column_of_row[members].sort().values
    row_of_column.fill_(-1)
    row_of_column[column_of_row] = torch.arange(len(cost), device=cost.device)
    _, group = torch.unique(cost, dim=1, return_inverse=True)
    for members in (torch.nonzero(group == g).flatten() for g in range(int(group.max()) + 1)):
        matched = row_of_column[members]
        matched = matched[matched >= 0].sort().values
        column_of_row[matched] = members[: len(matched)]
