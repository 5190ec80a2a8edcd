"""Zip: the C++ kernel against the plain procedure, published results, and cases solved by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import load_golden
from mudsc_fast.kernels.cpu import zip as cpu
from mudsc_fast.kernels.reference import zip as reference
from mudsc_fast.ops._dispatch import use_backend
from mudsc_fast.ops.zip import ZipResult, zip_units
from similarities import FAMILIES, random_entries, symmetric

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHRINKS = (0.5, 0.3, 0.125, 0.9, 1.0, 1.7, 2.0, 0.0, -1.0)
BUDGETS = (0.0, 0.125, 0.5, 1.0)
BACKENDS = ("cpu", "reference")

# The fixture `isa` sets an environment variable for the whole test, which all examples may share.
examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw a similarity matrix of any family, shape and dtype, with its number of models."""
    num_models = draw(st.integers(1, 4))
    units = num_models * draw(st.integers(1, 24))
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    return family(units, draw(st.integers(0, 2**20))).to(draw(st.sampled_from(DTYPES))), num_models


def assert_same(similarity: Tensor, num_models: int, remaining: int, budget: int, shrink: float) -> None:
    """Compare kernel and reference bit for bit, merge for merge."""
    before = similarity.clone()
    clusters, values = cpu.zip_units(similarity, num_models, remaining, budget, shrink)
    expected_clusters, expected_values = reference.zip_units(similarity, num_models, remaining, budget, shrink)
    assert values.tolist() == expected_values.tolist()
    assert clusters.tolist() == expected_clusters.tolist()
    assert torch.equal(similarity, before)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(6))
def test_published_result(number: int, backend: str) -> None:
    golden = load_golden(f"zip_{number}")
    with use_backend(backend):
        result = zip_units(
            torch.from_numpy(golden["similarity"]),
            int(golden["num_models"]),
            ratio=float(golden["ratio"]),
            shrink=float(golden["a"]),
            budget=float(golden["b"]),
        )
    unmerge = torch.nn.functional.one_hot(result.cluster_of_unit).numpy()
    assert (unmerge == golden["unmerge"]).all()
    assert result.sizes.tolist() == golden["unmerge"].sum(0).tolist()
    assert result.value == pytest.approx(float(golden["value"]), abs=1e-6)


@pytest.mark.usefixtures("isa")
@examples
@given(
    problem=problems(),
    shrink=st.sampled_from(SHRINKS),
    remaining_share=st.floats(0, 1),
    budget_share=st.floats(0, 1),
)
def test_kernel_matches_reference(
    problem: tuple[Tensor, int], shrink: float, remaining_share: float, budget_share: float
) -> None:
    similarity, num_models = problem
    remaining = max(1, round(len(similarity) * remaining_share))
    budget = int((len(similarity) - remaining) // num_models * budget_share)
    assert_same(similarity, num_models, remaining, budget, shrink)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("dtype", "shrink"), [(torch.float32, 0.5), (torch.float64, 0.0)])
@pytest.mark.parametrize(
    "family",
    [
        "asymmetric",
        "dead units",
        *(
            pytest.param(family, marks=pytest.mark.values)
            for family in ("correlation", "few values", "negative powers of two, asymmetric")
        ),
    ],
)
def test_kernel_matches_reference_beyond_one_block(family: str, dtype: torch.dtype, shrink: float) -> None:
    similarity = FAMILIES[family](546, 7).to(dtype)  # more than the 512 columns that are searched at once
    assert_same(similarity, num_models=3, remaining=300, budget=40, shrink=shrink)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [(129, 0), (0, 129), (64, 63), (129, 128)])
