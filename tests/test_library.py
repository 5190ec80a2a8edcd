"""The ops when torch traces them: opcheck, FakeTensor, torch.compile with one graph, and errors for gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mudsc_fast import CorrelationAccumulator, UnitMap, linear_assignment, permute_merge, zip_units

# The compiler's imports use deprecated parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def models(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def maps() -> dict[int, UnitMap]:
    clusters = UnitMap.clusters(torch.tensor([[0, 1, 1, 2], [2, 1, 0, 0]]), 3, torch.tensor([1.0, 0.5, 2.0]))
    return {0: UnitMap.permutation(torch.tensor([[2, 0, 1]] * 2)), 1: clusters}


def arguments_of(op: str) -> tuple[Any, ...]:
    if op == "permute_merge":
        by_axis = list(maps().values())
        indices, scales = [one.index for one in by_axis], [one.scale for one in by_axis]
        return models(3, 4), [0, 1], indices, [3, 4], [3, 3], [True, False], scales, [0.5, 0.5]
    if op == "linear_assignment":
        return torch.stack(models(5, 7)), True, 0.0
    if op == "zip_units":
        return torch.corrcoef(models(8, 30)[0]), 2, 4, 2, 0.5
    sums = [torch.zeros(shape, dtype=torch.float64) for shape in ((2, 4), (2, 4), (1, 4, 4))]
    return (*sums, 0, models(10, 4), 1, "cross", "float32")


@pytest.mark.parametrize("op", ["permute_merge", "linear_assignment", "zip_units", "correlation_update"])
def test_opcheck(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mudsc_fast, op).default, arguments_of(op))


@pytest.mark.parametrize("op", ["permute_merge", "linear_assignment", "zip_units", "correlation_update"])
def test_gradients_are_rejected(op: str) -> None:
    arguments = [
        [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in value]
        if isinstance(value, list) and isinstance(value[0], Tensor) and number in (0, 4)
        else value.requires_grad_()
        if isinstance(value, Tensor) and number == 0
        else value
        for number, value in enumerate(arguments_of(op))
    ]
    with pytest.raises(ValueError, match=f"mudsc_fast::{op} has no gradient"):
        getattr(torch.ops.mudsc_fast, op)(*arguments)


def test_compiled_merge() -> None:
    by_axis = maps()
    tensors = models(3, 4)
    expected = permute_merge(tensors, by_axis) + 1
    result = compiled(lambda a, b: permute_merge([a, b], by_axis) + 1)(*tensors)
    assert torch.equal(result, expected)


def test_compiled_merge_of_negated_entries() -> None:
    by_axis = maps()
    negated = torch.randn(3, 4, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    result = compiled(lambda a, b: permute_merge([a, b], by_axis))(negated, negated)
    assert torch.equal(result, permute_merge([negated.clone()] * 2, by_axis))


def test_compiled_assignment() -> None:
    similarity = models(6, 6)[0]

    def columns(values: Tensor) -> tuple[Tensor, Tensor]:
        found = linear_assignment(values * 2)
        return found.columns, found.objective

    for result, expected in zip(compiled(columns)(similarity), columns(similarity), strict=True):
        assert torch.equal(result, expected)


def test_compiled_zip() -> None:
    """The value is a float that depends on data, which the compiler only accepts if it is told to capture scalars."""
    similarity = torch.corrcoef(models(8, 30)[0])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        clusters = compiled(lambda values: zip_units(values * 1.0, 2).cluster_of_unit)(similarity)
    assert torch.equal(clusters, zip_units(similarity, 2).cluster_of_unit)


def test_compiled_correlation() -> None:
    accumulators = [CorrelationAccumulator(2, 4) for _ in range(2)]

    def update(accumulator: CorrelationAccumulator, a: Tensor, b: Tensor) -> None:
        accumulator.update(a, b + 1)

    for seed in range(3):
        torch.manual_seed(seed)
        a, b = torch.randn(9, 4), torch.randn(9, 4)
        update(accumulators[0], a, b)
        compiled(update)(accumulators[1], a, b)
    assert accumulators[1].num_samples == 27
    assert torch.equal(accumulators[0].finalize(), accumulators[1].finalize())


def test_fake_tensors_have_result_shapes() -> None:
    by_axis = maps()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert permute_merge([torch.empty(3, 4)] * 2, by_axis).shape == (3, 3)
        found = linear_assignment(torch.empty(2, 5, 7, dtype=torch.float16))
        assert (found.columns.shape, found.columns.dtype) == ((2, 5), torch.int64)
        assert (found.column_duals.shape, found.gap.dtype) == ((2, 7), torch.float64)


@pytest.mark.parametrize("op", ["permute_merge", "linear_assignment", "zip_units", "correlation_update"])
@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no tag for it")
def test_ops_stay_out_of_cuda_graphs(op: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.mudsc_fast, op).default.tags


def test_compiled_updates_report_features_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device, features are checked while they are multiplied."""
    accumulator = CorrelationAccumulator(2, 4)
    monkeypatch.setattr(CorrelationAccumulator, "in_range", property(lambda _: torch.tensor(False)))
    compiled(lambda a, b: accumulator.update(a, b))(torch.randn(9, 4), torch.randn(9, 4))
    with pytest.raises(ValueError, match="features must be finite, with sums of squares that float32 can hold"):
        accumulator.finalize()
