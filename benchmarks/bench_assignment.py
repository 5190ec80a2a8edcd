"""Assignment: `linear_assignment` compared with scipy and all other installed solvers, on one thread, in one run.

Every result is a permutation whose objective, in float64, is that of scipy (unless scipy is skipped at that size) and
is proven by its own duals, checked entry for entry. A table for each size gives the shortest times in milliseconds, the
ratios to scipy and to the fastest peer, and `reads`: the time divided by that of streaming the matrix once. Peers that
miss the optimum are named and left out. The extra information of each benchmark holds the times of all peers by name
and version.

    pip install -e '.[test,benchmark]'
    MUDSC_BENCHMARK_SIZES=512,1024,2048 pytest benchmarks/bench_assignment.py --benchmark-only -s

MUDSC_BENCHMARK_SIZES
    Sizes n, ascending, 64 to 16384 (1 GB a matrix); by default 64 to 2048. The largest is that of the measurements of
    warm start, instruction levels, threads and memory.
MUDSC_BENCHMARK_SECONDS
    A peer is skipped if eight times its time on the leading quarter of the matrix exceeds this (default: 20).
MUDSC_BENCHMARK_CACHE, MUDSC_BENCHMARK_DATA
    See families.py.

Peers get the negated matrix, computed beforehand, as contiguous float32, and run with their defaults.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_solve
from torch import Tensor

import families
import mudsc_fast
import peers
from mudsc_fast import Assignment, linear_assignment

SIZES = tuple(map(int, os.environ.get("MUDSC_BENCHMARK_SIZES", "64,128,256,512,1024,2048").split(",")))
LARGEST = max(SIZES)
MOST_SECONDS = float(os.environ.get("MUDSC_BENCHMARK_SECONDS", "20"))
#: Up to this size a peer is run without an estimate of its time.
ALWAYS_RUN = 512
#: Tolerance between float64 sums, relative to the sum of the magnitudes of the assigned entries.
ROUNDING = 1e-12
SMALL = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256, 512)
#: Families of small matrices: one optimum, ties everywhere, and rows and columns that can exchange their partners.
SMALL_FAMILIES = ("independent", "integer_ties", "dead_units")
BATCH, BATCH_SIZE = 1024, 128
THREADS = (1, 2)

#: Prints by how many bytes a solve raises the peak of resident memory. The peak is reset first, because starting
#: Python may need more memory than is resident later.
MEMORY_PROGRAM = """
import pathlib, sys
import numpy, torch, mudsc_fast

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(1)
mudsc_fast.linear_assignment(torch.rand(64, 64))
similarity = torch.from_numpy(numpy.load(sys.argv[1]))
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
mudsc_fast.linear_assignment(similarity)
print(resident("VmHWM") - before)
"""

Result = TypeVar("Result")
Benchmark = Any  # pytest-benchmark declares no types


@dataclass
class Row:
    """What was measured on one matrix; seconds, infinite for a peer that was skipped."""

    family: str
    own: float
    read: float
    peers: dict[str, float]

    @property
    def best_peer(self) -> str:
        """Name of the fastest peer, scipy among them."""
        return min(self.peers, key=lambda name: self.peers[name])

    @property
    def times_scipy(self) -> float:
        """How many times faster than scipy; infinite where scipy was skipped."""
        return self.peers["scipy"] / self.own

    @property
    def times_best(self) -> float:
        """How many times faster than the fastest peer."""
        return self.peers[self.best_peer] / self.own

    @property
    def reads(self) -> float:
        """Time in units of that of reading the matrix once."""
        return self.own / self.read


@dataclass
class Table:
    """The rows of one size."""

    size: int
    rows: list[Row] = field(default_factory=list)

    def means(self) -> tuple[float, float, float]:
        """Return the geometric means over hard families of the ratios to scipy and to the best peer, and of reads."""
        hard = [row for row in self.rows if row.family in families.HARD]
        return (
            geometric_mean([row.times_scipy for row in hard]),
            geometric_mean([row.times_best for row in hard]),
            geometric_mean([row.reads for row in hard]),
        )

    def __str__(self) -> str:
        lines = [
            f"n = {self.size}",
            f"{'family':<18}{'ms':>10}{'scipy':>11}{'best peer':>11}{'x scipy':>9}{'x best':>8}{'reads':>8}",
        ]
        for row in self.rows:
            best = row.best_peer
            times = (row.own, row.peers["scipy"], row.peers[best])
            lines.append(
                f"{row.family:<18}{times[0] * 1e3:10.3f}{times[1] * 1e3:11.3f}{times[2] * 1e3:11.3f}"
                f"{row.times_scipy:9.2f}{row.times_best:8.2f}{row.reads:8.1f}  {best}"
            )
        label = "hard, geometric mean"
        scipy, best_ratio, reads = self.means()
        return "\n".join([*lines, f"{label:<50}{scipy:9.2f}{best_ratio:8.2f}{reads:8.1f}"])


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"n={size}")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Collect the rows of one size and print them when all its families have run."""
    collected = Table(request.param)
    yield collected
    if collected.rows:
        print(f"\n\n{collected}\n")


