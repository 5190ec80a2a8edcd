"""Solve random assignment problems and compare every objective with scipy's, in float64.

    python benchmarks/fuzz_assignment.py --solves 1000000

Each case draws a family of values, a shape, a dtype, a memory layout, the sense, and one of the ways to call: a single
matrix, a threshold, a warm start from a similar problem, a batch, a list of matrices, columns only, or points without
their matrix; on one thread or several. A difference ends the run with the seed of its case, which `--first` repeats.
`--way pairwise` draws only that way. `--sizes 768 1300` draws sizes that the list search solves, which are rare
otherwise.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment as scipy_assignment

from mudsc_fast import Assignment, PairwiseSimilarity, linear_assignment, linear_sum_assignment

Matrix = NDArray[Any]

#: Shares of small, medium and large problems. A large one takes as long as a thousand small ones.
_SIZES = ((0.9, 1, 24), (0.0983, 24, 160), (0.0014, 160, 700), (0.0003, 700, 1400))

_DTYPES: tuple[type[np.floating[Any]], ...] = (np.float64, np.float32, np.float16)


def _normal(random: Generator, shape: tuple[int, int]) -> Matrix:
    return random.standard_normal(shape)


def _uniform(random: Generator, shape: tuple[int, int]) -> Matrix:
    return random.random(shape)


def _ties(random: Generator, shape: tuple[int, int]) -> Matrix:
    return random.integers(-random.integers(1, 5), 5, shape).astype(np.float64)


def _integers(random: Generator, shape: tuple[int, int]) -> Matrix:
    return random.integers(0, 100, shape).astype(np.float64)


def _binary(random: Generator, shape: tuple[int, int]) -> Matrix:
    return (random.random(shape) < random.random()).astype(np.float64)


def _constant(random: Generator, shape: tuple[int, int]) -> Matrix:
    return np.full(shape, random.standard_normal())


def _low_rank(random: Generator, shape: tuple[int, int]) -> Matrix:
    rank = int(random.integers(1, 4))
    product: Matrix = random.standard_normal((shape[0], rank)) @ random.standard_normal((rank, shape[1]))
    return product


def _dead_units(random: Generator, shape: tuple[int, int]) -> Matrix:
    values = random.standard_normal(shape)
    values[random.random(shape[0]) < 0.3] = 0
    values[:, random.random(shape[1]) < 0.3] = 0
    return values


def _equal_rows(random: Generator, shape: tuple[int, int]) -> Matrix:
    return random.standard_normal(shape)[random.integers(0, 1 + shape[0] // 3, shape[0])]


def _sparse(random: Generator, shape: tuple[int, int]) -> Matrix:
    return (random.random(shape) < 0.1) * random.random(shape)


def _boxes(random: Generator, shape: tuple[int, int]) -> Matrix:
    """Return 1 - IoU of boxes, most of which do not overlap: the costs of trackers."""
    low = [random.random((count, 2)) * 4 for count in shape]
    high = [corner + 0.2 + random.random(corner.shape) for corner in low]
    inner = np.minimum(high[0][:, None], high[1]) - np.maximum(low[0][:, None], low[1])
    overlap = inner.clip(0).prod(-1)
    areas = [(top - bottom).prod(-1) for bottom, top in zip(low, high, strict=True)]
    result: Matrix = 1 - overlap / (areas[0][:, None] + areas[1] - overlap)
    return result


def _points(random: Generator, shape: tuple[int, int]) -> Matrix:
    """Return distances between points of the plane or of space."""
    axes = int(random.integers(2, 4))
    first, second = (random.random((count, axes)) for count in shape)
    distances: Matrix = np.sqrt(((first[:, None] - second) ** 2).sum(-1))
    return distances


def _dominating(random: Generator, shape: tuple[int, int]) -> Matrix:
    values = random.standard_normal(shape)
    values[random.integers(shape[0])] *= 1e6
    return values


FAMILIES: Mapping[str, Callable[[Generator, tuple[int, int]], Matrix]] = {
    "normal": _normal,
    "uniform": _uniform,
    "ties": _ties,
    "integers": _integers,
    "binary": _binary,
    "constant": _constant,
    "low rank": _low_rank,
    "dead units": _dead_units,
    "equal rows": _equal_rows,
    "sparse": _sparse,
    "boxes": _boxes,
    "points": _points,
    "dominating": _dominating,
}


class Case:
    """One random case, drawn from its seed."""

    def __init__(self, seed: int, way: str | None = None, sizes: tuple[int, int] | None = None) -> None:
        self.random = np.random.default_rng(seed)
        self.family = str(self.random.choice(list(FAMILIES)))
        self.dtype = _DTYPES[self.random.choice(3, p=[0.45, 0.45, 0.1])]
        self.maximize = bool(self.random.random() < 0.5)
        self.way = way or str(self.random.choice(list(WAYS)))
        drawn = self.random.choice(len(_SIZES), p=[share for share, _, _ in _SIZES])
        self._low, self._high = sizes or _SIZES[drawn][1:]
        self.solves = 0

    def shape(self, square: bool = False) -> tuple[int, int]:
        rows, columns = (int(size) for size in self.random.integers(self._low, self._high, 2))
        return (rows, rows) if square or self.random.random() < 0.3 else (rows, columns)

    def values(self, shape: tuple[int, int]) -> Matrix:
        """Return values of the case's family and dtype; some pairs are forbidden in some cases."""
        return self.rounded(FAMILIES[self.family](self.random, shape))

    def rounded(self, values: Matrix) -> Matrix:
        """Return the values in the case's dtype, finite."""
        largest = float(np.finfo(self.dtype).max)
        result: Matrix = values.clip(-largest, largest).astype(self.dtype)
        return result

    def laid_out(self, values: Matrix) -> Any:
        """Return the values as an array or a tensor, in one of the usual memory layouts."""
        layout = int(self.random.integers(4))
        if layout == 1:
            values = np.asfortranarray(values)
        elif layout == 2:
            wide = np.empty((2 * values.shape[0], values.shape[1] + 3), values.dtype)
            wide[::2, 1:-2] = values
            values = wide[::2, 1:-2]
        return torch.from_numpy(values) if self.random.random() < 0.3 else values

    def forbid(self, values: Matrix) -> Matrix:
        """Return the values with some forbidden pairs. The others allow a complete assignment."""
        forbidden = self.random.random(values.shape) < 0.3
        size = min(values.shape)
        kept = self.random.permutation(values.shape[0])[:size], self.random.permutation(values.shape[1])[:size]
        forbidden[kept] = False
        return np.where(forbidden, -np.inf if self.maximize else np.inf, values).astype(values.dtype)

    def check(self, values: Matrix, found: float, threshold: float | None = None) -> None:
        """Raise AssertionError unless `found` is the optimal sum."""
        exact = values.astype(np.float64)
        gains = exact if self.maximize else -exact
        if threshold is not None:
            gains = np.maximum(gains - (threshold if self.maximize else -threshold), 0)
        best = float(gains[scipy_assignment(gains, maximize=True)].sum())
        finite = np.abs(exact[np.isfinite(exact)])
        scale = max(float(finite.max(initial=0.0)), abs(threshold or 0.0))
        assert abs(found - best) <= 1e-12 * max(1, min(values.shape)) * scale, (found, best)
        self.solves += 1

    def gain(self, objective: float) -> float:
        return objective if self.maximize else -objective

    def check_result(self, values: Matrix, result: Assignment, threshold: float | None = None) -> None:
        pairs = int((result.columns >= 0).sum())
        found = self.gain(float(result.objective) - (threshold or 0.0) * pairs)
        self.check(values, found, threshold)
        scale = max(float(np.abs(values[np.isfinite(values)]).max(initial=0.0)), abs(threshold or 0.0))
        assert 0 <= float(result.gap) <= 1e-11 * max(1, min(values.shape)) * scale, float(result.gap)
        rows, columns = (indices.numpy() for indices in result.indices())
        chosen = values.astype(np.float64)[rows, columns]
        assert len(set(columns.tolist())) == len(columns)
        assert abs(chosen.sum() - float(result.objective)) <= 1e-12 * max(1, len(rows)) * scale

    def draw_threshold(self, values: Matrix) -> float:
        """Return a threshold that some pairs pass, equal to an entry in half of the cases."""
        method = "nearest" if self.random.random() < 0.5 else "linear"
        return float(np.quantile(values.astype(np.float64), self.random.random(), method=method))  # type: ignore[call-overload]


