"""The matching steps of other libraries, with and without mudsc_fast, in one process on one core.

    pytest benchmarks/bench_compat.py --benchmark-only -s

For libraries that cannot be installed, this file implements the step from its formula. ``rebasin`` itself is measured
if it is installed (``pip install rebasin``). Every benchmark checks that both results are equal, and records both times
in seconds and their ratio in its extra information.
"""

from __future__ import annotations

import copy
import itertools
import time
import timeit
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast.compat import lap, mudsc, pleas, rebasin, zipit
from mudsc_fast.kernels.reference import zip as reference
from published import Published

Result = TypeVar("Result")
Benchmark = Any  # pytest-benchmark declares no types

WIDTHS = (784, 1024, 1024, 1024, 10)
ZIP_WIDTHS = (784, 256, 256, 10)


def correlation(units: int) -> Tensor:
    """Return [2 units, 2 units] correlations of rectified mixtures of latent features, as of two networks."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4096, 64, generator=generator) @ torch.randn(64, 2 * units, generator=generator)
    features += 4 * torch.randn(features.shape, generator=generator)
    return torch.corrcoef(features.relu_().T)


def mlp(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential()
    for index, (read, written) in enumerate(itertools.pairwise(widths), start=1):
        model.add_module(f"fc{index}", nn.Linear(read, written))
        model.add_module(f"relu{index}", nn.ReLU())
    return model


def mlp_axes(layers: int) -> dict[str, tuple[str | None, ...]]:
    nodes = [None, *(f"fc{index}" for index in range(1, layers)), None]
    axes: dict[str, tuple[str | None, ...]] = {}
    for index in range(1, layers + 1):
        axes |= {f"fc{index}.weight": (nodes[index], nodes[index - 1]), f"fc{index}.bias": (nodes[index],)}
    return axes


def seconds(call: Callable[[], Result]) -> tuple[float, Result]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def compare(benchmark: Benchmark, library: str, before: Callable[[], Any], after: Callable[[], Any]) -> tuple[Any, Any]:
    """Time both, the second as the benchmark; record the ratio and return both results."""
    benchmark.group = library
    times = []

    def run() -> Any:
        elapsed, result = seconds(after)
        times.append(elapsed)
        return result

    result = benchmark.pedantic(run, rounds=3, iterations=1, warmup_rounds=1)
    before_seconds, expected = min((seconds(before) for _ in range(2)), key=lambda timed: timed[0])
    benchmark.extra_info["before_seconds"] = round(before_seconds, 4)
    benchmark.extra_info["after_seconds"] = round(min(times), 4)
    benchmark.extra_info["times_faster"] = round(before_seconds / min(times), 1)
    print(f"\n{library}: {dict(benchmark.extra_info)}")
    assert before_seconds > min(times)
    return expected, result


def test_scipy(benchmark: Benchmark) -> None:
    similarity = correlation(1024)[:1024, 1024:].numpy()

    def solve() -> Any:
        return scipy.optimize.linear_sum_assignment(similarity, maximize=True)

    def patched() -> Any:
        with mudsc_fast.patch(only=["scipy.optimize"]):
            return solve()

    expected, found = compare(benchmark, "scipy, 1024 units, patched and restored each time", solve, patched)
    assert similarity[found].sum(dtype=float) == pytest.approx(similarity[expected].sum(dtype=float), rel=1e-12)


@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("shape", [(10, 12), (50, 60)])
def test_lapjv(benchmark: Benchmark, shape: tuple[int, int], limit: float | None) -> None:
    """Compare the CPU times at sizes of trackers; other work on the machine would distort ratios of wall times."""
    package = pytest.importorskip("lap", reason="pip install lapx, or lap")
    costs = np.random.default_rng(0).random(shape)
    options: dict[str, Any] = {"extend_cost": True} if limit is None else {"extend_cost": True, "cost_limit": limit}

    def cpu_seconds(call: Callable[..., Any]) -> float:
        timer = timeit.Timer(lambda: call(costs, **options), timer=time.process_time)
        return min(timer.repeat(20, 200)) / 200

    def total(result: Any) -> float:
        unmatched = sum(shape) - 2 * int((result[1] >= 0).sum())
        return float(result[0]) + (0.0 if limit is None else limit / 2 * unmatched)

    benchmark.group = f"lap {package.__version__}, {shape}, limit {limit}"
    before, after = cpu_seconds(package.lapjv), cpu_seconds(lap.lapjv)
    found = benchmark.pedantic(lambda: lap.lapjv(costs, **options), rounds=3)
    assert total(found) == pytest.approx(total(package.lapjv(costs, **options)), rel=1e-12)
    benchmark.extra_info["times_faster"] = round(before / after, 1)
    print(f"\n{benchmark.group}: {1e6 * before:.2f} us before, {1e6 * after:.2f} us after, {before / after:.1f} times")
    assert before > after


def test_zipit(benchmark: Benchmark) -> None:
    covariance = correlation(256)
    a, b = 0.3, 0.125

    def published() -> Tensor:
        similarity = zipit.compute_correlation(covariance)
        budget = int(256 // 2 * b + 1e-4)
        clusters, _ = reference.zip_units(similarity, 2, 256, budget, a)
        return torch.eye(256)[clusters]

    expected, (_, found) = compare(
        benchmark,
        "ZipIt, 256 units",
        published,
        lambda: zipit.match_tensors_zipit({"covariance": covariance}, a=a, b=b),
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["align", "zip"])
def test_mudsc(benchmark: Benchmark, mode: str) -> None:
    widths = WIDTHS if mode == "align" else ZIP_WIDTHS
    layers = len(widths) - 1
    models = [mlp(widths, seed) for seed in range(2)]
    perm = {
        node: [
            [0, f"fc{node}.weight"],
            [0, f"fc{node}.bias"],
            [1, f"fc{node + 1}.weight", {"in": {"dim": -1}}],
        ]
        for node in range(1, layers)
    }
    # Nodes of both in one order, in which sweeps visit them.
    spec = mudsc_fast.PermutationSpec(mlp_axes(layers))
    fusion = mudsc.WeightFusion(use_permute=mode == "align", verbose=False)

    def published() -> Published:
        merge = Published(spec, models, mode, 1.0)
        merge.run(None)
        return merge

    expected, _ = compare(
        benchmark, f"MuDSC's program, weights, {mode}, {widths}", published, lambda: fusion.transform(models, perm)
    )
    for (_, unmerge), node in zip(fusion.perm_mats.values(), spec.nodes, strict=True):
        # Random weights leave matchings of nearly the same value; the products in float32 decide between them.
        assert (unmerge.argmax(1) == expected.unmerges[node].argmax(1)).float().mean() > 0.9


def test_rebasin_port(benchmark: Benchmark) -> None:
    axes = mlp_axes(4)
    spec = rebasin.permutation_spec_from_axes_to_perm(axes)
    a, b = (mlp(WIDTHS, seed).state_dict() for seed in range(2))

    def published() -> dict[str, Tensor]:
        torch.manual_seed(0)
        perm = {p: torch.arange(a[uses[0][0]].shape[uses[0][1]]) for p, uses in spec.perm_to_axes.items()}
        names, progress = list(perm), True
        while progress:
            progress = False
            for index in torch.randperm(len(names)).tolist():
                p = names[index]
                units = len(perm[p])
                products = torch.zeros(units, units)
                for tensor, axis in spec.perm_to_axes[p]:
                    moved = rebasin.get_permuted_param(spec, perm, tensor, b, except_axis=axis)
                    rows, columns = (torch.movedim(x, axis, 0).reshape(units, -1) for x in (a[tensor], moved))
                    products += rows @ columns.T
                assigned = scipy.optimize.linear_sum_assignment(products.numpy(), maximize=True)[1]
                new, own = torch.from_numpy(assigned), torch.arange(units)
                progress |= bool(products[own, new].sum() > products[own, perm[p]].sum() + 1e-12)
                perm[p] = new
        return perm

    def ours() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return rebasin.weight_matching(spec, a, b, silent=True)

    expected, found = compare(benchmark, f"git-re-basin port, {WIDTHS}", published, ours)
    for p, permutation in expected.items():
        assert torch.equal(found[p], permutation)


def assignment_seconds(module: Any, run: Callable[[], Any]) -> float:
    """Return the seconds that a run spends in the assignment function that a module has bound."""
    solve, total = module.linear_sum_assignment, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal total
        elapsed, result = seconds(lambda: solve(*args, **kwargs))
        total += elapsed
        return result

    module.linear_sum_assignment = timed
    try:
        run()
    finally:
        module.linear_sum_assignment = solve
    return total


def test_rebasin_package(benchmark: Benchmark) -> None:
    package = pytest.importorskip("rebasin", reason="pip install rebasin")
    first, second = (mlp((784, 1024, 1024, 10), seed) for seed in range(2))
    batch = torch.randn(2, 784)

    def run() -> dict[str, Tensor]:
        moved = copy.deepcopy(second)
        package.PermutationCoordinateDescent(first, moved, batch).rebasin()
        return moved.state_dict()

    def patched() -> dict[str, Tensor]:
        with mudsc_fast.patch(only=["rebasin"]):
            return run()

    expected, found = compare(benchmark, "rebasin (PyPI), 1024 units, whole run", run, patched)
    solver = package.permutation_coordinate_descent
    assigning = [assignment_seconds(solver, run)]
    with mudsc_fast.patch(only=["rebasin"]):
        assigning.append(assignment_seconds(solver, run))
    benchmark.extra_info["assignment_times_faster"] = round(assigning[0] / assigning[1], 1)
    print(f"of these in the assignment: {assigning[0]:.4f} s before, {assigning[1]:.4f} s after")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_pleas(benchmark: Benchmark) -> None:
    similarity = correlation(1024)[:1024, 1024:]

    def published() -> Tensor:
        return torch.tensor(scipy.optimize.linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1])

    expected, found = compare(benchmark, "PLeaS, 1024 units", published, lambda: pleas.lsa_solver(similarity))
    totals = [float(similarity.double().gather(1, columns[:, None]).sum()) for columns in (expected, found)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)