def geometric_mean(ratios: list[float]) -> float:
    known = [ratio for ratio in ratios if 0 < ratio < math.inf]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else math.nan


def shortest(call: Callable[[], Result], budget: float = 0.05) -> tuple[float, Result]:
    """Return the shortest time of a call, repeated until the budget is spent, at least once, and its result."""
    times: list[float] = []
    while True:
        begin = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - begin)
        if sum(times) >= budget:
            return min(times), result


def run(benchmark: Benchmark, call: Callable[[], Result], budget: float = 0.2) -> tuple[float, Result]:
    """Benchmark a call for about as long as the budget; return its shortest time and its result."""
    times: list[float] = []

    def timed() -> Result:
        elapsed, result = shortest(call, budget=0.0)
        times.append(elapsed)
        return result

    first, _ = shortest(call, budget=0.0)
    rounds = max(2, min(100, int(budget / first)))
    result: Result = benchmark.pedantic(timed, rounds=rounds, iterations=1)
    return min(times), result


def streaming_read(similarity: Tensor) -> float:
    """Return the time to read the matrix once: the shortest of several reductions of it."""
    flat, ones = similarity.reshape(-1), torch.ones(similarity.shape[-1])
    ways: tuple[Callable[[], Tensor], ...] = (
        flat.sum,
        flat.amax,
        lambda: torch.dot(flat, flat),
        lambda: similarity @ ones,
    )
    return min(shortest(way, budget=0.03)[0] for way in ways)


def objective(similarity: Tensor, columns: Tensor) -> Tensor:
    """Return the float64 sum of the assigned entries of [..., n, n], of which no column may be assigned twice."""
    assert torch.equal(columns.sort(-1).values, torch.arange(similarity.shape[-1]).expand(columns.shape))
    return similarity.gather(-1, columns.unsqueeze(-1)).to(torch.float64).sum((-2, -1))


def magnitude(similarity: Tensor, columns: Tensor) -> float:
    return float(similarity.gather(-1, columns.unsqueeze(-1)).to(torch.float64).abs().sum((-2, -1)).max())


def check(similarity: Tensor, result: Assignment) -> None:
    """Prove the [n, n] result by its duals: they bound every entry, and their sum is the objective."""
    allowed = ROUNDING * max(magnitude(similarity, result.columns), float(similarity.abs().max()))
    value = float(objective(similarity, result.columns))
    assert abs(value - float(result.objective)) <= allowed
    assert float(result.row_duals.sum() + result.column_duals.sum()) - value <= allowed
    for start in range(0, len(similarity), 256):
        rows = slice(start, start + 256)
        bounds = result.row_duals[rows, None] + result.column_duals
        assert float((similarity[rows].to(torch.float64) - bounds).max()) <= allowed


def within_limit(peer: peers.Peer, cost: peers.Cost, budget: float = 0.05) -> tuple[float, peers.Columns | None]:
    """Return a peer's shortest time and its columns, or infinity if it is expected to exceed its limit."""
    if len(cost) > ALWAYS_RUN:
        half = len(cost) // 2
        seconds, _ = within_limit(peer, np.ascontiguousarray(cost[:half, :half]), budget=0.0)
        if 8 * seconds > MOST_SECONDS:
            return math.inf, None
    return shortest(lambda: peer.solve(cost), budget)


def measure_peers(similarity: Tensor, own: Assignment) -> tuple[dict[str, float], dict[str, str]]:
    """Return the peers' times and versions; the time of a peer whose result is not optimal is infinite.

    Solvers that compute in float32 miss the optimum of some matrices. None may find a better one than ours.
    """
    cost = (-similarity).numpy()
    expected = float(objective(similarity, own.columns))
    allowed = ROUNDING * magnitude(similarity, own.columns)
    times, versions = {}, {}
    for peer in peers.installed():
        times[peer.name], columns = within_limit(peer, cost)
        versions[peer.name] = peer.version
        if columns is not None:
            found = float(objective(similarity, torch.from_numpy(columns.astype(np.int64))))
            assert found - expected <= allowed, f"{peer.name}: objective {found}, ours {expected}"
            if expected - found > allowed:
                print(f"\n{peer.name} {peer.version} is left out: its objective is {found}, the optimum {expected}")
                times[peer.name] = math.inf
    return times, versions


