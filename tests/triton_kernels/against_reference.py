"""Compares Triton kernels with the reference on odd shapes, in Triton's interpreter or on a CUDA device.

TRITON_INTERPRET selects one of them. On a device every case compiles a kernel, so there are fewer cases.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mudsc_fast.kernels._samples import SampleOrder
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.kernels.reference import correlation as reference_correlation
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.kernels.triton import center, correlation, permute, permute_group
from mudsc_fast.ops import _dispatch
from mudsc_fast.ops.correlation import CorrelationAccumulator
from mudsc_fast.ops.permute import UnitMap

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = (
    []
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
)

# No default device, because the kernels' own tensors would follow it.
randn, rand, randint, randperm, arange, empty, ones, zeros, full = (
    functools.partial(make, device=DEVICE)
    for make in (
        torch.randn,
        torch.rand,
        torch.randint,
        torch.randperm,
        torch.arange,
        torch.empty,
        torch.ones,
        torch.zeros,
        torch.full,
    )
)

# Sums are rounded once: half types by one unit in the last place of the terms, which may cancel.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-6}
DTYPES = [*TOLERANCE] if INTERPRETED else [torch.bfloat16, torch.float32]
KINDS = ("permutation", "clusters", "scaled clusters", "selection")
SHAPES = [(7,), (101, 3), (17, 9, 3, 3), (2, 1030)]
if INTERPRETED:
    SHAPES += [(1,), (1, 131), (3, 101), (3, 4, 5, 6), (5, 2, 70)]
#: Layouts of features [outer, C, inner]: those of convolutions and of linear layers, and views.
LAYOUTS = {
    "samples adjacent": lambda: randn(3, 37, 9),
    "units adjacent": lambda: randn(50, 33, 1),
    "strides": lambda: randn(6, 21, 40).transpose(1, 2)[::2, ::3],
}
if INTERPRETED:
    LAYOUTS |= {"long lines": lambda: randn(1, 5, 700), "one number": lambda: randn(1, 1, 1)}


def random_map(kind: str, num_models: int, units: int) -> UnitMap:
    if kind == "permutation":
        return UnitMap.permutation(torch.stack([randperm(units) for _ in range(num_models)]))
    if kind == "selection":
        return UnitMap.permutation(randint(units, (num_models, units + 3)), units_in=units)
    clusters = max(1, units - 2)
    scale = rand(clusters) + 0.5 if kind == "scaled clusters" else None
    return UnitMap.clusters(randint(clusters, (num_models, units)), clusters, scale)


def assert_as_reference(tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], weights: Sequence[float]) -> None:
    result = permute.permute_merge(tensors, maps, weights, None)
    expected = reference.permute_merge(tensors, maps, weights, None)
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_models", [1, 3] if INTERPRETED else [3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(dtype: torch.dtype, num_models: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = [randn(shape).to(dtype) for _ in range(num_models)]
    for number, axes in enumerate(
        itertools.chain.from_iterable(itertools.combinations(range(len(shape)), c) for c in range(3))
    ):
        kinds = [KINDS[(number + at) % 4] for at in range(2)]
        maps = {axis: random_map(kind, num_models, shape[axis]) for axis, kind in zip(axes, kinds, strict=False)}
        assert_as_reference(tensors, maps, randn(num_models).tolist())


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
def test_single_model_is_copied_exactly(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[empty(0, dtype=dtype).element_size()]
    limits = torch.iinfo(integers)
    bits = randint(limits.min, limits.max, (13, 7, 3), dtype=integers)
    for axes in ((), (0,), (1,), (0, 1), (0, 2)):
        maps = {axis: random_map("permutation", 1, bits.shape[axis]) for axis in axes}
        expected = bits
        for axis, unit_map in maps.items():
            expected = expected.index_select(axis, unit_map.index[0])
        result = permute.permute_merge([bits.view(dtype)], maps, [1.0], None)
        assert torch.equal(result.view(integers), expected)


def test_unaligned_and_strided_tensors_and_out() -> None:
    torch.manual_seed(2)
    tensors = [randn(1 + 37 * 41)[1:].view(37, 41), randn(41, 37).T]
    maps = {0: random_map("permutation", 2, 37), 1: random_map("clusters", 2, 41)}
    assert_as_reference(tensors, maps, [0.5, 0.5])
    expected = reference.permute_merge(tensors, maps, [0.5, 0.5], None)
    for out in (empty(1 + expected.numel())[1:].view(expected.shape), empty(expected.T.shape).T):
        assert permute.permute_merge(tensors, maps, [0.5, 0.5], out) is out
        torch.testing.assert_close(out, expected)


def test_empty_axes_and_clusters_without_units() -> None:
    assert permute.permute_merge([ones(0, 3)] * 2, {1: random_map("clusters", 2, 3)}, [1, 1], None).shape == (
        0,
        1,
    )
    none = UnitMap.clusters(empty(2, 0, dtype=torch.int64), 4)
    assert torch.equal(permute.permute_merge([ones(3, 0)] * 2, {1: none}, [1, 1], None), zeros(3, 4))
    together = UnitMap.clusters(torch.tensor([[3, 3, 3, 1, 1]] * 2, device=DEVICE), 5)
    result = permute.permute_merge([ones(5, 3)] * 2, {0: together}, [1.0, 2.0], None)
    assert result[:, 0].tolist() == [0, 6, 0, 9, 0]


def test_half_sums_are_accumulated_in_float32() -> None:
    units = torch.cat([full((128,), 1.0), full((128,), 2.0**-10)])
    together = UnitMap.clusters(zeros(1, 256, dtype=torch.int64), 1)
    for dtype, expected in ((torch.float16, 128.125), (torch.bfloat16, 128.0)):
        assert permute.permute_merge([units.to(dtype)], {0: together}, [1.0], None).item() == expected


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_group(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    shapes = [(7,), (130,), (20, 9, 3, 3), (0,), (64, 3), (1, 1), (5, 300)]
    groups = [[randn(shape).to(dtype) for _ in range(3)] for shape in shapes]
    maps: list[dict[int, UnitMap]] = [
        {0: random_map(KINDS[number % 4], 3, shape[0])} if shape[0] else {} for number, shape in enumerate(shapes)
    ]
    maps[2][1] = random_map("permutation", 3, 9)
    maps[4] = {}
    weights = [0.2, 0.3, 0.5]
    tolerance = TOLERANCE[dtype]
    for result, tensors, by_axis in zip(
        permute_group.permute_merge_group(groups, maps, weights), groups, maps, strict=True
    ):
        expected = reference.permute_merge(tensors, by_axis, weights, None)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=8 * tolerance)


def test_layer_group_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors as in a layer of LLaMA: aligned vectors and matrices, re-indexed by heads, rows and columns."""
    torch.manual_seed(3)
    hidden, heads, width, middle = 32, 2, 16, 48
    residual, order, units = (random_map("permutation", 2, count) for count in (hidden, heads, middle))
    cases: list[tuple[tuple[int, ...], dict[int, UnitMap]]] = [
        *[((heads, width, hidden), {0: order, 2: residual})] * 3,
        ((hidden, heads, width), {0: residual, 1: order}),
        *[((middle, hidden), {0: units, 1: residual})] * 2,
        ((hidden, middle), {0: residual, 1: units}),
        *[((hidden,), {0: residual})] * 2,
    ]
    groups = [[randn(shape).bfloat16() for _ in range(2)] for shape, _ in cases]
    launched = []

    class Noting:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return kernel[grid]

    kernel = permute_group.merge_group_kernel
    monkeypatch.setattr(permute_group, "merge_group_kernel", Noting())
    results = permute_group.permute_merge_group(groups, [by_axis for _, by_axis in cases], [0.5, 0.5])
    assert len(launched) == 1
    for result, tensors, (_, by_axis) in zip(results, groups, cases, strict=True):
        expected = reference.permute_merge(tensors, by_axis, [0.5, 0.5], None)
        torch.testing.assert_close(result, expected, rtol=TOLERANCE[torch.bfloat16], atol=TOLERANCE[torch.bfloat16])