def _single(case: Case) -> None:
    values = case.values(case.shape())
    if case.random.random() < 0.2:
        values = case.forbid(values)
    case.check_result(values, linear_assignment(case.laid_out(values), maximize=case.maximize))


def _scipy(case: Case) -> None:
    values = case.values(case.shape())
    rows, columns = (np.asarray(part) for part in linear_sum_assignment(case.laid_out(values), case.maximize))
    case.check(values, case.gain(float(values.astype(np.float64)[rows, columns].sum())))
    exact = values.astype(np.float64)
    if max(values.shape) <= 128:
        expected = scipy_assignment(exact, case.maximize)
        assert np.array_equal(rows, expected[0]), "another choice than scipy's"
        assert np.array_equal(columns, expected[1]), "another choice than scipy's"


def _threshold(case: Case) -> None:
    values = case.values(case.shape())
    threshold = case.draw_threshold(values)
    result = linear_assignment(case.laid_out(values), threshold=threshold, maximize=case.maximize)
    case.check_result(values, result, threshold)


def _columns_only(case: Case) -> None:
    values = case.values(case.shape())
    columns = linear_assignment(case.laid_out(values), maximize=case.maximize, return_duals=False).numpy()
    rows = np.flatnonzero(columns >= 0)
    case.check(values, case.gain(float(values.astype(np.float64)[rows, columns[rows]].sum())))


