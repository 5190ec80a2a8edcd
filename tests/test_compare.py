from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

COMPARE = str(Path(__file__).parent.parent / "benchmarks" / "compare.py")


def run(*arguments: str | Path) -> int:
    script: dict[str, Any] = runpy.run_path(COMPARE)
    status: int = script["main"]([str(argument) for argument in arguments])
    return status


def write(path: Path, **ratios: float) -> Path:
    entries = [
        {"name": "merge[mlp]", "extra_info": {"ratios": ratios, "seconds": {"sweeps": 1.0}}},
        {"name": "without ratios", "extra_info": {}},
    ]
    path.write_text(json.dumps({"benchmarks": entries}))
    return path


def test_ratio_that_fell_by_more_than_a_fifth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", sweeps=30.0, whole=10.0)
    assert run(old, write(tmp_path / "new.json", sweeps=24.5, whole=11.0, other=1.0)) == 0
    assert "no ratio fell" in capsys.readouterr().out
    assert run(old, write(tmp_path / "new.json", sweeps=23.5, whole=10.0)) == 1
    assert capsys.readouterr().out == "merge[mlp]: sweeps was 30, is 23.5\n"
    assert run(old, write(tmp_path / "new.json", sweeps=30.0)) == 1
    assert capsys.readouterr().out == "merge[mlp]: whole was 10, is missing\n"


def test_reduced_to_ratios(tmp_path: Path) -> None:
    old, kept = write(tmp_path / "old.json", sweeps=30.0), tmp_path / "kept.json"
    assert run("--reduce", old, kept) == 0
    assert json.loads(kept.read_text()) == {"ratios": {"merge[mlp]": {"sweeps": 30.0}}}
    assert run(kept, old) == 0
    assert run(kept, write(tmp_path / "new.json", sweeps=1.0)) == 1


def test_incomparable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, broken = write(tmp_path / "old.json", sweeps=30.0), tmp_path / "broken.json"
    broken.write_text("{")
    assert run(old, broken) == 2
    assert "broken.json must be JSON" in capsys.readouterr().err
    assert run(old, write(tmp_path / "none.json")) == 2
    assert "none.json holds no ratios" in capsys.readouterr().err
    assert run(old, tmp_path / "absent.json") == 2
    assert "absent.json" in capsys.readouterr().err
