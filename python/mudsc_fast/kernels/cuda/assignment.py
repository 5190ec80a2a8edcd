"""Exact assignment in CUDA (csrc/cuda/assignment_batch.cu, csrc/cuda/assignment_large.cu)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mudsc_fast.kernels._assignment import OPTIMAL, Solution
from mudsc_fast.kernels.cpu import assignment as cpu
from mudsc_fast.kernels.cuda import _device

#: Up to this many columns, one block solves a problem.
MAX_COLUMNS_OF_A_BLOCK = 512
#: With fewer problems of that size, too few multiprocessors are busy: copying the matrices to the host and solving them
#: there takes less time. An estimate, not measured on a device yet.
MIN_BATCH = 64
#: The auction of a large problem ends when at most this share of the rows is left, or after so many rounds.
SHARE_LEFT = 1 / 64
MAX_ROUNDS = 1000
#: It also ends after this many bids per row, on average.
MAX_BIDS = 32
#: What a bid adds to the distance between best and second best, as a share of that distance's median.
EPSILON_SHARE = 0.2
#: Smallest number of entries in a row's list.
WANTED = 32
#: A block collects a list in shared memory. Where a longer list is needed, the whole row is taken instead.
LONGEST_LIST = 8192
#: Entries of lists that are on the device, and copied to the host, at a time: 8 bytes each.
LISTED_AT_ONCE = 2**27
#: Magnitudes whose sums float32 can hold, as for the kernels on the CPU.
LARGEST, SMALLEST = 1e35, 1e-28
#: Largest gap, and violation of a dual, of a result that counts as proven, relative to the magnitude of the duals.
#: Rounding leaves about 1e-7 for float32.
_PROOF_TOLERANCE = 1e-5

_warned = False


def solve(similarity: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    """Solve [..., n, m] problems with 0 < n <= m, exactly for any tolerance.

    The CPU solves few small problems, large problems in float64, and those with entries that are not finite or of
    extreme magnitude. It also solves again, with a warning, whatever the device solved without a valid proof.
    """
    *batch, rows, columns = similarity.shape
    values = similarity.detach().reshape(-1, rows, columns).contiguous()
    starts = None if prices is None else prices.reshape(-1, columns)
    solution = _solve_all(values, maximize, starts, tolerance)
    return Solution(**{name: value.reshape([*batch, *value.shape[1:]]) for name, value in vars(solution).items()})


def _solve_all(values: Tensor, maximize: bool, prices: Tensor | None, tolerance: float) -> Solution:
    batch, rows, columns = values.shape
    with _device.launching_on(values.device) as launch:
        if columns <= MAX_COLUMNS_OF_A_BLOCK:
            if batch < MIN_BATCH or not _device.extension().assignment_batch_fits(rows, columns, *launch):
                return cpu.solve(values, maximize, prices, tolerance)
            solution = _solve_batch(values, maximize, prices, launch)
            if not _is_proven(values, solution, maximize):
                return _solve_again(values, maximize, prices)
            return replace(solution, status=torch.zeros(batch, dtype=torch.int32, device="cpu"))
        solved = [
            _solve_large(problem, maximize, None if prices is None else prices[index], launch)
            or cpu.solve(problem[None], maximize, None if prices is None else prices[index, None], tolerance)
            for index, problem in enumerate(values)
        ]
    return Solution(**{name: torch.cat([getattr(one, name) for one in solved]) for name in vars(solved[0])})


def _is_proven(values: Tensor, solution: Solution, maximize: bool) -> bool:
    """Return whether all solutions are assignments that their duals prove to be optimal; waits for the device once."""
    wide = values if values.dtype == torch.float64 else values.float()
    least = wide - solution.column_duals[:, None, :].to(wide.dtype)
    least = least.amax(-1) if maximize else least.amin(-1)
    violation = (least - solution.row_duals) * (1.0 if maximize else -1.0)
    magnitude = solution.row_duals.abs().amax(-1) + solution.column_duals.abs().amax(-1)
    valid = solution.columns.sort(-1).values
    each_once = (valid[:, 0] >= 0) & (valid[:, -1] < values.shape[2]) & (valid.diff(dim=-1) > 0).all(-1)
    fits = violation.amax(-1) <= _PROOF_TOLERANCE * magnitude
    closes = solution.gap.abs() <= _PROOF_TOLERANCE * magnitude * values.shape[1]
    return bool((each_once & fits & closes & (solution.status.to(values.device) == OPTIMAL)).all())


def _solve_again(values: Tensor, maximize: bool, prices: Tensor | None) -> Solution:
    """Solve on the CPU what has no valid proof; warn if it was not the problem's fault."""
    solution = cpu.solve(values, maximize, prices, 0.0)
    global _warned
    if not _warned and not bool(solution.status.any()):
        _warned = True
        name = torch.cuda.get_device_name(values.device) if values.is_cuda else str(values.device)
        warnings.warn(
            f"the CUDA kernel for assignments returned a wrong result for {list(values.shape)} {values.dtype} on "
            f"{name}, which was noticed and solved again on the CPU. Please report this with the matrices, if you can, "
            "and the output of `mudsc-fast info`",
            stacklevel=2,
        )
    return solution


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
        values=values,
        maximize=maximize,
        prices=start,
        column_of_row=solution.columns,
        row_duals=solution.row_duals,
        column_duals=solution.column_duals,
        objective=solution.objective,
        gap=solution.gap,
        status=solution.status,
        **launch._asdict(),
    )
    return solution


