"""Assignment of problems large enough for lists: memory, column-major matrices, and warm starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment as scipy_solve
from torch import Tensor

from mudsc_fast import Assignment, linear_assignment, linear_sum_assignment

#: Prints by how many bytes a solve raises the peak of resident memory.
MEMORY_PROGRAM = """
import pathlib, sys
import torch, mudsc_fast

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

torch.set_num_threads(1)
mudsc_fast.linear_assignment(torch.rand(1024, 1024))
generator = torch.Generator().manual_seed(0)
similarity = torch.rand(4096, 4096, generator=generator)
if sys.argv[1] == "dead":
    similarity[torch.rand(4096, generator=generator) < 0.3] = 0
    similarity.T[torch.rand(4096, generator=generator) < 0.2] = 0
if sys.argv[1] == "by columns":
    similarity = similarity.T
if sys.argv[1] == "tall":
    similarity = similarity.reshape(8192, 2048)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
mudsc_fast.linear_assignment(similarity)
print(resident("VmHWM") - before)
"""


def check(similarity: Tensor, result: Assignment, maximize: bool = True) -> None:
    """Compare the result with scipy's, and check that its duals prove it."""
    exact = similarity.to(torch.float64)
    rows, columns = scipy_solve(exact.numpy(), maximize)
    best = float(exact[rows, columns].sum())
    allowed = 1e-12 * float(exact[rows, columns].abs().sum())
    assert torch.equal(result.columns.sort().values, torch.arange(len(exact)))
    assert abs(float(exact.gather(1, result.columns[:, None]).sum()) - best) <= allowed
    assert abs(float(result.objective) - best) <= allowed
    assert float(result.gap) >= -allowed
    assert float(result.gap) <= allowed
    lack = result.row_duals[:, None] + result.column_duals - exact
    slack = 1e-13 * float(exact.abs().max())
    assert float((lack if maximize else -lack).min()) >= -slack


def random_matrix(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.values
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["uniform", "dead", "by columns", "tall"])
def test_peak_memory_is_the_input_and_little_more(kind: str) -> None:
    grown = int(subprocess.check_output([sys.executable, "-c", MEMORY_PROGRAM, kind], text=True))
    # 4.6 to 12.7 MB with several versions of Python and torch. The input has 67 MB.
    assert grown < 0.2 * 4 * 4096**2


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("size", [129, 300, 800])
def test_column_major_matrices_give_same_result(size: int, maximize: bool) -> None:
    similarity = random_matrix(size)
    by_columns = similarity.T.contiguous().T
    result = linear_assignment(by_columns, maximize=maximize)
    check(similarity, result, maximize)
    assert torch.equal(result.columns, linear_assignment(similarity, maximize=maximize).columns)
    warm = linear_assignment(by_columns + 0.001, maximize=maximize, warm_start=result)
    assert torch.equal(warm.columns, result.columns)


def test_column_major_batch() -> None:
    similarity = torch.stack([random_matrix(200, seed) for seed in range(3)])
    result = linear_assignment(similarity.mT.contiguous().mT)
    assert torch.equal(result.columns, linear_assignment(similarity).columns)


def test_column_major_array() -> None:
    similarity = random_matrix(300).numpy()
    rows, columns = linear_sum_assignment(np.asfortranarray(similarity))
    expected = scipy_solve(similarity)
    assert np.array_equal(rows, expected[0])
    assert np.array_equal(columns, expected[1])


def test_forbidden_and_invalid_entries_of_column_major_matrices() -> None:
    similarity = random_matrix(200)
    earlier = linear_assignment(similarity)
    similarity[torch.arange(200), earlier.columns] = -torch.inf
    by_columns = similarity.T.contiguous().T
    result = linear_assignment(by_columns, warm_start=earlier)
    assert torch.equal(result.columns, linear_assignment(similarity).columns)
    by_columns[:, 7] = -torch.inf
    with pytest.raises(ValueError, match="infeasible"):
        linear_assignment(by_columns, warm_start=earlier)
    by_columns[3, 5] = torch.nan
    with pytest.raises(ValueError, match="must not hold NaN"):
        linear_assignment(by_columns)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("noise", [0.0, 0.001, 0.01, 0.3, 10.0])
def test_warm_start_after_noise(noise: float) -> None:
    similarity = random_matrix(800)
    earlier = linear_assignment(similarity)
    changed = similarity + noise * random_matrix(800, 1)
    check(changed, linear_assignment(changed, warm_start=earlier))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", [800, 1003])
