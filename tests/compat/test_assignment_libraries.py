"""The interfaces of other assignment libraries, compared with the installed libraries or with recorded results."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_assignment

import mudsc_fast
from mudsc_fast import use_backend
from mudsc_fast.compat import lap, lapjv, lapsolver, optax, torch_lap_cuda, torch_linear_assignment

Array = npt.NDArray[Any]
CASES = 300


def library(name: str) -> ModuleType:
    """Import a library, or skip the test if it is not installed."""
    module: ModuleType = pytest.importorskip(name, exc_type=ImportError)
    return module


def random_costs(random: np.random.Generator, shape: tuple[int, ...] | None = None) -> Array:
    """Return random costs in float32 or float64, some of them negative, or integers with ties."""
    shape = shape or tuple(int(size) for size in random.integers(1, 15, 2))
    kind = random.integers(4)
    costs = random.random(shape) if kind else random.integers(0, 5, shape).astype(np.float64)
    return (costs - 0.5 if kind == 2 else costs).astype(np.float32 if kind == 3 else np.float64)


def with_rejects(costs: Array, x: Array, limit: float) -> float:
    """Return lap's objective with a limit: the matched costs plus half the limit for each unmatched row or column."""
    rows = np.flatnonzero(x >= 0)
    matched = float(costs.astype(np.float64)[rows, x[rows]].sum())
    return matched + limit / 2 * (sum(costs.shape) - 2 * len(rows))


def test_lapjv_matches_lap() -> None:
    original = library("lap").lapjv
    random = np.random.default_rng(0)
    for _ in range(CASES):
        costs = random_costs(random)
        expected, x, y = original(costs, extend_cost=True)
        found, our_x, our_y = lap.lapjv(costs, extend_cost=True)
        assert found == pytest.approx(float(expected), abs=1e-12)
        assert isinstance(found, float)
        assert (our_x.dtype, our_y.dtype) == (x.dtype, y.dtype)
        assert (our_x < 0).sum() == (x < 0).sum()
        assert (our_y < 0).sum() == (y < 0).sum()
        limit = float(random.choice([0.3, 0.7, 1.0, 2.0]))
        _, x, y = original(costs, cost_limit=limit, extend_cost=True)
        found, our_x, our_y = lap.lapjv(costs, cost_limit=limit)
        assert with_rejects(costs, our_x, limit) == pytest.approx(with_rejects(costs, x, limit), abs=1e-12)
        rows = np.flatnonzero(our_x >= 0)
        assert found == pytest.approx(float(costs.astype(np.float64)[rows, our_x[rows]].sum()), abs=1e-12)
        assert our_y[our_x[rows]].tolist() == rows.tolist()
        assert (our_y >= 0).sum() == len(rows)


@pytest.mark.parametrize("name", ["lapjvx", "lapjvxa", "lapjvx_batch", "lapjvxa_batch"])
@pytest.mark.parametrize("limit", [np.inf, 0.6])
def test_lapx_results_have_the_same_form(name: str, limit: float) -> None:
    module = library("lap")
    if not hasattr(module, name):
        pytest.skip("only in lapx")
    random = np.random.default_rng(1)
    for shape in ((4, 6), (6, 4), (5, 5)):
        costs = random.random((3, *shape) if name.endswith("batch") else shape)
        for return_cost in (True, False):
            options = {"extend_cost": True, "cost_limit": limit, "return_cost": return_cost}
            expected = getattr(module, name)(costs, **options)
            found = getattr(lap, name)(costs, **options)
            assert type(found) is type(expected)
            if return_cost:
                np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
                found, expected = ((result[1:] if len(result) == 3 else result[1]) for result in (found, expected))
            batch = name.endswith("batch")
            for mine, theirs in zip(problems(found, batch), problems(expected, batch), strict=True):
                # There are no ties. With more rows than columns, lapx returns the pairs in another order.
                assert pairs_of(mine) == sorted(pairs_of(theirs))


def problems(result: Any, batch: bool) -> list[Any]:
    """Return the results as a list; a single problem counts as a batch of one."""
    if not batch:
        return [result]
    return list(zip(*result, strict=True)) if isinstance(result, tuple) else list(result)


def pairs_of(result: Any) -> list[tuple[int, ...]]:
    """Return pairs of row and column, given two arrays or an array of pairs."""
    pairs = np.stack(result, axis=1) if isinstance(result, tuple) else result
    assert pairs.shape[1] == 2
    return [tuple(pair) for pair in pairs.tolist()]


