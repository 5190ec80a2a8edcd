"""Permute: the C++ kernel compared with functions of torch and with the time to move the same bytes.

Every case is checked, and measured in one run with its peers and its lower bound: the time to copy as many bytes as the
call reads and writes. The copy is the faster of torch's `copy_` and one that bypasses the caches (`permute_merge`
without maps), both into an existing tensor. The share of the copy's bandwidth is that of a call with `out`. Peers
allocate their results and are compared with a call that allocates its result too.

    pytest benchmarks/bench_permute.py --benchmark-only --benchmark-columns=min,mean,rounds -s

MUDSC_BENCHMARK_THREADS is the number of threads (1), MUDSC_BENCHMARK_SIZE the tensors' rows and columns (4096).
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mudsc_fast.ops.permute import UnitMap, permute_, permute_merge

SIZE = int(os.environ.get("MUDSC_BENCHMARK_SIZE", "4096"))
THREADS = int(os.environ.get("MUDSC_BENCHMARK_THREADS", "1"))
AXES = {"rows": (0,), "columns": (1,), "both": (0, 1)}
#: Minimum share of the copy's bandwidth for one tensor, and minimum speedup over a product with dense matrices.
LEAST_BANDWIDTH = {"rows": 0.8, "columns": 0.5, "both": 0.0}
LEAST_DENSE = 5.0

# torch.compile imports parts of torch that torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Benchmark = Any  # pytest-benchmark declares no types


@pytest.fixture(autouse=True)
def _threads(_one_thread: None) -> None:
    torch.set_num_threads(THREADS)


def seconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Return the shortest time of a call."""
    shortest = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - began)
    return shortest


def in_turns(call: Callable[[], object], tensor: Tensor, copy: Tensor) -> tuple[float, float]:
    """Return the shortest times of a call and of a copy, measured in turns, so that other load affects both alike."""
    here = copied = float("inf")
    for _ in range(3):
        here = min(here, seconds(call))
        streamed = seconds(lambda: permute_merge([tensor], {}, weights=[1.0], out=copy))
        copied = min(copied, streamed, seconds(lambda: copy.copy_(tensor)))
    return here, copied


def chain(tensors: list[Tensor], orders: list[Tensor], axes: tuple[int, ...]) -> Tensor:
    total: Tensor | None = None
    for tensor, order in zip(tensors, orders, strict=True):
        for axis in axes:
            tensor = tensor.index_select(axis, order)
        total = tensor if total is None else total.add_(tensor)
    assert total is not None
    return total if len(tensors) == 1 else total.mul_(1 / len(tensors))


def indexed(tensors: list[Tensor], orders: list[Tensor], axes: tuple[int, ...]) -> Tensor:
    parts = []
    for tensor, order in zip(tensors, orders, strict=True):
        places = (
            (order[:, None], order[None, :]) if len(axes) == 2 else (order,) if axes == (0,) else (slice(None), order)
        )
        parts.append(tensor[places])
    return parts[0] if len(parts) == 1 else torch.stack(parts).mean(0) if len(parts) > 2 else (parts[0] + parts[1]) / 2


def dense(tensors: list[Tensor], orders: list[Tensor], axes: tuple[int, ...]) -> Tensor:
    total: Tensor | None = None
    for tensor, order in zip(tensors, orders, strict=True):
        matrix = torch.zeros(SIZE, SIZE)
        matrix[torch.arange(SIZE), order] = 1
        if 0 in axes:
            tensor = matrix @ tensor
        if 1 in axes:
            tensor = tensor @ matrix.T
        total = tensor if total is None else total.add_(tensor)
    assert total is not None
    return total if len(tensors) == 1 else total.mul_(1 / len(tensors))


@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("axes", AXES)
def test_merge(benchmark: Benchmark, axes: str, num_models: int) -> None:
    benchmark.group = f"permute, {num_models} x {SIZE} x {SIZE} float32, {axes}"
    torch.manual_seed(0)
    tensors = [torch.randn(SIZE, SIZE) for _ in range(num_models)]
    orders = [torch.randperm(SIZE) for _ in range(num_models)]
    maps = {axis: UnitMap.permutation(torch.stack(orders)) for axis in AXES[axes]}
    out, copy = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
    expected = chain(tensors, orders, AXES[axes])
    compiled = torch.compile(chain)

    def merge() -> object:
        return permute_merge(tensors, maps, out=out)

    benchmark.pedantic(merge, rounds=10, warmup_rounds=1)
    torch.testing.assert_close(out, expected)
    here, copied = in_turns(merge, tensors[0], copy)
    floor = copied * (num_models + 1) / 2
    allocated = seconds(lambda: permute_merge(tensors, maps))
    peers: dict[str, Callable[[], object]] = {
        "index_select": lambda: chain(tensors, orders, AXES[axes]),
        "advanced indexing": lambda: indexed(tensors, orders, AXES[axes]),
        "torch.compile": lambda: compiled(tensors, orders, AXES[axes]),
    }
    torch.testing.assert_close(compiled(tensors, orders, AXES[axes]), expected)
    ratios = {name: seconds(peer, 3) / allocated for name, peer in peers.items()}
    ratios["dense matrices"] = seconds(lambda: dense(tensors, orders, AXES[axes]), 1) / allocated
    benchmark.extra_info.update(
        milliseconds=round(here * 1e3, 2),
        allocating_milliseconds=round(allocated * 1e3, 2),
        floor_milliseconds=round(floor * 1e3, 2),
        share_of_copy_bandwidth=round(floor / here, 2),
        times_faster_than={name: round(ratio, 1) for name, ratio in ratios.items()},
    )
    print(f"\n{benchmark.group}: {dict(benchmark.extra_info)}")
    assert ratios["dense matrices"] >= LEAST_DENSE
    assert ratios["index_select"] >= 1
    if num_models == 1:
        assert floor / here >= LEAST_BANDWIDTH[axes]


