from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment as scipy_assignment

import mudsc_fast
from conftest import load_golden
from matrices import FAMILIES, make
from mudsc_fast import linear_assignment, linear_sum_assignment, use_backend

Array = npt.NDArray[Any]


def check_certificate(values: Array, result: mudsc_fast.Assignment, maximize: bool) -> None:
    """Assert that the result is a matching, and that its duals are feasible and prove that it is optimal."""
    exact = torch.from_numpy(values.astype(np.float64))
    rows, columns = exact.shape
    assigned = (result.columns >= 0).nonzero().flatten()
    partner = result.columns[assigned]
    assert len(assigned) == min(rows, columns)
    assert len(partner.unique()) == len(partner)
    scale = float(exact[exact.isfinite()].abs().max()) if exact.numel() else 0.0
    rounding = 1e-14 * scale * max(1, min(rows, columns))
    sign = 1.0 if maximize else -1.0
    slack = sign * (result.row_duals[:, None] + result.column_duals - exact)
    assert slack.numel() == 0 or float(slack.min()) >= -rounding
    if rows < columns:
        assert float((sign * result.column_duals).min()) >= 0
        unmatched = torch.ones(columns, dtype=torch.bool)
        unmatched[partner] = False
        assert not result.column_duals[unmatched].any()
    if rows > columns:
        assert float((sign * result.row_duals).min()) >= 0
        assert not result.row_duals[result.columns < 0].any()
    objective = float(exact[assigned, partner].sum())
    assert float(result.objective) == pytest.approx(objective, abs=rounding)
    bound = float(result.row_duals.sum() + result.column_duals.sum())
    assert objective + sign * float(result.gap) == pytest.approx(bound, abs=10 * rounding)
    assert 0 <= float(result.gap) <= 10 * rounding


@given(
    family=st.sampled_from(FAMILIES),
    rows=st.integers(0, 24),
    columns=st.integers(0, 24),
    seed=st.integers(0, 2**31),
    maximize=st.booleans(),
)
def test_optimal_and_proven(family: str, rows: int, columns: int, seed: int, maximize: bool) -> None:
    values = make(family, rows, columns, seed)
    best = values.astype(np.float64)[scipy_assignment(values.astype(np.float64), maximize)].sum()
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            result = linear_assignment(values, maximize=maximize)
        check_certificate(values, result, maximize)
        assert float(result.objective) == pytest.approx(best, rel=1e-12, abs=1e-12 * float(np.abs(best)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 9), (33, 20), (128, 128), (65, 200), (300, 300), (257, 411), (800, 800), (350, 820)]
)
def test_every_instruction_level(isa: str, family: str, shape: tuple[int, int]) -> None:
    values = make(family, *shape, seed=3)
    result = linear_assignment(values)
    check_certificate(values, result, maximize=True)
    exact = values.astype(np.float64)
    best = exact[scipy_assignment(exact, maximize=True)].sum()
    assert float(result.objective) == pytest.approx(best, rel=1e-12), isa


