from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import load_golden
from mudsc_fast.kernels._samples import SampleOrder
from mudsc_fast.kernels.cpu import correlation as cpu
from mudsc_fast.kernels.reference import correlation as reference
from mudsc_fast.ops import _centered_products
from mudsc_fast.ops._dispatch import use_backend
from mudsc_fast.ops._moments import Moments
from mudsc_fast.ops.correlation import Blocks, CorrelationAccumulator, Workspace
from mudsc_fast.ops.permute import UnitMap, permute_merge

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("cpu", "reference")


def features_of(num_models: int, *shape: int) -> list[Tensor]:
    """Return features that correlate across models: a shared signal plus noise."""
    shared = torch.randn(*shape)
    return [shared + 0.7 * torch.randn(*shape) for _ in range(num_models)]


def correlate_directly(samples: list[Tensor], eps: float = 1e-7) -> Tensor:
    """Return the full correlation of [C, T] samples by its definition, in float64."""
    units = torch.cat([one.double() for one in samples])
    centered = units - units.mean(1, keepdim=True)
    covariance = centered @ centered.T / units.shape[1]
    deviation = covariance.diagonal().sqrt()
    return covariance / torch.outer(deviation, deviation).clamp_min(eps)


def units_first(features: list[Tensor], axis: int = 1) -> list[Tensor]:
    return [one.movedim(axis, 0).flatten(1) for one in features]


def accumulated(features: list[Tensor], blocks: Any = "full", axis: int = 1, **options: Any) -> Tensor:
    result = CorrelationAccumulator(len(features), features[0].shape[axis], blocks=blocks, **options)
    result.update(*features, channel_axis=axis)
    return result.finalize()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(backend: str) -> None:
    golden = load_golden("correlation_0")
    batches = [[torch.from_numpy(golden[f"batch{k}_model{i}"]) for i in range(2)] for k in range(3)]
    units = batches[0][0].shape[1]
    full = CorrelationAccumulator(2, units, blocks="full")
    cross = CorrelationAccumulator(2, units)
    with use_backend(backend):
        for batch in batches:
            full.update(*batch)
            cross.update(*batch)
        expected = torch.from_numpy(golden["correlation"])
        torch.testing.assert_close(full.finalize(), expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(cross.finalize()[0], expected[:units, units:], rtol=0, atol=2e-6)
    assert full.num_samples == sum(batch[0].shape[0] * batch[0].shape[2] for batch in batches)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_center_matches_reference_in_any_layout(dtype: torch.dtype, double: bool) -> None:
    torch.manual_seed(0)
    to = torch.float64 if double or dtype == torch.float64 else torch.float32
    layouts = [
        torch.randn(3, 37, 9),
        torch.randn(1, 5, 700),
        torch.randn(50, 33, 1),
        torch.randn(4, 21, 40).transpose(1, 2),
        torch.randn(8, 30, 26)[::2, ::3, ::2],
        torch.randn(1, 1, 1),
    ]
    for layout in layouts:
        features = (layout * 3 + 5).to(dtype)
        features[0, 0, 0] = math.nan
        for strided in (features, torch.empty_like(layout, dtype=dtype).copy_(features)):
            memory = torch.empty(2, strided.numel(), dtype=to)
            found, expected = cpu.center(strided, memory[0]), reference.center(strided, memory[1])
            tolerance = 1e-13 if to == torch.float64 else 1e-6
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_shared_workspace_does_not_change_sums() -> None:
    torch.manual_seed(0)
    workspace = Workspace()
    kinds = [(9, torch.float32), (33, torch.float64), (5, torch.bfloat16), (33, torch.float32)]
    sharing = [CorrelationAccumulator(2, units, blocks="full") for units, _ in kinds]
    alone = [CorrelationAccumulator(2, units, blocks="full") for units, _ in kinds]
    with ExitStack() as stack:
        for sums in sharing:
            stack.enter_context(sums.computing_in(workspace))
        for samples in (40, 100, 7):
            for (units, dtype), *pair in zip(kinds, sharing, alone, strict=True):
                features = torch.randn(2, samples, units).to(dtype)
                for sums in pair:
                    sums.update(*features)
                    sums.replace(list(features), list(features.flip(0)))
    for one, other in zip(sharing, alone, strict=True):
        assert torch.equal(one.finalize(), other.finalize())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_center_with_index_matches_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    to = torch.float64 if dtype == torch.float64 else torch.float32
    for layout in (torch.randn(5, 37, 9), torch.randn(1, 18, 71), torch.randn(50, 33, 1), torch.randn(4, 40, 21).mT):
        features = (layout * 3 + 5).to(dtype)
        features[0, 0, 0] = math.nan
        for kinds in ((taken, None), (None, taken), (taken, taken), (summed, None), (None, summed)):
            orders = [
                None if kind is None else kind(layout.shape[axis]) for axis, kind in zip((0, 2), kinds, strict=True)
            ]
            lengths = [
                layout.shape[axis] if order is None else len(order) for axis, order in zip((0, 2), orders, strict=True)
            ]
            memory = torch.empty(2, math.prod(lengths) * layout.shape[1], dtype=to)
            found = cpu.center(features, memory[0], *orders)
            expected = reference.center(features, memory[1], *orders)
            tolerance = 1e-13 if to == torch.float64 else 1e-6
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def taken(length: int) -> SampleOrder:
    """Return an index that is longer than the samples, reads some of them twice, and skips others."""
    return SampleOrder(torch.randint(length, (60,), dtype=torch.int32))


def summed(length: int) -> SampleOrder:
    """Return an index of 40 outputs, each the sum of no, one or several samples."""
    cluster = torch.randint(40, (length,))
    ends = torch.bincount(cluster, minlength=40).cumsum(0, dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), ends])
    return SampleOrder(cluster.argsort(stable=True).to(torch.int32), starts, torch.rand(40, dtype=torch.float64))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("units", [1, 31, 32, 70])
