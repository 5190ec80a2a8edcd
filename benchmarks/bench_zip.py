"""Zip: the C++ kernel compared with the procedure in plain PyTorch, on correlations of features, on one core.

Every benchmark checks its result. Its extra information has the ratios to two times measured in the same run: that of
the reference, and a lower bound, which is the time to copy the similarity once.

    pytest benchmarks/bench_zip.py --benchmark-only --benchmark-columns=min,mean,rounds -s

MUDSC_BENCHMARK_LARGE=1 adds C = 8192, whose similarity has 1 GB; computing it takes another 2 GB of memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from mudsc_fast.kernels.reference import zip as reference
from mudsc_fast.ops.zip import ZipResult, zip_units

NUM_MODELS = 2
COMPARED = (256, 512)
ALONE = (2048, 8192) if os.environ.get("MUDSC_BENCHMARK_LARGE") else (2048,)
#: Limits for C units per model: maximum seconds, and minimum speedup over the reference.
MOST_SECONDS = {2048: 0.5, 8192: 5.0}
LEAST_SPEEDUP = {512: 100.0}

Result = TypeVar("Result")
Benchmark = Any  # pytest-benchmark declares no types


def correlation(units: int) -> Tensor:
    """Return [2 C, 2 C] correlations of rectified random mixtures of 64 latent features."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(4096, 64, generator=generator)
    mixing = torch.randn(64, NUM_MODELS * units, generator=generator)
    features = latent @ mixing
    features += 4 * torch.randn(features.shape, generator=generator)
    features = features.relu_()
    features -= features.mean(0)
    features /= features.norm(dim=0)
    return features.T @ features


def seconds(call: Callable[[], Result], rounds: int) -> tuple[float, Result]:
    """Return the shortest time of a call and its result."""
    shortest = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        result = call()
        shortest = min(shortest, time.perf_counter() - begin)
    return shortest, result


def by_reference(similarity: Tensor) -> tuple[Tensor, Tensor]:
    remaining = len(similarity) // NUM_MODELS
    return reference.zip_units(similarity, NUM_MODELS, remaining, remaining // NUM_MODELS, shrink=0.5)


def record_floor(benchmark: Benchmark, similarity: Tensor, kernel_seconds: float) -> None:
    """Record the time to copy the similarity, which must be read at least once, and the ratio to it."""
    copy = torch.empty_like(similarity).zero_()
    copy_seconds, _ = seconds(lambda: copy.copy_(similarity), rounds=5)
    benchmark.extra_info["similarity_bytes"] = similarity.nbytes
    benchmark.extra_info["copy_gigabytes_per_second"] = round(similarity.nbytes / copy_seconds / 1e9, 2)
    benchmark.extra_info["floor_seconds"] = round(copy_seconds, 6)
    benchmark.extra_info["times_the_floor"] = round(kernel_seconds / copy_seconds, 1)
    print(f"\nC = {len(similarity) // NUM_MODELS}: {kernel_seconds:.4f} s, {benchmark.extra_info}")


def run_kernel(benchmark: Benchmark, similarity: Tensor) -> tuple[float, ZipResult]:
    """Benchmark the public function; return its shortest time and its result."""
    times = []

    def run() -> ZipResult:
        elapsed, result = seconds(lambda: zip_units(similarity, NUM_MODELS), rounds=1)
        times.append(elapsed)
        return result

    rounds = 2 if len(similarity) > 8192 else 10
    result: ZipResult = benchmark.pedantic(run, rounds=rounds, iterations=1)
    assert int(result.sizes.sum()) == len(similarity)
    assert len(result.sizes) == len(similarity) // NUM_MODELS
    return min(times), result


@pytest.mark.parametrize("units", COMPARED)
def test_kernel(benchmark: Benchmark, units: int) -> None:
    benchmark.group = f"zip, C = {units}"
    similarity = correlation(units)
    kernel_seconds, result = run_kernel(benchmark, similarity)
    reference_seconds, (clusters, values) = seconds(lambda: by_reference(similarity), rounds=2)
    assert torch.equal(result.cluster_of_unit, clusters)
    assert result.value == float(values.mean())
    benchmark.extra_info["reference_seconds"] = round(reference_seconds, 4)
    benchmark.extra_info["times_faster_than_reference"] = round(reference_seconds / kernel_seconds, 1)
    record_floor(benchmark, similarity, kernel_seconds)
    assert reference_seconds / kernel_seconds >= LEAST_SPEEDUP.get(units, 1.0)


@pytest.mark.parametrize("units", COMPARED)
def test_reference(benchmark: Benchmark, units: int) -> None:
    benchmark.group = f"zip, C = {units}"
    similarity = correlation(units)
    _, values = benchmark.pedantic(by_reference, (similarity,), rounds=2, iterations=1)
    assert float(values.mean()) == zip_units(similarity, NUM_MODELS).value


@pytest.mark.parametrize("units", ALONE)
def test_kernel_alone(benchmark: Benchmark, units: int) -> None:
    benchmark.group = f"zip, C = {units}"
    similarity = correlation(units)
    kernel_seconds, _ = run_kernel(benchmark, similarity)
    record_floor(benchmark, similarity, kernel_seconds)
    assert kernel_seconds < MOST_SECONDS[units]