@settings(max_examples=40)
@given(
    family=st.sampled_from(FAMILIES),
    rows=st.integers(150, 900),
    columns=st.integers(256, 900),
    seed=st.integers(0, 2**31),
    maximize=st.booleans(),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_large_problems_are_optimal_and_proven(
    family: str, rows: int, columns: int, seed: int, maximize: bool, dtype: Any
) -> None:
    with np.errstate(over="ignore"):
        values = make(family, rows, columns, seed).astype(dtype)
    values = np.nan_to_num(values, posinf=6e4, neginf=-6e4)
    for matrix in (values, values.T):
        exact = matrix.astype(np.float64)
        best = exact[scipy_assignment(exact, maximize)].sum()
        result = linear_assignment(matrix, maximize=maximize)
        check_certificate(matrix, result, maximize)
        assert float(result.objective) == pytest.approx(best, rel=1e-12, abs=1e-12 * np.abs(exact).max())


@pytest.mark.parametrize("value", [1e-35, 1e-30, 3e38, 1e-300, 1e300])
@pytest.mark.parametrize("size", [60, 270, 790])
def test_costs_near_the_limits_of_their_dtype(value: float, size: int) -> None:
    dtype = np.float32 if 1e-40 < value < 1e39 else np.float64
    values = (value * np.random.default_rng(0).uniform(-1, 1, (size, size))).astype(dtype)
    result = linear_assignment(values)
    exact = values.astype(np.float64)
    assert float(result.objective) == pytest.approx(exact[scipy_assignment(exact, True)].sum(), rel=1e-12)
    check_certificate(values, result, maximize=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_zero_rows_differ_from_nearly_zero_rows(dtype: Any) -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((800, 800)).astype(dtype)
    zero, nearly = random.permutation(800)[:500].reshape(2, 250)
    values[zero] = np.where(random.random((250, 800)) < 0.5, 0.0, -0.0)
    values[nearly] = 0
    values[nearly, random.integers(0, 800, 250)] = 1
    for matrix in (values, np.ascontiguousarray(values.T)):
        result = linear_assignment(matrix)
        exact = matrix.astype(np.float64)
        assert float(result.objective) == pytest.approx(exact[scipy_assignment(exact, True)].sum(), rel=1e-12)
        check_certificate(matrix, result, maximize=True)
    columns = linear_assignment(values).columns.numpy()[np.sort(zero)]
    assert (np.diff(columns) > 0).all()


def test_rows_full_of_ties_refill_their_lists() -> None:
    # All rows prefer the same few columns, so their lists are exhausted again and again.
    random = np.random.default_rng(0)
    values = np.sort(random.integers(0, 40, 790))[None] + random.integers(0, 2, (790, 790)) * 1.0
    result = linear_assignment(values)
    assert float(result.objective) == values[scipy_assignment(values, True)].sum()
    check_certificate(values, result, maximize=True)


def make_float32(family: str, rows: int, columns: int, random: np.random.Generator) -> Array:
    """Return a float32 matrix of a family, scaled by a factor from 1e-20 to 1e20 if its range allows."""
    values = random.standard_normal((rows, columns), dtype=np.float32)
    if family == "ties":
        values = random.integers(-2, 3, (rows, columns)).astype(np.float32)
    elif family == "integers":
        values = random.integers(-(2**20), 2**20, (rows, columns)).astype(np.float32)
    elif family == "constant":
        values = np.full_like(values, random.standard_normal())
    elif family == "low rank":
        values = values[:, :2] @ random.standard_normal((values[:, :2].shape[1], columns), dtype=np.float32)
    elif family == "zero rows and columns":
        values[random.random(rows) < 0.3] = 0
        values[:, random.random(columns) < 0.3] = 0
    elif family == "identical rows" and rows > 0:
        values = values[random.integers(0, 1 + rows // 4, rows)]
    elif family == "dominating row" and rows > 0:
        values[random.integers(rows)] *= 1e6
    elif family == "equal prices":
        # All rows bid for the same columns, whose values differ only in the last digits of float32.
        prices = random.integers(1, 4, columns).astype(np.float32)
        values = prices + random.integers(0, 3, (rows, columns)).astype(np.float32) * np.float32(2.0**-21)
    scale = 2.0 ** random.integers(-66, 67 if family != "dominating row" else 40)
    return np.ascontiguousarray(values * np.float32(scale), dtype=np.float32)


PROVEN_FAMILIES = (
    "normal",
    "ties",
    "integers",
    "constant",
    "low rank",
    "zero rows and columns",
    "identical rows",
    "dominating row",
    "equal prices",
)
CASES_PER_EXAMPLE = 5


@pytest.mark.parametrize("family", PROVEN_FAMILIES)
@given(seed=st.integers(0, 2**63), maximize=st.booleans())
def test_thousands_of_float32_problems_are_proven(family: str, seed: int, maximize: bool) -> None:
    random = np.random.default_rng(seed)
    for _ in range(CASES_PER_EXAMPLE):
        rows, columns = (int(size) for size in random.integers(0, 201, 2))
        values = make_float32(family, rows, columns, random)
        prove(values, linear_assignment(values, maximize=maximize), maximize)


def prove(values: Array, result: mudsc_fast.Assignment, maximize: bool) -> None:
    """Assert the guarantees for float32 input: optimal, feasible for every entry, and a gap of at most 1e-12."""
    exact, sign = values.astype(np.float64), 1.0 if maximize else -1.0
    columns = result.columns.numpy()
    assigned = np.flatnonzero(columns >= 0)
    partner = columns[assigned]
    assert len(assigned) == len(np.unique(partner)) == min(values.shape)
    chosen = exact[assigned, partner]
    objective = float(result.objective)
    allowed = 1e-12 * max(float(np.abs(chosen).sum()), float(np.abs(exact).max(initial=0.0)))
    row_duals, column_duals = result.row_duals.numpy(), result.column_duals.numpy()
    slack = sign * (row_duals[:, None] + column_duals - exact)
    assert slack.min(initial=0.0) >= -allowed
    assert abs(chosen.sum() - objective) <= allowed
    assert abs(objective + sign * float(result.gap) - row_duals.sum() - column_duals.sum()) <= allowed
    assert abs(float(result.gap)) <= allowed
    assert abs(exact[scipy_assignment(exact, maximize)].sum() - objective) <= allowed


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 2**31), share=st.floats(0, 0.9))
def test_forbidden_pairs(rows: int, columns: int, seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    cost = random.standard_normal((rows, columns))
    cost[random.random(cost.shape) < share] = np.inf
    try:
        expected = cost[scipy_assignment(cost)].sum()
    except ValueError:
        for backend in ("cpu", "reference"):
            with use_backend(backend), pytest.raises(ValueError, match="similarity is infeasible"):
                linear_assignment(cost, maximize=False)
        with pytest.raises(ValueError, match="cost matrix is infeasible"):
            linear_sum_assignment(cost)
        return
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            result = linear_assignment(cost, maximize=False)
            check_certificate(cost, result, maximize=False)
            assert float(result.objective) == pytest.approx(expected)
            assert float(linear_assignment(-cost).objective) == pytest.approx(-expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [True, False])
def test_batches_and_dtypes(isa: str, dtype: torch.dtype, maximize: bool) -> None:
    values = torch.randn(3, 5, 17, 23, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = linear_assignment(values, maximize=maximize)
    assert result.columns.shape == (3, 5, 17)
    assert result.row_duals.shape == (3, 5, 17)
    assert result.column_duals.shape == (3, 5, 23)
    assert result.objective.shape == result.gap.shape == (3, 5)
    for index in np.ndindex(3, 5):
        single = linear_assignment(values[index], maximize=maximize)
        for field in ("columns", "objective", "row_duals", "column_duals", "gap"):
            assert torch.equal(getattr(single, field), getattr(result, field)[index]), isa
        check_certificate(values[index].double().numpy(), single, maximize)


def test_batches_use_threads() -> None:
    values = torch.randn(40, 300, 300)
    large = torch.randn(2100, 2100)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append([linear_assignment(values), linear_assignment(large)])
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one.columns, several.columns)
        assert torch.equal(one.row_duals, several.row_duals)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_integers(dtype: torch.dtype) -> None:
    values = torch.randint(0, 2 if dtype == torch.bool else 100, (9, 9)).to(dtype)
    expected = values.double().numpy()
    best = expected[scipy_assignment(expected, maximize=True)].sum()
    assert float(linear_assignment(values).objective) == best
    assert float(linear_assignment(values.numpy()).objective) == best


def test_strides_and_byte_order() -> None:
    values = torch.randn(40, 30)
    expected = linear_assignment(values[::2, 1::3].clone())
    assert torch.equal(linear_assignment(values[::2, 1::3]).columns, expected.columns)
    assert torch.equal(linear_assignment(values.T[1::3, ::2].T).columns, expected.columns)
    array = values.numpy()[::2, 1::3]
    swapped = array.astype(array.dtype.newbyteorder())
    for variant in (array, swapped, array[::-1][::-1], np.asfortranarray(array)):
        assert torch.equal(linear_assignment(variant).columns, expected.columns)
    frozen = np.ascontiguousarray(array)
    frozen.flags.writeable = False
    assert torch.equal(linear_assignment(frozen).columns, expected.columns)


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0), (2, 0, 3), (0, 3, 3), (2, 3, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    with use_backend(backend):
        result = linear_assignment(torch.zeros(shape))
    assert result.columns.tolist() == torch.full(shape[:-1], -1).tolist()
    assert result.row_duals.shape == shape[:-1]
    assert result.column_duals.shape == (*shape[:-2], shape[-1])
    assert not result.objective.any()
    assert not result.gap.any()


@given(
    family=st.sampled_from(("uniform", "ties", "equal rows", "tiny")),
    size=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    noise=st.sampled_from([0.0, 0.01, 100.0]),
)
def test_any_warm_start_gives_optimum(family: str, size: int, seed: int, noise: float) -> None:
    values = make(family, size, size, seed)
    changed = values + noise * np.abs(values).max() * np.random.default_rng(seed + 1).standard_normal(values.shape)
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            warm = linear_assignment(changed, warm_start=linear_assignment(values))
            cold = linear_assignment(changed)
        assert float(warm.objective) == pytest.approx(
            float(cold.objective), rel=1e-11, abs=1e-11 * np.abs(changed).max()
        )
        assert float(warm.gap) <= 1e-11 * size * np.abs(changed).max() * (1 + 1 / max(noise, 0.01))


@given(
    family=st.sampled_from(FAMILIES),
    rows=st.integers(1, 30) | st.integers(30, 128),
    columns=st.integers(1, 30) | st.integers(30, 128),
    seed=st.integers(0, 2**31),
    maximize=st.booleans(),
)
def test_small_problems_break_ties_like_scipy(family: str, rows: int, columns: int, seed: int, maximize: bool) -> None:
    values = make(family, rows, columns, seed).astype(np.float64)
    expected = scipy_assignment(values, maximize)
    assert np.array_equal(linear_sum_assignment(values, maximize), expected)
    for backend in ("cpu", "reference") if max(rows, columns) <= 30 else ("cpu",):
        with use_backend(backend):
            found = linear_sum_assignment(values, maximize)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (150, 150), (140, 200), (200, 140)])
def test_constant_matrices_get_diagonal_assignment(shape: tuple[int, int]) -> None:
    rows, columns = linear_sum_assignment(np.ones(shape))
    assert rows.tolist() == columns.tolist() == list(range(min(shape)))


def test_dead_units_keep_their_order() -> None:
    alive = torch.randn(150, 150, generator=torch.Generator().manual_seed(1)).abs() + 1
    alive[[2, 5, 9]] = 0
    alive[:, [2, 5, 9]] = 0
    assert linear_assignment(alive).columns[[2, 5, 9]].tolist() == [2, 5, 9]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_golden(number: int, backend: str) -> None:
    golden = load_golden(f"align_{number}")
    num_models = int(golden["num_models"])
    units = len(golden["similarity"]) // num_models
    for model in range(1, num_models):
        block = golden["similarity"][:units, model * units : (model + 1) * units]
        expected = golden["unmerge"][model * units : (model + 1) * units].argmax(0)
        with use_backend(backend):
            assert linear_assignment(block).columns.tolist() == expected.tolist()


# The cases of scipy's own documentation and tests: cost matrix and the costs along the optimal assignment.
SCIPY_CASES: list[tuple[list[list[float]], list[float]]] = [
    ([[400, 150, 400], [400, 450, 600], [300, 225, 300]], [150, 400, 300]),
    ([[400, 150, 400, 1], [400, 450, 600, 2], [300, 225, 300, 3]], [150, 2, 300]),
    ([[10, 10, 8], [9, 8, 1], [9, 7, 4]], [10, 1, 7]),
    ([[10, 10, 8, 11], [9, 8, 1, 1], [9, 7, 4, 10]], [10, 1, 4]),
    ([[10, float("inf"), float("inf")], [float("inf"), float("inf"), 1], [float("inf"), 7, float("inf")]], [10, 1, 7]),
    ([[4, 1, 3], [2, 0, 5], [3, 2, 2]], [1, 2, 2]),
    ([[]], []),
]


@pytest.mark.parametrize(("cost", "expected"), SCIPY_CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_scipy_cases(cost: list[list[float]], expected: list[float], sign: int) -> None:
    maximize = sign == -1
    matrix = sign * np.array(cost)
    rows, columns = linear_sum_assignment(matrix, maximize=maximize)
    assert rows.dtype == columns.dtype == np.int64
    assert rows.tolist() == sorted(rows)
    assert (sign * matrix[rows, columns]).sum() == sum(expected)
    rows, columns = linear_sum_assignment(cost_matrix=matrix.T, maximize=maximize)
    assert rows.tolist() == sorted(rows)
    assert (sign * matrix.T[rows, columns]).sum() == sum(expected)


@pytest.mark.parametrize("dtype", [bool, object, np.uint32, np.uint64, np.float16])
def test_scipy_input_types(dtype: Any) -> None:
    matrix = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]], dtype=dtype)
    rows, columns = linear_sum_assignment(matrix, True)
    assert matrix[rows, columns].sum() == 3
    assert all(isinstance(indices, np.ndarray) for indices in (rows, columns))
    rows, columns = linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]])
    assert columns.tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (4, 9), (9, 4), (40, 70), (70, 40), (200, 130)])
