"""The public functions on a CUDA device: results stay there and match those of the CPU or of the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast import CorrelationAccumulator, Mode, Space, UnitMap
from networks import CONV_SPEC, MLP_SPEC, ConvNet, make_mlp, random_permutations

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Tolerance of sums of half types, whose terms may cancel.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def random_numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def features_of(num_models: int, samples: int, units: int, seed: int = 0) -> list[Tensor]:
    shared = random_numbers(samples, units, seed=seed)
    return [shared + random_numbers(samples, units, seed=seed + 1 + model) for model in range(num_models)]


def maps_of(kind: str, num_models: int, axes: dict[int, int], device: torch.device) -> dict[int, UnitMap]:
    """Return a map for each axis, given the lengths of the axes."""
    generator = torch.Generator().manual_seed(1)
    if kind == "permutations":
        return {
            axis: UnitMap.permutation(
                torch.stack([torch.randperm(units, generator=generator) for _ in range(num_models)]).to(device)
            )
            for axis, units in axes.items()
        }
    return {
        axis: UnitMap.clusters(
            torch.randint(units - 3, (num_models, units), generator=generator).to(device),
            units - 3,
            (torch.rand(units - 3, generator=generator) + 0.5).to(device),
        )
        for axis, units in axes.items()
    }


def assert_equal_there(found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


def on_both(gpu: torch.device, compute: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    """Return the results of `compute` on the device and on the CPU."""
    return compute(gpu), compute(torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["permutations", "clusters"])
@pytest.mark.parametrize("shape", [(300,), (64, 130), (16, 8, 3, 3)], ids=str)
def test_permute_merge(gpu: torch.device, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = [random_numbers(*shape, seed=seed, dtype=dtype) for seed in range(2)]
    axes = dict(enumerate(shape[:2]))

    def merge(device: torch.device) -> Tensor:
        return mudsc_fast.permute_merge([one.to(device) for one in tensors], maps_of(kind, 2, axes, device))

    found, expected = on_both(gpu, merge)
    assert_equal_there(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_permute_merge_group(gpu: torch.device, dtype: torch.dtype) -> None:
    shapes = [(40,), (7,), (40, 24), (24, 5, 3, 3), (1, 1)]

    def merge(device: torch.device) -> list[Tensor]:
        groups = [[random_numbers(*shape, seed=seed, dtype=dtype).to(device) for seed in range(3)] for shape in shapes]
        maps = [
            maps_of(("permutations", "clusters")[number % 2], 3, {0: shape[0]}, device) if shape[0] > 3 else {}
            for number, shape in enumerate(shapes)
        ]
        return mudsc_fast.permute_merge_group(groups, maps, weights=[0.2, 0.3, 0.5])

    for found, expected in zip(*on_both(gpu, merge), strict=True):
        assert_equal_there(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
def test_permute_in_place(gpu: torch.device, axes: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = (129, 65, 3)

    def permute(device: torch.device) -> Tensor:
        tensor = random_numbers(*shape, dtype=dtype).to(device)
        maps = maps_of("permutations", 1, {axis: shape[axis] for axis in axes}, device)
        assert mudsc_fast.permute_(tensor, maps) is tensor
        return tensor

    assert_equal_there(*on_both(gpu, permute))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", ["cross", "full"])
def test_correlation(gpu: torch.device, blocks: Any, dtype: torch.dtype) -> None:
    """Updates, an exchange of samples, a merge of accumulators and a blend."""
    old, kept, new = ([one.to(dtype) for one in features_of(3, 90, 40, seed=seed)] for seed in (0, 10, 20))

    def correlate(device: torch.device) -> list[Tensor]:
        def there(features: list[Tensor]) -> list[Tensor]:
            return [one.to(device) for one in features]

        sums, others = (CorrelationAccumulator(3, 40, blocks=blocks, device=device) for _ in range(2))
        sums.update(*there(old))
        before = sums.finalize()
        others.update(*there(kept))
        sums.merge(others)
        sums.replace(there(old), there(new))
        return [before, sums.finalize(), sums.finalize(other=before, balance=0.7)]

    for found, expected in zip(*on_both(gpu, correlate), strict=True):
        assert_equal_there(found, expected, 3e-6)


@pytest.mark.parametrize("kind", ["permutations", "clusters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_correlation_of_samples_in_another_order(gpu: torch.device, dtype: torch.dtype, kind: str) -> None:
    features = [one.to(dtype) for one in features_of(2, 72, 40)]

    def correlate(device: torch.device) -> Tensor:
        sums = CorrelationAccumulator(2, 40, device=device)
        sums.update(*[one.to(device) for one in features], maps=maps_of(kind, 2, {0: 72}, device))
        return sums.finalize()

    found, expected = on_both(gpu, correlate)
    # Sums of bfloat16 are rounded to bfloat16 in the order in which the kernel adds.
    assert_equal_there(found, expected, 1e-2 if dtype == torch.bfloat16 and kind == "clusters" else 3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 30, 30), (2, 3, 20, 50), (2, 50, 20), (600, 600), (700, 520)], ids=str)
def test_linear_assignment(gpu: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = random_numbers(*shape, dtype=dtype)
    for maximize in (True, False):

        def solve(device: torch.device, maximize: bool = maximize) -> mudsc_fast.Assignment:
            return mudsc_fast.linear_assignment(values.to(device), maximize=maximize)

        found, expected = on_both(gpu, solve)
        assert_equal_there(found.objective, expected.objective, 1e-11)
        assert float(found.gap.max()) <= 1e-9
        for part in ("columns", "row_duals", "column_duals", "gap"):
            assert getattr(found, part).device.type == "cuda"
        if max(shape[-2:]) <= 128:
            assert torch.equal(found.columns.cpu(), expected.columns)


def test_assignment_of_forbidden_and_invalid_entries(gpu: torch.device) -> None:
    for units in (30, 600):
        values = random_numbers(units, units)
        values[3, 4] = -torch.inf
        found, expected = (mudsc_fast.linear_assignment(values.to(device)) for device in (gpu, "cpu"))
        assert_equal_there(found.objective, expected.objective, 1e-11)
        values[5, 6] = torch.nan
        with pytest.raises(ValueError, match="similarity must not hold NaN"):
            mudsc_fast.linear_assignment(values.to(gpu))
        values[5] = -torch.inf
        with pytest.raises(ValueError, match="similarity is infeasible"):
            mudsc_fast.linear_assignment(values.to(gpu))


def test_assignment_warm_start(gpu: torch.device) -> None:
    for units in (100, 600):
        values = random_numbers(units, units).to(gpu)
        earlier = mudsc_fast.linear_assignment(values)
        changed = values + 0.01 * random_numbers(units, units, seed=1).to(gpu)
        found = mudsc_fast.linear_assignment(changed, warm_start=earlier)
        expected = mudsc_fast.linear_assignment(changed.cpu())
        assert_equal_there(found.objective, expected.objective, 1e-11)


@pytest.mark.parametrize("shape", [(30, 30), (20, 50), (50, 20), (600, 600)], ids=str)
def test_linear_sum_assignment_returns_tensors(gpu: torch.device, shape: tuple[int, int]) -> None:
    cost = random_numbers(*shape)
    (rows, columns), expected = on_both(gpu, lambda device: mudsc_fast.linear_sum_assignment(cost.to(device)))
    assert rows.device.type == columns.device.type == "cuda"
    sums = [float(cost[rows.cpu(), columns.cpu()].double().sum()), float(cost[expected].double().sum())]
    assert sums[0] == pytest.approx(sums[1], rel=1e-9)


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_zip(gpu: torch.device, num_models: int) -> None:
    similarity = torch.corrcoef(random_numbers(60 * num_models, 500))
    found, expected = on_both(gpu, lambda device: mudsc_fast.zip_units(similarity.to(device), num_models, ratio=0.5))
    assert_equal_there(found.cluster_of_unit, expected.cluster_of_unit)
    assert_equal_there(found.sizes, expected.sizes)


MODES: tuple[Mode, ...] = ("align", "zip")
SPACES: tuple[Space, ...] = ("weight", "activation", "dual")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("network", ["perceptron", "convolutions"])
def test_merge_of_networks(gpu: torch.device, network: str, space: Space, mode: Mode) -> None:
    """The second network is a permuted copy plus small noise, so its units are found despite rounding differences."""
    first: nn.Module
    if network == "perceptron":
        spec, first, inputs = MLP_SPEC, make_mlp(), random_numbers(200, 20, seed=3)
    else:
        spec, first, inputs = CONV_SPEC, ConvNet().eval(), random_numbers(30, 3, 8, 8, seed=3)
    permuted = mudsc_fast.permute_state_dict(first.state_dict(), spec, random_permutations(spec, first, 4))
    second = copy.deepcopy(first)
    second.load_state_dict(
        {
            name: tensor * (1 + 0.01 * random_numbers(*tensor.shape, seed=5)) if tensor.is_floating_point() else tensor
            for name, tensor in permuted.items()
        }
    )

    def merge(device: torch.device) -> mudsc_fast.MergeResult:
        models = [copy.deepcopy(one).to(device) for one in (first, second)]
        return mudsc_fast.merge(models, [inputs.to(device)], spec=spec, space=space, mode=mode)

    found, expected = on_both(gpu, merge)
    assert found.model is not None
    assert {tensor.device.type for tensor in found.model.state_dict().values()} == {"cuda"}
    for name, tensor in expected.state_dict.items():
        assert_equal_there(found.state_dict[name], tensor, 1e-5)
    for node in spec.nodes:
        assert torch.equal(found.matching[node].cluster_of_unit.cpu(), expected.matching[node].cluster_of_unit)


def computed(sums: CorrelationAccumulator, features: list[Tensor], maps: dict[int, UnitMap]) -> tuple[Tensor, ...]:
    sums.update(*features)
    assigned = mudsc_fast.linear_assignment(features[0].T @ features[1])
    return mudsc_fast.permute_merge(features, maps) + 1, assigned.columns, assigned.objective


# The compiler's imports and its generated code emit warnings.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [{"backend": "aot_eager"}, {}, {"mode": "reduce-overhead"}], ids=str)
def test_compiled(gpu: torch.device, how: dict[str, str]) -> None:
    features = [one.to(gpu) for one in features_of(2, 70, 30)]
    maps = maps_of("clusters", 2, {0: 70, 1: 30}, gpu)
    torch._dynamo.reset()
    compiled: Any = torch.compile(computed, **how)  # type: ignore[call-overload]
    sums, expected_sums = (CorrelationAccumulator(2, 30, device=gpu) for _ in range(2))
    for repetition in range(3):
        features[0] += repetition
        expected = computed(expected_sums, features, maps)
        for found, wanted in zip(compiled(sums, features, maps), expected, strict=True):
            assert_equal_there(found, wanted.cpu(), 1e-4)
    assert_equal_there(sums.finalize(), expected_sums.finalize().cpu(), 1e-6)