def test_lapmod_matches_lap() -> None:
    original = library("lap").lapmod
    random = np.random.default_rng(2)
    for size in (1, 3, 8, 20, 300):
        for share in (0.2, 0.6, 1.0):
            dense = random.random((size, size))
            kept = (random.random((size, size)) < share) | np.eye(size, dtype=bool)
            cc, ii, kk = dense[kept], np.concatenate([[0], kept.sum(1).cumsum()]), np.nonzero(kept)[1]
            expected, _, _ = original(size, cc, ii, kk)
            found, x, y = lap.lapmod(size, cc, ii, kk)
            assert found == pytest.approx(float(expected), rel=1e-12)
            assert x.dtype == y.dtype == np.int32
            assert kept[np.arange(size), x].all()
            assert y[x].tolist() == list(range(size))
            assert [part.tolist() for part in lap.lapmod(size, cc, ii, kk, return_cost=False)] == [
                x.tolist(),
                y.tolist(),
            ]


def test_recorded_facts_of_lap() -> None:
    inf = np.inf
    for backend in (None, "cpu"):
        with use_backend(backend or "cpu"):
            assert_result(lap.lapjv(np.array([[inf, 1.0], [1.0, inf]])), 2.0, [1, 0], [1, 0])
            # A forbidden pair is used only if there is no other solution; the total is then infinite.
            assert_result(lap.lapjv(np.array([[inf, inf], [1.0, 2.0]])), inf, [1, 0], [1, 0])
            limited = lap.lapjv(np.array([[inf, inf], [inf, 2.0]]), extend_cost=True, cost_limit=10.0)
            assert_result(limited, 2.0, [-1, 1], [-1, 1])
            assert_result(lap.lapjv(np.array([[2.0]]), cost_limit=1.0), 0.0, [-1], [-1])
            assert_result(lap.lapjv(np.array([[2.0]]), cost_limit=3.0), 2.0, [0], [0])
            assert_result(lap.lapjv(np.zeros((0, 3)), extend_cost=True), 0.0, [], [-1, -1, -1])
            assert_result(lap.lapjv(np.zeros((3, 0)), extend_cost=True), 0.0, [-1, -1, -1], [])
            assert_result(lap.lapjv(-np.ones((2, 2)), cost_limit=-2.0), 0.0, [-1, -1], [-1, -1])
    assert lap.lapmod(2, [1.0, 2.0], [0, 1, 2], [0, 0])[0] == inf


