from __future__ import annotations

import contextlib
import copy
import itertools
import math
import pickle
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mudsc_fast.ops._dispatch import use_backend
from mudsc_fast.ops.permute import UnitMap, permute_, permute_merge, permute_merge_group

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Kernel and reference add in different orders: a few units in the last place of the accumulator, and at
# most one of the result.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-14}


def random_permutation(num_models: int, units: int) -> UnitMap:
    return UnitMap.permutation(torch.stack([torch.randperm(units) for _ in range(num_models)]))


def random_map(kind: str, num_models: int, units: int) -> UnitMap:
    if kind == "permutation":
        return random_permutation(num_models, units)
    if kind == "selection":
        return UnitMap.permutation(torch.randint(units, (num_models, units + 3)), units_in=units)
    clusters = max(1, units - 2)
    scale = torch.rand(clusters) + 0.5 if kind == "scaled clusters" else None
    return UnitMap.clusters(torch.randint(clusters, (num_models, units)), clusters, scale)


def random_tensors(num_models: int, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*shape).to(dtype) for _ in range(num_models)]


def by_reference(tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], **options: Any) -> Tensor:
    with use_backend("reference"):
        return permute_merge(tensors, maps, **options)


def assert_as_reference(tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], **options: Any) -> None:
    result = permute_merge(tensors, maps, **options)
    expected = by_reference(tensors, maps, **options)
    assert result.dtype == expected.dtype == tensors[0].dtype
    assert result.is_contiguous()
    tolerance = TOLERANCE[result.dtype]
    # Sums may cancel, so the tolerance is relative to the few entries that are added.
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(7,), (300, 5), (5, 300), (33, 9, 3, 3), (4, 17, 5, 5), (3, 4, 5, 6), (3, 2100)], ids=str
)
@pytest.mark.parametrize("num_models", [1, 3])
@pytest.mark.usefixtures("isa")
def test_kernel_matches_reference(dtype: torch.dtype, shape: tuple[int, ...], num_models: int) -> None:
    torch.manual_seed(0)
    tensors = random_tensors(num_models, shape, dtype)
    kinds = ("permutation", "clusters", "scaled clusters", "selection")
    for count in range(3):
        for axes in itertools.combinations(range(len(shape)), count):
            for chosen in itertools.permutations(kinds, count):
                maps = {
                    axis: random_map(kind, num_models, shape[axis]) for axis, kind in zip(axes, chosen, strict=True)
                }
                weights = torch.randn(num_models).tolist()
                assert_as_reference(tensors, maps, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("isa")
def test_single_model_permutation_is_bit_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty(0, dtype=dtype).element_size()]
    limits = torch.iinfo(integers)
    for shape in [(61,), (40, 70), (20, 30, 3, 3), (6, 5, 5, 5), (5, 700)]:
        # Random bits include NaN with payloads, infinities, subnormals and negative zeros.
        bits = torch.randint(limits.min, limits.max, shape, dtype=integers)
        for count in range(min(3, len(shape)) + 1):
            for axes in itertools.combinations(range(len(shape)), count):
                maps = {axis: random_permutation(1, shape[axis]) for axis in axes}
                expected = bits
                for axis, unit_map in maps.items():
                    expected = expected.index_select(axis, unit_map.index[0])
                result = permute_merge([bits.view(dtype)], maps, weights=[1.0])
                assert torch.equal(result.view(integers), expected)
                assert torch.equal(by_reference([bits.view(dtype)], maps, weights=[1.0]).view(integers), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (40, 70), (5, 9, 3, 3), (3, 4, 5, 6), (2, 3, 80), (900, 700)], ids=str)
@pytest.mark.parametrize("num_models", [1, 2, 9])
def test_fast_path_matches_general_path(dtype: torch.dtype, shape: tuple[int, ...], num_models: int) -> None:
    """The call that runs entirely in C++ and the one with Python's checks agree bit for bit."""
    torch.manual_seed(9)
    tensors = random_tensors(num_models, shape, dtype)
    for count in range(3):
        for axes in itertools.permutations(range(len(shape)), count):
            for kind in ("permutation", "scaled clusters", "selection"):
                maps = {axis: random_map(kind, num_models, shape[axis]) for axis in axes}
                for weights in (None, [1.0] * num_models):
                    result = permute_merge(tensors, maps, weights=weights)
                    with use_backend("cpu"):
                        expected = permute_merge(tensors, maps, weights=weights)
                    assert result.shape == expected.shape
                    assert torch.equal(result, expected)
                    given = torch.full_like(expected, math.nan)
                    assert permute_merge(tensors, maps, weights=weights, out=given) is given
                    assert torch.equal(given, expected)


