from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from conftest import TORCH_VERSION

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWN = {
    "with_scipy": "the same sum",
    "with_detr": "the same pairs for 16 images",
    "with_zipit": "64 clusters, ",
    "with_mudsc": "merged (128, 64) units: 10 outputs",
    "with_rebasin": "the network was restored",
    "with_pleas": "200 of 200 units found",
}


def test_every_library_has_example() -> None:
    assert {path.stem for path in EXAMPLES.glob("with_*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "with_detr" and TORCH_VERSION < (2, 6):
        pytest.skip("transformers 5 does not take tensors of torch before 2.6")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SHOWN[name] in capsys.readouterr().out