def assert_result(result: Any, cost: float, x: list[int], y: list[int]) -> None:
    assert result[0] == cost
    assert result[1].tolist() == x or sorted(result[1].tolist()) == sorted(x) == list(range(len(x)))
    assert result[2].tolist() == y or sorted(result[2].tolist()) == sorted(y) == list(range(len(y)))
    assert result[1].dtype == result[2].dtype == np.int32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((2, 3)),), ValueError, r"Square cost array expected, got shape \[2, 3\]"),
        ((np.zeros(3),), ValueError, "2-dimensional array expected"),
        (([[1, 2], [2, 1]],), TypeError, "cost must be a numpy.ndarray, got list"),
        ((np.zeros((2, 2)), False, np.nan), ValueError, "cost_limit must be finite or positive infinity, got nan"),
        ((np.array([[np.nan, 1.0], [1.0, 2.0]]),), ValueError, "must not hold NaN or -inf"),
        ((np.array([["a"]]),), TypeError, "cost must hold real numbers"),
    ],
)
def test_bad_input_of_lapjv(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lap.lapjv(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, [], [0], []), "n must be at least 1"),
        ((2, [1.0], [0, 1], [0]), "n \\+ 1 = 3 entries"),
        ((2, [1.0, 1.0], [0, 1, 1], [0, 1]), "ii must start at 0, end at len"),
        ((2, [1.0, 1.0], [0, 1, 2], [0, 2]), "kk must be between 0 and 1"),
        ((2, [1.0, 1.0], [0, 2, 2], [1, 0]), "kk must increase within each row"),
        ((2, [1.0, np.inf], [0, 1, 2], [0, 1]), "cc must be finite"),
        ((2, ["a", "b"], [0, 1, 2], [0, 1]), "cc must hold real numbers"),
    ],
)
def test_bad_input_of_lapmod(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lap.lapmod(*arguments)


def test_lapjv_package() -> None:
    original = library("lapjv").lapjv
    random = np.random.default_rng(3)
    for _ in range(CASES // 3):
        size = int(random.integers(1, 20))
        costs = random_costs(random, (size, size)).astype(np.float32)
        rows, columns, (expected, _, _) = original(costs)
        x, y, (found, u, v) = lapjv.lapjv(costs)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert costs[np.arange(size), rows].sum() == pytest.approx(found, rel=1e-5, abs=1e-5)
        assert x[y].tolist() == list(range(size))
        assert rows[columns].tolist() == list(range(size))
        assert (x.dtype, y.dtype, u.dtype, v.dtype) == (np.int32, np.int32, np.float32, np.float32)
        assert (u[:, None] + v <= costs + 1e-5).all()
        assert u.sum(dtype=np.float64) + v.sum(dtype=np.float64) == pytest.approx(found, abs=1e-4)
    assert lapjv.lapjv([[1, 2], [2, 1]], force_doubles=True)[2][1].dtype == np.float64
    with pytest.raises(ValueError, match='"cost_matrix" must be a square 2D numpy array'):
        lapjv.lapjv(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="cost_matrix must not hold NaN"):
        lapjv.lapjv(np.full((2, 2), np.nan))


@pytest.mark.parametrize("name", ["lapsolver", "motmetrics"])
def test_solve_dense_matches_libraries(name: str) -> None:
    module = library(name)
    random = np.random.default_rng(4)
    for _ in range(CASES):
        costs = random_costs(random).astype(np.float64)
        costs[random.random(costs.shape) < random.choice([0.0, 0.3, 0.8])] = random.choice([np.nan, np.inf])
        expected = module.solve_dense(costs) if name == "lapsolver" else module.lap.lsa_solve_scipy(costs)
        rows, columns = lapsolver.solve_dense(costs)
        assert rows.dtype == columns.dtype == np.int32
        assert len(rows) == len(columns) == len(expected[0])
        total = costs[expected[0].astype(int), expected[1].astype(int)].sum()
        assert costs[rows, columns].sum() == pytest.approx(total, rel=1e-9, abs=1e-9)
        assert (np.diff(rows) > 0).all()
    if name == "motmetrics":
        with module.lap.set_default_solver(lapsolver.solve_dense):
            rows, columns = module.lap.linear_sum_assignment(np.array([[1.0, np.nan], [np.nan, 2.0]]))
        assert rows.tolist() == columns.tolist() == [0, 1]


def test_recorded_facts_of_lapsolver() -> None:
    nan, inf = np.nan, np.inf
    rows, columns = lapsolver.solve_dense([[1, nan, 3], [nan, nan, inf]])
    assert (rows.tolist(), columns.tolist()) == ([0], [0])
    rows, columns = lapsolver.solve_dense(np.array([[nan, -inf]]))
    assert rows.dtype == np.int32
    assert rows.tolist() == columns.tolist() == []
    # Two pairs, though one alone would cost less.
    rows, columns = lapsolver.solve_dense(np.array([[0.0, 100.0], [100.0, nan]]))
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])


def test_torch_linear_assignment() -> None:
    module = library("torch_linear_assignment")
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 5, 7), (3, 7, 5), (2, 6, 6), (0, 3, 3), (2, 0, 3)):
        costs = torch.randn(*shape, generator=generator)
        expected = module.batch_linear_assignment(costs)
        found = torch_linear_assignment.batch_linear_assignment(costs)
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)
        for mine, theirs in zip(
            torch_linear_assignment.assignment_to_indices(found), module.assignment_to_indices(found), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_recorded_facts_of_torch_linear_assignment() -> None:
    costs = torch.tensor([[[4.0, 1.0], [2.0, 0.0], [9.0, 9.0]]])
    found = torch_linear_assignment.batch_linear_assignment(costs)
    assert found.tolist() == [[1, 0, -1]]
    rows, columns = torch_linear_assignment.assignment_to_indices(found)
    assert (rows.tolist(), columns.tolist()) == ([[0, 1]], [[1, 0]])
    with pytest.raises(ValueError, match="Inconsistent matching sizes"):
        torch_linear_assignment.assignment_to_indices(torch.tensor([[0, 1], [0, -1]]))
    with pytest.raises(ValueError, match="Need 3-dimensional tensor"):
        torch_linear_assignment.batch_linear_assignment(costs[0])
    with pytest.raises(ValueError, match="cost must not hold NaN or -inf"):
        torch_linear_assignment.batch_linear_assignment(costs * float("nan"))


def test_solve_lap_takes_one_problem_or_a_batch() -> None:
    costs = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(0))
    found = torch_lap_cuda.solve_lap(costs)
    for cost, columns in zip(costs, found, strict=True):
        assert columns.tolist() == scipy_assignment(cost.numpy())[1].tolist()
        assert torch.equal(torch_lap_cuda.solve_lap(cost, device="cpu"), columns)
    with pytest.raises(ValueError, match=r"must be \[N, N\] or \[B, N, N\]"):
        torch_lap_cuda.solve_lap(costs[:, :3])
    with pytest.raises(TypeError, match=r"cost_matrix must be a torch\.Tensor"):
        torch_lap_cuda.solve_lap(costs.numpy())  # type: ignore[arg-type]


