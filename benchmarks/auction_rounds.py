"""What the CUDA auction of one large assignment does round by round, counted on a CPU: no device, and no time of one.

    MUDSC_BENCHMARK_SIZES=1024,4096 python benchmarks/auction_rounds.py

The rounds are those of csrc/cuda_sim/auction_rounds.cpp, which agrees with the kernel to the bit (tests). `rounds` are
followed by a barrier of the whole device each; `bids` read a row each, `reads` is their number in reads of the matrix;
`small` is the share of rounds with fewer bidders than an H100 has multiprocessors. Then the paths on the host are
searched, on lists made here in the device's place: `left` rows without a column, `lists` requests that the device would
serve, with `relisted` rows in all, and the host's own milliseconds on one core of this machine. Every result is proven.
Needs the simulator: pip install . --config-settings=cmake.define.MUDSC_CUDA_SIMULATOR=ON
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
from mudsc_fast.kernels._scalar_types import SCALAR_TYPES
from mudsc_fast.kernels.cuda import assignment

SIZES = tuple(map(int, os.environ.get("MUDSC_BENCHMARK_SIZES", "1024,2048,4096,8192,16384").split(",")))
FAMILIES = ("independent", "uniform", "low_rank", "dead_units", "planted", "integer_ties")
#: Wider perceptrons take minutes to train.
LARGEST_TRAINED = 2048
#: In a block of the kernel that makes lists.
THREADS = 256
COLUMNS = ("n", "family", "rounds", "bids", "reads", "small", "left", "lists", "relisted", "host ms")


class HostProblem(assignment._LargeProblem):
    """The steps of a large problem with plain loops and torch in the place of the kernels."""

    def __init__(self, values: Tensor, simulator: Any) -> None:
        self.values = values
        self.rows, self.columns = values.shape
        self.matrix = (SCALAR_TYPES[values.dtype], values.data_ptr(), self.rows, self.columns, True)
        self.where = {}
        self.simulator = simulator
        # What the searches need of the extension.
        self.cuda = SimpleNamespace(assignment_list=self._list_rows, PathSolver=self._timed_solver)
        self.solver: TimedSolver | None = None
        self.counts: tuple[int, int, int] = (0, 0, 0)

    def _list_rows(self, matrix: tuple[int, int, int, int, bool], **request: int) -> None:
        _, address, n, _, maximize = matrix
        self.simulator.list_rows(address, n, maximize, THREADS, **request)

    def _timed_solver(self, *arguments: Any) -> TimedSolver:
        self.solver = TimedSolver(self.simulator.PathSolver(*arguments))
        return self.solver

    def bid(self, prices: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        column_of_row = torch.empty(self.rows, dtype=torch.int32)
        self.counts = self.simulator.auction_rounds(
            self.values.data_ptr(),
            self.rows,
            True,
            float(epsilon),
            int(self.rows * assignment.SHARE_LEFT),
            assignment.MAX_ROUNDS,
            assignment.MAX_BIDS * self.rows,
            self.class_of_row.data_ptr(),
            prices.data_ptr(),
            column_of_row.data_ptr(),
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


class TimedSolver:
    """A path solver that adds up the time it takes, and what it asks for after the first lists."""

    def __init__(self, solver: Any) -> None:
        self._solver = solver
        self.requests, self.relisted = -1, 0
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._solver, name)

    def advance(self) -> Any:
        begin = time.perf_counter()
        requested = self._solver.advance()
        self.seconds += time.perf_counter() - begin
        if self.requests >= 0:
            self.relisted += sum(count for _, count in requested)
        self.requests += bool(requested)
        return requested

    def set_lists(self, **lists: int) -> None:
        begin = time.perf_counter()
        self._solver.set_lists(**lists)
        self.seconds += time.perf_counter() - begin


def measure(n: int, family: str, matrix: Tensor, simulator: Any) -> str:
    problem = HostProblem(matrix, simulator)
    prices = torch.zeros(n)
    epsilon = problem.inspect(prices)
    pairs, _ = problem.bid(prices, epsilon)
    column_of_row, duals = problem.find_paths(-prices.double(), pairs, float(epsilon))
    solver = problem.solver
    assert solver is not None
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
        solver.requests,
        solver.relisted,
        f"{1000 * solver.seconds:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    torch.set_num_threads(1)
    simulator = import_module("mudsc_fast._cuda_simulator")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for n in SIZES:
        for name in FAMILIES:
            matrix = families.RANDOM[name](n, np.random.default_rng(n))
            print(measure(n, name, torch.from_numpy(matrix), simulator), flush=True)
        for name, matrix in (families.perceptrons(n) if n <= LARGEST_TRAINED else {}).items():
            print(measure(n, name, torch.from_numpy(matrix), simulator), flush=True)


if __name__ == "__main__":
    main()
