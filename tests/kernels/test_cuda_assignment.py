"""CUDA kernels of the assignment, in the simulator and on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matrices import FAMILIES, make
from mudsc_fast.kernels._assignment import INFEASIBLE, INVALID, Solution
from mudsc_fast.kernels.cpu import assignment as cpu
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.kernels.cuda import assignment as cuda

#: Threads per block of csrc/cuda/assignment_large.cu in the simulator.
SIMULATED_THREADS = 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _blocks_for_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the block kernel solve batches of any size; test_few_small_problems_are_solved_on_cpu has the default."""
    monkeypatch.setattr(cuda, "MIN_BATCH", 1)


def matrix(family: str, rows: int, columns: int, seed: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(make(family, rows, columns, seed))).double()


def assert_same_choice(values: Tensor, found: Solution, wanted: Solution, maximize: bool) -> None:
    """Assert that both assignments are equal. The duals may differ, but each set proves the optimum."""
    assert torch.equal(found.status.cpu(), wanted.status)
    assert torch.equal(found.columns.cpu(), wanted.columns)
    for position, one in enumerate(values.double()):
        problem = {name: value.cpu()[position : position + 1] for name, value in vars(found).items()}
        check_proof(one, Solution(**problem), maximize)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (7, 12), (40, 40), (65, 128)])
def test_simulated_batches_match_cpu_kernel(simulator: Any, family: str, shape: tuple[int, int]) -> None:
    batch = torch.stack([matrix(family, *shape, seed) for seed in range(3)])
    for seed, dtype in enumerate(DTYPES if shape == (7, 12) else DTYPES[2:3]):
        simulator.set_seed(seed + 1)
        values = batch.to(dtype)
        if not bool(values.isfinite().all()):
            continue
        for maximize in (False, True):
            found, wanted = (solve(values, maximize, None, 0.0) for solve in (cuda.solve, cpu.solve))
            assert_same_choice(values, found, wanted, maximize)


@pytest.mark.parametrize("shape", [(40, 170), (180, 180)])
@pytest.mark.parametrize("in_shared_memory", [False, True])
def test_simulated_blocks_of_several_warps(simulator: Any, shape: tuple[int, int], in_shared_memory: bool) -> None:
    if not in_shared_memory:
        simulator.set_shared_memory_limit(16 * 1024)
    simulator.set_seed(3)
    values = matrix("ties", *shape, 0)[None].float()
    found, wanted = cuda.solve(values, True, None, 0.0), cpu.solve(values, True, None, 0.0)
    assert torch.equal(found.objective, wanted.objective)
    check_proof(values[0].double(), found, True)


def check_proof(values: Tensor, solution: Solution, maximize: bool) -> None:
    sign = 1.0 if maximize else -1.0
    rows, columns = values.shape
    scale = 1e-13 * rows * float(values.abs().max())
    assert len(solution.columns[0].unique()) == rows
    slack = sign * (solution.row_duals[0][:, None] + solution.column_duals[0] - values)
    assert float(slack.min()) >= -scale
    if rows < columns:
        assert float((sign * solution.column_duals).min()) >= 0
        free = torch.ones(columns, dtype=torch.bool)
        free[solution.columns[0]] = False
        assert not solution.column_duals[0][free].any()
    assert 0 <= float(solution.gap) <= scale
    assert float(solution.objective) == pytest.approx(float(values[range(rows), solution.columns[0]].sum()), abs=scale)


def test_simulated_forbidden_and_invalid_entries(simulator: Any) -> None:  # noqa: ARG001
    values = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    values[0, 2, 3] = torch.inf
    values[1, 2, 3] = torch.nan
    values[2, 2, 3] = -torch.inf
    values[3, 2] = torch.inf
    solution = cuda.solve(values, False, None, 0.0)
    assert solution.status.tolist() == [0, INVALID, INVALID, INFEASIBLE]
    wanted = cpu.solve(values[:1], False, None, 0.0)
    assert torch.equal(solution.columns[:1], wanted.columns)


def test_simulated_single_matrix(simulator: Any) -> None:  # noqa: ARG001
    values = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    found, wanted = (solve(values, True, None, 0.0) for solve in (cuda.solve, cpu.solve))
    assert found.objective.shape == found.gap.shape == found.status.shape == ()
    assert torch.equal(found.columns, wanted.columns)