def test_single_model_group_is_copied_exactly() -> None:
    bits = [torch.arange(-30, 30, dtype=torch.int16, device=DEVICE).view(shape) for shape in ((60,), (6, 10))]
    groups = [[(one * 1091).view(torch.bfloat16)] for one in bits]
    maps = [{0: random_map("permutation", 1, one[0].shape[0])} for one in groups]
    for result, tensors, by_axis in zip(
        permute_group.permute_merge_group(groups, maps, [1.0]), groups, maps, strict=True
    ):
        expected = tensors[0].index_select(0, by_axis[0].index[0])
        assert torch.equal(result.view(torch.int16), expected.view(torch.int16))


def test_groups_are_launched_separately_in_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grouped launch would have to copy its table from the host."""
    monkeypatch.setattr(_device, "is_capturing", lambda _: True)
    monkeypatch.setattr(permute_group, "merge_group_kernel", None)
    tensors, by_axis = [randn(9, 7) for _ in range(2)], {0: random_map("permutation", 2, 9)}
    result = permute_group.permute_merge_group([tensors], [by_axis], [0.5, 0.5])[0]
    torch.testing.assert_close(result, reference.permute_merge(tensors, by_axis, [0.5, 0.5], None))
    elsewhere = dataclasses.replace(by_axis[0], index=by_axis[0].index.to("meta"))
    with pytest.raises(RuntimeError, match="a UnitMap on meta cannot be used while a CUDA graph is captured"):
        permute_group.permute_merge_group([tensors], [{0: elsewhere}], [0.5, 0.5])


def test_unsupported_input_uses_reference() -> None:
    maps = {axis: random_map("permutation", 2, 3) for axis in range(3)}
    tensors = [randn(3, 3, 3) for _ in range(2)]
    assert torch.equal(
        permute.permute_merge(tensors, maps, [1, 1], None), reference.permute_merge(tensors, maps, [1, 1], None)
    )
    doubles = [tensor.double() for tensor in tensors]
    assert permute.permute_merge(doubles, {}, [1, 1], None).dtype == torch.float64


def test_launches_fill_the_threads_with_vectors() -> None:
    for element_size in (2, 4):
        for items in (1, 3, 500, 4096, 11008, 10**6):
            launch = permute.launch_of(items, element_size)
            bytes_of_tile = launch.block_lines * launch.block_items * element_size
            assert bytes_of_tile == launch.num_warps * 32 * 16 * 4
            assert launch.block_items >= min(items, 32 * launch.num_warps * 16 // element_size)


def test_fastest_launch_gives_same_result() -> None:
    def seconds(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    tensors, maps = [randn(9, 33) for _ in range(2)], {1: random_map("permutation", 2, 33)}
    launch = permute.fastest_launch(tensors, maps, [0.5, 0.5], seconds)
    torch.testing.assert_close(
        permute.permute_merge(tensors, maps, [0.5, 0.5], None, launch),
        reference.permute_merge(tensors, maps, [0.5, 0.5], None),
    )


def taken(length: int) -> SampleOrder:
    return SampleOrder(randint(length, (length + 5,), dtype=torch.int32))


def summed(length: int, scaled: bool = True) -> SampleOrder:
    """Return an index whose outputs are sums of no, one or several samples."""
    sample = randint(length, (length,))
    starts = torch.searchsorted(sample.sort().values, arange(length + 1)).to(torch.int32)
    scale = rand(length, dtype=torch.float64) + 0.5 if scaled else None
    return SampleOrder(sample.argsort(stable=True).to(torch.int32), starts, scale)


def assert_centered(features: Tensor, outer: SampleOrder | None = None, inner: SampleOrder | None = None) -> None:
    """Compare the centered features and the float64 sums with the reference."""
    samples = math.prod(
        features.shape[axis] if order is None else len(order) for axis, order in ((0, outer), (2, inner))
    )
    memory = empty(2, features.shape[1] * samples, dtype=torch.promote_types(features.dtype, torch.float32))
    found = center.center(features, memory[0], outer, inner)
    expected = reference_correlation.center(features, memory[1], outer, inner)
    tolerance = 1e-12 if memory.dtype == torch.float64 else 1e-6
    if features.dtype in TOLERANCE and any(order is not None and order.starts is not None for order in (outer, inner)):
        tolerance = TOLERANCE[features.dtype]  # sums of half types are rounded
    deviation = (expected.squares / samples).sqrt()
    assert found.rest is not None
    torch.testing.assert_close(found.rest, found.values.sum(1, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    left = found.rest / samples
    assert bool((left.abs() <= 1.0 * deviation + tolerance).all())
    values = found.values.double() - left[:, None]
    torch.testing.assert_close(values, expected.values.double(), rtol=tolerance, atol=20 * tolerance)
    torch.testing.assert_close(found.mean, expected.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.squares, expected.squares, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_center(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    values = LAYOUTS[layout]()
    features = torch.empty_like(values, dtype=dtype).copy_(values * 3 + 5)
    features[0, 0, 0] = math.nan
    lengths = features.shape
    for outer, inner in (
        (None, None),
        (taken(lengths[0]), None),
        (None, taken(lengths[2])),
        (taken(lengths[0]), taken(lengths[2])),
        (summed(lengths[0]), None),
        (None, summed(lengths[2], scaled=False)),
    ):
        assert_centered(features, outer, inner)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64])
def test_center_unaligned(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    assert_centered(randn(1 + 20 * 31)[1:].view(1, 20, 31).to(dtype), None, summed(31))


def test_center_in_parts_and_far_from_zero() -> None:
    torch.manual_seed(6)
    for features in (randn(9000, 3, 1) + 1000, randn(1, 3, 9001).mul_(0.01).sub_(50)):
        assert center.launch_of(3, features.numel() // 3, features.stride(2) == 1 and features.shape[2] > 1)[2] > 1
        assert_centered(features)
    constant = full((1, 2, 300), 0.1)
    found = center.center(constant, empty(600))
    assert torch.equal(found.values, zeros(2, 300))
    assert torch.equal(found.squares, zeros(2, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_infinite_features_have_no_finite_mean() -> None:
    infinite = ones(1, 2, 300)
    infinite[0, 1, 7] = math.inf
    assert center.center(infinite, empty(600)).mean.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("kind", ["permutation", "scaled clusters", "selection"])
def test_weight_vectors_are_gathered_during_summation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    features = [randn(6, 40, 5, 3) + 3 for _ in range(2)]
    for units_axis, axis in ((0, 1), (1, 0), (2, 1), (1, 2)):
        maps = {axis: random_map(kind, 2, features[0].shape[axis])}
        results = []
        for backend in ("triton", "reference"):
            with monkeypatch.context() as patch:
                kernels = {name: {"other": ("reference",)} for name in _dispatch.KERNELS}
                patch.setattr(_dispatch, "KERNELS", {**kernels, "correlation": {"other": (backend,)}})
                sums = CorrelationAccumulator(
                    2, features[0].shape[units_axis], blocks="full", dtype=torch.float64, device=DEVICE
                )
                sums.update(*features, channel_axis=units_axis, maps=maps)
                sums.update(*features, channel_axis=units_axis)
                results.append(sums.finalize())
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("units", [1, 70])
@pytest.mark.parametrize("balance", [None, 0.3, 0.8])
def test_correlate(dtype: torch.dtype, units: int, balance: float | None) -> None:
    """Blocks of one matrix: one with its transpose elsewhere, one symmetric, one alone."""
    torch.manual_seed(4)
    comoment = randn(units, units, dtype=torch.float64)
    row, column = rand(units, dtype=torch.float64), rand(units, dtype=torch.float64)
    row[::5] = 0
    wide = zeros(2, 2 * units, 2 * units, dtype=dtype)
    other = None if balance is None else randn(units, units + 3).to(dtype)[:, :units]
    share = 1.0 if balance is None else balance
    for result, correlate in zip(wide, (correlation.correlate, reference_correlation.correlate), strict=True):
        diagonal, off = result[:units, :units], result[:units, units:]
        correlate(comoment, row, column, 7, 0.05, off, result[units:, :units], other, share)
        correlate(comoment, row, column, 7, 0.05, diagonal, diagonal, other, share)
        correlate(comoment, row, column, 7, 0.05, result[units:, units:], None, other, share)
    # The kernel reads the share as float32.
    tolerance = 1e-6 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(wide[0], wide[1], rtol=tolerance, atol=2 * tolerance)