def _warm_start(case: Case) -> None:
    values = case.values(case.shape(square=True))
    start = linear_assignment(values, maximize=case.maximize)
    noise = case.random.choice([0.0, 0.01, 1.0]) * case.random.standard_normal(values.shape)
    changed = case.rounded(values + noise * max(float(np.abs(values).max()), 1e-30))
    case.check_result(values, start)
    case.check_result(changed, linear_assignment(changed, maximize=case.maximize, warm_start=start))


def _batch(case: Case) -> None:
    shape = case.shape()
    values = np.stack([case.values(shape) for _ in range(int(case.random.integers(1, 6)))])
    result = linear_assignment(values, maximize=case.maximize)
    for index, matrix in enumerate(values):
        case.check(matrix, case.gain(float(result.objective[index])))


def _list(case: Case) -> None:
    matrices = [case.values(case.shape()) for _ in range(int(case.random.integers(1, 8)))]
    threshold = case.draw_threshold(matrices[0]) if case.random.random() < 0.5 else None
    given = [case.laid_out(matrix) for matrix in matrices]
    found = linear_assignment(given, maximize=case.maximize, threshold=threshold)
    for matrix, result in zip(matrices, found, strict=True):
        case.check_result(matrix, result, threshold)


def _pairwise(case: Case) -> None:
    random = case.random
    shape = case.shape()
    if random.random() < 0.05:  # large enough for the solver that does not store the matrix
        shape = (int(random.integers(1, 60)), int(random.integers(768, 9000)))
    features = int(random.integers(2, 12))
    draws: list[Callable[[tuple[int, int]], Matrix]] = [
        random.standard_normal,
        lambda size: random.integers(0, 4, size).astype(np.float64),
        lambda size: 100 + random.random(size),
    ]
    draw = draws[random.integers(len(draws))]
    x, y = (case.rounded(draw((count, features))) for count in shape)
    if random.random() < 0.3:
        y[random.integers(shape[1], size=shape[1] // 2)] = x[random.integers(shape[0], size=shape[1] // 2)]
    if random.random() < 0.3:
        x, y = y, x
    kinds: tuple[Literal["correlation", "cosine", "sqeuclidean"], ...] = ("correlation", "cosine", "sqeuclidean")
    problem = PairwiseSimilarity(x, y, kinds[random.integers(3)])
    case.check_result(problem.dense().numpy(), linear_assignment(problem, maximize=case.maximize))


#: Functions that solve a case, by name.
WAYS: Mapping[str, Callable[[Case], None]] = {
    "single": _single,
    "scipy": _scipy,
    "threshold": _threshold,
    "columns only": _columns_only,
    "warm start": _warm_start,
    "batch": _batch,
    "list": _list,
    "pairwise": _pairwise,
}


def run(
    solves: int,
    first: int = 0,
    report: Callable[[int], None] | None = None,
    way: str | None = None,
    sizes: tuple[int, int] | None = None,
) -> Counter[str]:
    """Run cases from seed `first` on until `solves` problems are solved. Return how often each function was used.

    All cases are of the given way and range of sizes, if any.

    Raises
    ------
    AssertionError
        If a result differs from scipy's, naming the seed.
    """
    counts: Counter[str] = Counter()
    seed, total = first, 0
    while total < solves:
        case = Case(seed, way, sizes)
        try:
            WAYS[case.way](case)
        except Exception as error:
            raise AssertionError(
                f"seed {seed}: {case.way}, {case.family}, {np.dtype(case.dtype)}, maximize={case.maximize}: {error!r}"
            ) from error
        counts[case.way] += case.solves
        total += case.solves
        seed += 1
        if report is not None:
            report(total)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solves", type=int, default=100_000, help="number of problems to solve")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--way", choices=WAYS, help="draw only cases of this way")
    parser.add_argument("--sizes", type=int, nargs=2, metavar=("LOW", "HIGH"), help="draw LOW <= rows, columns < HIGH")
    parser.add_argument("--threads", type=int, default=2, help="threads of every call")
    arguments = parser.parse_args()
    if arguments.sizes is not None and not 1 <= arguments.sizes[0] < arguments.sizes[1]:
        parser.error(f"--sizes: expected 1 <= LOW < HIGH, got {arguments.sizes[0]} and {arguments.sizes[1]}")
    torch.set_num_threads(arguments.threads)
    started, shown = time.monotonic(), 0

    def report(total: int) -> None:
        nonlocal shown
        if total // 10_000 > shown:
            shown = total // 10_000
            print(f"{total} solves without a difference, {time.monotonic() - started:.0f} s", flush=True)

    sizes = None if arguments.sizes is None else (arguments.sizes[0], arguments.sizes[1])
    counts = run(arguments.solves, arguments.first, report, arguments.way, sizes)
    print(f"{sum(counts.values())} solves without a difference: {dict(counts)}")


if __name__ == "__main__":
    main()