@pytest.mark.parametrize(
    ("dtype", "shape", "num_models", "axes"),
    [
        (torch.float32, (4099, 2053), 1, (0,)),
        (torch.float16, (4099, 4111), 1, (0,)),
        (torch.float32, (4099, 2053), 1, (1,)),
        (torch.float32, (4099, 2053), 2, (0,)),
        (torch.float32, (4099, 2053), 2, (0, 1)),
        (torch.float32, (4099, 70, 31), 2, ()),
    ],
    ids=str,
)
@pytest.mark.usefixtures("isa")
def test_large_results_bypass_caches(
    dtype: torch.dtype, shape: tuple[int, ...], num_models: int, axes: tuple[int, ...]
) -> None:
    """Results of 32 MB and more, with lines that begin and end within a vector."""
    torch.manual_seed(10)
    tensor = torch.rand(shape, dtype=dtype)
    maps = {axis: random_permutation(num_models, shape[axis]) for axis in axes}
    parts = [tensor] * num_models
    for axis, unit_map in maps.items():
        parts = [part.index_select(axis, unit_map.index[model]) for model, part in enumerate(parts)]
    expected = parts[0] if num_models == 1 else parts[0].mul_(0.5).add_(parts[1].mul_(0.5)) if axes else tensor
    assert torch.equal(permute_merge([tensor] * num_models, maps), expected)


def test_used_maps_can_be_copied() -> None:
    unit_map = UnitMap.permutation(torch.tensor([[1, 0]]))
    tensor = torch.tensor([1.0, 2.0])
    permute_merge([tensor], {0: unit_map})
    for other in (copy.copy(unit_map), copy.deepcopy(unit_map), pickle.loads(pickle.dumps(unit_map))):
        assert torch.equal(permute_merge([tensor], {0: other}), tensor.flip(0))


class Marked(Tensor):
    """A tensor subclass, as other libraries define them."""


def test_tensor_subclasses_use_general_path() -> None:
    unit_map = UnitMap.permutation(torch.tensor([[1, 0]]))
    tensor = torch.tensor([1.0, 2.0])
    result = permute_merge([tensor.as_subclass(Marked)], {0: unit_map})
    assert torch.equal(result.as_subclass(Tensor), tensor.flip(0))
    strided = torch.stack([tensor, tensor], 1)[:, 0]
    assert torch.equal(permute_merge([strided], {-1: unit_map}), tensor.flip(0))
    assert torch.equal(permute_merge([tensor.numpy()], {0: unit_map}, weights=[1]), tensor.flip(0))
    assert torch.equal(permute_merge([tensor], MappingProxyType({0: unit_map})), tensor.flip(0))


def test_environment_applies_to_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    unit_map = UnitMap.permutation(torch.tensor([[1, 0]]))
    monkeypatch.setenv("MUDSC_ISA", "avx1024")
    with pytest.raises(ValueError, match="MUDSC_ISA must be one of"):
        permute_merge([torch.ones(2)], {0: unit_map})
    monkeypatch.setenv("MUDSC_ISA", "")
    monkeypatch.setenv("MUDSC_BACKEND", "none")
    with pytest.raises(ValueError, match="MUDSC_BACKEND must be one of"):
        permute_merge([torch.ones(2)], {0: unit_map})


@pytest.mark.usefixtures("isa")
def test_three_axes() -> None:
    torch.manual_seed(2)
    tensors = random_tensors(2, (6, 7, 8, 3), torch.float32)
    maps = {
        0: random_map("clusters", 2, 6),
        -3: random_map("permutation", 2, 7),
        2: random_map("scaled clusters", 2, 8),
    }
    expected = torch.zeros(4, 7, 6, 3)
    for i, tensor in enumerate(tensors):
        for a in range(6):
            for b in range(7):
                for c in range(8):
                    k, m = int(maps[0].index[i, a]), int(maps[2].index[i, c])
                    scale = maps[2].scale
                    assert scale is not None
                    expected[k, b, m] += 0.5 * float(scale[m]) * tensor[a, int(maps[-3].index[i, b]), c]
    torch.testing.assert_close(permute_merge(tensors, maps), expected)
    torch.testing.assert_close(by_reference(tensors, maps), expected)


