"""Assignment of points without their matrix: equal to that of the matrix, bit by bit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from mudsc_fast import Assignment, PairwiseSimilarity, linear_assignment, linear_sum_assignment, use_backend
from mudsc_fast.ops.pairwise import Kind

KINDS = get_args(Kind)
RESULTS = ("columns", "objective", "row_duals", "column_duals", "gap")


def random_points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_equals_matrix(problem: PairwiseSimilarity, **options: Any) -> Assignment:
    """Solve the problem with and without its matrix; both results must be equal, and the duals must prove them."""
    found: Assignment = linear_assignment(problem, **options)
    sense = {"maximize": not problem.is_cost, **options}
    matrix = problem.dense()
    expected = linear_assignment(matrix, **sense)
    for name in RESULTS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    lack = found.row_duals[:, None] + found.column_duals - matrix.double()
    slack = 1e-13 * float(matrix.abs().amax()) if matrix.numel() > 0 else 0.0
    assert bool(((lack if sense["maximize"] else -lack) >= -slack).all())
    rows, columns = found.indices()
    assert len(columns.unique()) == len(rows) == min(problem.shape)
    return found


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
def test_result_equals_that_of_matrix(kind: Kind) -> None:
    x, y = random_points(2, 1024, 5)
    check_equals_matrix(PairwiseSimilarity(x, y, kind))


@pytest.mark.parametrize("shape", [(500, 801), (801, 500), (1, 900), (900, 900), (30, 40), (40, 30), (0, 5), (5, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(shape: tuple[int, int], kind: Kind) -> None:
    problem = PairwiseSimilarity(random_points(shape[0], 3), random_points(shape[1], 3, seed=1), kind)
    assert problem.shape == shape
    check_equals_matrix(problem)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("features", [1, 17, 100])
@pytest.mark.parametrize("kind", ["cosine", "sqeuclidean"])
def test_entries_equal_those_of_torch(kind: Kind, features: int) -> None:
    # The duals of rows are single entries minus duals of columns, so results differ if an entry does.
    check_equals_matrix(PairwiseSimilarity(random_points(30, features), random_points(777, features, seed=1), kind))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_follow_formula(kind: Kind, dtype: torch.dtype) -> None:
    x, y = (4 * random_points(2, 20, 9)).to(dtype)
    a, b = x.double()[:, None], y.double()
    if kind == "sqeuclidean":
        expected = (a - b).square().sum(-1)
    else:
        if kind == "correlation":
            a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        expected = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    found = PairwiseSimilarity(x, y, kind).dense()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_arrays_of_numpy_are_points() -> None:
    x, y = random_points(2, 20, 3).numpy()
    from_tensors = PairwiseSimilarity(torch.tensor(x), torch.tensor(y), "cosine")
    assert torch.equal(PairwiseSimilarity(x, y, "cosine").dense(), from_tensors.dense())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_points_get_their_partners_in_order(kind: Kind) -> None:
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((60, 4))[random.integers(0, 60, 800)] for _ in range(2))
    check_equals_matrix(PairwiseSimilarity(x, y, kind))
    found = check_equals_matrix(PairwiseSimilarity(x, random.standard_normal((800, 4)), kind))
    for point in np.unique(x, axis=0):
        columns = found.columns[torch.from_numpy((x == point).all(1))]
        assert torch.equal(columns, columns.sort().values)


def test_points_of_grid_tie() -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 6, (2, 800, 3))
    check_equals_matrix(PairwiseSimilarity(x, y, "sqeuclidean"))


def test_distances_of_equal_points_are_zero() -> None:
    x = random_points(800, 50)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(1))
    found = linear_assignment(PairwiseSimilarity(x[order], x, "sqeuclidean"))
    assert torch.equal(found.columns, order)
    assert float(found.objective) == 0.0
    assert float(PairwiseSimilarity(x, x, "sqeuclidean").dense().min()) == 0.0


def test_numbers_are_assigned_in_ascending_order() -> None:
    x, y = random_points(2, 900, 1)
    found = check_equals_matrix(PairwiseSimilarity(x, y, "sqeuclidean"))
    assert torch.equal(found.columns[x[:, 0].argsort()], y[:, 0].argsort())


@pytest.mark.parametrize("kind", ["correlation", "cosine"])
def test_similarity_of_constant_points_is_zero(kind: Kind) -> None:
    x, y = random_points(2, 800, 4)
    x[::3] = 0.1 if kind == "correlation" else 0.0
    problem = PairwiseSimilarity(x, y, kind)
    assert bool((problem.dense()[::3] == 0).all())
    check_equals_matrix(problem)


def test_all_points_equal() -> None:
    found = check_equals_matrix(PairwiseSimilarity(torch.ones(800, 2), torch.zeros(800, 2), "sqeuclidean"))
    assert torch.equal(found.columns, torch.arange(800))


def test_digits_of_points_far_from_zero_are_kept() -> None:
    x, y = random_points(2, 100, 2).double()
    near = PairwiseSimilarity(x, y, "sqeuclidean").dense()
    far = PairwiseSimilarity(x + 5e6, y + 5e6, "sqeuclidean").dense()
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-5)


def test_distances_are_minimized_by_default() -> None:
    x, y = random_points(2, 800, 3)
    problem = PairwiseSimilarity(x, y, "sqeuclidean")
    nearest, farthest = linear_assignment(problem), check_equals_matrix(problem, maximize=True)
    assert torch.equal(nearest.columns, linear_assignment(problem.dense(), maximize=False).columns)
    assert float(nearest.objective) < float(farthest.objective)
    check_equals_matrix(PairwiseSimilarity(x, y, "cosine"), maximize=False)


def test_options() -> None:
    x, y = random_points(2, 800, 3)
    problem = PairwiseSimilarity(x, y, "sqeuclidean")
    found = linear_assignment(problem)
    assert torch.equal(linear_assignment(problem, return_duals=False), found.columns)
    check_equals_matrix(problem, warm_start=found)
    check_equals_matrix(problem, tolerance=0.5)


def check_optimal(problem: PairwiseSimilarity, **options: Any) -> Assignment:
    """Solve the problem with and without its matrix; both objectives must be equal, and the duals must prove it."""
    found: Assignment = linear_assignment(problem, **options)
    sense = {"maximize": not problem.is_cost, **options}
    matrix = problem.dense()
    expected = linear_assignment(matrix, **sense)
    largest = float(matrix.abs().amax())
    assert abs(float(found.objective - expected.objective)) <= 1e-12 * largest * min(problem.shape)
    assert 0 <= float(found.gap) <= 1e-12 * largest * min(problem.shape)
    rows, columns = found.indices()
    assert len(columns.unique()) == len(rows) == min(problem.shape)
    assert float(found.objective) == pytest.approx(float(matrix[rows, columns].double().sum()), rel=1e-12)
    lack = found.row_duals[:, None] + found.column_duals
    lack -= matrix
    assert float((lack if sense["maximize"] else -lack).min()) >= -1e-13 * largest
    unused = torch.ones(problem.shape[1], dtype=torch.bool)
    unused[columns] = False
    assert not found.column_duals[unused].any()
    assert float((found.row_duals.sum() + found.column_duals.sum() - found.objective).abs()) <= 1e-11 * largest * len(
        rows
    )
    return found


# From 8192 columns of few features on, only the tiles of neighbours that may matter are computed.
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("kind", "features"), [("sqeuclidean", 3), ("sqeuclidean", 8), ("cosine", 4), ("sqeuclidean", 1)]
)
def test_neighbours_prove_optimum(kind: Kind, features: int) -> None:
    x = random_points(700, features)
    y = random_points(8200, features, seed=1) + 0.5
    found = check_optimal(PairwiseSimilarity(x, y, kind))
    # The optimum is unique.
    assert torch.equal(
        found.columns, linear_assignment(PairwiseSimilarity(x, y, kind).dense(), maximize=kind != "sqeuclidean").columns
    )


@pytest.mark.parametrize("kind", ["correlation", "sqeuclidean"])
def test_neighbours_with_equal_points(kind: Kind) -> None:
    random = np.random.default_rng(0)
    y = random.integers(0, 20, (8193, 3)).astype(np.float32)
    x = y[random.integers(0, 8193, 900)]
    found = check_optimal(PairwiseSimilarity(x, y, kind))
    for point in np.unique(x, axis=0):
        columns = found.columns[torch.from_numpy((x == point).all(1))]
        assert torch.equal(columns, columns.sort().values)


def test_neighbours_of_tall_problem_and_of_opposite_sense() -> None:
    x, y = random_points(8200, 2), random_points(400, 2, seed=1)
    check_optimal(PairwiseSimilarity(y, x, "sqeuclidean"), maximize=True)
    tall, wide = (linear_assignment(PairwiseSimilarity(*points, "sqeuclidean")) for points in ((x, y), (y, x)))
    assert torch.equal(tall.columns[wide.columns], torch.arange(400))
    assert torch.equal(tall.column_duals, wide.row_duals)


def test_many_numbers_are_assigned_in_ascending_order() -> None:
    x, noise = random_points(2, 8300, 1)
    y = x.flip(0) + 1e-4 * noise
    found = linear_assignment(PairwiseSimilarity(x, y, "sqeuclidean"))
    sorted_sum = (x.sort(dim=0).values - y.sort(dim=0).values).double().square().sum()
    assert float(found.objective) == pytest.approx(float(sorted_sum), rel=1e-5)
    again = linear_assignment(PairwiseSimilarity(x, y, "sqeuclidean"), warm_start=found)
    assert float(again.objective) == pytest.approx(float(found.objective), rel=1e-12)


@pytest.mark.usefixtures("isa")
def test_result_does_not_depend_on_threads() -> None:
    x, y = random_points(1000, 3), random_points(8200, 3, seed=1)
    problem = PairwiseSimilarity(x, y, "sqeuclidean")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(linear_assignment(problem))
    finally:
        torch.set_num_threads(threads)
    for name in RESULTS:
        assert torch.equal(*(getattr(result, name) for result in results)), name


def test_reference_backend() -> None:
    x, y = random_points(2, 40, 3)
    problem = PairwiseSimilarity(x, y, "cosine")
    found = linear_assignment(problem)
    with use_backend("reference"):
        assert torch.equal(linear_assignment(problem).columns, found.columns)


def test_points_too_near_to_each_other_are_solved_with_matrix() -> None:
    x, y = 1e-16 * random_points(2, 800, 3)
    check_equals_matrix(PairwiseSimilarity(x, y, "sqeuclidean"))


def test_repr_and_frozen() -> None:
    problem = PairwiseSimilarity(random_points(3, 2), random_points(4, 2), "cosine")
    assert repr(problem) == "PairwiseSimilarity('cosine', shape=[3, 4], features=2)"
    with pytest.raises(AttributeError):
        problem.kind = "correlation"  # type: ignore[misc]


POINTS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("x", "y", "kind", "error", "message"),
    [
        (POINTS, POINTS, "euclidean", ValueError, "kind must be one of 'correlation', 'cosine', 'sqeuclidean'"),
        ("points", POINTS, "cosine", TypeError, "x must be a torch.Tensor, got str"),
        (POINTS, POINTS.bool(), "cosine", TypeError, "y must hold real numbers, got dtype bool"),
        (POINTS, POINTS.to(torch.complex64), "cosine", TypeError, "y must hold real numbers, got dtype complex64"),
        (POINTS[0], POINTS, "cosine", ValueError, r"x must be \[points, features\], got shape \[2\]"),
        (POINTS, POINTS[:, :1], "cosine", ValueError, "same number of features, got 2 and 1"),
        (POINTS[:, :1], POINTS[:, :1], "correlation", ValueError, "at least 2 features for 'correlation', got 1"),
        (POINTS[:, :0], POINTS[:, :0], "cosine", ValueError, "at least 1 features"),
        (POINTS, POINTS / 0, "cosine", ValueError, r"y must be finite, got nan at \(0, 0\)"),
        (POINTS, POINTS + 1e18, "sqeuclidean", ValueError, "squared distances are at most 1e\\+34"),
        (POINTS.double(), POINTS.double() + 1e200, "sqeuclidean", ValueError, "squared distances are at most"),
        (POINTS.to("meta"), POINTS, "cosine", ValueError, "x must hold data"),
    ],
)
def test_errors(x: Any, y: Any, kind: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PairwiseSimilarity(x, y, kind)


@pytest.mark.parametrize("option", ["threshold", "rows", "columns"])
def test_unsupported_options_are_refused(option: str) -> None:
    value: Any = 0.5 if option == "threshold" else [2]
    with pytest.raises(ValueError, match=f"{option} is incompatible with a PairwiseSimilarity; pass similarity.dense"):
        linear_assignment(PairwiseSimilarity(POINTS, POINTS, "cosine"), **{option: value})


def test_other_calls_need_the_matrix() -> None:
    problem = PairwiseSimilarity(POINTS, POINTS, "cosine")
    with pytest.raises(TypeError, match="cost_matrix must be a matrix, got a PairwiseSimilarity"):
        linear_sum_assignment(problem)
    with pytest.raises(TypeError, match=r"similarity\[0\] must be a matrix, got a PairwiseSimilarity"):
        linear_assignment([problem])  # type: ignore[list-item]


def test_large_matrix_is_not_made() -> None:
    points = 1e-16 * random_points(8200, 2)
    with pytest.raises(ValueError, match=r"\[8200, 8200\] is too large to store its matrix, and all entries have"):
        linear_assignment(PairwiseSimilarity(points, points.flip(0), "sqeuclidean"))
    with use_backend("reference"), pytest.raises(ValueError, match="the backend 'reference' needs the matrix"):
        linear_assignment(PairwiseSimilarity(points, points, "cosine"))


#: Prints by how many bytes a solve of 12,000 points raises the peak of resident memory.
MEMORY_PROGRAM = """
import resource
import torch
from mudsc_fast import PairwiseSimilarity, linear_assignment

torch.set_num_threads(1)
points = torch.rand(2, 12000, 3, generator=torch.Generator().manual_seed(0))
linear_assignment(PairwiseSimilarity(*points[:, :1000], "sqeuclidean"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_assignment(PairwiseSimilarity(*points, "sqeuclidean"))
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_matrix_is_not_stored() -> None:
    grown = int(subprocess.check_output([sys.executable, "-c", MEMORY_PROGRAM], text=True))
    assert grown < 0.1 * 4 * 12000**2
