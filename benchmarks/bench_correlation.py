"""Streaming correlation against torch's matrix products and the published accumulator, on this machine's devices.

The benchmark measures an update with the features [T, C] of two models and ``blocks="cross"``: in float32, 2 T C^2
operations and the sums. In the same run it measures torch.mm alone in float32, TF32 and bfloat16 (without means, sums
of squares and checks for NaN), and the published accumulator, which takes the second moment of the units of both models
together. Some units are compared with float64. On a device of compute capability 9.0, wgmma and mma.sync are measured.

The lower bound of an update is one product in float32 on a CPU; on a GPU it is three products in TF32 for float32, and
one product in bfloat16 for bfloat16. The lower bound of finalize is the time to copy as many bytes.

    pytest benchmarks/bench_correlation.py --benchmark-only --benchmark-columns=min,mean,rounds -s
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mudsc_fast.kernels.cuda import _tensor_cores
from mudsc_fast.ops import _dispatch
from mudsc_fast.ops.correlation import CorrelationAccumulator

NUM_MODELS = 2
ROUNDS = 5
#: Number of units whose correlations are compared with float64, and the tolerance.
CHECKED = 64
MOST_ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-6}
#: Small sizes on a CPU, and sizes of real networks on a GPU.
SIZES = [("cpu", 256, 8192), ("cpu", 768, 8192)]
if torch.cuda.is_available():
    SIZES += [("cuda", units, 65536) for units in (768, 2048, 4096, 8192)]
#: Instructions to measure on a device that has both; other devices use the available one.
INSTRUCTIONS = [""]
if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
    INSTRUCTIONS = [_tensor_cores.WGMMA, _tensor_cores.MMA_SYNC]

Benchmark = Any  # pytest-benchmark declares no types


def features_of(device: str, units: int, samples: int, dtype: torch.dtype) -> list[Tensor]:
    """Return rectified features [T, C] of two models that share half of their variance."""
    generator = torch.Generator(device).manual_seed(0)
    shared = torch.randn(samples, units, generator=generator, device=device)
    noise = (torch.randn(samples, units, generator=generator, device=device) for _ in range(NUM_MODELS))
    return [(shared + one).relu_().to(dtype) for one in noise]


def seconds(device: str, call: Callable[[], object]) -> float:
    """Return the shortest time of a call, including the wait for the device."""
    shortest = float("inf")
    for _ in range(ROUNDS + 1):  # the first one warms up
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - begin)
    return shortest


@contextmanager
def tf32() -> Iterator[None]:
    """Let torch multiply float32 in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def published(features: list[Tensor]) -> Tensor:
    """Return the correlation as the published accumulator computes it: from the mean and second moment of all units."""
    units = torch.cat([one.T for one in features])
    mean = units.mean(1)
    covariance = units @ units.T / units.shape[1] - torch.outer(mean, mean)
    deviation = covariance.diagonal().sqrt()
    return covariance / torch.outer(deviation, deviation).clamp_min(1e-7)


def error_of(result: Tensor, features: list[Tensor]) -> float:
    """Return the largest error among the correlations of the first units."""
    first, second = (one[:, :CHECKED].double() - one[:, :CHECKED].double().mean(0) for one in features)
    exact = first.T @ second / torch.outer(first.norm(dim=0), second.norm(dim=0))
    return float((result[:CHECKED, :CHECKED].double() - exact).abs().max())


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device", "units", "samples"), SIZES)
def test_update(
    benchmark: Benchmark,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    units: int,
    samples: int,
    dtype: torch.dtype,
    instructions: str,
) -> None:
    if device == "cuda":
        monkeypatch.setenv("MUDSC_TENSOR_CORES", instructions)
    elif instructions == _tensor_cores.MMA_SYNC:
        pytest.skip("tensor cores are on a GPU")
    benchmark.group = f"correlation on {device}, C = {units}, T = {samples}, {dtype}"
    features = features_of(device, units, samples, dtype)

    def update() -> CorrelationAccumulator:
        sums = CorrelationAccumulator(NUM_MODELS, units, device=device)
        sums.update(*features)
        if device == "cuda":
            torch.cuda.synchronize()
        return sums

    sums = benchmark.pedantic(update, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    taken = benchmark.stats.stats.min
    error = error_of(sums.finalize()[0], features)
    first, second = (one.float() for one in features)
    halves = [one.bfloat16() for one in features]
    peers = {
        "float32": seconds(device, lambda: first.T @ second),
        "bfloat16": seconds(device, lambda: halves[0].T @ halves[1]),
        "published": seconds(device, lambda: published([first, second])),
    }
    with tf32():
        peers["tf32"] = seconds(device, lambda: first.T @ second)
    on_tensor_cores = peers["bfloat16"] if dtype == torch.bfloat16 else 3 * peers["tf32"]
    floor = on_tensor_cores if device == "cuda" else peers["float32"]
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        backend=_dispatch.backend_for("correlation", device),
        instructions=instructions,
        teraflops=round(2 * samples * units**2 / taken / 1e12, 3),
        error=error,
        times_the_floor=round(taken / floor, 2),
        **{f"times_faster_than_{name}": round(other / taken, 2) for name, other in peers.items()},
    )
    print(f"\nC = {units}, {dtype} on {device} {instructions}: {taken:.5f} s, {benchmark.extra_info}")
    assert error <= MOST_ERROR[dtype]


@pytest.mark.parametrize("blended", [False, True], ids=["alone", "blended"])
@pytest.mark.parametrize(("device", "units", "samples"), SIZES)
def test_finalize(benchmark: Benchmark, device: str, units: int, samples: int, blended: bool) -> None:
    benchmark.group = f"finalize on {device}, C = {units}"
    sums = CorrelationAccumulator(NUM_MODELS, units, device=device)
    sums.update(*features_of(device, units, samples // 8, torch.float32))
    other = torch.rand(NUM_MODELS - 1, units, units, device=device) if blended else None

    def finalize() -> Tensor:
        result = sums.finalize(other=other, balance=0.5 if blended else 1.0)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.pedantic(finalize, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    taken = benchmark.stats.stats.min
    # Eight bytes of a co-moment are read, and four of the other similarity; four are written.
    bytes_moved = units**2 * (16 if blended else 12)
    source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source).zero_()
    floor = seconds(device, lambda: target.copy_(source))
    benchmark.extra_info.update(
        gigabytes_per_second=round(bytes_moved / taken / 1e9, 2), share_of_copy_bandwidth=round(floor / taken, 2)
    )
    print(f"\nC = {units} on {device}: {taken:.6f} s, {benchmark.extra_info}")
