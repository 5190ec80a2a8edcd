"""Exact assignment in PyTorch: one shortest augmenting path per row, over the dense matrix.

D. F. Crouse, "On implementing 2D rectangular assignment algorithms", IEEE Transactions on Aerospace and Electronic
Systems 52 (2016), including its choice between equally good assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast.kernels._assignment import INFEASIBLE, INVALID, OPTIMAL, Solution


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:  # noqa: ARG001
    """Solve [..., n, m] problems with 0 < n <= m, exactly whatever the tolerance is."""
    sign = -1.0 if maximize else 1.0
    values = similarity.detach().to(torch.float64)
    problems = values.reshape(-1, *values.shape[-2:])
    starts = None if prices is None else prices.reshape(-1, prices.shape[-1])
    solved = [
        _solve_one(sign * problem, None if starts is None else sign * starts[index])
        for index, problem in enumerate(problems)
    ]
    columns, row_duals, column_duals, status = (
        torch.stack(parts).reshape(values.shape[:-2] + parts[0].shape) for parts in zip(*solved, strict=True)
    )
    chosen = values.gather(-1, columns[..., None]).squeeze(-1)
    slack = sign * chosen - column_duals.gather(-1, columns) - row_duals
    return Solution(columns, sign * row_duals, sign * column_duals + 0.0, chosen.sum(-1), slack.sum(-1), status)


def _solve_one(cost: Tensor, prices: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the columns, row duals and column duals of a minimized problem, and its status."""
    rows, columns = cost.shape
    column_of_row = torch.full((rows,), -1, device=cost.device)
    row_of_column = torch.full((columns,), -1, device=cost.device)
    u = cost.new_zeros(rows)
    v = cost.new_zeros(columns) if prices is None or rows < columns else prices.clone()
    status = OPTIMAL if bool((cost > -torch.inf).all()) else INVALID
    for row in range(rows if status == OPTIMAL else 0):
        if not _augment(cost, row, column_of_row, row_of_column, u, v):
            status = INFEASIBLE
            break
    return (
        column_of_row.clamp_min(0),
        (cost - v).amin(1),
        v,
        torch.tensor(status, dtype=torch.int32, device=cost.device),
    )


def _augment(cost: Tensor, root: int, column_of_row: Tensor, row_of_column: Tensor, u: Tensor, v: Tensor) -> bool:
    """Match `root` along a shortest path in reduced costs, by Dijkstra's search; False if there is none.

    Of several nearest columns it takes the last one without a row, or else the first one, in the order of
    `open_columns`: from last to first, where a closed column is replaced by the one at the end.
    """
    distance = torch.full_like(v, torch.inf)
    parent = torch.full_like(row_of_column, -1)
    open_columns = list(range(len(v) - 1, -1, -1))
    tree: list[int] = []
    u[root], row, reached, sink = 0.0, root, 0.0, -1
    while sink < 0:
        tree.append(row)
        columns = torch.tensor(open_columns, device=cost.device)
        through = reached + cost[row, columns] - u[row] - v[columns]
        nearer = columns[through < distance[columns]]
        distance[nearer], parent[nearer] = through[through < distance[columns]], row
        reached = float(distance[columns].min())
        if reached == torch.inf:
            return False
        ties = (distance[columns] == reached).nonzero().flatten()
        unmatched = ties[row_of_column[columns[ties]] < 0]
        place = int(unmatched[-1] if len(unmatched) else ties[0])
        column = open_columns[place]
        open_columns[place] = open_columns[-1]
        open_columns.pop()
        if row_of_column[column] < 0:
            sink = column
        else:
            row = int(row_of_column[column])
    u[root] += reached
    for row in tree[1:]:
        column = int(column_of_row[row])
        u[row] += reached - distance[column]
        v[column] -= reached - distance[column]
    column = sink
    while True:
        row = int(parent[column])
        next_column = int(column_of_row[row])
        column_of_row[row], row_of_column[column] = column, row
        if row == root:
            return True
        column = next_column