@pytest.mark.parametrize("axes", AXES)
def test_in_place(benchmark: Benchmark, axes: str) -> None:
    benchmark.group = f"permute in place, {SIZE} x {SIZE} float32, {axes}"
    tensor, copy = torch.randn(SIZE, SIZE), torch.zeros(SIZE, SIZE)
    order = torch.randperm(SIZE)
    maps = {axis: UnitMap.permutation(order[None]) for axis in AXES[axes]}
    expected = chain([tensor], [order], AXES[axes])
    assert torch.equal(permute_(tensor, maps), expected)
    benchmark.pedantic(permute_, (tensor, maps), rounds=10)
    here, copied = in_turns(lambda: permute_(tensor, maps), tensor, copy)
    benchmark.extra_info.update(milliseconds=round(here * 1e3, 2), share_of_copy_bandwidth=round(copied / here, 2))
    print(f"\n{benchmark.group}: {dict(benchmark.extra_info)}")


#: Shapes of weights, biases and features: small, odd and large ones.
SHAPES = (
    (64,),
    (64, 64),
    (256, 256),
    (1000, 333),
    (2048, 2048),
    (64, 64, 3, 3),
    (512, 512, 3, 3),
    (256, 64, 1, 1),
    (8, 512, 300),
)


def clustered(tensors: list[Tensor], clusters: Tensor, axes: tuple[int, ...]) -> Tensor:
    total: Tensor | None = None
    for tensor, cluster_of_unit in zip(tensors, clusters, strict=True):
        for axis in axes:
            tensor = torch.zeros_like(tensor).index_add_(axis, cluster_of_unit, tensor)
        total = tensor if total is None else total.add_(tensor)
    assert total is not None
    return total.mul_(1 / len(tensors))


def cases_of(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Yield names, calls of `permute_merge`, and the chains of torch's functions that do the same."""
    for shape, num_models in itertools.product(SHAPES, (1, 2)):
        tensors = [torch.randn(shape).to(dtype) for _ in range(num_models)]
        for axes in ((0,), (1,), (0, 1)):
            if max(axes) >= len(shape) or len({shape[axis] for axis in axes}) > 1:
                continue
            units = shape[axes[0]]
            orders = [torch.randperm(units) for _ in range(num_models)]
            maps = dict.fromkeys(axes, UnitMap.permutation(torch.stack(orders)))
            yield (
                f"{num_models} x {list(shape)} by {list(axes)}",
                functools.partial(permute_merge, tensors, maps),
                functools.partial(chain, tensors, orders, axes),
            )
            if num_models == 2 and max(shape) <= 512:
                clusters = torch.randint(units, (num_models, units))
                yield (
                    f"{num_models} x {list(shape)} by {list(axes)}, clusters",
                    functools.partial(permute_merge, tensors, dict.fromkeys(axes, UnitMap.clusters(clusters, units))),
                    functools.partial(clustered, tensors, clusters, axes),
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_many_shapes(benchmark: Benchmark, dtype: torch.dtype) -> None:
    """Compare calls that allocate their results with chains of `index_select` and `index_add_`, in turns."""
    benchmark.group = f"permute, many shapes, {dtype}"
    torch.manual_seed(0)
    ratios = {}
    tolerance = 64 * torch.finfo(dtype).eps  # chains round halves after every step
    for name, merge, peer in cases_of(dtype):
        torch.testing.assert_close(merge(), peer(), rtol=tolerance, atol=tolerance)
        here = there = float("inf")
        for _ in range(8 if merge().numel() > 10**6 else 40):
            here, there = min(here, seconds(merge, 1)), min(there, seconds(peer, 1))
        ratios[name] = round(there / here, 2)
    benchmark.pedantic(next(iter(cases_of(dtype)))[1], rounds=100)
    slower = {name: ratio for name, ratio in sorted(ratios.items(), key=lambda item: item[1]) if ratio < 1}
    median = sorted(ratios.values())[len(ratios) // 2]
    benchmark.extra_info.update(cases=len(ratios), median_times_faster=median, slower=slower)
    print(f"\n{benchmark.group}: {dict(benchmark.extra_info)}")
