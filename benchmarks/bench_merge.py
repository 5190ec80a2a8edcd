"""Whole merges compared with the published procedure, in one process on one core.

    pytest benchmarks/bench_merge.py --benchmark-only -s --benchmark-json=new.json
    python benchmarks/compare.py benchmarks/results/merge.json new.json

Every benchmark merges one pair of networks (see benchmarks/merge_cases.py) in both ways, checks that the objectives
agree, and records the seconds of each phase, the ratios, and the memory beyond models and data. MUDSC_BENCHMARK_LARGE=1
adds the zips of 1024 units per layer, for which the published procedure takes ten minutes, and LLaMA's block.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mudsc_fast
from merge_cases import Case, llama_block_pair, mnist_pair, resnet_pair, vit_pair
from published import Published

LARGE = bool(os.environ.get("MUDSC_BENCHMARK_LARGE"))
Benchmark = Any  # pytest-benchmark declares no types

CASES: dict[str, Callable[[], Case]] = {
    "mnist": functools.cache(mnist_pair),
    "resnet20x4": functools.cache(resnet_pair),
    "vit_s": functools.cache(vit_pair),
}
ROWS = [
    ("mnist", "align", "weight", 1.0),
    ("mnist", "align", "dual", 0.5),
    ("mnist", "zip", "weight", 1.0),
    ("mnist", "zip", "dual", 0.4),
    ("resnet20x4", "align", "weight", 1.0),
    ("resnet20x4", "align", "dual", 0.5),
    ("vit_s", "align", "weight", 1.0),
]


@pytest.mark.parametrize(("name", "mode", "space", "balance"), ROWS)
def test_merge(benchmark: Benchmark, name: str, mode: Any, space: Any, balance: float) -> None:
    if name == "mnist" and mode == "zip" and not LARGE:
        pytest.skip("the published zip takes ten minutes: set MUDSC_BENCHMARK_LARGE=1")
    benchmark.group = f"merge, {name}, {mode}, {space}"
    case = CASES[name]()
    batches = None if space == "weight" else case.batches
    before = _resident_bytes_from_now()
    ours: mudsc_fast.MergeResult = benchmark.pedantic(
        lambda: mudsc_fast.merge(
            case.models, batches, spec=case.spec, mode=mode, space=space, balance=balance, verify=False
        ),
        rounds=1 if space == "dual" else 3,
        iterations=1,
    )
    memory = _peak_bytes() - before
    published = Published(case.spec, case.models, mode, balance)
    merged = published.run(batches)
    _check_agreement(ours, published.objective)
    sweeps = sum(ours.timings[phase] for phase in ("weight similarity", "matching", "merging"))
    whole = sweeps + ours.timings.get("activations", 0.0)
    info = benchmark.extra_info
    info["seconds"] = {phase: round(seconds, 3) for phase, seconds in ours.timings.items()}
    info["published_seconds"] = {phase: round(seconds, 3) for phase, seconds in published.seconds.items()}
    info["sweeps"] = [len(ours.objectives), published.sweeps]
    info["peak_megabytes"] = round(memory / 2**20)
    info["ratios"] = {
        "sweeps": round(published.seconds["sweeps"] / sweeps, 2),
        "whole": round(sum(published.seconds.values()) / whole, 2),
    }
    if batches is not None:
        info["ratios"]["activations"] = round(published.seconds["activations"] / ours.timings["activations"], 2)
        info["times_the_floor"] = {"activations": round(ours.timings["activations"] / _activation_floor(case, mode), 2)}
    if case.accuracy is not None:
        assert ours.model is not None  # modules went in
        info["accuracy"] = round(case.accuracy(ours.model), 2)
        ours.model.load_state_dict(merged)
        info["published_accuracy"] = round(case.accuracy(ours.model), 2)
        assert abs(info["accuracy"] - info["published_accuracy"]) <= 1.0
    print(f"\n{benchmark.group}: {info}")


@pytest.mark.skipif(not LARGE, reason="takes 8 GB and minutes: set MUDSC_BENCHMARK_LARGE=1")
def test_llama_block(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a merge by weights with the time of torch's matrix products, which every similarity needs."""
    benchmark.group = "merge, llama block, align, weight"
    case = llama_block_pair()
    in_products = 0.0
    multiply = torch.mm

    def timed(*args: Any, **options: Any) -> Tensor:
        nonlocal in_products
        begin = time.perf_counter()
        product = multiply(*args, **options)
        in_products += time.perf_counter() - begin
        return product

    monkeypatch.setattr(torch, "mm", timed)
    before = _resident_bytes_from_now()
    ours: mudsc_fast.MergeResult = benchmark.pedantic(
        lambda: mudsc_fast.merge([model.state_dict() for model in case.models], spec=case.spec, space="weight"),
        rounds=1,
        iterations=1,
    )
    seconds = sum(ours.timings.values())
    info = benchmark.extra_info
    info["seconds"] = {phase: round(value, 2) for phase, value in ours.timings.items()}
    info["sweeps"] = len(ours.objectives)
    info["peak_megabytes"] = round((_peak_bytes() - before) / 2**20)
    info["times_the_products"] = round(seconds / in_products, 2)
    info["share_of_matching"] = round(ours.timings["matching"] / seconds, 4)
    info["ratios"] = {"products": round(in_products / seconds, 3)}
    print(f"\n{benchmark.group}: {info}")


def _check_agreement(ours: mudsc_fast.MergeResult, published_objective: float) -> None:
    """Both searches maximize the same objective, but rounding may lead them to different local optima."""
    assert max(ours.objectives) == pytest.approx(published_objective, rel=0.02)


def _activation_floor(case: Case, mode: str) -> float:
    """Return the seconds of the forward passes and, at the rate of a large product, those of the similarities."""
    assert case.batches is not None
    forward = _seconds_of_forward(case.models, case.batches)
    samples: dict[str, int] = {}
    units = case.spec.units(case.models[0].state_dict())
    for model in case.models[:1]:
        handles = []
        for node in case.spec.nodes:
            (observation,) = case.spec.observations(node)

            def count(_module: Any, args: Any, output: Tensor, node: str = node, port: str = observation.port) -> None:
                values = output if port == "output" else args[0]
                samples[node] = samples.get(node, 0) + values.numel() // units[node]

            handles.append(model.get_submodule(observation.module).register_forward_hook(count))
        _seconds_of_forward([model], case.batches)
        for handle in handles:
            handle.remove()
    pairs = {"align": 1.0, "zip": 2.0}[mode]  # a zip needs half of two by two blocks
    products = sum(2.0 * pairs * units[node] ** 2 * samples[node] for node in case.spec.nodes)
    return forward + products / _matrix_rate()


def _seconds_of_forward(models: Sequence[torch.nn.Module], batches: Sequence[Tensor]) -> float:
    begin = time.perf_counter()
    with torch.inference_mode():
        for model in models:
            for batch in batches:
                model(batch)
    return time.perf_counter() - begin


@functools.cache
def _matrix_rate() -> float:
    """Return the flops per second of a large float32 product."""
    a, b = torch.randn(1024, 2048), torch.randn(2048, 1024)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2.0 * 1024 * 2048 * 1024 / best


def _resident_bytes_from_now() -> int:
    """Return the memory in use, and reset the peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_bytes() -> int:
    return _status("VmHWM")


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry + ":"))