@pytest.mark.usefixtures("isa")
def test_matches_product_with_cluster_matrices() -> None:
    """As published: merge the producing axis, unmerge the consuming axis, average over models."""
    torch.manual_seed(3)
    models, units = 2, 12
    cluster_of_unit = torch.randperm(models * units).remainder(units).reshape(models, units)
    unmerge = torch.nn.functional.one_hot(cluster_of_unit, units).float()  # [N, C, K]
    sizes = unmerge.sum((0, 1))
    scale = models / (sizes + 1e-5)
    tensors = random_tensors(models, (units, units), torch.float32)
    expected = sum((unmerge[i] * scale).T @ tensors[i] @ unmerge[i] for i in range(models)) / models
    produced = UnitMap.clusters(cluster_of_unit, units, scale)
    consumed = UnitMap.clusters(cluster_of_unit, units)
    result = permute_merge(tensors, {0: produced, 1: consumed})
    torch.testing.assert_close(result, torch.as_tensor(expected))


@pytest.mark.parametrize("kind", ["permutation", "clusters"])
@pytest.mark.usefixtures("isa")
def test_inputs_of_any_strides(kind: str) -> None:
    torch.manual_seed(4)
    tensors = [torch.randn(9, 8, 10).permute(1, 2, 0), torch.randn(16, 20, 9)[::2, ::2]]
    maps = {0: random_map(kind, 2, 8), 1: random_map(kind, 2, 10)}
    copies = [tensor.contiguous() for tensor in tensors]
    assert torch.equal(permute_merge(tensors, maps), permute_merge(copies, maps))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["permutation", "clusters"])