def test_one_entry_that_differs_from_its_mirror_image(place: tuple[int, int]) -> None:
    similarity = symmetric(random_entries(130, 3))
    similarity[place] = 9.0
    assert_same(similarity, 2, 40, 20, 0.5)
    assert_same(similarity, 2, 1, 65, 1.0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [(0, 0), (129, 129), (129, 0), (63, 64), (0, 129)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_entry_that_is_not_finite(place: tuple[int, int], dtype: torch.dtype) -> None:
    similarity = random_entries(130, 3).to(dtype)
    for bad in (math.nan, -math.inf):
        similarity[place] = bad
        with pytest.raises(ValueError, match=rf"similarity must be finite, got {bad} at \({place[0]}, {place[1]}\)"):
            cpu.zip_units(similarity, 2, 65, 32, 0.5)


@pytest.mark.usefixtures("isa")
def test_small_and_large_values() -> None:
    similarity = symmetric(random_entries(60, 3))
    for scale in (1e-38, 1e-44, 1e37):
        assert_same(similarity * scale, 2, 12, 24, 0.5)
    # Negative entries overflow to -inf, which no merge may use; both must stop at the same place.
    assert_same(-similarity.abs() * 1e37, 2, 2, 29, 1000.0)
    assert_same(similarity.abs() * 1e37, 2, 2, 29, 1000.0)


@given(
    problem=problems(),
    shrink=st.sampled_from([shrink for shrink in SHRINKS if shrink > 0]),
    budget=st.sampled_from(BUDGETS),
    ratio=st.none() | st.floats(0, 1, exclude_max=True),
)
def test_properties(problem: tuple[Tensor, int], shrink: float, budget: float, ratio: float | None) -> None:
    similarity, num_models = problem
    units = len(similarity)
    share = 1 - 1 / num_models if ratio is None else ratio
    remaining = int(units * (1 - share) + 1e-4)
    always_possible = budget == 1 or (num_models <= 2 and remaining >= units // num_models)
    assume(remaining > 0 and always_possible)
    result = zip_units(similarity, num_models, ratio=ratio, shrink=shrink, budget=budget)
    assert result.cluster_of_unit.dtype == result.sizes.dtype == torch.int64
    assert len(result.sizes) == remaining
    assert int(result.sizes.sum()) == units
    assert int(result.sizes.min()) >= 1
    assert result.sizes.tolist() == torch.bincount(result.cluster_of_unit).tolist()
    first_units = [result.cluster_of_unit.tolist().index(cluster) for cluster in range(remaining)]
    assert first_units == sorted(first_units)
    # Each merge within model 0 removes one of its clusters, so their number gives the number of merges.
    clusters_of_first_model = sum(unit < units // num_models for unit in first_units)
    inside = units // num_models - clusters_of_first_model
    assert inside <= int((units - remaining) // num_models * budget + 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
class TestByHand:
    """Small cases with known answers, through the public function."""

    @pytest.fixture(autouse=True)
    def _backend(self, backend: str) -> Any:
        with use_backend(backend):
            yield

    def test_pairs_across_models(self) -> None:
        similarity = torch.full((4, 4), 0.1)
        similarity[0, 3] = similarity[3, 0] = 0.5
        similarity[1, 2] = similarity[2, 1] = 0.75
        check(zip_units(similarity, 2), clusters=[0, 1, 1, 0], sizes=[2, 2], value=0.625)

    def test_shrink_raises_negative_similarities(self) -> None:
        similarity = torch.tensor([[0.0, -1.0, -4.0], [-1.0, 0.0, -3.0], [-4.0, -3.0, 0.0]])
        result = zip_units(similarity, 1, ratio=2 / 3)
        check(result, clusters=[0, 0, 0], sizes=[3], value=(-1.0 - 0.5 * 4.0) / 2)

    def test_ties_resolve_in_row_major_order(self) -> None:
        similarity = torch.zeros(4, 4)
        similarity[0, 3] = similarity[1, 2] = similarity[3, 0] = similarity[2, 1] = 1.0
        check(zip_units(similarity, 2, ratio=0.25), clusters=[0, 1, 2, 0], sizes=[2, 1, 1], value=1.0)
        similarity[0, 3] = 0.0  # the lower triangle's (2, 1) and (3, 0) now come after (1, 2)
        check(zip_units(similarity, 2, ratio=0.25), clusters=[0, 1, 1, 2], sizes=[1, 2, 1], value=1.0)

    def test_both_triangles_of_asymmetric_matrix_count(self) -> None:
        similarity = torch.tensor([[0.0, 0.1, 0.5], [0.9, 0.0, 0.2], [0.3, 0.2, 0.0]])
        check(zip_units(similarity, 3, ratio=1 / 3), clusters=[0, 0, 1], sizes=[2, 1], value=0.9)

    def test_spent_budget_forbids_merges_within_model(self) -> None:
        similarity = torch.zeros(8, 8)
        similarity[:4, :4] = 0.9  # model 0 would rather merge within itself
        similarity[:4, 4:] = similarity[4:, :4] = 0.1
        for budget, clusters in ((1.0, [0, 0, 0, 1]), (0.5, [0, 0, 1, 2]), (0.0, [0, 1, 2, 3])):
            result = zip_units(similarity, 2, budget=budget, shrink=1.0)
            assert result.cluster_of_unit[:4].tolist() == clusters

    def test_zero_shrink_severs_merged_cluster_from_both_models(self) -> None:
        similarity = torch.full((6, 6), -0.5)
        pairs = {(0, 2): 0.9, (0, 4): 0.8, (2, 4): 0.8, (1, 3): 0.2, (1, 2): 0.85, (1, 5): 0.1}
        for (row, column), value in pairs.items():
            similarity[row, column] = similarity[column, row] = value
        # Units 0 and 2 join models 0 and 1: unit 4, of model 2, may follow, at the full 0.8.
        result = zip_units(similarity, 3, ratio=0.5, shrink=0.0)
        check(result, clusters=[0, 1, 0, 1, 0, 2], sizes=[3, 2, 1], value=(0.9 + 0.8 + 0.2) / 3)

    def test_value_without_merges_is_zero(self) -> None:
        check(zip_units(torch.ones(3, 3), 1), clusters=[0, 1, 2], sizes=[1, 1, 1], value=0.0)
        check(zip_units(torch.ones(4, 4), 2, ratio=0), clusters=[0, 1, 2, 3], sizes=[1] * 4, value=0.0)

    def test_no_units(self) -> None:
        check(zip_units(torch.ones(0, 0), 2), clusters=[], sizes=[], value=0.0)

    def test_one_unit_per_model(self) -> None:
        check(zip_units(torch.ones(1, 1), 1), clusters=[0], sizes=[1], value=0.0)
        check(zip_units(torch.full((2, 2), -3.0), 2), clusters=[0, 0], sizes=[2], value=-3.0)

    def test_budget_too_small_for_ratio(self) -> None:
        with pytest.raises(ValueError, match=r"no legal merge is left at 4 clusters, 2 were requested"):
            zip_units(torch.ones(8, 8), 2, ratio=0.75, budget=0.0)
        with pytest.raises(ValueError, match=r"budget allows 1 merges inside each of num_models=2 models, shrink=0.5"):
            zip_units(torch.ones(8, 8), 2, ratio=0.75, budget=0.5)

    def test_clusters_inherit_bans_of_their_parts(self) -> None:
        similarity = torch.full((6, 6), 0.1)
        for row, column in ((0, 2), (1, 4), (3, 5)):
            similarity[row, column] = similarity[column, row] = 0.9
        # Every two of the three pairs share a model, and no model may merge within itself.
        with pytest.raises(ValueError, match=r"no legal merge is left at 3 clusters, 2 were requested"):
            zip_units(similarity, 3, budget=0.0)

    def test_too_many_severed_clusters_for_ratio(self) -> None:
        with pytest.raises(ValueError, match=r"no legal merge is left at 2 clusters, 1 were .* shrink=-1.0"):
            zip_units(torch.eye(4).flip(0), 2, ratio=0.75, shrink=-1)

    def test_severing_two_models_always_leaves_enough_merges(self) -> None:
        for seed in range(40):
            similarity = symmetric(random_entries(12, seed))
            for budget in BUDGETS:
                assert len(zip_units(similarity, 2, shrink=0.0, budget=budget).sizes) == 6


def check(result: ZipResult, clusters: list[int], sizes: list[int], value: float) -> None:
    assert result.cluster_of_unit.tolist() == clusters
    assert result.sizes.tolist() == sizes
    assert result.value == pytest.approx(value, abs=1e-7)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layouts(dtype: torch.dtype) -> None:
    square = random_entries(30, 5).to(dtype)
    wide = torch.zeros(60, 50, dtype=dtype)
    wide[::2, 7:37] = square
    expected = cpu.zip_units(square, 3, 10, 5, 0.5)
    for layout in (square.T.contiguous().T, wide[::2, 7:37], square.clone().requires_grad_()):
        clusters, values = cpu.zip_units(layout, 3, 10, 5, 0.5)
        assert torch.equal(clusters, expected[0])
        assert torch.equal(values, expected[1])
    rows_in_one_place = torch.arange(6.0).to(dtype).expand(6, 6)
    assert_same(rows_in_one_place, 2, 3, 1, 0.5)


def test_arguments_match_published_procedure() -> None:
    similarity = symmetric(random_entries(24, 1))
    result = zip_units(similarity, 3, shrink=0.3, budget=0.5)
    clusters, values = reference.zip_units(similarity, 3, remaining=8, budget=2, shrink=0.3)
    assert torch.equal(result.cluster_of_unit, clusters)
    assert result.value == float(values.mean())
    # 90 * (1 - 0.9) is 8.999...8 in float64, but must count as 9.
    assert len(zip_units(torch.eye(90), 10).sizes) == 9


class TestBadInput:
    def test_not_a_tensor(self) -> None:
        with pytest.raises(TypeError, match=r"similarity must be a torch.Tensor, got list"):
            zip_units([[0.0]], 1)  # type: ignore[arg-type]

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_dtype(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=r"similarity must have dtype float16, .*, got " + str(dtype)[6:]):
            zip_units(torch.ones(2, 2, dtype=dtype), 1)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, bad: float, dtype: torch.dtype) -> None:
        similarity = torch.ones(6, 6, dtype=dtype)
        similarity[3, 4] = similarity[5, 1] = bad
        with pytest.raises(ValueError, match=rf"similarity must be finite, got {bad} at \(3, 4\)"):
            zip_units(similarity, 2)

    def test_sum_beyond_dtype_range_is_finite(self) -> None:
        assert len(zip_units(torch.full((4, 4), 1.7e308, dtype=torch.float64), 2).sizes) == 2

    @pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 4, 4), ()])
    def test_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"similarity must be square, \[N \* C, N \* C\], got shape \["):
            zip_units(torch.ones(shape), 1)

    def test_size_not_divisible(self) -> None:
        with pytest.raises(ValueError, match=r"divisible by num_models=3, got shape \[4, 4\]"):
            zip_units(torch.ones(4, 4), 3)

    def test_num_models(self) -> None:
        with pytest.raises(ValueError, match=r"num_models must be at least 1, got 0"):
            zip_units(torch.ones(4, 4), 0)
        with pytest.raises(TypeError, match=r"num_models must be an int, got float"):
            zip_units(torch.ones(4, 4), 2.0)  # type: ignore[arg-type]

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.inf])
    def test_ratio(self, ratio: float) -> None:
        with pytest.raises(ValueError, match=rf"ratio must be in \[0, 1\), got {ratio}"):
            zip_units(torch.ones(4, 4), 2, ratio=ratio)

    def test_ratio_must_leave_a_cluster(self) -> None:
        with pytest.raises(ValueError, match=r"ratio must leave at least one cluster of 4 units, got 0.99"):
            zip_units(torch.ones(4, 4), 2, ratio=0.99)

    @pytest.mark.parametrize("budget", [-0.1, 1.01, -math.inf])
    def test_budget(self, budget: float) -> None:
        with pytest.raises(ValueError, match=rf"budget must be in \[0, 1\], got {budget}"):
            zip_units(torch.ones(4, 4), 2, budget=budget)

    @pytest.mark.parametrize("shrink", [math.inf, -math.inf])
    def test_shrink_not_finite(self, shrink: float) -> None:
        with pytest.raises(ValueError, match=rf"shrink must be finite, got {shrink}"):
            zip_units(torch.ones(4, 4), 2, shrink=shrink)

    @pytest.mark.parametrize("shrink", [1e-60, 1e60])
    def test_shrink_out_of_range(self, shrink: float) -> None:
        with pytest.raises(ValueError, match=r"shrink, if positive, must be in \[.*\], the range of float32, got"):
            zip_units(torch.ones(4, 4, dtype=torch.float16), 2, shrink=shrink)
        assert len(zip_units(torch.ones(4, 4, dtype=torch.float64), 2, shrink=shrink).sizes) == 2

    @pytest.mark.parametrize("argument", ["ratio", "shrink", "budget"])
    def test_not_a_number(self, argument: str) -> None:
        arguments: dict[str, Any] = {argument: math.nan}
        with pytest.raises(ValueError, match=rf"{argument} must be a number, got NaN"):
            zip_units(torch.ones(4, 4), 2, **arguments)
        arguments = {argument: "0.5"}
        with pytest.raises(TypeError, match=rf"{argument} must be a number, got str"):
            zip_units(torch.ones(4, 4), 2, **arguments)