def test_fast_path_equals_general_path(isa: str, shape: tuple[int, int], dtype: Any) -> None:
    values = np.random.default_rng(5).standard_normal(shape).astype(dtype)
    for maximize in (False, True):
        with use_backend("cpu"):
            expected = linear_sum_assignment(values, maximize)
            proven = linear_assignment(values, maximize=maximize)
        for matrix in (values, torch.from_numpy(values)):
            found = linear_sum_assignment(matrix, maximize)
            assert all(isinstance(indices, type(matrix)) for indices in found)
            assert np.array_equal(np.stack(found), np.stack(expected)), isa
            result = linear_assignment(matrix, maximize=maximize)
            for name in ("columns", "objective", "row_duals", "column_duals", "gap"):
                assert torch.equal(getattr(result, name), getattr(proven, name))


def test_fast_path_respects_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUDSC_BACKEND", "abacus")
    with pytest.raises(ValueError, match="MUDSC_BACKEND must be one of"):
        linear_sum_assignment(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="MUDSC_BACKEND must be one of"):
        linear_assignment(np.zeros((3, 3)))
    monkeypatch.delenv("MUDSC_BACKEND")
    monkeypatch.setenv("MUDSC_ISA", "sse9")
    with pytest.raises(ValueError, match="MUDSC_ISA must be one of"):
        linear_sum_assignment(np.zeros((3, 3)))


