"""The stubs match the compiled modules."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

import pytest

import mudsc_fast

PACKAGE = Path(__file__).parent.parent / "python" / "mudsc_fast"
STUBS = sorted(path.stem for path in PACKAGE.glob("_*.pyi"))


@pytest.mark.parametrize("module", STUBS)
def test_stub_matches_compiled_module(module: str, tmp_path: Path) -> None:
    if find_spec(f"mudsc_fast.{module}") is None:
        pytest.skip(f"mudsc_fast.{module} is not built")
    # Only the stub, and a torch with a single class: with the sources of both packages, mypy takes a minute.
    for package, content in (("mudsc_fast", ""), ("torch", "class Tensor: ...\n")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.pyi").write_text(content)
    shutil.copy(PACKAGE / f"{module}.pyi", tmp_path / "mudsc_fast")
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    command = [sys.executable, "-m", "mypy.stubtest", f"mudsc_fast.{module}", "--mypy-config-file", "mypy.ini"]
    result = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_installed_package_is_typed() -> None:
    installed = {str(path) for path in files("mudsc-fast") or ()}
    if not any(path.startswith("mudsc_fast/ops") for path in installed):
        pytest.skip("an editable install lists no Python files")
    assert "mudsc_fast/py.typed" in installed
    assert {f"mudsc_fast/{module}.pyi" for module in STUBS} <= installed


def test_no_module_has_the_name_of_a_public_function() -> None:
    # Importing the module would replace the function.
    functions = [name for name in mudsc_fast.__all__ if callable(getattr(mudsc_fast, name))]
    assert {"match", "merge", "permute_"} <= set(functions)
    assert not [name for name in functions if _is_module(f"mudsc_fast.{name}")]


def test_public_functions_do_not_look_like_modules_to_mypy() -> None:
    # mypy may take the module, and then reports "Module not callable" in the code of users.
    imports = [
        (node.module or "", alias.name)
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mudsc_fast.")
        for alias in node.names
    ]
    assert ("mudsc_fast.merge_models", "merge") in imports
    modules = [f"{module}.{name}" for module, name in imports if _is_module(f"{module}.{name}")]
    assert not modules
    # What type checkers see is what is loaded at first use.
    for module, name in imports:
        assert getattr(mudsc_fast, name) is getattr(import_module(module), name)


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()
