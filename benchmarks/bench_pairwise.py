"""Time and peak memory of the assignment of points without their matrix.

    python benchmarks/bench_pairwise.py --points 65536 --features 3 --kind sqeuclidean

Points are uniform in the unit cube. With `--noise`, y is x in another order plus normal noise of that deviation;
without, it is independent of x. `--dense` also solves the matrix, and compares.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import get_args

import torch

import mudsc_fast
from mudsc_fast import PairwiseSimilarity, linear_assignment
from mudsc_fast.ops.pairwise import Kind


def make_points(arguments: argparse.Namespace) -> PairwiseSimilarity:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, arguments.points, arguments.features, generator=generator)
    if arguments.noise is not None:
        order = torch.randperm(len(x), generator=generator)
        y = x[order] + arguments.noise * torch.randn(x.shape, generator=generator)
    return PairwiseSimilarity(x, y, arguments.kind)


def peak_memory() -> float:
    """Return the peak of resident memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=16384)
    parser.add_argument("--features", type=int, default=3)
    parser.add_argument("--kind", choices=get_args(Kind), default="sqeuclidean")
    parser.add_argument("--noise", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dense", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = make_points(arguments)
    before = peak_memory()
    began, began_cpu = time.perf_counter(), time.process_time()
    found = linear_assignment(problem)
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    print(problem)
    print(f"{cpu:.2f} s of processor time, {seconds:.2f} s in all, threads: {arguments.threads}")
    print(f"peak memory {peak_memory():.0f} MB, of which {before:.0f} MB before the call")
    print(f"objective {float(found.objective):.9g}, gap {float(found.gap):.3g}")
    if arguments.dense:
        began_cpu = time.process_time()
        matrix = problem.dense()
        made = time.process_time()
        dense = linear_assignment(matrix, maximize=not problem.is_cost)
        print(f"matrix: {made - began_cpu:.2f} s to make, {time.process_time() - made:.2f} s to solve (processor time)")
        difference = float(found.objective - dense.objective)
        print(f"same columns: {torch.equal(found.columns, dense.columns)}, objective - dense: {difference:.3g}")


if __name__ == "__main__":
    print(f"mudsc_fast {mudsc_fast.__version__}, torch {torch.__version__}")
    main()