def _solve_large(values: Tensor, maximize: bool, prices: Tensor | None, launch: _device.Launch) -> Solution | None:
    """Solve one problem; None if the CPU is to solve it."""
    if values.dtype == torch.float64:
        return None
    problem = _LargeProblem(values, maximize, launch)
    sign = -1.0 if maximize else 1.0
    # Duals of columns in the minimized problem; the auction's prices are minus these.
    start = values.new_zeros(problem.columns, dtype=torch.float64) if prices is None else sign * prices
    bid_prices = (0.0 - start).float()
    epsilon = problem.inspect(bid_prices)
    if epsilon is None:
        return None
    if problem.rows == problem.columns:
        pairs, _counts = problem.bid(bid_prices, epsilon)
        # Without an epsilon nobody bids.
        auction = _Auction(bid_prices, pairs, float(epsilon)) if float(epsilon) > 0 else None
        column_of_row, duals = problem.search(start, auction)
    else:
        column_of_row, duals = problem.search(start)
    least, paired = problem.certify(duals, column_of_row)
    slack = paired - duals[column_of_row] - least
    # `certify` computes `least` from the duals and the matrix, so that these are valid: what remains is the gap.
    magnitude = paired.abs().sum() + duals.abs().sum()
    each_once = torch.bincount(column_of_row, minlength=problem.columns).amax() == 1
    if not bool(each_once & (slack.sum().abs() <= _PROOF_TOLERANCE * magnitude)):
        return _solve_again(values[None], maximize, None if prices is None else prices[None])
    return Solution(
        columns=column_of_row[None],
        row_duals=sign * least[None],
        column_duals=sign * duals[None] + 0.0,
        objective=sign * paired.sum()[None],
        gap=slack.sum()[None],
        status=torch.zeros(1, dtype=torch.int32, device="cpu"),
    )


def first_of_equal(numbers: Tensor) -> Tensor:
    """Return [n] int32: the place of the first number that equals each of [n] numbers."""
    order = torch.arange(len(numbers), device=numbers.device)
    distinct, which = numbers.unique(return_inverse=True)
    first = torch.full_like(distinct, len(numbers)).scatter_reduce_(0, which, order, "amin")
    return first[which].int()


class _Auction(NamedTuple):
    """An auction that has ended with few rows left."""

    prices: Tensor
    #: [n] int32 columns of rows, -1 for a row that is left.
    pairs: Tensor
    epsilon: float


