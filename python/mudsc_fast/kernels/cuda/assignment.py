"""Exact assignment in CUDA (csrc/cuda/assignment_batch.cu, csrc/cuda/assignment_large.cu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mudsc_fast.kernels._assignment import Solution
from mudsc_fast.kernels._scalar_types import SCALAR_TYPES
from mudsc_fast.kernels.cpu import assignment as cpu
from mudsc_fast.kernels.cuda import _device

#: Up to so many columns a problem is one block's work, whatever the batch.
MOST_COLUMNS_OF_A_BLOCK = 512
#: The auction of a large problem ends when so small a share of the rows is left, and after so many rounds.
SHARE_LEFT = 1 / 64
MOST_ROUNDS = 1000
#: It also ends after so many bids for each row, on average.
MOST_BIDS = 32
#: What a bid adds to the distance between best and second best, as a share of that distance's median.
EPSILON_SHARE = 0.2
#: Least number of entries of a row's list.
WANTED = 32
#: Longer lists, which a block collects in shared memory, are whole rows instead.
LONGEST_LIST = 8192
#: Entries of lists that are on the device, and copied to the host, at a time: 8 bytes each.
LISTED_AT_ONCE = 2**27
#: Magnitudes that sums in float32 can hold, as for the kernels on the CPU.
LARGEST, SMALLEST = 1e35, 1e-28


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve [..., n, m] problems with 0 < n <= m, exactly whatever the tolerance.

    Large problems in float64, those with entries that are not finite and those of extreme magnitude are solved on
    the CPU.
    """
    *batch, rows, columns = similarity.shape
    values = similarity.detach().reshape(-1, rows, columns).contiguous()
    starts = None if prices is None else prices.reshape(-1, columns)
    solution = _solve_all(values, maximize, starts, tolerance)
    return Solution(**{name: value.reshape([*batch, *value.shape[1:]]) for name, value in vars(solution).items()})