def test_optax_returns_jax_arrays() -> None:
    pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    original = importlib.import_module("optax.assignment").hungarian_algorithm
    random = np.random.default_rng(5)
    for shape in ((4, 6), (6, 4), (5, 5)):
        costs = jax.numpy.asarray(random.random(shape))
        found, expected = optax.hungarian_algorithm(costs), original(costs)
        for mine, theirs in zip(found, expected, strict=True):
            assert isinstance(mine, jax.Array)
            assert mine.dtype == theirs.dtype
        # optax 0.2.8 returns the rows in another order.
        assert list(zip(*map(np.ndarray.tolist, map(np.asarray, found)), strict=True)) == sorted(
            zip(*map(np.ndarray.tolist, map(np.asarray, expected)), strict=True)
        )
    with pytest.raises(TypeError, match="traced by JAX"):
        jax.jit(optax.hungarian_algorithm)(costs)
    with mudsc_fast.patch():
        patched = importlib.import_module("optax.assignment").hungarian_algorithm
        assert patched is not original
        assert sorted(jax.jit(patched)(costs)[1].tolist()) == sorted(original(costs)[1].tolist())


def test_optax_without_jax() -> None:
    rows, columns = optax.hungarian_algorithm(np.array([[8.0, 4, 7], [5, 2, 3], [9, 6, 7], [9, 4, 8]]))
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 3], [0, 2, 1])


def test_patch_replaces_library_functions() -> None:
    """A module that has bound a function of lap gets mudsc_fast's, even if lap is imported during the patch."""
    code = """
import sys
import mudsc_fast
import numpy as np
cost = np.array([[1.0, 2.0, 5.0], [2.0, 1.0, 5.0]])
with mudsc_fast.patch(functions=["lap.lapjv"]) as patched:
    import lap
    from lap import lapjv
    assert lapjv.__module__.startswith("mudsc_fast"), lapjv
    assert lap.lapjv is lapjv
    assert lap.lapmod.__module__.startswith("lap")
    assert lapjv(cost, extend_cost=True)[1].tolist() == [0, 1]
    assert "lap.lapjv -> mudsc_fast" in patched.report(), patched.report()
kept = [lap.lapjv]
assert not (lapjv.__module__ or "").startswith("mudsc_fast")
assert lap.lapjv is lapjv
with mudsc_fast.patch():
    assert lap.lapjv is lapjv is not kept[0]
    assert lap.lapmod.__module__.startswith("mudsc_fast")
assert lap.lapjv is lapjv is kept[0]
"""
    library("lap")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_patch_finds_library_by_documented_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def solve_lap(cost_matrix: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"not replaced, called with {cost_matrix}")

    module, user = ModuleType("torch_lap_cuda"), ModuleType("user")
    module.__dict__["solve_lap"] = user.__dict__["solve"] = solve_lap
    user.__dict__["other"] = torch_lap_cuda.solve_lap
    for name, value in (("torch_lap_cuda", module), ("user", user)):
        monkeypatch.setitem(sys.modules, name, value)
    with mudsc_fast.patch(functions=["torch_lap_cuda.solve_lap"], only=["user"]) as patched:
        assert patched.patched == ("user.solve",)
        assert "torch_lap_cuda.solve_lap" in repr(patched)
        assert user.solve(torch.eye(3)).tolist() in ([1, 2, 0], [2, 0, 1])
        assert pickle.loads(pickle.dumps(user.solve)) is user.solve
        assert module.solve_lap is solve_lap
    assert user.solve is solve_lap
    assert user.other is torch_lap_cuda.solve_lap  # a name bound to a function of compat is left alone


def test_patch_rejects_unknown_functions() -> None:
    with pytest.raises(ValueError, match=r"functions must be among scipy\.optimize\.linear_sum_assignment, lap\.lapjv"):
        mudsc_fast.patch(functions=["lap.lapjvs"])
    with pytest.raises(TypeError, match=r"functions must be a sequence of function names, got 'lap\.lapjv'"):
        mudsc_fast.patch(functions="lap.lapjv")
