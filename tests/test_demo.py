from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from mudsc_fast.plot import plot_merges

ROOT = Path(__file__).parent.parent


def run_demo(arguments: list[str]) -> int:
    demo: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    status: int = demo["main"](arguments)
    return status


def test_demo_shows_what_matching_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for _ in range(2):
        assert run_demo(["--epochs", "2", "--quiet", "--output", str(tmp_path)]) == 0
        outputs.append(capsys.readouterr().out)
    rows = {
        line[:17].strip(): line[17:].split()
        for line in outputs[0].splitlines()
        if " align " in line or " zip " in line or line.startswith("average")
    }
    mean = {method: float(cells[3 if "dual" in method else 2]) for method, cells in rows.items()}
    assert len(mean) == 7
    for mode in ("align", "zip"):
        for space in ("activation", "dual"):
            assert mean[f"{space} {mode}"] > mean["average"] + 5
    # Accuracies are the same on every run; only the seconds differ.
    again = [line[:48] for line in outputs[1].splitlines() if line[:17].strip() in rows]
    assert again == [line[:48] for line in outputs[0].splitlines() if line[:17].strip() in rows]
    assert (tmp_path / "merge.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["merge.png"]


def test_demo_refuses_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_demo(["--epochs", "0"])
    assert "--epochs must be at least 1, got 0" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "merge.png"
    path.write_text("old")
    pairs = {"fc1": (torch.rand(5), torch.rand(5))}
    with pytest.raises(ValueError, match="not supported"):
        plot_merges(tmp_path / "merge.nothing", {"average": 0.5}, 0.9, pairs)
    assert path.read_text() == "old"
    plot_merges(path, {"average": 0.5}, 0.9, pairs)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["merge.png"]
