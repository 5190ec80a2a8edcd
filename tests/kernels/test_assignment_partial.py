"""Thresholds, problems of several sizes in one call, and results without duals."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment as scipy_assignment

import mudsc_fast
from matrices import FAMILIES, make
from mudsc_fast import linear_assignment, use_backend
from mudsc_fast.kernels.cuda import assignment as cuda
from mudsc_fast.ops._assignment_padding import solve_ragged

Array = npt.NDArray[Any]


def best_with_threshold(values: Array, threshold: float, maximize: bool) -> float:
    """Return scipy's optimal sum of the distances of the pairs to the threshold."""
    gains = np.maximum((values.astype(np.float64) - threshold) * (1.0 if maximize else -1.0), 0.0)
    return float(gains[scipy_assignment(gains, maximize=True)].sum())


def check_threshold(values: Array, result: mudsc_fast.Assignment, threshold: float, maximize: bool) -> None:
    """Assert that every pair is better than the threshold, and that the duals prove the pairs to be optimal."""
    exact = values.astype(np.float64)
    sign = 1.0 if maximize else -1.0
    columns = result.columns.numpy()
    rows = np.flatnonzero(columns >= 0)
    partner = columns[rows]
    assert len(np.unique(partner)) == len(partner)
    chosen = exact[rows, partner]
    assert (sign * (chosen - threshold) > 0).all()
    finite = exact[np.isfinite(exact)]
    allowed = 1e-13 * max(1, min(exact.shape)) * max(float(np.abs(finite).max(initial=0.0)), abs(threshold))
    assert float(result.objective) == pytest.approx(chosen.sum(), abs=allowed)
    gain = float((sign * (chosen - threshold)).sum())
    assert gain == pytest.approx(best_with_threshold(values, threshold, maximize), abs=allowed)
    u, v = sign * result.row_duals.numpy(), sign * result.column_duals.numpy()
    assert min(u.min(initial=0.0), v.min(initial=0.0)) >= 0
    assert not u[columns < 0].any()
    assert not np.delete(v, partner).any()
    assert (u[:, None] + v - sign * (exact - threshold)).min(initial=0.0) >= -allowed
    assert gain + float(result.gap) == pytest.approx(u.sum() + v.sum(), abs=allowed)
    assert 0 <= float(result.gap) <= allowed
    assert result.threshold == threshold