def test_dead_and_repeated_units(size: int) -> None:
    similarity = random_matrix(size)
    similarity[::3] = 0
    similarity[:, ::5] = 0
    similarity[1::6] = similarity[1].clone()
    similarity[3] = -0.0
    result = linear_assignment(similarity)
    check(similarity, result)
    for equal in (torch.arange(0, size, 3), torch.arange(1, size, 6)):
        assert torch.equal(result.columns[equal], result.columns[equal].sort().values)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_lists_prove_the_duals(dtype: torch.dtype, scale: float) -> None:
    """Costs are close to each other and far from 0, so that rounding in scans is as large as their differences."""
    similarity = (scale * (1 + 1e-3 * random_matrix(780))).to(dtype)
    check(similarity, linear_assignment(similarity))


def forbidden_pairs(size: int, share: float, cost: float) -> Tensor:
    """Return costs below 1 for a share of the pairs, and one large cost for all others."""
    random = torch.Generator().manual_seed(size)
    allowed = torch.rand(size, size, generator=random) < share
    return torch.where(allowed, torch.rand(size, size, generator=random), cost)


def box_distances(size: int) -> Tensor:
    """Return 1 minus the overlap of boxes, most of which do not overlap."""
    random = torch.Generator().manual_seed(size)
    low = torch.rand(2, size, 2, generator=random) * size
    high = low + 10 + 20 * torch.rand(2, size, 2, generator=random)
    shared = torch.minimum(high[0, :, None], high[1]) - torch.maximum(low[0, :, None], low[1])
    intersection = shared.clamp(min=0).prod(-1)
    area = (high - low).prod(-1)
    return 1 - intersection / (area[0, :, None] + area[1] - intersection)


def levels(size: int) -> Tensor:
    """Return costs that span a dozen orders of magnitude."""
    random = torch.Generator().manual_seed(size)
    level = torch.rand(size, size, generator=random)
    costs = 1e-3 * torch.rand(size, size, generator=random)
    for share, cost in ((0.995, 1e3), (0.98, 1e6), (0.9, 1e9)):
        costs = torch.where(level < share, cost, costs)
    return costs


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [200, 300, 800])
@pytest.mark.parametrize(
    "make",
    [
        lambda size: forbidden_pairs(size, 1 / size, 1e5),
        lambda size: forbidden_pairs(size, 4 / size, 1e9),
        box_distances,
        levels,
    ],
    ids=["most rows forced", "few rows forced", "boxes", "levels"],
)
def test_large_costs_of_forbidden_pairs(make: Callable[[int], Tensor], size: int, dtype: torch.dtype) -> None:
    """Most pairs have the same large cost, and many rows must take it."""
    costs = make(size).to(dtype)
    check(costs, linear_assignment(costs, maximize=False), maximize=False)


@pytest.mark.parametrize("kind", ["low rank", "dead units", "integers"])
def test_threads_do_not_change_the_result(kind: str) -> None:
    """Threads divide the bids of a block of rows, and the block does not depend on the number of threads."""
    size = 1800
    random = torch.Generator().manual_seed(1)
    similarity = torch.randn(size, 8, generator=random) @ torch.randn(8, size, generator=random)
    if kind == "integers":
        similarity = similarity.round()
    if kind == "dead units":
        similarity[torch.rand(size, generator=random) < 0.3] = 0
        similarity[torch.rand(size, generator=random) < 0.2] = similarity[0].clone()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear_assignment(similarity))
    finally:
        torch.set_num_threads(before)
    check(similarity, results[0])
    for other in results[1:]:
        assert torch.equal(other.columns, results[0].columns)
        assert torch.equal(other.row_duals, results[0].row_duals)
        assert torch.equal(other.column_duals, results[0].column_duals)