def test_sums_and_quotients_match_reference(units: int) -> None:
    torch.manual_seed(1)
    start = torch.randn(units, units, dtype=torch.float64)
    row, column = torch.rand(units, dtype=torch.float64), torch.rand(units, dtype=torch.float64)
    row[::5] = 0
    for product_dtype in (torch.float32, torch.float64):
        product = torch.randn(units, units, dtype=product_dtype)
        found, expected = start.clone(), start.clone()
        cpu.accumulate(found, product, row, column)
        reference.accumulate(expected, product, row, column)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    for dtype in DTYPES:
        wide = torch.zeros(2, 2 * units, 2 * units, dtype=dtype)
        for result, correlate in zip(wide, (cpu.correlate, reference.correlate), strict=True):
            diagonal, off = result[:units, :units], result[:units, units:]
            correlate(start, row, column, 7, 0.05, off, result[units:, :units], None, 1.0)
            correlate(start, row, column, 7, 0.05, diagonal, diagonal, None, 1.0)
            correlate(start, row, column, 7, 0.05, result[units:, units:], None, None, 1.0)
        # Half types may round a tie either way.
        torch.testing.assert_close(wide[0], wide[1], rtol=torch.finfo(dtype).eps, atol=1e-15)
        upper = wide[0, :, :]
        assert torch.equal(upper[:units, :].T[:units], upper[:units, :units])
        assert torch.equal(upper[units:, :units], upper[:units, units:].T)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", ["cross", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_finalize_blends_like_lerp(backend: str, blocks: Blocks, dtype: torch.dtype) -> None:
    """Results agree up to rounding: torch adds the unrounded product. The other similarity may have strided rows."""
    torch.manual_seed(12)
    with use_backend(backend):
        accumulator = CorrelationAccumulator(2, 37, blocks=blocks, dtype=dtype)
        accumulator.update(*features_of(2, 30, 37, 5))
        alone = accumulator.finalize()
        wide = torch.randn(*alone.shape[:-1], alone.shape[-1] + 3).to(dtype)
        if blocks == "full":
            wide[:, : len(wide)] = (wide[:, : len(wide)] + wide[:, : len(wide)].T) / 2
        other = wide[..., : alone.shape[-1]]
        tolerance = 2 * torch.finfo(dtype).eps
        for balance in (0.0, 0.3, 0.5, 0.8, 1.0):
            blended = accumulator.finalize(other=other, balance=balance)
            expected = torch.lerp(other, alone, balance)
            torch.testing.assert_close(blended, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(accumulator.finalize(other=other, balance=0.0), other)
        assert torch.equal(accumulator.finalize(other=other), alone)


@pytest.mark.parametrize(
    ("other", "balance", "error", "message"),
    [
        (torch.ones(1, 3, 2), 0.5, ValueError, r"other must be \[1, 3, 3\] in torch.float32 on cpu, got \[1, 3, 2\]"),
        (torch.ones(1, 3, 3).half(), 0.5, ValueError, r"other must be .*got \[1, 3, 3\] in torch.float16"),
        ([1.0], 0.5, TypeError, "other must be a torch.Tensor, got list"),
        (torch.ones(1, 3, 3), 1.5, ValueError, r"balance must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_blends(other: Any, balance: float, error: type[Exception], message: str) -> None:
    accumulator = CorrelationAccumulator(2, 3)
    accumulator.update(*features_of(2, 5, 3, 1))
    with pytest.raises(error, match=message):
        accumulator.finalize(other=other, balance=balance)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_definition(backend: str, num_models: int) -> None:
    torch.manual_seed(2)
    features = features_of(num_models, 30, 11, 5)
    expected = correlate_directly(units_first(features)).float()
    with use_backend(backend):
        result = accumulated(features)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        assert torch.equal(result, result.T)
        if num_models > 1:
            cross = accumulated(features, "cross")
            blocks = torch.stack([expected[:11, 11 * i : 11 * i + 11] for i in range(1, num_models)])
            torch.testing.assert_close(cross, blocks, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_agree(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    features = [one.to(dtype) for one in features_of(2, 4, 13, 6, 5)]
    expected = correlate_directly(units_first(features)).float()
    for axis in range(4):
        moved = [one.movedim(1, axis) for one in features]
        for layout in (moved, [one.contiguous() for one in moved]):
            for name in (axis, axis - 4):
                result = accumulated(layout, axis=name)
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    nhwc = [one.contiguous(memory_format=torch.channels_last) for one in features]
    torch.testing.assert_close(accumulated(nhwc), expected, rtol=0, atol=1e-6)
    samples = units_first(features)
    torch.testing.assert_close(accumulated(samples, axis=0), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(accumulated([one.T for one in samples], axis=-1), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["units first", "units last"])
def test_mean_far_from_zero(backend: str, layout: str) -> None:
    """With mean 1e3, deviation 1 and a drift of a thousand deviations, the result is as accurate as in float64."""
    torch.manual_seed(4)
    result = CorrelationAccumulator(2, 20, blocks="full")
    seen = []
    for drift in (0.0, 0.0, 1e3):
        batch = [1e3 + drift * (k + 1) + one for k, one in enumerate(features_of(2, 500, 20))]
        if layout == "units first":
            batch = [one.T.contiguous().T for one in batch]
        seen.append(batch)
        with use_backend(backend):
            result.update(*batch)
        samples = [torch.cat([part[i] for part in seen]).T for i in range(2)]
        expected = correlate_directly(samples).float()
        torch.testing.assert_close(result.finalize(), expected, rtol=0, atol=1e-6)


def test_float64_features_stay_accurate() -> None:
    torch.manual_seed(5)
    features = [1e6 + one.double() for one in features_of(2, 400, 9)]
    result = accumulated(features, dtype=torch.float64)
    torch.testing.assert_close(result, correlate_directly(units_first(features)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_counts_as_zero(backend: str) -> None:
    torch.manual_seed(6)
    features = features_of(2, 40, 6)
    features[0][3, 2] = features[1][5] = math.nan
    zeroed = [one.nan_to_num(nan=0.0) for one in features]
    with use_backend(backend):
        assert torch.equal(accumulated(features), accumulated(zeroed))
    assert features[0].isnan().sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", ["cross", "full"])
def test_blend_with_another_similarity(backend: str, blocks: Any) -> None:
    with use_backend(backend):
        sums, others = (CorrelationAccumulator(3, 8, blocks=blocks) for _ in range(2))
        sums.update(*features_of(3, 40, 8))
        others.update(*features_of(3, 40, 8))
        plain, other = sums.finalize(), others.finalize()
        kept = other.clone()
        for balance in (0.0, 0.3, 1.0):
            blended = sums.finalize(other=other, balance=balance)
            torch.testing.assert_close(blended, balance * plain + (1 - balance) * other)
        assert torch.equal(sums.finalize(other=other, balance=0.0), other)
        assert torch.equal(sums.finalize(other=other), plain)
        transposed = other.mT.contiguous().mT
        assert torch.equal(sums.finalize(other=transposed, balance=0.0), other)
        assert torch.equal(other, kept)


@pytest.mark.parametrize(
    ("other", "balance", "error", "message"),
    [
        (None, 0.5, ValueError, "balance must be 1 without other, got 0.5"),
        (torch.ones(1, 3, 3), 1.5, ValueError, r"balance must be in \[0, 1\], got 1.5"),
        (torch.ones(1, 3, 3), "half", TypeError, "balance must be a number, got str"),
        (torch.ones(3, 3), 0.5, ValueError, r"other must be \[1, 3, 3\] in torch.float32 on cpu, got \[3, 3\] in"),
        (torch.ones(1, 3, 3).double(), 0.5, ValueError, "got .* in torch.float64 on cpu"),
        ([1.0], 0.5, TypeError, "other must be a torch.Tensor, got list"),
    ],
)
def test_bad_blend(other: Any, balance: Any, error: type[Exception], message: str) -> None:
    result = CorrelationAccumulator(2, 3)
    result.update(GOOD, GOOD)
    with pytest.raises(error, match=message):
        result.finalize(other=other, balance=balance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_units_give_zero(backend: str) -> None:
    features = features_of(2, 100, 5)
    features[0][:, 1] = 0
    features[1][:, 2] = 0.1
    with use_backend(backend):
        result = accumulated(features)
    for dead in (1, 7):
        assert torch.equal(result[dead], torch.zeros(10))
        assert torch.equal(result[:, dead], torch.zeros(10))
    torch.testing.assert_close(result.diagonal()[[0, 2, 8]], torch.ones(3), rtol=0, atol=1e-6)


def test_eps_bounds_quotient() -> None:
    features = [1e-3 * one for one in features_of(2, 100, 5)]
    deviations = torch.cat(units_first(features)).double().var(1, correction=0)
    diagonal = CorrelationAccumulator(2, 5, blocks="full")
    diagonal.update(*features)
    torch.testing.assert_close(diagonal.finalize(eps=1e-2).diagonal().double(), deviations / 1e-2)


@pytest.mark.parametrize("blocks", ["cross", "full"])
def test_no_samples_and_one_sample(blocks: Any) -> None:
    result = CorrelationAccumulator(2, 3, blocks=blocks)
    with pytest.raises(ValueError, match="there are no samples: call update"):
        result.finalize()
    result.update(torch.ones(0, 3, 5), torch.ones(0, 3, 5))
    result.update(torch.ones(4, 3, 0), torch.ones(4, 3, 0))
    assert result.num_samples == 0
    with pytest.raises(ValueError, match="there are no samples"):
        result.finalize()
    result.update(torch.randn(1, 3), torch.randn(1, 3))
    assert result.num_samples == 1
    assert not result.finalize().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_dtype(dtype: torch.dtype) -> None:
    features = features_of(2, 50, 4)
    result = accumulated(features, dtype=dtype)
    assert result.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    expected = correlate_directly(units_first(features))
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("isa")
def test_squares_beyond_float32() -> None:
    features = [1e25 * one for one in features_of(2, 50, 4)]
    expected = correlate_directly(units_first(features)).float()
    torch.testing.assert_close(accumulated(features), expected, rtol=0, atol=1e-6)


def test_chunks_do_not_change_result(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    for shape, axis in [((7, 5, 30), 1), ((40, 5), 1), ((2, 30, 5), 2), ((5, 300), 0)]:
        features = [100 + one for one in features_of(2, *shape)]
        whole = accumulated(features, axis=axis)
        for limit in (1, 7, 30, 64):
            monkeypatch.setattr(_centered_products, "_MIN_CHUNK", limit)
            monkeypatch.setattr(_centered_products, "_CHUNK_NUMBERS", 1)
            torch.testing.assert_close(accumulated(features, axis=axis), whole, rtol=0, atol=1e-6)
        monkeypatch.undo()


def test_first_samples_are_not_added_to_cleared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    features, sums = features_of(2, 30, 6), CorrelationAccumulator(2, 6)
    with monkeypatch.context() as patched:
        patched.setattr(Moments, "accumulate", None)
        sums.update(*features)
    expected = correlate_directly(units_first(features))[:6, 6:]
    torch.testing.assert_close(sums.finalize()[0].double(), expected, rtol=0, atol=2e-6)


def test_threads_do_not_change_sums() -> None:
    torch.manual_seed(8)
    for features in (torch.randn(2000, 600, 1), torch.randn(3, 600, 700)):
        comoment, product = torch.randn(600, 600, dtype=torch.float64), torch.randn(600, 600)
        row = torch.rand(600, dtype=torch.float64)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            sums, out = comoment.clone(), torch.empty(600, 600)
            cpu.accumulate(sums, product, row, row)
            cpu.correlate(sums, row, row, 5, 1e-7, out, out, None, 1.0)
            centered = cpu.center(features, torch.empty(features.numel()))
            results.append([centered.values, centered.mean, centered.squares, sums, out])
        assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", ["cross", "full"])
def test_merged_accumulators_match_single_pass(backend: str, blocks: Any) -> None:
    torch.manual_seed(9)
    first, second = features_of(3, 60, 7), [50 + 2 * one for one in features_of(3, 21, 7)]
    with use_backend(backend):
        one, other, both = (CorrelationAccumulator(3, 7, blocks=blocks) for _ in range(3))
        one.update(*first)
        other.update(*second)
        both.update(*[torch.cat(pair) for pair in zip(first, second, strict=True)])
        before = other.finalize()
        one.merge(other)
        assert one.num_samples == 81
        torch.testing.assert_close(one.finalize(), both.finalize(), rtol=0, atol=1e-6)
        assert torch.equal(other.finalize(), before)

        empty = CorrelationAccumulator(3, 7, blocks=blocks)
        other.merge(empty)
        assert torch.equal(other.finalize(), before)
        empty.merge(other)
        assert torch.equal(empty.finalize(), before)
        other.merge(other)
        assert other.num_samples == 42
        torch.testing.assert_close(other.finalize(), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", ["cross", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["samples first", "units first", "convolution"])
def test_replaced_samples(backend: str, blocks: Any, dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(11)
    shape, axis = {
        "samples first": ((40, 7), 1),
        "units first": ((7, 40), 0),
        "convolution": ((8, 7, 5), 1),
    }[layout]
    old, other, new = ([(3 + one).to(dtype) for one in features_of(3, *shape)] for _ in range(3))
    old[1].flatten()[4] = torch.nan
    new[2].flatten()[9] = torch.nan
    with use_backend(backend):
        sums = CorrelationAccumulator(3, 7, blocks=blocks, dtype=torch.float64)
        sums.update(*old, channel_axis=axis)
        sums.update(*other, channel_axis=axis)
        sums.replace(old, new, channel_axis=axis)
        expected = CorrelationAccumulator(3, 7, blocks=blocks, dtype=torch.float64)
        expected.update(*new, channel_axis=axis)
        expected.update(*other, channel_axis=axis)
        assert sums.num_samples == expected.num_samples
        torch.testing.assert_close(sums.finalize(), expected.finalize(), rtol=0, atol=2e-6)
        sums.replace([new[0], *new[1:]], [new[0], *old[1:]], channel_axis=axis)  # the first model's samples stay
        expected = CorrelationAccumulator(3, 7, blocks=blocks, dtype=torch.float64)
        expected.update(new[0], *old[1:], channel_axis=axis)
        expected.update(*other, channel_axis=axis)
        torch.testing.assert_close(sums.finalize(), expected.finalize(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", ["cross", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "units_axis", "axis"), [((40, 7), 1, 0), ((7, 40), 0, -1), ((8, 7, 5), 1, 2)])
def test_reordered_samples(
    backend: str, blocks: Any, dtype: torch.dtype, shape: tuple[int, ...], units_axis: int, axis: int
) -> None:
    torch.manual_seed(13)
    features = [(3 + one).to(dtype) for one in features_of(3, *shape)]
    places = torch.randperm(shape[axis])[: shape[axis] // 2]
    orders = [places, places[torch.randperm(len(places))], places.flip(0)]
    with use_backend(backend):
        sums = CorrelationAccumulator(3, 7, blocks=blocks, dtype=torch.float64)
        sums.update(*features, channel_axis=units_axis)
        sums._reorder(*features, axis=axis, old=[places] * 3, new=orders, channel_axis=units_axis)
        for feature, order in zip(features, orders, strict=True):
            chosen = feature.index_select(axis % len(shape), order)
            feature.index_copy_(axis % len(shape), places, chosen)
        expected = CorrelationAccumulator(3, 7, blocks=blocks, dtype=torch.float64)
        expected.update(*features, channel_axis=units_axis)
        torch.testing.assert_close(sums.finalize(), expected.finalize(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_computed_by_rows(backend: str) -> None:
    torch.manual_seed(14)
    features, more = features_of(3, 9, 600), features_of(3, 9, 40)
    places = torch.arange(20)
    moved = [places, places.flip(0), places.roll(3)]
    with use_backend(backend):
        whole = CorrelationAccumulator(3, 9)
        parts = [CorrelationAccumulator(3, 9) for _ in range(2)]
        for sums, rows in ((whole, None), (parts[0], (0, 4)), (parts[1], (4, 9))):
            with sums._only_rows(rows):
                sums.update(*features, channel_axis=0)
                sums.update(*more, channel_axis=0)
                sums._reorder(*more, axis=1, old=[places] * 3, new=moved, channel_axis=0)
        first, second = (one._moments for one in parts)
        first.comoments[:, 4:] = second.comoments[:, 4:]
        for one, other in ((first.mean, second.mean), (first.squares, second.squares)):
            assert (one[0, 4:] == 0).all()
            one[0, 4:] = other[0, 4:]
        torch.testing.assert_close(parts[0].finalize(), whole.finalize(), rtol=0, atol=1e-6)


def test_bad_replacements_leave_state_unchanged() -> None:
    sums = CorrelationAccumulator(2, 4)
    sums.update(*features_of(2, 9, 4))
    before = sums.finalize()
    with pytest.raises(ValueError, match=r"new must have the shape of old, \[3, 4\], got \[2, 4\]"):
        sums.replace(features_of(2, 3, 4), features_of(2, 2, 4))
    with pytest.raises(ValueError, match="old must hold at most the 9 samples so far, got 10"):
        sums.replace(features_of(2, 10, 4), features_of(2, 10, 4))
    with pytest.raises(ValueError, match="features must be one tensor for each of 2 models, got 3"):
        sums.replace(features_of(3, 2, 4), features_of(2, 2, 4))
    places = [torch.arange(10)] * 2
    with pytest.raises(ValueError, match="old must hold at most the 9 samples so far, got 10"):
        sums._reorder(*features_of(2, 10, 4), axis=0, old=places, new=places)
    assert torch.equal(sums.finalize(), before)


@pytest.mark.parametrize("units", [511, 512, 700])
def test_self_products_by_blocks(units: int) -> None:
    torch.manual_seed(12)
    features = features_of(2, 30, units)
    expected = correlate_directly(units_first(features)).float()
    torch.testing.assert_close(accumulated(features), expected, rtol=0, atol=2e-6)


def maps_of(kind: str, *lengths: int) -> list[UnitMap]:
    """Return a map of two models for each length: permutations, longer selections, or clusters."""
    if kind == "permutations":
        return [UnitMap.permutation(torch.stack([torch.arange(n), torch.randperm(n)])) for n in lengths]
    if kind == "selections":
        return [UnitMap.permutation(torch.randint(n, (2, n + 3)), units_in=n) for n in lengths]
    return [UnitMap.clusters(torch.randint(n, (2, n)), n, torch.rand(n)) for n in lengths]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["permutations", "selections", "clusters"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_maps_reindex_samples_while_summing(
    backend: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(_centered_products, "_MIN_CHUNK", 50)
    monkeypatch.setattr(_centered_products, "_CHUNK_NUMBERS", 50)
    features = [one.to(dtype) for one in features_of(2, 3, 7, 11, 5, 4)]
    for channel_axis, axes in ((2, (1,)), (0, (1,)), (-1, (1,)), (0, (-1,)), (1, (0,)), (2, (0, 3)), (1, ())):
        maps = dict(zip(axes, maps_of(kind, *(features[0].shape[axis] for axis in axes)), strict=True))
        sums = CorrelationAccumulator(2, features[0].shape[channel_axis], dtype=torch.float64, blocks="full")
        with use_backend(backend):
            copies = [
                permute_merge([one], {axis: unit_map.of_model(i) for axis, unit_map in maps.items()}, weights=[1.0])
                for i, one in enumerate(features)
            ]
            sums.update(*features, channel_axis=channel_axis, maps=maps)
            expected = accumulated(copies, axis=channel_axis, dtype=torch.float64)
        assert sums.num_samples == copies[0].numel() // copies[0].shape[channel_axis]
        # Both do the same operations on the same numbers, so rounding does not differ.
        assert torch.equal(sums.finalize(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [4, 1000])
def test_overflow_leaves_state_unchanged(backend: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_centered_products, "_MIN_CHUNK", chunk)
    monkeypatch.setattr(_centered_products, "_CHUNK_NUMBERS", chunk)
    features = features_of(2, 20, 3)
    features[1][18:, 2] = 3e38
    clusters = UnitMap.clusters(torch.arange(20).expand(2, 20) // 2, 10)
    sums = CorrelationAccumulator(2, 3)
    with (
        use_backend(backend),
        pytest.raises(ValueError, match=r"features\[1\] must not be infinite, got inf at \(9, 2\)"),
    ):
        sums.update(*features, maps={0: clusters})
    assert sums.num_samples == 0
    features[1][18, 2] = 1.0
    with use_backend(backend):
        sums.update(*features, maps={0: clusters})
    assert sums.num_samples == 10


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([0], TypeError, "maps must be a mapping from axis to UnitMap, got list"),
        ({0: maps_of("permutations", 5)[0]}, ValueError, r"maps\[0\] must take 4 units"),
        ({2: maps_of("permutations", 4)[0]}, ValueError, "maps has axis 2, but the tensors have 2 axes"),
        (
            {-1: maps_of("permutations", 3)[0]},
            ValueError,
            "maps must be of axes other than the units', got one of axis 1",
        ),
        ({0: maps_of("permutations", 4)[0].of_model(0)}, ValueError, r"maps\[0\] must be of as many models"),
    ],
)
def test_bad_maps_leave_state_unchanged(maps: Any, error: type[Exception], message: str) -> None:
    sums = CorrelationAccumulator(2, 3)
    with pytest.raises(error, match=message):
        sums.update(*features_of(2, 4, 3), maps=maps)
    assert sums.num_samples == 0


@pytest.mark.skipif(not _centered_products.can_round_products(), reason="this torch cannot round products")
@pytest.mark.parametrize("blocks", ["cross", "full"])
def test_products_in_bfloat16(blocks: Any) -> None:
    torch.manual_seed(13)
    features = [5 + one for one in features_of(2, 4000, 256)]
    exact, rounded = (accumulated(features, blocks, precision=name) for name in ("float32", "bfloat16"))
    torch.testing.assert_close(rounded, exact, rtol=0, atol=5e-3)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # type: ignore[attr-defined]


def test_bfloat16_needs_torch_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_centered_products, "_product_settings", lambda: None)
    with pytest.raises(ValueError, match="precision 'bfloat16' requires a version of torch"):
        CorrelationAccumulator(2, 4, precision="bfloat16")


def test_state_survives_saving(tmp_path: Any) -> None:
    torch.manual_seed(10)
    one = CorrelationAccumulator(2, 6, blocks="full")
    one.update(*features_of(2, 30, 6))
    state = one.state_dict()
    torch.save(state, tmp_path / "state.pt")
    expected = one.finalize()
    more = features_of(2, 9, 6)
    one.update(*more)  # the state is a copy
    again = CorrelationAccumulator(2, 6, blocks="full")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.finalize(), expected)
    again.update(*more)
    assert torch.equal(again.finalize(), one.finalize())


@given(data=st.data())
def test_batch_order_and_size_do_not_matter(data: st.DataObject) -> None:
    units, total = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 60))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    offset = data.draw(st.sampled_from([0.0, 1.0, -1e3]))
    features = [offset + one for one in features_of(2, total, units)]
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    parts = [[one[a:b] for one in features] for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    result = CorrelationAccumulator(2, units, blocks="full")
    for part in data.draw(st.permutations(parts)):
        result.update(*part)
    found = result.finalize()
    assert found.abs().max() <= 1 + 1e-5
    expected = correlate_directly(units_first(features)).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_gradients_are_not_recorded() -> None:
    features = [one.requires_grad_() for one in features_of(2, 10, 3)]
    assert not accumulated(features).requires_grad


GOOD = torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("features", "options", "error", "message"),
    [
        ([GOOD], {}, ValueError, "one tensor for each of 2 models, got 1"),
        ([GOOD, [1.0]], {}, TypeError, r"features\[1\] must be a torch.Tensor, got list"),
        ([GOOD, GOOD.long()], {}, TypeError, r"features\[1\] must have dtype .*, got int64"),
        (
            [GOOD, GOOD[:3]],
            {},
            ValueError,
            r"features\[1\] .* shape of features\[0\], \[4, 3\], got \[3, 3\]",
        ),
        ([GOOD.T, GOOD.T], {}, ValueError, r"features must have 3 units on axis 1, got shape \[3, 4\]"),
        ([GOOD, GOOD], {"channel_axis": 2}, ValueError, r"channel_axis is 2, but features\[0\] has 2 axes"),
        ([GOOD, GOOD], {"channel_axis": -3}, ValueError, "channel_axis is -3"),
        ([GOOD, GOOD], {"channel_axis": 1.0}, TypeError, "channel_axis must be an int, got float"),
        ([GOOD[0, 0], GOOD[0, 0]], {}, ValueError, "channel_axis is 1, .* has 0 axes"),
        ([GOOD, GOOD.to("meta")], {}, ValueError, r"features\[1\] must hold data"),
        ([GOOD, GOOD / 0], {}, ValueError, r"features\[1\] must not be infinite, got inf at \(0, 1\)"),
        (
            [-GOOD.half() / 0, GOOD],
            {},
            ValueError,
            r"features\[0\] must not be infinite, got -inf at \(0, 1\)",
        ),
    ],
)
def test_bad_features_leave_state_unchanged(
    features: list[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    result = CorrelationAccumulator(2, 3)
    result.update(GOOD, GOOD.flip(0))
    before = copy.deepcopy(result)
    with pytest.raises(error, match=message):
        result.update(*features, **options)
    assert result.num_samples == before.num_samples
    assert torch.equal(result.finalize(), before.finalize())


def test_infinity_after_first_chunk_leaves_state_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_centered_products, "_MIN_CHUNK", 2)
    monkeypatch.setattr(_centered_products, "_CHUNK_NUMBERS", 1)
    result = CorrelationAccumulator(2, 3)
    late = GOOD.clone()
    late[0, 0], late[3, 1] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"got inf at \(3, 1\)"):
        result.update(GOOD, late)
    assert result.num_samples == 0


def test_other_device_is_rejected() -> None:
    result = CorrelationAccumulator(2, 3, device="meta")
    with pytest.raises(ValueError, match=r"features\[0\] must be on meta, got cpu"):
        result.update(GOOD, GOOD)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((2, 3), {"blocks": "all"}, ValueError, "blocks must be one of 'cross', 'full', got 'all'"),
        ((2, 3), {"dtype": torch.int32}, TypeError, "dtype must be float16, .* got torch.int32"),
        ((1, 3), {}, ValueError, "num_models must be at least 2, got 1"),
        ((0, 3), {"blocks": "full"}, ValueError, "num_models must be at least 1, got 0"),
        ((2.0, 3), {}, TypeError, "num_models must be an int, got float"),
        ((2, 0), {}, ValueError, "units must be at least 1, got 0"),
    ],
)
def test_bad_configuration(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CorrelationAccumulator(*arguments, **options)


@pytest.mark.parametrize(
    ("eps", "error", "message"),
    [
        (0, ValueError, "eps must be positive and finite, got 0"),
        (math.inf, ValueError, "eps must be positive and finite, got inf"),
        (math.nan, ValueError, "eps must be a number, got NaN"),
        ("1", TypeError, "eps must be a number, got str"),
    ],
)
def test_bad_eps(eps: Any, error: type[Exception], message: str) -> None:
    result = CorrelationAccumulator(2, 3)
    result.update(GOOD, GOOD)
    with pytest.raises(error, match=message):
        result.finalize(eps)


def test_bad_merge() -> None:
    result = CorrelationAccumulator(2, 3)
    for other in (
        CorrelationAccumulator(3, 3),
        CorrelationAccumulator(2, 4),
        CorrelationAccumulator(2, 3, blocks="full"),
    ):
        with pytest.raises(ValueError, match=r"other must have the configuration .*'units': 3.* got "):
            result.merge(other)
    with pytest.raises(TypeError, match="other must be a CorrelationAccumulator, got dict"):
        result.merge(result.state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"units": 4}, ValueError, "state must have units 3, got 4"),
        ({"num_samples": -1}, ValueError, r"state\['num_samples'\] must be at least 0, got -1"),
        ({"mean": [0.0]}, TypeError, r"state\['mean'\] must be a torch.Tensor, got list"),
        (
            {"squares": torch.ones(2, 3)},
            ValueError,
            r"state\['squares'\] must be \[2, 3\] in torch.float64, got",
        ),
        ({"comoments": None}, TypeError, r"state\['comoments'\] must be a torch.Tensor"),
    ],
)
def test_bad_state(change: dict[str, Any], error: type[Exception], message: str) -> None:
    result = CorrelationAccumulator(2, 3)
    with pytest.raises(error, match=message):
        result.load_state_dict(result.state_dict() | change)
    assert result.num_samples == 0


def test_incomplete_state() -> None:
    result = CorrelationAccumulator(2, 3)
    state = result.state_dict()
    del state["mean"]
    with pytest.raises(ValueError, match="state must have the entry 'mean', got"):
        result.load_state_dict(state)
    with pytest.raises(TypeError, match="state must be a mapping, got list"):
        result.load_state_dict([])  # type: ignore[arg-type]
