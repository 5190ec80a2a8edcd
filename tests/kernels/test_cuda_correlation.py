"""CUDA kernels of streaming correlation, in the simulator and on a device, against float64 and other kernels."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mudsc_fast.command import installation
from mudsc_fast.kernels.cpu import correlation as cpu
from mudsc_fast.kernels.cuda import _device, _tensor_cores
from mudsc_fast.kernels.cuda import correlation as cuda
from mudsc_fast.ops import _centered_products, _dispatch, _tensor_core_products
from mudsc_fast.ops._features import Samples
from mudsc_fast.ops.correlation import CorrelationAccumulator
from mudsc_fast.ops.permute import UnitMap, permute_merge

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
#: Tolerance of a correlation: the error of a float32 product.
TOLERANCE = 1e-6


@pytest.fixture
def used(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make accumulators on the CPU use the CUDA kernels in the simulator."""
    monkeypatch.setattr(_dispatch, "KERNELS", {**_dispatch.KERNELS, "correlation": {"cpu": ("cuda",), "other": ()}})
    monkeypatch.setattr(_dispatch, "_unusable_reason", lambda *_: "")
    return simulator


@pytest.fixture(params=[_tensor_cores.MMA_SYNC, _tensor_cores.WGMMA])
def simulated(used: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate products with each of the instructions."""
    monkeypatch.setenv("MUDSC_TENSOR_CORES", request.param)
    return used


@pytest.fixture
def warpgroups_simulated(used: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate products with wgmma."""
    monkeypatch.setenv("MUDSC_TENSOR_CORES", _tensor_cores.WGMMA)
    return used


def features_of(num_models: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return features that correlate across models: a shared signal plus noise."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(*shape, generator=generator)
    return [(shared + 0.7 * torch.randn(*shape, generator=generator)).to(dtype) for _ in range(num_models)]


def samples_of(features: list[Tensor], axis: int = 1) -> Tensor:
    """Return the samples [N C, T] in float64, with NaN replaced by 0."""
    return torch.cat([one.movedim(axis, 0).flatten(1).double().cpu() for one in features]).nan_to_num(nan=0.0)


def correlate_directly(samples: Tensor) -> Tensor:
    centered = samples - samples.mean(1, keepdim=True)
    covariance = centered @ centered.T / samples.shape[1]
    deviation = covariance.diagonal().sqrt()
    return covariance / torch.outer(deviation, deviation).clamp_min(1e-7)


def accumulated(features: list[Tensor], blocks: Any = "full", axis: int = 1) -> Tensor:
    units = features[0].shape[axis]
    sums = CorrelationAccumulator(len(features), units, blocks=blocks, dtype=torch.float64, device=features[0].device)
    sums.update(*features, channel_axis=axis)
    return sums.finalize().cpu()


def assert_correlated(features: list[Tensor], axis: int = 1, tolerance: float = TOLERANCE) -> None:
    expected = correlate_directly(samples_of(features, axis))
    found = accumulated(features, axis=axis)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_models_and_blocks(simulated: Any, num_models: int, seed: int) -> None:
    simulated.set_seed(seed)
    features = features_of(num_models, 70, 37, seed=seed)
    assert_correlated(features)
    if num_models > 1:
        full = correlate_directly(samples_of(features))
        blocks = torch.stack([full[:37, 37 * i : 37 * i + 37] for i in range(1, num_models)])
        torch.testing.assert_close(accumulated(features, "cross"), blocks, rtol=0, atol=TOLERANCE)


#: How features are laid out, their shape before, and the axis of the units.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], int]] = {
    "units last": (lambda x: x.contiguous(), (45, 36), 1),
    "units last, odd": (lambda x: x.contiguous(), (45, 35), 1),
    "units last, batches": (lambda x: x.contiguous(), (3, 11, 40), 2),
    "units last, cut": (lambda x: x[:, 1:-1, 4:], (4, 11, 40), 2),
    "units first": (lambda x: x.contiguous(), (36, 72), 0),
    "units first, odd": (lambda x: x.contiguous(), (35, 71), 0),
    "convolution": (lambda x: x.contiguous(), (3, 33, 4, 10), 1),
    "convolution, odd": (lambda x: x.contiguous(), (5, 33, 3, 3), 1),
    "channels last": (lambda x: x.contiguous(memory_format=torch.channels_last), (3, 33, 5, 4), 1),
    "strides": (lambda x: x[::2, ::3, ::2], (6, 60, 22), 1),
    "not aligned": (lambda x: x.flatten()[1:].unflatten(0, (-1, 36)), (1 + 36 * 33,), 1),
    "one unit": (lambda x: x.contiguous(), (40, 1), 1),
    "one sample a batch element": (lambda x: x.contiguous(), (40, 5, 1), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(simulated: Any, layout: str, dtype: torch.dtype) -> None:
    simulated.set_seed(5)
    arrange, shape, axis = LAYOUTS[layout]
    assert_correlated([arrange(one) for one in features_of(2, *shape, dtype=dtype)], axis)


def maps_of(kind: str, length: int) -> UnitMap:
    """Return a map of two models: permutations, longer selections, or clusters."""
    if kind == "permutations":
        return UnitMap.permutation(torch.stack([torch.arange(length), torch.randperm(length)]))
    if kind == "selections":
        return UnitMap.permutation(torch.randint(length, (2, length + 3)), units_in=length)
    return UnitMap.clusters(torch.randint(length, (2, length)), length, torch.rand(length))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("permutations", torch.float16, marks=pytest.mark.values),
        ("permutations", torch.float32),
        ("selections", torch.bfloat16),
        pytest.param("clusters", torch.float32, marks=pytest.mark.values),
    ],
)
def test_samples_are_read_through_index(
    simulated: Any, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated.set_seed(6)
    torch.manual_seed(6)
    indexed: list[bool] = []
    monkeypatch.setattr(cuda, "Samples", noting(cuda.Samples, indexed))
    for shape, units_axis, axis, in_place in (
        ((45, 36), 1, 0, True),
        ((45, 35), 1, 0, True),
        ((3, 11, 40), 2, 1, True),
        ((5, 33, 4, 4), 1, 0, True),
        ((5, 33, 3, 3), 1, 0, True),
        ((36, 72), 0, 1, False),
        ((1, 40), 1, 0, True),
    ):
        features = features_of(2, *shape, dtype=dtype)
        features[1].flatten()[1] = math.nan
        unit_map = maps_of(kind, shape[axis])
        copies = [permute_merge([one], {axis: unit_map.of_model(i)}, weights=[1.0]) for i, one in enumerate(features)]
        sums = CorrelationAccumulator(2, shape[units_axis], blocks="full", dtype=torch.float64)
        indexed.clear()
        sums.update(*features, channel_axis=units_axis, maps={axis: unit_map})
        assert indexed == [in_place and kind != "clusters"]
        # Both do the same operations on the same numbers, so rounding does not differ.
        assert torch.equal(sums.finalize(), accumulated(copies, axis=units_axis))


def test_one_sample_index_keeps_vectors_aligned(simulated: Any) -> None:  # noqa: ARG001
    features = [torch.randn(7 * 36 + 3)[:252].as_strided((7, 36), (35, 1)) for _ in range(2)]
    unit_map = UnitMap.permutation(torch.tensor([[1], [2]]), units_in=7)
    sums = CorrelationAccumulator(2, 36)
    sums.update(*features, maps={0: unit_map})
    assert torch.equal(sums.finalize(), torch.zeros(1, 36, 36))


def noting(samples: Any, indexed: list[bool]) -> Any:
    """Return a class of `Samples` that records whether they are read through an index."""

    def make(features: list[Tensor], outer_index: list[Tensor | None]) -> Any:
        indexed.append(outer_index[0] is not None)
        return samples(features, outer_index)

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_and_dead_units(simulated: Any, dtype: torch.dtype, axis: int) -> None:  # noqa: ARG001
    features = features_of(2, 70, 40, dtype=dtype)
    features[0][3, 2] = features[1][5] = math.nan
    features[0][:, 7] = 0
    features[1][:, 39] = 0.1
    features = [one.movedim(1, axis).contiguous() for one in features]
    expected = correlate_directly(samples_of(features, axis))
    found = accumulated(features, axis=axis)
    assert not found[7].any()
    if not features[1].movedim(axis, 1)[:, 39].isnan().any():
        assert not found[79].any()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("axis", [0, 1])
def test_constant_units_give_exact_zeros(simulated: Any, axis: int) -> None:  # noqa: ARG001
    for dtype in DTYPES:
        features = [3 + one for one in features_of(2, 70, 33, dtype=dtype)]
        features[1][:, 4] = 0.1
        found = accumulated([one.movedim(1, axis).contiguous() for one in features], axis=axis)
        assert not found[37].any()
        assert not found[:, 37].any()


@pytest.mark.values
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_mean_far_from_zero(simulated: Any, dtype: torch.dtype, axis: int) -> None:  # noqa: ARG001
    """Half of the units have a mean of 1e3 deviations and drift by as much between updates."""
    offset = torch.where(torch.arange(70) < 40, 1e3 if dtype != torch.bfloat16 else 1e2, 0.0)
    sums = CorrelationAccumulator(2, 70, blocks="full", dtype=torch.float64)
    seen = []
    for drift in (1, 1, 2):
        batch = [(drift * offset + one).to(dtype) for one in features_of(2, 150, 70, seed=drift)]
        seen.append(batch)
        sums.update(*[one.movedim(1, axis).contiguous() for one in batch], channel_axis=axis)
    samples = torch.cat([samples_of(batch) for batch in seen], 1)
    torch.testing.assert_close(sums.finalize(), correlate_directly(samples), rtol=0, atol=TOLERANCE)


@pytest.mark.values
@pytest.mark.parametrize("axis", [0, 1])
def test_products_have_float32_accuracy(simulated: Any, axis: int) -> None:  # noqa: ARG001
    """The TF32 split has the error of a float32 product; both are measured in float64, in units of deviations."""
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(1500, 32, generator=generator) for _ in range(2)]
    arranged = [one.movedim(1, axis).contiguous() for one in features]
    samples = cuda.Samples([one[:, :, None] if axis == 1 else one[None] for one in arranged])
    product = samples.product(0, 1)
    shifts = [samples.mean(i) - samples.sum(i) / samples.count for i in range(2)]
    centered = [one.double() - shift for one, shift in zip(features, shifts, strict=True)]
    exact = centered[0].T @ centered[1]
    single = centered[0].float().T @ centered[1].float()
    scale = torch.outer(centered[0].norm(dim=0), centered[1].norm(dim=0))
    error = ((product.parts.double().sum(0) - exact) / scale).abs().max()
    single_error = ((single.double() - exact) / scale).abs().max()
    assert error < 2e-7
    assert error < 4 * single_error
    for i in range(2):
        torch.testing.assert_close(samples.mean(i), features[i].double().mean(0), rtol=0, atol=1e-7)
        torch.testing.assert_close(
            samples.squares(i), features[i].double().var(0, correction=0) * 1500, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_half_products_are_exact_up_to_summation(simulated: Any, dtype: torch.dtype) -> None:  # noqa: ARG001
    features = features_of(2, 500, 32, dtype=dtype)
    samples = cuda.Samples([one[:, :, None] for one in features])
    found = samples.product(0, 1).parts.double().sum(0)
    exact = features[0].double().T @ features[1].double()
    scale = torch.outer(features[0].double().norm(dim=0), features[1].double().norm(dim=0))
    assert ((found - exact) / scale).abs().max() < 2e-7


@pytest.mark.values
def test_thread_order_does_not_change_result(simulated: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        features = [one + offset for offset, one in zip((0, 9), features_of(2, 130, 40, dtype=dtype), strict=True)]
        results = []
        for seed in range(4):
            simulated.set_seed(seed)
            results.append(accumulated(features))
        assert all(torch.equal(results[0], one) for one in results[1:])


def test_two_slabs_where_shared_memory_is_small(simulated: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        features = features_of(2, 200, 40, dtype=dtype)
        simulated.set_shared_memory_limit(2**31)
        expected = accumulated(features)
        simulated.set_shared_memory_limit(24 * 1024)
        assert torch.equal(accumulated(features), expected)


def test_chunks_and_updates(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    features = features_of(2, 4, 20, 70)
    whole = accumulated(features)
    monkeypatch.setattr(cuda, "_PART_SAMPLES", 64)
    monkeypatch.setattr(cuda, "_MAX_PARTS", 1)
    torch.testing.assert_close(accumulated(features), whole, rtol=0, atol=TOLERANCE)
    sums = CorrelationAccumulator(2, 20, blocks="full", dtype=torch.float64)
    for k in range(4):
        sums.update(*[one[k] for one in features], channel_axis=0)
    torch.testing.assert_close(sums.finalize(), whole, rtol=0, atol=TOLERANCE)
    assert sums.num_samples == 280


def test_other_methods(simulated: Any) -> None:  # noqa: ARG001
    first, second = features_of(2, 60, 7), [3 + 2 * one for one in features_of(2, 21, 7, seed=1)]
    one, other = (CorrelationAccumulator(2, 7, blocks="full", dtype=torch.float64) for _ in range(2))
    one.update(*first)
    other.update(*second)
    one.merge(other)
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    expected = correlate_directly(samples_of(both))
    torch.testing.assert_close(one.finalize(), expected, rtol=0, atol=TOLERANCE)
    again = CorrelationAccumulator(2, 7, blocks="full", dtype=torch.float64)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.finalize(), one.finalize())
    one.replace(second, [features[:21] for features in first])
    both = [torch.cat([features, features[:21]]) for features in first]
    torch.testing.assert_close(one.finalize(), correlate_directly(samples_of(both)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("blocks", "stays"), [("cross", False), pytest.param("full", True, marks=pytest.mark.values)])
def test_replaced_samples(
    simulated: Any, monkeypatch: pytest.MonkeyPatch, stays: bool, blocks: Any, dtype: Any
) -> None:
    """The kernel computes all products, and the sums are those of the new samples."""
    simulated.set_seed(3)
    monkeypatch.setattr(_centered_products, "exchange", None)
    old, kept, new = ([3 + one for one in features_of(3, 4, 9, 20, seed=seed, dtype=dtype)] for seed in range(3))
    old[1][2, 3] = new[2][1, 4] = math.nan
    if stays:
        new[1] = old[1]
    sums = CorrelationAccumulator(3, 9, blocks=blocks, dtype=torch.float64)
    sums.update(*old)
    sums.update(*kept)
    sums.replace(old, new)
    both = [torch.cat(pair) for pair in zip(new, kept, strict=True)]
    torch.testing.assert_close(sums.finalize(), accumulated(both, blocks), rtol=0, atol=2e-6)
    reordered = [new[0], *(one.flip(0) for one in new[1:])]
    sums.replace(new, reordered, reordered=True)
    both = [torch.cat(pair) for pair in zip(reordered, kept, strict=True)]
    torch.testing.assert_close(sums.finalize(), accumulated(both, blocks), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float16, torch.float32)])
def test_other_dtypes_use_reference(simulated: Any, dtypes: tuple[torch.dtype, ...]) -> None:  # noqa: ARG001
    assert_correlated([one.to(dtype) for one, dtype in zip(features_of(2, 40, 9), dtypes, strict=True)])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, 1e25])
def test_out_of_range_values_are_reported_when_sums_are_used(simulated: Any, bad: float) -> None:  # noqa: ARG001
    features = features_of(2, 40, 9)
    features[1][3, 2] = bad
    sums = CorrelationAccumulator(2, 9)
    sums.update(*features)
    sums.update(*features_of(2, 40, 9))
    for use in (sums.finalize, sums.state_dict, lambda: CorrelationAccumulator(2, 9).merge(sums)):
        with pytest.raises(ValueError, match="features must be finite, with sums of squares that float32 can hold"):
            use()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("units", [1, 31, 70])
def test_quotients_match_cpu_kernel(simulated: Any, units: int, dtype: torch.dtype) -> None:
    simulated.set_seed(units)
    generator = torch.Generator().manual_seed(units)
    comoment = torch.randn(units, units, dtype=torch.float64, generator=generator)
    row, column = torch.rand(2, units, dtype=torch.float64, generator=generator)
    row[::5] = 0
    results = torch.zeros(2, 2 * units, 2 * units, dtype=dtype)
    for result, correlate in zip(results, (cpu.correlate, cuda.correlate), strict=True):
        correlate(comoment, row, column, 7, 0.05, result[:units, units:], result[units:, :units], None, 1.0)
        correlate(comoment, row, column, 7, 0.05, result[:units, :units], result[:units, :units], None, 1.0)
        correlate(comoment, row, column, 7, 0.05, result[units:, units:], None, None, 1.0)
    assert torch.equal(results[0], results[1])
    if dtype.itemsize < 4:
        return
    other = torch.randn(units, 2 * units, dtype=dtype, generator=generator)[:, units:]
    for balance in (0.0, 0.3, 0.5, 0.8, 1.0):
        found = torch.empty(units, units, dtype=dtype)
        cuda.correlate(comoment, row, column, 7, 0.05, found, None, other, balance)
        expected = torch.lerp(other, results[0][units:, units:], balance)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("blocks", ["cross", "full"])
def test_blend_in_one_pass(simulated: Any, blocks: Any) -> None:  # noqa: ARG001
    sums, others = (CorrelationAccumulator(3, 12, blocks=blocks) for _ in range(2))
    sums.update(*features_of(3, 40, 12))
    others.update(*features_of(3, 40, 12, seed=1))
    other, plain = others.finalize(), sums.finalize()
    found = sums.finalize(other=other, balance=0.7)
    torch.testing.assert_close(found, torch.lerp(other, plain, 0.7), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float16, 20.0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_several_tiles_of_warpgroups(warpgroups_simulated: Any, axis: int, dtype: torch.dtype, offset: float) -> None:
    """The simulator uses the same wgmma tile size as a device."""
    warpgroups_simulated.set_seed(4)
    features = [(offset + one).to(dtype) for one in features_of(2, 210, 134)]
    features[0][7, 131] = features[1][5, 3] = math.nan
    arranged = [one.movedim(1, axis).contiguous() for one in features]
    if dtype == torch.float16:  # the other units are not shifted
        arranged[0] = torch.where(torch.arange(134).view(-1, 1).movedim(0, axis) < 128, arranged[0] - 20, arranged[0])
    assert_correlated(arranged, axis)


CPU = torch.device("cpu")


@pytest.fixture
def comparison(used: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the first use of the simulator compare products again, with few units and samples."""
    monkeypatch.delenv("MUDSC_TENSOR_CORES", raising=False)
    monkeypatch.setattr(_tensor_cores, "_UNITS", 24)
    monkeypatch.setattr(_tensor_cores, "_SAMPLES", 70)
    monkeypatch.setattr(_tensor_cores, "_compared", {})
    monkeypatch.setattr(_tensor_cores, "WGMMA_CONFIRMED", frozenset({(9, 0)}))
    return used


def test_first_use_of_device_compares_products(comparison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    product = comparison.correlation_product
    monkeypatch.setattr(
        comparison,
        "correlation_product",
        lambda **given: launched.append(given["warpgroups"]) or product(**given),  # type: ignore[func-returns-value]
    )
    assert cuda.tensor_cores(CPU) == ("wgmma", "gives the products of mma.sync")
    assert len(launched) == 24
    features = [one[:, :, None] for one in features_of(2, 40, 9)]
    cuda.Samples(features).product(0, 1)
    assert launched[24:] == [True]


def planted(which: int) -> Callable[[list[Tensor], int, str], list[Tensor]]:
    """Return products of which those by wgmma are wrong in one entry of the product (0) or a model's squares (1, 2)."""

    def multiply(features: list[Tensor], axis: int, instructions: str) -> list[Tensor]:
        results = cuda._products(features, axis, instructions)
        if instructions == _tensor_cores.WGMMA:
            results[which].view(-1)[7] *= 1.01
        return results

    return multiply


@pytest.mark.parametrize("which", [0, 1, 2])
def test_device_with_different_products_uses_mma_sync(comparison: Any, which: int) -> None:  # noqa: ARG001
    instructions, reason = _tensor_cores.choose(CPU, planted(which))
    assert instructions == "mma.sync"
    assert reason.startswith("wgmma gives other products of torch.float32 features of mean 0.0, units adjacent, by ")


def test_wrong_kernel_is_not_used(comparison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    product = comparison.correlation_product

    def wrong(**given: Any) -> None:
        launched.append(given["warpgroups"])
        product(**{**given, "rows": given["columns"] if given["warpgroups"] else given["rows"]})

    monkeypatch.setattr(comparison, "correlation_product", wrong)
    assert_correlated(features_of(2, 70, 37))
    assert_correlated(features_of(2, 70, 37, seed=1))
    assert launched.count(True) == 1
    assert cuda.tensor_cores(CPU).instructions == "mma.sync"


def test_graph_uses_earlier_comparison(comparison: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(_device, "is_capturing", lambda _: True)
    assert cuda.tensor_cores(CPU) == ("mma.sync", "nothing can be compared while a graph is captured")
    monkeypatch.setattr(_device, "is_capturing", lambda _: False)
    compared = cuda.tensor_cores(CPU)
    assert compared.instructions == "wgmma"
    monkeypatch.setattr(_device, "is_capturing", lambda _: True)
    assert cuda.tensor_cores(CPU) == compared


def test_build_without_wgmma_uses_mma_sync(comparison: Any) -> None:  # noqa: ARG001
    def multiply(features: list[Tensor], axis: int, instructions: str) -> list[Tensor]:  # noqa: ARG001
        return [torch.full((3, 3), torch.nan if instructions == _tensor_cores.WGMMA else 1.0)]

    assert _tensor_cores.choose(CPU, multiply) == (
        "mma.sync",
        "wgmma was not compiled: this build has no code for 9.0a",
    )


def test_failed_comparison_says_how_to_avoid_it(comparison: Any) -> None:  # noqa: ARG001
    def multiply(*_: object) -> list[Tensor]:
        raise RuntimeError("an illegal instruction was encountered")

    with pytest.raises(RuntimeError, match=r"setting MUDSC_TENSOR_CORES=mma\.sync avoids both: an illegal instruction"):
        _tensor_cores.choose(CPU, multiply)


def test_environment_selects_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensor_cores, "_capability", lambda _: (8, 0))
    monkeypatch.delenv("MUDSC_TENSOR_CORES", raising=False)
    assert cuda.tensor_cores(CPU) == ("mma.sync", "compute capability is not 9.0")
    monkeypatch.setenv("MUDSC_TENSOR_CORES", "wgmma")
    assert cuda.tensor_cores(CPU) == ("wgmma", "named by MUDSC_TENSOR_CORES")
    monkeypatch.setenv("MUDSC_TENSOR_CORES", "hmma")
    with pytest.raises(ValueError, match=r"MUDSC_TENSOR_CORES must be 'mma\.sync' or 'wgmma', got 'hmma'"):
        cuda.tensor_cores(CPU)


def test_wgmma_is_not_used_before_it_is_confirmed(comparison: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(_tensor_cores, "WGMMA_CONFIRMED", frozenset())
    assert cuda.tensor_cores(CPU) == (
        "mma.sync",
        "wgmma is not confirmed on a device yet; MUDSC_TENSOR_CORES=wgmma selects it",
    )


@pytest.mark.parametrize(
    ("capability", "float32"),
    [
        ((8, 0), True),
        ((8, 6), False),
        ((8, 9), False),
        ((9, 0), True),
        ((10, 0), True),
        ((12, 0), False),
        ((15, 0), False),
    ],
)
def test_float32_is_multiplied_where_tf32_is_fast(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], float32: bool
) -> None:
    monkeypatch.setattr(_tensor_cores, "_capability", lambda _: capability)
    monkeypatch.delenv("MUDSC_TENSOR_CORES", raising=False)
    assert [cuda.serves(CPU, dtype) for dtype in (*DTYPES, torch.float64)] == [True, True, float32, False]
    monkeypatch.setenv("MUDSC_TENSOR_CORES", "mma.sync")
    assert cuda.serves(CPU, torch.float32)


def test_float32_is_centered_where_tf32_is_slow(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensor_cores, "_capability", lambda _: (8, 6))
    monkeypatch.delenv("MUDSC_TENSOR_CORES")
    monkeypatch.setattr(simulated, "correlation_product", None)
    assert_correlated(features_of(2, 40, 9))


class Launches(TorchDispatchMode):
    """Counts the launches of an update: torch operations that compute something, and kernels of this package."""

    #: Operations that only allocate or view memory and launch nothing.
    FREE = ("empty", "view", "select", "slice", "unsqueeze", "detach", "as_strided", "alias", "unbind")

    def __init__(self, simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        for name in ("correlation_shift", "correlation_product", "correlation_moments", "correlation_join"):
            monkeypatch.setattr(simulator, name, functools.partial(self.note, name, getattr(simulator, name)))

    def note(self, name: str, kernel: Any, **given: Any) -> None:
        self.names.append(name)
        kernel(**given)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        if not name.startswith(self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("blocks", "launches"), [("cross", 4), ("full", 8)])
def test_number_of_launches_per_update(
    simulated: Any, monkeypatch: pytest.MonkeyPatch, blocks: Any, launches: int
) -> None:
    sums = CorrelationAccumulator(2, 9, blocks=blocks)
    sums.update(*features_of(2, 40, 9))
    features = features_of(2, 40, 9)
    moments = sums._moments
    with Launches(simulated, monkeypatch) as counted:
        _tensor_core_products.add(moments, [Samples(one[:, :, None]) for one in features])
    assert len(counted.names) == launches, counted.names
    assert sums.num_samples == 80


def test_info_names_tensor_core_instructions(comparison: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(_device, "unavailable_reason", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "tensor_cores", lambda _: _tensor_cores.choose(CPU, planted(0)))
    said = installation._tensor_cores()["tensor cores"]
    assert re.fullmatch(r"cuda:0 mma\.sync \(wgmma gives other products of .* by \S+ of their size\)", said)

    def fail(_: torch.device) -> None:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(cuda, "tensor_cores", fail)
    assert installation._tensor_cores() == {"tensor cores": "cuda:0 none (an illegal instruction)"}
    monkeypatch.setattr(_device, "unavailable_reason", lambda *_: "no driver")
    assert installation._tensor_cores() == {}


@pytest.mark.gpu
@pytest.mark.parametrize("instructions", [_tensor_cores.MMA_SYNC, _tensor_cores.WGMMA])
@pytest.mark.parametrize("dtype", DTYPES, ids=["half", "bfloat", "single"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("samples", "units", "offset"), [(70, 16, 0.0), (5000, 300, 100.0), (20000, 768, 0.0)])
def test_on_device(
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    samples: int,
    units: int,
    offset: float,
    dtype: torch.dtype,
    axis: int,
    instructions: str,
) -> None:
    if instructions == _tensor_cores.WGMMA and torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    monkeypatch.setenv("MUDSC_TENSOR_CORES", instructions)
    features = [(offset + one).to(dtype).to(gpu) for one in features_of(2, samples, units)]
    features[0][3] = math.nan
    # With a mean far from zero, a NaN counted as 0 is an outlier: float32 products of torch have an error of 9e-6.
    assert_correlated([one.movedim(1, axis).contiguous() for one in features], axis, 2e-6 if offset == 0 else 3e-5)


@pytest.mark.gpu
def test_wgmma_matches_mma_sync(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    monkeypatch.delenv("MUDSC_TENSOR_CORES", raising=False)
    monkeypatch.setattr(_tensor_cores, "WGMMA_CONFIRMED", frozenset({(9, 0)}))
    assert cuda.tensor_cores(torch.device("cuda", torch.cuda.current_device())) == (
        "wgmma",
        "gives the products of mma.sync",
    )