@pytest.mark.parametrize("num_models", [1, 2])
def test_out_is_written_and_returned(backend: str, kind: str, num_models: int) -> None:
    torch.manual_seed(5)
    tensors = random_tensors(num_models, (6, 8), torch.bfloat16)
    maps = {1: random_map(kind, num_models, 8)}
    expected = permute_merge(tensors, maps)
    for out in (torch.empty_like(expected), torch.empty_like(expected.T).T):
        with use_backend(backend):
            assert permute_merge(tensors, maps, out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_result_is_a_copy_even_if_nothing_moves(backend: str) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    with use_backend(backend):
        result = permute_merge([tensor], {})
    assert torch.equal(result, tensor)
    result.zero_()
    assert tensor[1, 2] == 5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_axes_and_scalars(backend: str) -> None:
    with use_backend(backend):
        assert permute_merge([torch.tensor(2.0), torch.tensor(4.0)], {}).item() == 3
        for axis in range(3):
            for free in range(3):
                shape = [3, 3, 3]
                shape[free] = 0
                mapped = {axis: random_permutation(2, shape[axis])}
                assert permute_merge([torch.ones(shape)] * 2, mapped).shape == torch.Size(shape)
        no_units = UnitMap.clusters(torch.empty(2, 0, dtype=torch.int64), 4)
        for axis, shape in [(0, [0, 3]), (1, [3, 0]), (0, [0, 100])]:
            result = permute_merge([torch.ones(shape)] * 2, {axis: no_units})
            shape[axis] = 4
            assert torch.equal(result, torch.zeros(shape))
        none_selected = UnitMap.permutation(torch.empty(2, 0, dtype=torch.int64), units_in=3)
        assert permute_merge([torch.ones(3, 5)] * 2, {0: none_selected}).shape == (0, 5)


@pytest.mark.usefixtures("isa")
def test_clusters_without_units_are_zero() -> None:
    tensors = random_tensors(2, (5, 70), torch.float32)
    unit_map = UnitMap.clusters(torch.tensor([[3, 3, 3, 1, 1]] * 2), 5)
    for result in (
        permute_merge(tensors, {0: unit_map}),
        permute_merge([t.T for t in tensors], {1: unit_map}).T,
    ):
        assert torch.equal(result[[0, 2, 4]], torch.zeros(3, 70))
        torch.testing.assert_close(result[3], (tensors[0][:3] + tensors[1][:3]).sum(0) / 2)


@pytest.mark.usefixtures("isa")
def test_half_sums_are_accumulated_in_float32() -> None:
    """1024 units of 1.0 and 1024 of 2^-10: the small ones are lost one by one in float16, but not in float32."""
    units = torch.cat([torch.full((1024,), 1.0), torch.full((1024,), 2.0**-10)]).half()
    together = UnitMap.clusters(torch.zeros(1, 2048, dtype=torch.int64), 1)
    assert permute_merge([units], {0: together}, weights=[1.0]).item() == 1025
    columns = units.reshape(1, -1).expand(3, -1)
    assert permute_merge([columns], {1: together}, weights=[1.0]).flatten().tolist() == [1025] * 3


def test_threads_do_not_change_result() -> None:
    tensors = random_tensors(2, (1500, 700), torch.float32)
    maps = {0: random_map("clusters", 2, 1500), 1: random_map("clusters", 2, 700)}
    one, rows = permute_merge(tensors, maps), permute_merge(tensors, {0: maps[0]})
    torch.set_num_threads(3)
    assert torch.equal(permute_merge(tensors, maps), one)
    assert torch.equal(permute_merge(tensors, {0: maps[0]}), rows)


@given(data=st.data())
def test_permutation_and_inverse_cancel(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    tensor = torch.randn(shape).to(dtype)
    there = torch.randperm(shape[axis])
    moved = permute_merge([tensor], {axis: UnitMap.permutation(there[None])})
    back = permute_merge([moved], {axis: UnitMap.permutation(there.argsort()[None])})
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_group_matches_single_merges(backend: str) -> None:
    torch.manual_seed(9)
    groups = [random_tensors(2, shape, torch.float32) for shape in [(5,), (6, 7), (0,), (3, 4, 2, 2)]]
    maps = [
        {0: random_map("clusters", 2, 5)},
        {1: random_map("permutation", 2, 7)},
        {},
        {0: random_map("selection", 2, 3)},
    ]
    with use_backend(backend):
        results = permute_merge_group(groups, maps, weights=[0.25, 0.5])
        for result, tensors, by_axis in zip(results, groups, maps, strict=True):
            assert torch.equal(result, permute_merge(tensors, by_axis, weights=[0.25, 0.5]))
    assert permute_merge_group([], []) == []


@pytest.mark.parametrize(
    ("groups", "maps", "message"),
    [
        ([[torch.ones(2)]], [], "maps must have one entry per group, 1, got 0"),
        (
            [[torch.ones(2)], [torch.ones(2)] * 2],
            [{}, {}],
            r"groups\[1\] must have as many tensors as groups\[0\], 1, got 2",
        ),
        ([[torch.ones(2)], [torch.ones(2).half()]], [{}, {}], r"groups\[1\] must have the dtype of groups\[0\]"),
    ],
)
def test_bad_groups(groups: Any, maps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        permute_merge_group(groups, maps)


@pytest.mark.parametrize("kind", ["permutation", "selection", "clusters"])
def test_members_invert_map(kind: str) -> None:
    unit_map = random_map(kind, 3, 11)
    members, starts = unit_map.members
    assert members.dtype == starts.dtype == torch.int32
    for model in range(3):
        for unit in range(unit_map.units_out):
            found = members[starts[model, unit] : starts[model, unit + 1]].tolist()
            index = unit_map.index[model]
            assert found == (
                [int(index[unit])] if unit_map.is_permutation else (index == unit).nonzero().flatten().tolist()
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("isa")
def test_in_place_matches_copy(dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(8)
    torch.set_num_threads(threads)
    for shape in [(1,), (61,), (40, 70), (20, 30, 3, 3), (6, 5, 5, 5), (5, 7, 50), (0, 3), (1500, 700)]:
        for count in range(4):
            for axes in itertools.combinations(range(len(shape)), count):
                tensor = torch.randn(shape).to(dtype)
                maps = {axis: random_permutation(1, shape[axis]) for axis in axes}
                expected = permute_merge([tensor], maps, weights=[1.0])
                by_torch = tensor.clone()
                with use_backend("reference"):
                    permute_(by_torch, maps)
                assert permute_(tensor, maps) is tensor
                assert torch.equal(tensor, expected)
                assert torch.equal(by_torch, expected)


@given(data=st.data())
def test_in_place_with_any_cycles_and_strides(data: st.DataObject) -> None:
    """Threads may start within a cycle, cycles may have one unit, and tensors need not be contiguous."""
    rows = data.draw(st.permutations(range(data.draw(st.integers(1, 9)))))
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    tensor = torch.randn(len(rows), data.draw(st.sampled_from([3, 300_000])))
    index = UnitMap.permutation(torch.tensor([rows]))
    view = tensor.T if data.draw(st.booleans()) else tensor
    axis = 1 if view is not tensor else 0
    expected = view.index_select(axis, torch.tensor(rows))
    assert torch.equal(permute_(view, {axis: index}), expected)


@pytest.mark.parametrize(
    ("tensor", "maps", "message"),
    [
        (torch.ones(3), {0: UnitMap.permutation(torch.tensor([[0, 2, 2]]))}, r"maps\[0\] .* got unit 1 0 times"),
        (torch.ones(3), {0: UnitMap.permutation(torch.tensor([[0, 2]]), units_in=3)}, "changes the units"),
        (torch.ones(3), {0: UnitMap.clusters(torch.tensor([[0, 2, 1]]), 3)}, "must be a permutation"),
        (torch.ones(2), {0: UnitMap.permutation(torch.tensor([[0, 1]] * 2))}, "of as many models"),
        (torch.ones(1).expand(3), {}, "got an expanded tensor"),
        (torch.nn.Parameter(torch.ones(3)), {}, "requires a gradient"),
    ],
)
def test_in_place_bad_arguments(tensor: Tensor, maps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        permute_(tensor, maps)


@given(data=st.data())
def test_clusters_preserve_total(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True, max_size=3))
    num_models = data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    tensors = [torch.randint(-9, 10, shape).double() for _ in range(num_models)]
    maps = {}
    for axis in axes:
        clusters = data.draw(st.integers(1, 25))
        maps[axis] = UnitMap.clusters(torch.randint(clusters, (num_models, shape[axis])), clusters)
    merged = permute_merge(tensors, maps, weights=[1.0] * num_models)
    assert merged.sum() == torch.stack(tensors).sum()


def test_gradients_are_rejected_and_no_grad_is_accepted() -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    unit_map = UnitMap.permutation(torch.tensor([[2, 0, 1]]))
    shorter = UnitMap.permutation(torch.tensor([[2, 0]]), units_in=3)
    with pytest.raises(ValueError, match=r"tensors\[0\] requires a gradient, which is not implemented"):
        permute_merge([parameter], {0: unit_map})
    for backend in (None, "cpu", "reference"):
        with torch.no_grad(), contextlib.nullcontext() if backend is None else use_backend(backend):
            results = [permute_merge([parameter], {0: each}) for each in (unit_map, shorter)]
        assert [result.tolist() for result in results] == [[2, 0, 1], [2, 0]]
        assert not any(result.requires_grad or type(result) is not Tensor for result in results)
    with pytest.raises(ValueError, match="out requires a gradient"):
        permute_merge([torch.ones(3)], {0: unit_map}, out=parameter)


def test_map_copies_its_indices() -> None:
    index = torch.tensor([[1, 0]])
    unit_map = UnitMap.permutation(index)
    index[0, 0] = 10**9
    assert permute_merge([torch.tensor([1.0, 2.0])], {0: unit_map}).tolist() == [2, 1]
    assert (unit_map.num_models, unit_map.units_in, unit_map.units_out) == (1, 2, 2)
    assert unit_map.is_permutation
    assert not UnitMap.clusters(torch.tensor([[1, 0]]), 2).is_permutation


A, B = torch.ones(2, 3), torch.ones(2, 3)
TWO = UnitMap.permutation(torch.tensor([[1, 0], [0, 1]]))
THREE = UnitMap.clusters(torch.tensor([[1, 0, 1], [0, 1, 1]]), 2)


@pytest.mark.parametrize(
    ("tensors", "maps", "options", "error", "message"),
    [
        ([], {}, {}, ValueError, "at least one tensor"),
        (A, {}, {}, TypeError, "tensors must be a sequence of tensors, got Tensor"),
        ([A, "b"], {}, {}, TypeError, r"tensors\[1\] must be a torch.Tensor, got str"),
        ([A, B.int()], {}, {}, TypeError, r"tensors\[1\] must have dtype .*got int32"),
        (
            [A, B.T],
            {},
            {},
            ValueError,
            r"tensors\[1\] must have the shape of tensors\[0\], \[2, 3\], got \[3, 2\]",
        ),
        ([A, B.half()], {}, {}, ValueError, r"tensors\[1\] must have the dtype .*float32, got torch.float16"),
        ([A, B.to("meta")], {}, {}, ValueError, r"tensors\[1\] must hold data"),
        ([A, B], [TWO], {}, TypeError, "maps must be a mapping"),
        ([A, B], {"0": TWO}, {}, TypeError, "axes of maps must be ints, got str"),
        ([A, B], {0: TWO.index}, {}, TypeError, r"maps\[0\] must be a UnitMap, got Tensor"),
        ([A, B], {2: TWO}, {}, ValueError, "maps has axis 2, but the tensors have 2 axes"),
        ([A, B], {-3: TWO}, {}, ValueError, "maps has axis -3"),
        ([A, B], {0: TWO, -2: TWO}, {}, ValueError, "maps has axis 0 twice: as 0 and as -2"),
        ([A, B], {1: TWO}, {}, ValueError, r"maps\[1\] must take 3 units, the .* on axis 1, got a map of 2"),
        ([A], {1: THREE}, {}, ValueError, r"maps\[1\] must be of as many models as .* 1, got 2"),
        ([A, B], {}, {"weights": [1.0]}, ValueError, "weights must have one entry per tensor, 2, got 1"),
        ([A, B], {}, {"weights": [1.0, float("nan")]}, ValueError, r"weights\[1\] must be a number, got NaN"),
        ([A, B], {}, {"weights": [1.0, float("inf")]}, ValueError, r"weights\[1\] must be finite, got inf"),
        ([A, B], {}, {"weights": [1.0, "1"]}, TypeError, r"weights\[1\] must be a number, got str"),
        ([A, B], {}, {"out": [1]}, TypeError, "out must be a torch.Tensor, got list"),
        ([A, B], {1: THREE}, {"out": torch.ones(2, 3)}, ValueError, r"out .* \[2, 2\], got \[2, 3\]"),
        ([A, B], {}, {"out": A.half()}, ValueError, "out must have the dtype"),
        (
            [A, B],
            {},
            {"out": torch._neg_view(torch.zeros_like(A))},
            ValueError,
            "out must not be a view with the negative bit set",
        ),
        ([A, B], {}, {"out": B}, ValueError, r"out must not share memory .* tensors\[1\]"),
        ([A, B], {}, {"out": torch.ones(3).expand(2, 3)}, ValueError, "got an expanded tensor"),
    ],
)
def test_bad_arguments(tensors: Any, maps: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        permute_merge(tensors, maps, **options)


def test_out_may_share_storage_without_overlap() -> None:
    storage = torch.arange(6.0)
    permute_merge([storage[:3]], {}, out=storage[3:])
    assert storage.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match="out must not share memory"):
        permute_merge([storage[:3]], {}, out=storage[2:5])


INDEX = torch.tensor([[0, 1, 2]])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UnitMap.permutation([0, 1]), TypeError, "index must be a torch.Tensor, got list"),  # type: ignore[arg-type]
        (lambda: UnitMap.permutation(INDEX.int()), TypeError, "index must have dtype int64, got int32"),
        (lambda: UnitMap.permutation(INDEX[0]), ValueError, r"index must be \[num_models.*got \[3\]"),
        (lambda: UnitMap.permutation(INDEX[:0]), ValueError, r"index must be \[num_models.*got \[0, 3\]"),
        (lambda: UnitMap.permutation(INDEX + 1), ValueError, r"index .*\[0, 3\), got 3 at \(0, 2\)"),
        (lambda: UnitMap.permutation(INDEX - 1), ValueError, r"index .*got -1 at \(0, 0\)"),
        (lambda: UnitMap.permutation(INDEX, units_in=2), ValueError, r"\[0, 2\), got 2 at \(0, 2\)"),
        (lambda: UnitMap.permutation(INDEX, units_in=2**31), ValueError, "units_in must be at most"),
        (lambda: UnitMap.permutation(INDEX, units_in=3.0), TypeError, "units_in must be an int"),  # type: ignore[arg-type]
        (lambda: UnitMap.clusters(INDEX, 2), ValueError, r"cluster_of_unit .*\[0, 2\), got 2 at \(0, 2\)"),
        (lambda: UnitMap.clusters(INDEX, -1), ValueError, "num_clusters must be at least 0, got -1"),
        (lambda: UnitMap.clusters(INDEX, 2**31), ValueError, "num_clusters must be at most"),
        (lambda: UnitMap.clusters(INDEX, 3, torch.ones(2)), ValueError, r"scale .* = \[3\], got \[2\]"),
        (lambda: UnitMap.clusters(INDEX, 3, INDEX[0]), TypeError, "scale must have dtype"),
        (
            lambda: UnitMap.clusters(INDEX, 3, torch.tensor([1.0, float("nan"), 2.0])),
            ValueError,
            "scale must be finite",
        ),
    ],
)
def test_bad_maps(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