def record(benchmark: Benchmark, row: Row, versions: dict[str, str]) -> None:
    benchmark.extra_info.update(
        milliseconds=row.own * 1e3,
        times_scipy=None if math.isinf(row.times_scipy) else row.times_scipy,
        times_best_peer=row.times_best,
        best_peer=row.best_peer,
        reads=row.reads,
        read_milliseconds=row.read * 1e3,
        peer_milliseconds={name: None if math.isinf(value) else value * 1e3 for name, value in row.peers.items()},
        peer_versions=versions,
    )


@pytest.mark.parametrize("family", families.FAMILIES)
def test_family(benchmark: Benchmark, table: Table, family: str) -> None:
    benchmark.group = f"assignment, n = {table.size}"
    similarity = torch.from_numpy(families.load(family, table.size))
    own_seconds, result = run(benchmark, lambda: linear_assignment(similarity))
    check(similarity, result)
    times, versions = measure_peers(similarity, result)
    row = Row(family, own_seconds, streaming_read(similarity), times)
    table.rows.append(row)
    record(benchmark, row, versions)


def test_hard_families(benchmark: Benchmark, table: Table) -> None:
    """Solve all hard families one after another; the extra information holds the geometric means."""
    benchmark.group = f"assignment, n = {table.size}"

    def solve_all() -> float:
        total = 0.0
        for family in families.HARD:
            similarity = torch.from_numpy(families.load(family, table.size))
            total += shortest(lambda matrix=similarity: linear_assignment(matrix), budget=0.0)[0]  # type: ignore[misc]
        return total

    benchmark.extra_info["milliseconds"] = 1e3 * benchmark.pedantic(solve_all, rounds=1, iterations=1)
    names = ("times_scipy", "times_best_peer", "reads")
    benchmark.extra_info["geometric_means"] = dict(zip(names, table.means(), strict=True))