@given(
    family=st.sampled_from(FAMILIES),
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    seed=st.integers(0, 2**31),
    quantile=st.floats(0, 1),
    maximize=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_threshold_is_optimal_and_proven(
    family: str, rows: int, columns: int, seed: int, quantile: float, maximize: bool, dtype: Any
) -> None:
    values = make(family, rows, columns, seed).astype(dtype)
    # Half of the thresholds equal an entry; the others lie between entries.
    threshold = float(np.quantile(values.astype(np.float64), quantile, method="nearest" if seed % 2 else "linear"))
    check_threshold(values, linear_assignment(values, threshold=threshold, maximize=maximize), threshold, maximize)
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            result = linear_assignment(values, threshold=threshold, maximize=maximize)
        check_threshold(values, result, threshold, maximize)


@settings(max_examples=10)
@given(
    rows=st.integers(100, 700),
    columns=st.integers(100, 700),
    seed=st.integers(0, 2**31),
    threshold=st.sampled_from([0.5, 0.8, 0.99]),
    maximize=st.booleans(),
)
def test_threshold_of_large_matrices(rows: int, columns: int, seed: int, threshold: float, maximize: bool) -> None:
    values = np.random.default_rng(seed).random((rows, columns), dtype=np.float32)
    if not maximize:
        values = 1 - values
    check_threshold(values, linear_assignment(values, threshold=threshold, maximize=maximize), threshold, maximize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_threshold_of_batches_and_dtypes(backend: str, dtype: torch.dtype) -> None:
    values = (8 * torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    with use_backend(backend):
        result = linear_assignment(values, threshold=4.2)
        assert result.columns.shape == (2, 3, 9)
        for index in np.ndindex(2, 3):
            one = mudsc_fast.Assignment(
                result.columns[index],
                result.objective[index],
                result.row_duals[index],
                result.column_duals[index],
                result.gap[index],
                result.threshold,
            )
            check_threshold(values[index].double().numpy(), one, 4.2, maximize=True)


def test_threshold_is_not_rounded_to_float32() -> None:
    near = np.float32(0.8)  # a little more than 0.8
    assert float(near) > 0.8
    values = np.full((1, 1), near)
    for backend in (None, "reference"):
        with use_backend(backend or "cpu"):
            assert linear_assignment(values, threshold=0.8).columns.tolist() == [0]
            assert linear_assignment(values, threshold=float(near)).columns.tolist() == [-1]
            assert linear_assignment(values, threshold=0.8, maximize=False).columns.tolist() == [-1]
    assert linear_assignment(values, threshold=0.8).columns.tolist() == [0]


def test_threshold_leaves_forbidden_pairs_unmatched() -> None:
    cost = np.array([[np.inf, np.inf, 3.0], [np.inf, 1.0, np.inf]])
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            result = linear_assignment(cost, threshold=2.0, maximize=False)
        assert result.columns.tolist() == [-1, 1]
        assert float(result.objective) == 1.0
        with use_backend(backend), pytest.raises(ValueError, match="must not hold NaN or -inf"):
            linear_assignment(-cost, threshold=2.0, maximize=False)
        with use_backend(backend), pytest.raises(ValueError, match="must not hold NaN"):
            linear_assignment(np.array([[np.nan, 1.0]]), threshold=2.0)


def same(first: mudsc_fast.Assignment, second: mudsc_fast.Assignment) -> None:
    assert torch.equal(first.columns, second.columns)
    assert float(first.objective) == pytest.approx(float(second.objective), rel=1e-13, abs=1e-13)


RAGGED = [(3, 5), (5, 3), (1, 1), (4, 4), (0, 2), (2, 0), (8, 12), (12, 8), (7, 1)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("shapes", [RAGGED, RAGGED[:1], [(3, 5), (2, 2), (1, 9)], [(5, 3), (9, 1), (2, 2)], [(0, 3)]])
def test_lists_and_padded_batches_match_single_problems(
    backend: str, threshold: float | None, maximize: bool, shapes: list[tuple[int, int]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    rows, columns = zip(*shapes, strict=True)
    padded = torch.full((len(shapes), max(rows), max(columns)), float("nan"), dtype=torch.float64)
    for index, matrix in enumerate(matrices):
        padded[index, : rows[index], : columns[index]] = matrix
    with use_backend(backend):
        expected = [linear_assignment(matrix, maximize=maximize, threshold=threshold) for matrix in matrices]
        listed = linear_assignment(matrices, maximize=maximize, threshold=threshold)
        from_padded = linear_assignment(
            padded, rows=torch.tensor(rows), columns=list(columns), maximize=maximize, threshold=threshold
        )
        only_columns = linear_assignment(matrices, maximize=maximize, threshold=threshold, return_duals=False)
    for index, one in enumerate(expected):
        for found in (listed[index], from_padded[index]):
            assert found.row_duals.shape == (rows[index],)
            assert found.column_duals.shape == (columns[index],)
            same(found, one)
            assert torch.equal(only_columns[index], one.columns)
            assert 0 <= float(found.gap) < 1e-12
            check_duals(matrices[index], found, threshold, maximize)


def check_duals(values: torch.Tensor, result: mudsc_fast.Assignment, threshold: float | None, maximize: bool) -> None:
    sign = 1.0 if maximize else -1.0
    gains = sign * (values - (threshold or 0.0))
    u, v = sign * result.row_duals, sign * result.column_duals
    assert values.numel() == 0 or float((u[:, None] + v - gains).min()) >= -1e-12
    pairs = int((result.columns >= 0).sum())
    bound = float(u.sum() + v.sum())
    assert sign * float(result.objective) - sign * (threshold or 0.0) * pairs == pytest.approx(bound, abs=1e-12)
    taken = torch.zeros(len(v), dtype=torch.bool)
    taken[result.columns[result.columns >= 0]] = True
    assert not u[result.columns < 0].any()
    assert not v[~taken].any()
    if threshold is not None or len(u) < len(v):
        assert bool((v >= 0).all())
    if threshold is not None or len(u) > len(v):
        assert bool((u >= 0).all())


def test_only_rows_or_only_columns() -> None:
    values = torch.randn(3, 4, 6)
    by_rows = linear_assignment(values, rows=[1, 4, 0])
    assert [one.columns.shape[0] for one in by_rows] == [1, 4, 0]
    same(by_rows[1], linear_assignment(values[1]))
    by_columns = linear_assignment(values, columns=np.array([6, 2, 3]))  # type: ignore[call-overload]
    same(by_columns[2], linear_assignment(values[2, :, :3]))


def test_lists_accept_any_array_and_layout() -> None:
    matrix = np.random.default_rng(0).standard_normal((20, 30))
    strided = np.zeros((40, 60))[::2, ::2]
    strided[:] = matrix
    given: list[Any] = [
        matrix,
        np.asfortranarray(matrix),
        strided,
        matrix[::-1][::-1],
        torch.from_numpy(matrix),
        torch.from_numpy(matrix).T.contiguous().T,
        torch.from_numpy(matrix).expand(20, 30),
    ]
    expected = linear_assignment(matrix)
    for result in linear_assignment(given):
        same(result, expected)
    halves = [torch.from_numpy(matrix).half(), torch.from_numpy(matrix).bfloat16(), torch.ones(3, 1).expand(3, 3)]
    for found, half in zip(linear_assignment(halves), halves, strict=True):
        same(found, linear_assignment(half))
    assert linear_assignment([]) == []
    assert linear_assignment((np.zeros((2, 2)),))[0].columns.tolist() == [0, 1]


def test_lists_with_threads_give_same_results() -> None:
    random = np.random.default_rng(0)
    matrices = [random.standard_normal((size, size + 10)) for size in random.integers(50, 200, 40)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear_assignment(matrices)
        torch.set_num_threads(4)
        several = linear_assignment(matrices)
    finally:
        torch.set_num_threads(before)
    for first, second in zip(one, several, strict=True):
        assert torch.equal(first.columns, second.columns)
        assert torch.equal(first.row_duals, second.row_duals)


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3), (40, 60), (300, 310)])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_columns_only_matches_full_result(shape: tuple[int, int], threshold: float | None) -> None:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    expected = linear_assignment(values, threshold=threshold).columns
    for given_values in (values, values.numpy()):
        columns = linear_assignment(given_values, threshold=threshold, return_duals=False)
        assert torch.equal(columns, expected)
    with use_backend("cpu"):
        assert torch.equal(linear_assignment(values, threshold=threshold, return_duals=False), expected)


@pytest.mark.parametrize("shape", [(700, 300), (300, 700), (1300, 900)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_layout_of_large_matrices(shape: tuple[int, int], dtype: Any) -> None:
    values = np.random.default_rng(0).random(shape).astype(dtype)
    best = values.astype(np.float64)[scipy_assignment(values, maximize=True)].sum()
    wide = np.zeros((shape[0], shape[1] + 5), dtype)
    wide[:, :-5] = values
    for matrix in (values, np.asfortranarray(values), wide[:, :-5]):
        assert float(linear_assignment(matrix).objective) == pytest.approx(best, rel=1e-12)
        rows, columns = mudsc_fast.linear_sum_assignment(matrix, maximize=True)
        assert values.astype(np.float64)[rows, columns].sum() == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (np.zeros((2, 2)), {"threshold": float("inf")}, ValueError, "threshold must be finite, got inf"),
        (np.zeros((2, 2)), {"threshold": float("nan")}, ValueError, "threshold must be a number, got NaN"),
        (np.zeros((2, 2)), {"threshold": "high"}, TypeError, "threshold must be a number, got str"),
        ([np.zeros(3)], {}, ValueError, r"similarity\[0\] must be a matrix \[n, m\], got shape \[3\]"),
        ([[1.0]], {}, TypeError, r"similarity\[0\] must be a torch.Tensor, got list"),
        ([np.zeros((2, 2)), np.full((2, 2), np.nan)], {}, ValueError, r"similarity\[1\] must not hold NaN"),
        ([np.full((2, 2), -np.inf)], {}, ValueError, r"similarity\[0\] is infeasible"),
        ([np.zeros((2, 2))], {"rows": [1]}, ValueError, "incompatible with a list of matrices"),
        ([np.zeros((2, 2))], {"tolerance": 0.1}, ValueError, "tolerance is incompatible with problems of several"),
        (np.zeros((2, 2)), {"rows": [1]}, ValueError, r"similarity must be \[batch, n, m\] with rows= or columns="),
        (np.zeros((2, 3, 3)), {"rows": [1]}, ValueError, "rows must hold one number for each of 2 problems, got 1"),
        (np.zeros((2, 3, 3)), {"columns": [1, 4]}, ValueError, r"columns\[1\] must be between 0 and 3, got 4"),
        (np.zeros((2, 3, 3)), {"columns": [1, 0.5]}, TypeError, r"columns\[1\] must be an int, got float"),
        (torch.zeros(2, 2), {"threshold": 1.0, "tolerance": 0.1}, ValueError, "tolerance and threshold are incompat"),
    ],
)
def test_bad_arguments(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_assignment(arguments, **options)


def test_report_and_short_repr() -> None:
    result = linear_assignment(torch.eye(40)[:, :30], threshold=0.5)
    assert repr(result) == (
        "Assignment(columns=[40], objective=[], row_duals=[40], column_duals=[30], gap=[], threshold=0.5)"
    )
    assert str(result).splitlines() == [
        "Assignment of 40 x 30",
        "pairs      30",
        "objective  30",
        "gap        0",
        "threshold  0.5",
    ]
    assert result._repr_html_().startswith("<table><caption>Assignment of 40 x 30</caption><tr><th>pairs</th>")
    batch = linear_assignment(torch.stack([torch.eye(3), 2 * torch.eye(3)]))
    assert str(batch).splitlines()[:3] == ["2 assignments of 3 x 3", "pairs      3", "objective  3 to 6"]
    assert "none" in str(linear_assignment(torch.zeros(0, 3, 3)))
    assert result != linear_assignment(torch.eye(40)[:, :30], threshold=0.5)
    assert len({result, batch}) == 2
    with pytest.raises(ValueError, match="expected a single assignment, got a batch"):
        batch.indices()
    rows, columns = result.indices()
    assert rows.tolist() == columns.tolist() == list(range(30))
    with pytest.raises(AttributeError, match="has no attribute 'cost'"):
        result.cost  # noqa: B018


def test_results_can_be_pickled_and_copied() -> None:
    import copy
    import pickle

    result = linear_assignment(np.eye(4))
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert torch.equal(other.columns, torch.arange(4))
        assert float(other.objective) == 4.0


def test_thresholds_and_lists_can_be_compiled() -> None:
    def matched(similarity: torch.Tensor) -> torch.Tensor:
        return linear_assignment(similarity, threshold=0.5, return_duals=False) + 1

    values = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(matched, backend="eager", fullgraph=True)
    assert torch.equal(compiled(values), matched(values))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2, 3, 2), (2, 2, 3), (300, 200)])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_infeasible_problems_are_errors_in_any_shape(
    shape: tuple[int, ...], threshold: float | None, backend: str
) -> None:
    values = torch.full(shape, float("nan"))
    with use_backend(backend), pytest.raises(ValueError, match="must not hold NaN"):
        linear_assignment(values, threshold=threshold)
    with use_backend(backend), pytest.raises(ValueError, match=r"\[0\] must not hold NaN"):
        linear_assignment([values.reshape(-1, shape[-1])], threshold=threshold)


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("shapes", [RAGGED, RAGGED[:1], [(5, 3), (9, 1), (2, 2)]])
def test_simulated_blocks_solve_problems_of_several_sizes(
    simulator: Any, threshold: float | None, shapes: list[tuple[int, int]]
) -> None:
    simulator.set_seed(1)
    random = np.random.default_rng(0)
    matrices = [torch.from_numpy(random.standard_normal(shape)) for shape in shapes]
    rows, columns = (torch.tensor(counts) for counts in zip(*shapes, strict=True))
    padded = torch.full((len(shapes), int(rows.max()), int(columns.max())), float("nan"), dtype=torch.float64)
    for problem, matrix in zip(padded, matrices, strict=True):
        problem[: matrix.shape[0], : matrix.shape[1]] = matrix
    solved = solve_ragged(padded, rows, columns, True, threshold, lambda wide: cuda.solve(wide, True, None, 0.0))
    for index, (matrix, expected) in enumerate(
        zip(matrices, linear_assignment(matrices, threshold=threshold), strict=True)
    ):
        found = mudsc_fast.Assignment(
            solved.columns[index, : matrix.shape[0]],
            solved.objective[index],
            solved.row_duals[index, : matrix.shape[0]],
            solved.column_duals[index, : matrix.shape[1]],
            solved.gap[index],
            threshold,
        )
        same(found, expected)
        check_duals(matrix, found, threshold, maximize=True)
