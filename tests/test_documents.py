"""Code in README, documentation pages and tutorials runs as written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def python_blocks(page: Path) -> list[str]:
    """Return the Python code of a page; blocks with a title are files of the reader's, not code to run."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def with_code(pages: list[Path]) -> list[Path]:
    return [page for page in pages if python_blocks(page)]


def run(code: list[str], source: Path) -> None:
    # One namespace: later blocks of a page use what earlier ones define.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in code:
        exec(compile(block, str(source), "exec"), namespace)


@pytest.mark.parametrize("page", with_code(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(python_blocks(page), page)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_of_tutorial_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    run(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"], notebook)


def test_readme_and_quickstart_have_code() -> None:
    assert {ROOT / "README.md", ROOT / "docs" / "quickstart.md"} <= set(with_code(PAGES))
    assert len(NOTEBOOKS) == 2