class _LargeProblem:
    """The steps of csrc/cuda/assignment_large.cu on one [n, m] matrix."""

    def __init__(self, values: Tensor, maximize: bool, launch: _device.Launch) -> None:
        self.values = values
        self.rows, self.columns = values.shape
        self.cuda = _device.extension()
        self.where = launch._asdict()
        self.maximize = maximize

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
            values=self.values,
            maximize=self.maximize,
            prices=prices,
            gaps=gaps,
            magnitudes=magnitudes,
            hashes=hashes,
            **self.where,
        )
        self.class_of_row = first_of_equal(hashes)
        self.cuda.assignment_check_classes(values=self.values, class_of_row=self.class_of_row, **self.where)
        largest = float(magnitudes.max())
        if largest != 0.0 and not SMALLEST < largest < LARGEST:
            return None
        median = torch.where(gaps > 0, gaps, torch.nan).nanmedian()
        return (EPSILON_SHARE * median.nan_to_num(0.0)).reshape(1)

    def bid(self, prices: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """Raise `prices` by an auction; return the column of each row, or -1, and the numbers of rounds and bids."""
        column_of_row = self._empty(self.rows, dtype=torch.int32)
        counts = self._empty(2, dtype=torch.int64)
        workspace = _device.workspace(
            self.cuda.assignment_bid_workspace_bytes(self.rows, self.columns), self.values.device
        )
        self.cuda.assignment_bid(
            values=self.values,
            maximize=self.maximize,
            epsilon=epsilon,
            stop=int(self.rows * SHARE_LEFT),
            max_rounds=MAX_ROUNDS,
            max_bids=MAX_BIDS * self.rows,
            class_of_row=self.class_of_row,
            prices=prices,
            column_of_row=column_of_row,
            counts=counts,
            workspace=workspace,
            **self.where,
        )
        return column_of_row, counts

    def search(self, duals: Tensor, auction: _Auction | None = None) -> tuple[Tensor, Tensor]:
        """Return the column of each row and the duals of columns, given duals to start from and the auction so far."""
        device = self.values.device
        found = self.cuda.ListSearch(duals=duals.cpu(), class_of_row=self.class_of_row.cpu(), wanted=WANTED)
        if auction is not None:
            found.continue_auction(
                duals=-auction.prices.double().cpu(), column_of_row=auction.pairs.cpu(), epsilon=auction.epsilon
            )
        while requests := found.advance():
            duals = torch.from_numpy(found.duals()).to(device)
            for wanted, rows in requests:
                whole = 4 * wanted >= self.columns or 2 * wanted > LONGEST_LIST
                capacity = self.columns if whole else 2 * wanted
                for part in torch.from_numpy(rows).split(max(1, LISTED_AT_ONCE // capacity)):
                    found.set_lists(rows=part, **self._list(part, duals, wanted, capacity))
        return torch.from_numpy(found.column_of_row()).to(device), torch.from_numpy(found.duals()).to(device)

    def _list(self, rows: Tensor, duals: Tensor, wanted: int, capacity: int) -> dict[str, Tensor]:
        """Return the lists of [count] rows, on the host."""
        count = len(rows)
        lists = {
            "columns": self._empty(count, capacity, dtype=torch.int32),
            "costs": self._empty(count, capacity, dtype=torch.float32),
            "sizes": self._empty(count, dtype=torch.int32),
            "floors": self._empty(count, dtype=torch.float64),
        }
        self.cuda.assignment_list(
            values=self.values,
            maximize=self.maximize,
            rows=rows.to(self.values.device),
            duals=duals,
            wanted=wanted,
            **lists,
            **self.where,
        )
        return {name: tensor.cpu() for name, tensor in lists.items()}

    def certify(self, duals: Tensor, column_of_row: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's least reduced cost and the cost of its pair."""
        least = self._empty(self.rows, dtype=torch.float64)
        paired = torch.empty_like(least)
        self.cuda.assignment_certify(
            values=self.values,
            maximize=self.maximize,
            duals=duals,
            column_of_row=column_of_row,
            least=least,
            paired=paired,
            **self.where,
        )
        return least, paired
