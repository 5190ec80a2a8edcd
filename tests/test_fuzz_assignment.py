"""A short run of the program that compares random assignment problems with scipy."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = str(Path(__file__).parent.parent / "benchmarks" / "fuzz_assignment.py")


@pytest.fixture(scope="module")
def fuzz() -> dict[str, Any]:
    return runpy.run_path(SCRIPT)


def test_random_problems_match_scipy(fuzz: dict[str, Any]) -> None:
    counts = fuzz["run"](2000)
    assert sum(counts.values()) >= 2000
    assert set(counts) == set(fuzz["WAYS"])


def test_random_problems_for_the_list_search_match_scipy(fuzz: dict[str, Any]) -> None:
    assert sum(fuzz["run"](30, sizes=(768, 1000)).values()) >= 30


def test_sizes_out_of_order_are_refused(
    fuzz: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [SCRIPT, "--sizes", "9", "9"])
    with pytest.raises(SystemExit):
        fuzz["main"]()
    assert "--sizes: expected 1 <= LOW < HIGH, got 9 and 9" in capsys.readouterr().err


def test_wrong_result_is_reported_with_seed(fuzz: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    solve = fuzz["linear_assignment"]

    def solve_the_opposite(values: Any, *, maximize: bool = True, **options: Any) -> Any:
        return solve(values, maximize=not maximize, **options)

    monkeypatch.setitem(fuzz["run"].__globals__, "linear_assignment", solve_the_opposite)
    with pytest.raises(AssertionError, match=r"seed \d+: "):
        fuzz["run"](200)