def test_few_small_problems_are_solved_on_cpu(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MIN_BATCH", 4)
    launched = []
    launch = simulator.assignment_batch

    def noting(**given: Any) -> None:
        launched.append(len(given["values"]))
        launch(**given)

    monkeypatch.setattr(simulator, "assignment_batch", noting)
    values = torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(0))
    for count, launches in ((1, []), (3, []), (4, [4])):
        found, wanted = (solve(values[:count], True, None, 0.0) for solve in (cuda.solve, cpu.solve))
        assert torch.equal(found.columns, wanted.columns)
        assert launched == launches


@pytest.mark.parametrize("fault", ["columns", "column_duals", "row_duals", "gap"])
@pytest.mark.usefixtures("simulator")
def test_wrong_results_are_recomputed_on_cpu(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Results are checked even if the kernel reports success: one warning, and the exact result."""
    solve_batch = cuda._solve_batch

    def wrong(*arguments: Any) -> Solution:
        solution = solve_batch(*arguments)
        value = getattr(solution, fault)
        value.view(-1)[0] = value.view(-1)[1] if fault == "columns" else value.view(-1)[0] - 1.5
        return solution

    monkeypatch.setattr(cuda, "_solve_batch", wrong)
    monkeypatch.setattr(cuda, "_warned", False)
    values = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"wrong result for \[2, 9, 9\] torch.float32 .* Please report this"):
        found = cuda.solve(values, True, None, 0.0)
    assert torch.equal(found.columns, cpu.solve(values, True, None, 0.0).columns)
    cuda.solve(values, True, None, 0.0)  # a second time without a warning, which would be an error here


@pytest.mark.usefixtures("simulator")
def test_wrong_large_results_are_recomputed_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_COLUMNS_OF_A_BLOCK", 0)
    monkeypatch.setattr(cuda, "_warned", False)
    search = cuda._LargeProblem.search

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor]:
        columns, duals = search(*arguments)
        columns[:2] = columns[:2].flip(0)
        return columns, duals

    monkeypatch.setattr(cuda._LargeProblem, "search", wrong)
    values = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="Please report this"):
        found = cuda.solve(values, True, None, 0.0)
    assert torch.equal(found.columns, cpu.solve(values, True, None, 0.0).columns)


def test_solutions_are_copied_once() -> None:
    solution = cpu.solve(torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), True, None, 0.0)
    moved = solution.to(torch.device("meta"))
    assert [value.shape for value in vars(moved).values()] == [value.shape for value in vars(solution).values()]
    assert moved.columns.dtype == torch.int64
    assert moved.status.device.type == "cpu"


def test_simulated_warm_start(simulator: Any) -> None:  # noqa: ARG001
    values = torch.randn(2, 30, 30, generator=torch.Generator().manual_seed(0))
    prices = cpu.solve(values, True, None, 0.0).column_duals
    found, wanted = (solve(values, True, prices, 0.0) for solve in (cuda.solve, cpu.solve))
    assert_same_choice(values, found, wanted, maximize=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(90, 90), (130, 170)])
def test_simulated_large_problems(
    simulator: Any, monkeypatch: pytest.MonkeyPatch, family: str, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(cuda, "MAX_COLUMNS_OF_A_BLOCK", 0)
    monkeypatch.setattr(cuda, "WANTED", 4)
    simulator.set_seed(2)
    for dtype in DTYPES[:3] if family == "uniform" else DTYPES[2:3]:
        values = matrix(family, *shape, 1).to(dtype)
        for maximize in (False, True) if family == "uniform" else (shape[0] == shape[1],):
            found, wanted = (module.solve(values[None], maximize, None, 0.0) for module in (cuda, cpu))
            assert float(found.objective) == pytest.approx(float(wanted.objective), rel=1e-12)
            check_proof(values.double(), found, maximize)


@pytest.mark.parametrize("family", ["low rank", "ties"])
def test_simulated_large_problems_are_listed_in_parts(
    simulator: Any,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    monkeypatch.setattr(cuda, "MAX_COLUMNS_OF_A_BLOCK", 0)
    monkeypatch.setattr(cuda, "WANTED", 4)
    values = matrix(family, 90, 90, 1).float()
    at_once = cuda.solve(values[None], True, None, 0.0)
    monkeypatch.setattr(cuda, "LISTED_AT_ONCE", 100)
    in_parts = cuda.solve(values[None], True, None, 0.0)
    for name, tensor in vars(at_once).items():
        assert torch.equal(getattr(in_parts, name), tensor)


@pytest.mark.values
@pytest.mark.parametrize("family", FAMILIES)
def test_auction_rounds_do_not_depend_on_thread_order(simulator: Any, family: str) -> None:
    """The kernel, with several thread orders, and the loops of csrc/cuda_sim/auction_rounds.cpp agree bit for bit."""
    rows = 70
    values = matrix(family, rows, rows, 5).float()
    prices, column_of_row = torch.zeros(rows), torch.empty(rows, dtype=torch.int32)
    with _device.launching_on(values.device) as launch:
        problem = cuda._LargeProblem(values, True, launch)
        epsilon = problem.inspect(prices)
        assert epsilon is not None
        rounds = simulator.auction_rounds(
            values=values,
            maximize=True,
            epsilon=float(epsilon),
            stop=int(rows * cuda.SHARE_LEFT),
            max_rounds=cuda.MAX_ROUNDS,
            max_bids=cuda.MAX_BIDS * rows,
            class_of_row=problem.class_of_row,
            prices=prices,
            column_of_row=column_of_row,
        )
        for seed in range(3):
            simulator.set_seed(seed)
            simulated = torch.zeros(rows)
            pairs, counts = problem.bid(simulated, epsilon)
            assert torch.equal(simulated, prices)
            assert torch.equal(pairs, column_of_row)
            assert counts.tolist() == list(rounds[:2])


@pytest.mark.values
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", [4, 30, 40, 100])
def test_lists_match_plain_loops(simulator: Any, family: str, wanted: int) -> None:
    """The kernel and csrc/cuda_sim/row_lists.cpp agree bit for bit, also with ties."""
    rows = 90
    values = matrix(family, rows, rows, 4).float()
    duals = -torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    duals[values.sum(0) == 0] = 0.0
    numbers = torch.arange(rows - 1, -1, -1, dtype=torch.int32)
    capacity = rows if 2 * wanted >= rows else 2 * wanted
    request = {"values": values, "maximize": True, "rows": numbers, "duals": duals, "wanted": wanted}
    made = []
    with _device.launching_on(values.device) as launch:
        for lister, options in (
            (simulator.assignment_list, launch._asdict()),
            (simulator.list_rows, {"threads": SIMULATED_THREADS}),
        ):
            lists = {
                "columns": torch.full((rows, capacity), -1, dtype=torch.int32),
                "costs": torch.zeros(rows, capacity),
                "sizes": torch.zeros(rows, dtype=torch.int32),
                "floors": torch.zeros(rows, dtype=torch.float64),
            }
            lister(**request, **lists, **options)
            made.append(lists)
    for name, kernel in made[0].items():
        assert torch.equal(kernel, made[1][name]), name


def test_simulated_large_classes_and_failed_paths(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many equal rows whose best columns tie, and a price war that ends in path searches."""
    monkeypatch.setattr(cuda, "MAX_COLUMNS_OF_A_BLOCK", 0)
    monkeypatch.setattr(cuda, "WANTED", 4)
    simulator.set_seed(1)
    generator = torch.Generator().manual_seed(0)
    equal = torch.randn(6, 120, generator=generator).round()[torch.randint(0, 6, (120,), generator=generator)]
    rank_one = torch.randn(120, 1, generator=generator) * torch.randn(120, generator=generator)
    for values in (equal, equal.T.contiguous(), rank_one):
        found, wanted = (module.solve(values[None], True, None, 0.0) for module in (cuda, cpu))
        assert float(found.objective) == pytest.approx(float(wanted.objective), rel=1e-12)
        check_proof(values.double(), found, True)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 12), (128, 128)])
def test_batches_on_device(gpu: torch.device, family: str, shape: tuple[int, int]) -> None:
    values = torch.stack([matrix(family, *shape, seed) for seed in range(200)]).float()
    found, wanted = cuda.solve(values.to(gpu), True, None, 0.0), cpu.solve(values, True, None, 0.0)
    assert_same_choice(values, found, wanted, maximize=True)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(300, 300), (200, 512), (1000, 1000), (900, 1100), (2048, 2048)])
def test_one_problem_on_device(gpu: torch.device, family: str, shape: tuple[int, int]) -> None:
    values = matrix(family, *shape, 0).float()
    found = cuda.solve(values[None].to(gpu), True, None, 0.0).to(torch.device("cpu"))
    wanted = cpu.solve(values[None], True, None, 0.0)
    assert float(found.objective) == pytest.approx(float(wanted.objective), rel=1e-12)
    check_proof(values.double(), found, True)