def tall_matrix(kind: str, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    similarity = torch.randn(rows, columns, generator=generator)
    if kind == "low rank":
        return similarity[:, :8] @ similarity[:columns, 8:16].T
    if kind == "small integers":
        return (similarity > 2.7).float() + (similarity > 3.0)
    if kind == "constant":
        return torch.full((rows, columns), 0.3)
    if kind == "constant columns":
        return similarity[:1].expand(rows, columns).contiguous()
    if kind == "dead and repeated units":
        similarity[:, ::3] = 0
        similarity[::4] = 0
        similarity[:, 1:200:3] = similarity[:, 1:2]
    return similarity


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind",
    ["normal", "low rank", "small integers", "dead and repeated units", "constant", "constant columns"],
)
def test_more_rows_than_columns_matches_transpose(kind: str, dtype: torch.dtype) -> None:
    similarity = tall_matrix(kind, 1101, 1027 if kind == "low rank" else 803).to(dtype)
    in_place = linear_assignment(similarity)
    copied = linear_assignment(similarity.T.contiguous())
    rows = copied.columns
    assert torch.equal(in_place.columns[rows], torch.arange(similarity.shape[1]))
    assert int((in_place.columns >= 0).sum()) == similarity.shape[1]
    assert torch.equal(in_place.row_duals, copied.column_duals)
    assert torch.equal(in_place.column_duals, copied.row_duals)
    assert torch.equal(in_place.objective, copied.objective)
    chosen = scipy_solve(similarity.numpy(), maximize=True)
    best = float(similarity.double()[chosen].sum())
    assert float(in_place.objective) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_forbidden_and_invalid_entries_of_more_rows_than_columns() -> None:
    similarity = tall_matrix("normal", 1100, 800)
    similarity[7, 3] = -torch.inf
    expected = scipy_solve(similarity.numpy(), maximize=True)
    best = float(similarity.double()[expected].sum())
    assert float(linear_assignment(similarity).objective) == pytest.approx(best, rel=1e-12)
    similarity[7, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        linear_assignment(similarity)
    similarity[:, 3] = -torch.inf
    with pytest.raises(ValueError, match="infeasible"):
        linear_assignment(similarity)


def sparse_integers(rows: int, columns: int, values: int, seed: int) -> Tensor:
    """Return mostly zeros, with integers below `values` in about three places per row."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, columns, generator=generator) < 3 / columns
    return chosen * torch.randint(1, values, (rows, columns), generator=generator).float()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(130, 130), (150, 400), (512, 512), (900, 1000)])
def test_two_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for seed, (low, high) in enumerate([(0.0, 1.0), (-2.5, 0.75), (0.1, 0.3)]):
        similarity = (low + (high - low) * sparse_integers(*shape, 2, seed)).to(dtype)
        for maximize in (True, False):
            values = similarity if maximize else -similarity
            exact = values.double()
            result = linear_assignment(values, maximize=maximize)
            best = float(exact[scipy_solve(exact.numpy(), maximize)].sum())
            assert float(result.objective) == pytest.approx(best, abs=1e-10)
            assert len(result.columns.unique()) == shape[0]
            assert 0 <= float(result.gap) <= 1e-11
            slack = result.row_duals[:, None] + result.column_duals - exact
            assert float((slack if maximize else -slack).min()) >= -1e-14


@pytest.mark.parametrize("values", [2, 3])
@pytest.mark.parametrize("size", [200, 512, 900])
def test_equal_columns_are_assigned_in_ascending_order(size: int, values: int) -> None:
    similarity = sparse_integers(size - 40, size, values, 0)
    columns = linear_assignment(similarity).columns
    row_of_column = torch.full((size,), size)
    row_of_column[columns] = torch.arange(size - 40)
    groups: dict[bytes, list[int]] = {}
    for column in range(size):
        groups.setdefault(similarity[:, column].contiguous().numpy().tobytes(), []).append(column)
    repeated = [members for members in groups.values() if len(members) > 1]
    assert repeated
    for members in repeated:
        rows = row_of_column[members]
        assert torch.equal(rows, rows.sort().values)


def test_nearly_two_values() -> None:
    """The general solvers handle a third value, a value that is not finite, and too many entries of the lower cost."""
    for odd in (0.5, torch.inf, -torch.inf):
        similarity = sparse_integers(300, 300, 2, 0)
        similarity[299, 298] = odd
        if odd == torch.inf:
            with pytest.raises(ValueError, match="inf"):
                linear_assignment(similarity)
            continue
        result = linear_assignment(similarity)
        best = float(similarity.double()[scipy_solve(similarity.numpy(), maximize=True)].sum())
        assert float(result.objective) == pytest.approx(best)
        assert float(result.gap) == pytest.approx(0.0, abs=1e-12)
    mostly_ones = (torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) < 0.9).float()
    check(mostly_ones, linear_assignment(mostly_ones))
