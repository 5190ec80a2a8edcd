"""Count the rounds and bids of the CUDA auction on a CPU, for one large assignment at a time.

    MUDSC_BENCHMARK_SIZES=1024,4096 python benchmarks/auction_rounds.py

The rounds are those of csrc/cuda_sim/auction_rounds.cpp, which tests compare with the kernel bit for bit. Columns:

- `rounds`: number of rounds, each followed by a barrier of the whole device;
- `bids`: number of bids, each of which reads a row, and `reads`, the same in reads of the whole matrix;
- `small`: share of rounds with fewer bidders than an H100 has multiprocessors;
- `left`: rows without a column that are left to the path searches on the host;
- `lists`: requests of the host for new lists, with `relisted` rows in all. Here, torch makes the lists;
- the time of the host in milliseconds on one core of this machine.

Every result is proven optimal. The script needs the simulator:
pip install . --config-settings=cmake.define.MUDSC_CUDA_SIMULATOR=ON
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import families
from mudsc_fast.kernels.cuda import assignment

SIZES = tuple(map(int, os.environ.get("MUDSC_BENCHMARK_SIZES", "1024,2048,4096,8192,16384").split(",")))
FAMILIES = ("independent", "uniform", "low_rank", "dead_units", "planted", "integer_ties", "gated", "zero_one")
#: Wider perceptrons take minutes to train.
LARGEST_TRAINED = 2048
#: Threads in a block of the kernel that makes lists.
THREADS = 256
COLUMNS = ("n", "family", "rounds", "bids", "reads", "small", "left", "lists", "relisted", "host ms")


class HostProblem(assignment._LargeProblem):
    """The steps of a large problem with plain loops and torch instead of the kernels."""

    def __init__(self, values: Tensor, simulator: Any) -> None:
        self.values = values
        self.rows, self.columns = values.shape
        self.maximize = True
        self.where = {}
        self.simulator = simulator
        # Functions of the extension that the searches need.
        self.cuda = SimpleNamespace(assignment_list=self._list_rows, ListSearch=self._timed_search)
        self.timed: TimedSearch | None = None
        self.counts: tuple[int, int, int] = (0, 0, 0)

    def _list_rows(self, **request: Any) -> None:
        self.simulator.list_rows(threads=THREADS, **request)

    def _timed_search(self, **arguments: Any) -> TimedSearch:
        self.timed = TimedSearch(self.simulator.ListSearch(**arguments))
        return self.timed

    def bid(self, prices: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        column_of_row = torch.empty(self.rows, dtype=torch.int32)
        self.counts = self.simulator.auction_rounds(
            values=self.values,
            maximize=True,
            epsilon=float(epsilon),
            stop=int(self.rows * assignment.SHARE_LEFT),
            max_rounds=assignment.MAX_ROUNDS,
            max_bids=assignment.MAX_BIDS * self.rows,
            class_of_row=self.class_of_row,
            prices=prices,
            column_of_row=column_of_row,
        )
        return column_of_row, torch.tensor(self.counts[:2])

    def inspect(self, prices: Tensor) -> Tensor:
        weights = torch.randint(-(2**62), 2**62, (self.columns,), generator=torch.Generator().manual_seed(0))
        hashes = [((part + 0.0).view(torch.int32) * weights).sum(1) for part in self.values.split(1024)]
        self.class_of_row = assignment.first_of_equal(torch.cat(hashes))
        top = torch.cat([(part - prices).topk(2).values for part in self.values.split(1024)])
        gaps = top[:, 0] - top[:, 1]
        median = torch.where(gaps > 0, gaps, torch.nan).nanmedian()
        return (assignment.EPSILON_SHARE * median.nan_to_num(0.0)).reshape(1)

    def certify(self, duals: Tensor, column_of_row: Tensor) -> tuple[Tensor, Tensor]:
        least = torch.cat([(-part.double() - duals).amin(1) for part in self.values.split(1024)])
        return least, -self.values[torch.arange(self.rows), column_of_row].double()


class TimedSearch:
    """A search that adds up its time and its requests after the first lists."""

    def __init__(self, search: Any) -> None:
        self._search = search
        self.requests, self.relisted = -1, 0
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._search, name)

    def advance(self) -> Any:
        begin = time.perf_counter()
        requested = self._search.advance()
        self.seconds += time.perf_counter() - begin
        if self.requests >= 0:
            self.relisted += sum(len(rows) for _, rows in requested)
        self.requests += bool(requested)
        return requested

    def set_lists(self, **lists: Tensor) -> None:
        begin = time.perf_counter()
        self._search.set_lists(**lists)
        self.seconds += time.perf_counter() - begin


def measure(n: int, family: str, matrix: Tensor, simulator: Any) -> str:
    problem = HostProblem(matrix, simulator)
    prices = torch.zeros(n)
    epsilon = problem.inspect(prices)
    pairs, _ = problem.bid(prices, epsilon)
    auction = assignment._Auction(prices, pairs, float(epsilon)) if float(epsilon) > 0 else None
    column_of_row, duals = problem.search(torch.zeros(n, dtype=torch.float64), auction)
    search = problem.timed
    assert search is not None
    least, paired = problem.certify(duals, column_of_row)
    gap = float((paired - duals[column_of_row] - least).sum())
    assert len(column_of_row.unique()) == n
    assert abs(gap) <= 1e-12 * n * float(matrix.abs().max()), gap
    rounds, bids, small = problem.counts
    cells = (
        n,
        family,
        rounds,
        bids,
        f"{bids / n:.1f}",
        f"{small / max(1, rounds):.2f}",
        int((pairs < 0).sum()),
        search.requests,
        search.relisted,
        f"{1000 * search.seconds:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    torch.set_num_threads(1)
    simulator = import_module("mudsc_fast._cuda_simulator")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for n in SIZES:
        for name in FAMILIES:
            matrix = families.RANDOM[name](n, np.random.default_rng(n))
            print(measure(n, name, torch.from_numpy(np.ascontiguousarray(matrix)), simulator), flush=True)
        for name, matrix in (families.perceptrons(n) if n <= LARGEST_TRAINED else {}).items():
            print(measure(n, name, torch.from_numpy(np.ascontiguousarray(matrix)), simulator), flush=True)


if __name__ == "__main__":
    main()
