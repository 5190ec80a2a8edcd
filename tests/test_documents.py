"""Code in README, documentation pages and tutorials runs as written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import mudsc_fast

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def python_blocks(page: Path) -> list[str]:
    """Return the Python code of a page, except blocks with a title, which show files of the reader."""
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


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_of_tutorial_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    run(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"], notebook)


def test_readme_and_quickstart_have_code() -> None:
    assert {ROOT / "README.md", ROOT / "docs" / "quickstart.md"} <= set(with_code(PAGES))
    assert len(NOTEBOOKS) == 2


def test_reference_has_every_public_name() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)", pages, re.MULTILINE))
    missing = [
        f"{module.__name__}.{name}"
        for module in (mudsc_fast, mudsc_fast.ops, mudsc_fast.compat)
        for name in module.__all__
        if not {f"{module.__name__}.{name}", f"mudsc_fast.{name}"} & shown
    ]
    # The modules have their own pages; the values of Mode and Space are in the signatures.
    assert missing == [f"mudsc_fast.{name}" for name in ("Mode", "Space", "__version__", "compat", "ops")]