@pytest.mark.parametrize("function", ["linear_assignment", "linear_sum_assignment"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", SMALL_FAMILIES)
@pytest.mark.parametrize("size", SMALL)
def test_call_overhead(benchmark: Benchmark, size: int, family: str, dtype: str, function: str) -> None:
    """Measure small matrices, for which the call takes longer than the search, with scipy's arguments and results."""
    benchmark.group = f"assignment, call overhead, n = {size}"
    similarity = families.load(family, size).astype(dtype)
    solve = getattr(mudsc_fast, function)
    calls = range(max(1, 4096 // size**2))
    own_seconds, results = run(benchmark, lambda: [solve(similarity, maximize=True) for _ in calls], budget=0.05)
    scipy_seconds, expected = shortest(lambda: [scipy_solve(similarity, maximize=True) for _ in calls], budget=0.05)
    columns = results[0].columns.numpy() if function == "linear_assignment" else results[0][1]
    values = [similarity[range(size), chosen].sum(dtype=np.float64) for chosen in (columns, expected[0][1])]
    assert abs(values[0] - values[1]) <= ROUNDING * size * np.abs(similarity).max()
    own_microseconds, scipy_microseconds = (seconds * 1e6 / len(calls) for seconds in (own_seconds, scipy_seconds))
    ratio = scipy_seconds / own_seconds
    benchmark.extra_info.update(microseconds=own_microseconds, scipy_microseconds=scipy_microseconds, times_scipy=ratio)
    print(
        f"\n{function}, {family}, {dtype}, n = {size}: {own_microseconds:.2f} us, scipy {scipy_microseconds:.2f} us, "
        f"x scipy {ratio:.2f}"
    )


@pytest.mark.parametrize("threads", THREADS)
def test_batch(benchmark: Benchmark, threads: int) -> None:
    benchmark.group = f"assignment, batch {BATCH} x {BATCH_SIZE} x {BATCH_SIZE}"
    matrices = [families.independent(BATCH_SIZE, np.random.default_rng(seed), samples=256) for seed in range(BATCH)]
    similarity = torch.from_numpy(np.stack(matrices))
    torch.set_num_threads(threads)
    own_seconds, result = run(benchmark, lambda: linear_assignment(similarity), budget=1.0)
    torch.set_num_threads(1)
    costs = (-similarity).numpy()
    scipy_seconds, expected = shortest(lambda: np.stack([scipy_solve(cost)[1] for cost in costs]))
    found = objective(similarity, result.columns)
    allowed = ROUNDING * magnitude(similarity, result.columns)
    assert torch.allclose(found, objective(similarity, torch.from_numpy(expected)), rtol=0, atol=allowed)
    times, versions = {"scipy": scipy_seconds}, {}
    for peer in peers.installed_for_batches():
        times[peer.name], columns = shortest(lambda solve=peer.solve: solve(costs, threads))  # type: ignore[misc]
        versions[peer.name] = peer.version
        peer_objective = objective(similarity, torch.from_numpy(columns.astype(np.int64)))
        assert torch.allclose(found, peer_objective, rtol=0, atol=allowed), peer.name
    row = Row(f"threads = {threads}", own_seconds, streaming_read(similarity), times)
    record(benchmark, row, versions)
    print(
        f"\nbatch, threads = {threads}: {own_seconds * 1e3:.1f} ms, x scipy loop {row.times_scipy:.2f}, "
        f"x best {row.times_best:.2f} ({row.best_peer})"
    )


@pytest.mark.parametrize("size", [size for size in (2048, 4096) if size <= LARGEST] or [LARGEST])
@pytest.mark.parametrize("family", ["independent", "activations_2"])
def test_warm_start(benchmark: Benchmark, family: str, size: int) -> None:
    """Solve a matrix again after adding noise of 1 % of its standard deviation, with and without the earlier duals."""
    benchmark.group = f"assignment, warm start, n = {size}"
    similarity = torch.from_numpy(families.load(family, size))
    earlier = linear_assignment(similarity)
    noise = torch.randn(similarity.shape, generator=torch.Generator().manual_seed(0))
    changed = similarity + 0.01 * similarity.std() * noise
    warm_seconds, result = run(benchmark, lambda: linear_assignment(changed, warm_start=earlier))
    cold_seconds, cold = shortest(lambda: linear_assignment(changed), budget=0.3)
    check(changed, result)
    check(changed, cold)
    benchmark.extra_info.update(cold_milliseconds=cold_seconds * 1e3, times_cold=cold_seconds / warm_seconds)
    print(
        f"\nwarm start, {family}, n = {size}: {warm_seconds * 1e3:.2f} ms, cold {cold_seconds * 1e3:.2f} ms, "
        f"x cold {cold_seconds / warm_seconds:.2f}"
    )


@pytest.mark.parametrize("family", ["independent", "activations_2"])
def test_instruction_levels(benchmark: Benchmark, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure how much slower the kernel is with lower instruction levels."""
    benchmark.group = f"assignment, instruction levels, n = {LARGEST}"
    similarity = torch.from_numpy(families.load(family, LARGEST))
    best_seconds, result = run(benchmark, lambda: linear_assignment(similarity))
    times = {}
    for level in ("avx512", "avx2", "baseline"):
        monkeypatch.setenv("MUDSC_ISA", level)
        times[level], limited = shortest(lambda: linear_assignment(similarity), budget=0.3)
        check(similarity, limited)
        assert abs(float(limited.objective - result.objective)) <= ROUNDING * magnitude(similarity, result.columns)
    benchmark.extra_info["level_milliseconds"] = {level: value * 1e3 for level, value in times.items()}
    compared = ", ".join(f"{level} {value * 1e3:.2f} ms" for level, value in times.items())
    print(f"\ninstruction levels, {family}, n = {LARGEST}: {best_seconds * 1e3:.2f} ms; {compared}")


@pytest.mark.parametrize("family", ["independent", "activations_2"])
def test_two_threads(benchmark: Benchmark, family: str) -> None:
    benchmark.group = f"assignment, two threads, n = {LARGEST}"
    similarity = torch.from_numpy(families.load(family, LARGEST))
    one_seconds, _ = shortest(lambda: linear_assignment(similarity), budget=0.3)
    torch.set_num_threads(2)
    two_seconds, result = run(benchmark, lambda: linear_assignment(similarity))
    check(similarity, result)
    benchmark.extra_info.update(one_thread_milliseconds=one_seconds * 1e3, times_one_thread=one_seconds / two_seconds)
    print(
        f"\ntwo threads, {family}, n = {LARGEST}: {two_seconds * 1e3:.2f} ms, one {one_seconds * 1e3:.2f} ms, "
        f"x one {one_seconds / two_seconds:.2f}"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["independent", "activations_2"])
def test_peak_memory(benchmark: Benchmark, family: str) -> None:
    """Measure by how much a solve raises the peak of memory, in a separate process."""
    benchmark.group = f"assignment, memory, n = {LARGEST}"
    path = families.path_of(family, LARGEST)
    package = Path(mudsc_fast.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}

    def grow() -> int:
        program = [sys.executable, "-c", MEMORY_PROGRAM, str(path)]
        grown: int = json.loads(subprocess.check_output(program, env=environment, text=True))
        return grown

    grown = benchmark.pedantic(grow, rounds=1, iterations=1)
    share = grown / (4 * LARGEST**2)
    benchmark.extra_info.update(grown_bytes=grown, share_of_input=share)
    print(f"\npeak memory, {family}, n = {LARGEST}: input + {100 * share:.1f} %")