def _solve_all(values: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    rows, columns = values.shape[1:]
    with _device.launching_on(values.device) as launch:
        if columns <= MOST_COLUMNS_OF_A_BLOCK and _device.extension().assignment_batch_fits(rows, columns, *launch):
            return _solve_batch(values, maximize, prices, launch)
        solved = [
            _solve_large(problem, maximize, None if prices is None else prices[index], launch)
            or cpu.solve(problem[None], maximize, None if prices is None else prices[index, None], tolerance)
            for index, problem in enumerate(values)
        ]
    return Solution(**{name: torch.cat([getattr(one, name) for one in solved]) for name in vars(solved[0])})


def _solve_batch(values: Tensor, maximize: bool, prices: Tensor | None, launch: _device.Launch) -> Solution:
    batch, rows, columns = values.shape
    start = None if prices is None else prices.contiguous()
    solution = Solution(
        columns=values.new_empty(batch, rows, dtype=torch.int64),
        row_duals=values.new_empty(batch, rows, dtype=torch.float64),
        column_duals=values.new_empty(batch, columns, dtype=torch.float64),
        objective=values.new_empty(batch, dtype=torch.float64),
        gap=values.new_empty(batch, dtype=torch.float64),
        status=values.new_empty(batch, dtype=torch.int32),
    )
    _device.extension().assignment_batch(
        dtype=SCALAR_TYPES[values.dtype],
        values=values.data_ptr(),
        batch=batch,
        rows=rows,
        columns=columns,
        maximize=maximize,
        prices=0 if start is None else start.data_ptr(),
        column_of_row=solution.columns.data_ptr(),
        row_duals=solution.row_duals.data_ptr(),
        column_duals=solution.column_duals.data_ptr(),
        objective=solution.objective.data_ptr(),
        gap=solution.gap.data_ptr(),
        status=solution.status.data_ptr(),
        **launch._asdict(),
    )
    return solution


def _solve_large(values: Tensor, maximize: bool, prices: Tensor | None, launch: _device.Launch) -> Solution | None:
    """Solve one problem; None if that is the CPU's work."""
    if values.dtype == torch.float64:
        return None
    problem = _LargeProblem(values, maximize, launch)
    sign = -1.0 if maximize else 1.0
    # Duals of columns in the minimised problem; the auction's prices are minus these.
    start = values.new_zeros(problem.columns, dtype=torch.float64) if prices is None else sign * prices
    bid_prices = (0.0 - start).float()
    epsilon = problem.inspect(bid_prices)
    if epsilon is None:
        return None
    if problem.rows == problem.columns:
        pairs, _counts = problem.bid(bid_prices, epsilon)
        column_of_row, duals = problem.find_paths(-bid_prices.double(), pairs, float(epsilon))
    else:
        column_of_row, duals = problem.find_paths(start)
    least, paired = problem.certify(duals, column_of_row)
    slack = paired - duals[column_of_row] - least
    return Solution(
        columns=column_of_row[None],
        row_duals=sign * least[None],
        column_duals=sign * duals[None] + 0.0,
        objective=sign * paired.sum()[None],
        gap=slack.sum()[None],
        status=torch.zeros(1, dtype=torch.int32, device=values.device),
    )


def first_of_equal(numbers: Tensor) -> Tensor:
    """Return [n] int32: the place of the first number that equals each of [n] numbers."""
    order = torch.arange(len(numbers), device=numbers.device)
    distinct, which = numbers.unique(return_inverse=True)
    first = torch.full_like(distinct, len(numbers)).scatter_reduce_(0, which, order, "amin")
    return first[which].int()


class _LargeProblem:
    """The steps of csrc/cuda/assignment_large.cu on one [n, m] matrix."""

    def __init__(self, values: Tensor, maximize: bool, launch: _device.Launch) -> None:
        self.values = values
        self.rows, self.columns = values.shape
        self.cuda = _device.extension()
        self.where = launch._asdict()
        self.matrix = (SCALAR_TYPES[values.dtype], values.data_ptr(), self.rows, self.columns, maximize)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.values.device)

    def inspect(self, prices: Tensor) -> Tensor | None:
        """Find equal rows, and return [1] what a bid should add, 0 if nothing.

        None if values are not finite, or too large or small.
        """
        gaps = self._empty(self.rows, dtype=torch.float32)
        magnitudes = torch.empty_like(gaps)
        hashes = self._empty(self.rows, dtype=torch.int64)
        self.cuda.assignment_inspect(
            self.matrix,
            prices=prices.data_ptr(),
            gaps=gaps.data_ptr(),
            magnitudes=magnitudes.data_ptr(),
            hashes=hashes.data_ptr(),
            **self.where,
        )
        self.class_of_row = first_of_equal(hashes)
        self.cuda.assignment_check_classes(self.matrix, class_of_row=self.class_of_row.data_ptr(), **self.where)
        largest = float(magnitudes.max())
        if largest != 0.0 and not SMALLEST < largest < LARGEST:
            return None
        median = torch.where(gaps > 0, gaps, torch.nan).nanmedian()
        return (EPSILON_SHARE * median.nan_to_num(0.0)).reshape(1)

    def bid(self, prices: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Raise `prices` by an auction; return the column of each row, or -1, and the numbers of rounds and bids."""
        column_of_row = self._empty(self.rows, dtype=torch.int32)
        counts = self._empty(2, dtype=torch.int64)
        workspace = _device.workspace(self.cuda.assignment_bid_workspace_bytes(self.matrix), self.values.device)
        self.cuda.assignment_bid(
            self.matrix,
            epsilon=epsilon.data_ptr(),
            stop=int(self.rows * SHARE_LEFT),
            most_rounds=MOST_ROUNDS,
            most_bids=MOST_BIDS * self.rows,
            class_of_row=self.class_of_row.data_ptr(),
            prices=prices.data_ptr(),
            column_of_row=column_of_row.data_ptr(),
            counts=counts.data_ptr(),
            workspace=workspace.data_ptr(),
            **self.where,
        )
        return column_of_row, counts

    def find_paths(self, duals: Tensor, pairs: Tensor | None = None, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the column of each row and the columns' duals, given duals to start from and pairs of an auction."""
        on_host = duals.cpu()
        classes = self.class_of_row.cpu()
        solver = self.cuda.PathSolver(self.rows, self.columns, on_host.data_ptr(), classes.data_ptr(), WANTED)
        if pairs is not None:
            pairs_on_host = pairs.cpu()
            solver.continue_auction(pairs_on_host.data_ptr(), epsilon)
        while requests := solver.advance():
            solver.copy_duals(on_host.data_ptr(), self.columns)
            duals = on_host.to(self.values.device)
            for request, (wanted, count) in enumerate(requests):
                rows = torch.empty(count, dtype=torch.int32, device="cpu")
                solver.copy_requested_rows(request, rows.data_ptr())
                whole = 4 * wanted >= self.columns or 2 * wanted > LONGEST_LIST
                capacity = self.columns if whole else 2 * wanted
                for part in rows.split(max(1, LISTED_AT_ONCE // capacity)):
                    self._list(solver, part, duals, wanted, capacity)
        solver.copy_duals(on_host.data_ptr(), self.columns)
        column_of_row = torch.empty(self.rows, dtype=torch.int64, device="cpu")
        solver.copy_column_of_row(column_of_row.data_ptr(), self.rows)
        return column_of_row.to(self.values.device), on_host.to(self.values.device)

    def _list(self, solver: Any, rows: Tensor, duals: Tensor, wanted: int, capacity: int) -> None:
        """Make the lists of [count] rows and give them to the solver."""
        on_device = rows.to(self.values.device)
        count = len(rows)
        lists = {
            "columns": self._empty(count, capacity, dtype=torch.int32),
            "costs": self._empty(count, capacity, dtype=torch.float32),
            "sizes": self._empty(count, dtype=torch.int32),
            "floors": self._empty(count, dtype=torch.float64),
        }
        self.cuda.assignment_list(
            self.matrix,
            rows=on_device.data_ptr(),
            count=count,
            duals=duals.data_ptr(),
            wanted=wanted,
            capacity=capacity,
            **{name: tensor.data_ptr() for name, tensor in lists.items()},
            **self.where,
        )
        copies = {name: tensor.cpu() for name, tensor in lists.items()}
        solver.set_lists(
            rows=rows.data_ptr(),
            count=count,
            capacity=capacity,
            **{name: tensor.data_ptr() for name, tensor in copies.items()},
        )

    def certify(self, duals: Tensor, column_of_row: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's least reduced cost and the cost of its pair."""
        least = self._empty(self.rows, dtype=torch.float64)
        paired = torch.empty_like(least)
        self.cuda.assignment_certify(
            self.matrix,
            duals=duals.data_ptr(),
            column_of_row=column_of_row.data_ptr(),
            least=least.data_ptr(),
            paired=paired.data_ptr(),
            **self.where,
        )
        return least, paired