def test_scipy_function_accepts_tensors() -> None:
    cost = torch.tensor([[4.0, 1, 3], [2, 0, 5], [3, 2, 2]], requires_grad=True)
    rows, columns = linear_sum_assignment(cost)
    assert isinstance(rows, torch.Tensor)
    assert columns.dtype == torch.int64
    assert columns.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ([1, 2, 3], r"expected a matrix \(2-D array\), got a 1 array"),
        (np.zeros((2, 2, 2)), r"expected a matrix \(2-D array\), got a 3 array"),
        ([[1, np.nan], [0, 1]], "matrix contains invalid numeric entries"),
        ([[1, -np.inf], [0, 1]], "matrix contains invalid numeric entries"),
        ([[np.inf, np.inf], [0, 1]], "cost matrix is infeasible"),
        ([[np.inf, 1], [np.inf, 2]], "cost matrix is infeasible"),
    ],
)
def test_scipy_errors(cost: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_sum_assignment(cost)
    with pytest.raises(ValueError, match=message.split(",")[0]):
        linear_sum_assignment(-np.array(cost), maximize=True)


@pytest.mark.parametrize(
    ("similarity", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"similarity must be \[..., n, m\], got shape \[3\]"),
        (torch.full((2, 2), float("nan")), ValueError, r"similarity must not hold NaN or \+inf"),
        (torch.full((2, 2), float("inf")), ValueError, r"similarity must not hold NaN or \+inf"),
        (torch.full((2, 2), -float("inf")), ValueError, "similarity is infeasible"),
        ("a", TypeError, "similarity must be a torch.Tensor, got str"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "similarity must hold real numbers, got dtype complex64"),
        (
            np.zeros((2, 2), complex),
            TypeError,
            "similarity must hold real numbers of at most 64 bits, got dtype complex128",
        ),
        (np.array([["a"]]), TypeError, "similarity must hold real numbers"),
        (torch.zeros(2, 2, device="meta"), ValueError, "meta device"),
    ],
)
def test_bad_input(similarity: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_assignment(similarity)


def make_large(family: str, size: int) -> Array:
    random = np.random.default_rng(7)
    if family == "constant rows":
        return np.repeat(random.standard_normal((size, 1)), size, axis=1)
    if family == "constant columns":
        return np.repeat(random.standard_normal((1, size)), size, axis=0)
    if family == "identity":
        return np.eye(size)
    if family == "permutation":
        return np.eye(size)[random.permutation(size)] + 0.1 * random.standard_normal((size, size))
    if family == "blocks":
        block = np.kron(np.eye(4), np.ones((size // 4, size // 4)))
        return block * random.random((size, size))
    if family == "sparse":
        return (random.random((size, size)) < 0.02) * random.random((size, size))
    if family == "equal prices":
        return np.add.outer(random.integers(0, 3, size), random.integers(0, 3, size)) + np.eye(size) * 1e-9
    return random.integers(0, 100, (size, size)).astype(np.float64)


@pytest.mark.parametrize(
    "family",
    [
        "constant rows",
        "constant columns",
        "identity",
        "permutation",
        "blocks",
        "sparse",
        "equal prices",
        "integers",
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param(np.float16, marks=pytest.mark.values), np.float32, np.float64])
@pytest.mark.parametrize("size", [320, 800])
def test_families_with_early_stops_and_ties(isa: str, family: str, dtype: Any, size: int) -> None:
    values = make_large(family, size).astype(dtype)
    exact = values.astype(np.float64)
    for maximize in (True, False):
        result = linear_assignment(values, maximize=maximize)
        check_certificate(values, result, maximize)
        best = exact[scipy_assignment(exact, maximize)].sum()
        assert float(result.objective) == pytest.approx(best, rel=1e-12, abs=1e-12), isa


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("size", [300, 800])
def test_one_bad_entry_among_constant_rows(value: float, size: int) -> None:
    values = np.zeros((size, size))
    values[7] = value
    with pytest.raises(ValueError, match="similarity must not hold NaN"):
        linear_assignment(values)
    values[7] = 0
    values[-1, -1] = value
    with pytest.raises(ValueError, match="similarity must not hold NaN"):
        linear_assignment(values)


@pytest.mark.values
@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [320, 800])
def test_large_warm_start(isa: str, noise: float, dtype: Any, size: int) -> None:
    random = np.random.default_rng(2)
    values = random.standard_normal((size, size)).astype(dtype)
    changed = (values + noise * random.standard_normal(values.shape)).astype(dtype)
    exact = changed.astype(np.float64)
    best = exact[scipy_assignment(exact, maximize=True)].sum()
    start = linear_assignment(values)
    assert float(linear_assignment(changed, warm_start=start).objective) == pytest.approx(best, rel=1e-12), isa
    for scale in (30.0, 1e6) if noise == 1.0 else (30.0,):
        far = dataclasses.replace(start, column_duals=scale * torch.randn(size, dtype=torch.float64))
        assert float(linear_assignment(changed, warm_start=far).objective) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("columns", [slice(None), slice(0, 200), slice(7, 8)], ids=str)
@pytest.mark.parametrize("dual", [1e10, -1e20, 1e39, 1e300, math.inf, math.nan])
def test_start_duals_much_larger_than_entries_are_ignored(dual: float, columns: slice) -> None:
    values = torch.randn(900, 900, generator=torch.Generator().manual_seed(0))
    found = linear_assignment(values)
    absurd = found.column_duals.clone()
    absurd[columns] = dual
    warm = linear_assignment(values, warm_start=dataclasses.replace(found, column_duals=absurd))
    assert float(warm.objective) == pytest.approx(float(found.objective), rel=1e-12)
    assert 0 <= float(warm.gap) <= 1e-12 * float(found.objective)


def test_other_problems_of_batch_keep_warm_start() -> None:
    values = torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = linear_assignment(values)
    for dtype in (torch.float64, torch.float32):
        duals = found.column_duals.to(dtype, copy=True)
        duals[1] = 1e30
        warm = linear_assignment(values, warm_start=dataclasses.replace(found, column_duals=duals))
        assert torch.equal(warm.columns, found.columns)


@pytest.mark.parametrize("tolerance", [0, 1e-4, 1e-2, 1.0, 1e300])
@pytest.mark.parametrize("shape", [(20, 20), (300, 300), (800, 800), (700, 820)])
def test_tolerance_bounds_the_gap(tolerance: float, shape: tuple[int, int]) -> None:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    result = linear_assignment(values, tolerance=tolerance)
    best = float(linear_assignment(values).objective)
    assert result.columns.unique().numel() == shape[0]
    slack = result.row_duals[:, None] + result.column_duals - values
    assert float(slack.min()) >= -1e-13
    bound = float(result.row_duals.sum() + result.column_duals.sum())
    assert float(result.objective + result.gap) == pytest.approx(bound, rel=1e-12)
    assert float(result.gap) <= max(tolerance, 1e-12) * abs(float(result.objective))
    assert best * (1 - 1e-12) <= bound


def test_loose_tolerance_stops_early() -> None:
    values = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(3))
    assert float(linear_assignment(values, tolerance=0.1).gap) > 0


@pytest.mark.parametrize(
    ("tolerance", "error", "message"),
    [
        (-1.0, ValueError, "tolerance must be at least 0, got -1.0"),
        (float("nan"), ValueError, "tolerance must be a number, got NaN"),
        ("tight", TypeError, "tolerance must be a number, got str"),
    ],
)
def test_bad_tolerance(tolerance: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_assignment(torch.zeros(3, 3), tolerance=tolerance)


def test_bad_warm_start() -> None:
    with pytest.raises(TypeError, match="warm_start must be an Assignment, got int"):
        linear_assignment(torch.zeros(3, 3), warm_start=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"warm_start must be of a problem of shape \[3, 3\]"):
        linear_assignment(torch.zeros(3, 3), warm_start=linear_assignment(torch.zeros(4, 4)))


@pytest.mark.parametrize(("rows", "columns"), [(200, 200), (150, 400), (300, 140)])
@pytest.mark.parametrize("change", [None, 0.1, math.inf, math.nan])
def test_float64_costs_that_float32_holds(rows: int, columns: int, change: float | None) -> None:
    values = np.random.default_rng(rows).integers(-50, 50, (rows, columns)).astype(np.float64)
    if change is not None:
        values[-1, -1] = change
    if change is not None and math.isnan(change):
        with pytest.raises(ValueError, match="NaN"):
            linear_assignment(values, maximize=False)
        return
    result = linear_assignment(values, maximize=False)
    check_certificate(values, result, maximize=False)
    if change != 0.1:
        narrow = linear_assignment(values.astype(np.float32), maximize=False)
        for name in ("columns", "row_duals", "column_duals", "objective", "gap"):
            assert torch.equal(getattr(result, name), getattr(narrow, name))
