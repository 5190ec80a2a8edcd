"""Replacing scipy's function: which modules are patched, for how long, and that everything is restored."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

import mudsc_fast

# Kept in a place where patches do not look. A name of this module would be replaced too.
KEPT = SimpleNamespace(original=scipy.optimize.linear_sum_assignment)
COST = np.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])


def user_module(name: str, **names: Any) -> ModuleType:
    """Return a loaded module that has bound the function to its own names."""
    module = ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    """Check that a test restores everything that it patched."""
    finders, loaded = list(sys.meta_path), set(sys.modules)
    yield
    assert sys.meta_path == finders
    assert KEPT.original is scipy.optimize.linear_sum_assignment
    for name in set(sys.modules) - loaded:
        if name.partition(".")[0] in ("user", "user_package", "user_late"):
            del sys.modules[name]


def test_patch_replaces_and_restores_every_name() -> None:
    user = user_module("user", solve=KEPT.original, lsa=KEPT.original, other=len)
    with mudsc_fast.patch() as patched:
        assert scipy.optimize.linear_sum_assignment is not KEPT.original
        assert user.solve is user.lsa is scipy.optimize.linear_sum_assignment
        assert user.other is len
        assert {"user.solve", "user.lsa", "scipy.optimize.linear_sum_assignment"} <= set(patched.patched)
        assert "user.solve" in patched.report()
        assert "(active)" in patched.report()
        assert repr(patched) == "<mudsc_fast.patch of all modules>"
    assert user.solve is user.lsa is KEPT.original
    assert not patched.active
    assert "(restored)" in patched.report()


def test_patched_function_matches_scipy() -> None:
    with mudsc_fast.patch():
        for given in (COST, COST.tolist(), COST.astype(np.float32), torch.from_numpy(COST), COST[:2], COST[:, :2]):
            for maximize in (False, True):
                answer = scipy.optimize.linear_sum_assignment(given, maximize=maximize)
                for found, expected in zip(answer, KEPT.original(given, maximize), strict=True):
                    assert isinstance(found, np.ndarray)
                    assert found.dtype == expected.dtype
                    np.testing.assert_array_equal(found, expected)
        for bad, message in ((np.full((2, 2), np.nan), "invalid numeric"), (np.zeros(3), "expected a matrix")):
            with pytest.raises(ValueError, match=message):
                scipy.optimize.linear_sum_assignment(bad)
            with pytest.raises(ValueError, match=message):
                KEPT.original(bad)


def test_patch_is_active_until_restored() -> None:
    patched = mudsc_fast.patch()
    assert patched.active
    assert scipy.optimize.linear_sum_assignment is not KEPT.original
    patched.restore()
    patched.restore()
    assert scipy.optimize.linear_sum_assignment is KEPT.original
    with patched, patched:
        assert scipy.optimize.linear_sum_assignment is not KEPT.original
    assert scipy.optimize.linear_sum_assignment is KEPT.original


def test_patch_restores_after_exception() -> None:
    with pytest.raises(RuntimeError, match="stop"), mudsc_fast.patch():
        raise RuntimeError("stop")
    assert scipy.optimize.linear_sum_assignment is KEPT.original


def test_patch_of_selected_packages() -> None:
    user = user_module("user", solve=KEPT.original)
    inner = user_module("user_package.inner", solve=KEPT.original)
    with mudsc_fast.patch(only=["user_package"]) as patched:
        assert inner.solve is not KEPT.original
        assert user.solve is scipy.optimize.linear_sum_assignment is KEPT.original
        assert patched.patched == ("user_package.inner.solve",)
        assert repr(patched) == "<mudsc_fast.patch of user_package>"
    assert inner.solve is KEPT.original


def test_patches_overlap_in_any_order() -> None:
    user = user_module("user", solve=KEPT.original)
    everywhere = mudsc_fast.patch()
    some = mudsc_fast.patch(only=["user"])
    assert some.patched == ("user.solve",)
    everywhere.restore()
    assert scipy.optimize.linear_sum_assignment is KEPT.original
    assert user.solve is not KEPT.original
    again = mudsc_fast.patch()
    some.restore()
    assert user.solve is not KEPT.original
    again.restore()
    assert user.solve is KEPT.original


def test_rebound_names_are_left_alone() -> None:
    user = user_module("user", solve=KEPT.original)
    with mudsc_fast.patch():
        user.solve = max  # type: ignore[attr-defined]
        user.late = scipy.optimize.linear_sum_assignment  # type: ignore[attr-defined]
    assert user.solve is max
    assert user.late is KEPT.original


def test_modules_unloaded_while_patched_are_restored() -> None:
    user = user_module("user", solve=KEPT.original)
    with mudsc_fast.patch():
        del sys.modules["user"]
    assert user.solve is KEPT.original


@pytest.mark.parametrize("only", [None, ["user_late"]])
def test_modules_imported_while_patched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: list[str] | None
) -> None:
    (tmp_path / "user_late.py").write_text("from scipy.optimize import linear_sum_assignment as solve\n")
    monkeypatch.syspath_prepend(tmp_path)
    with mudsc_fast.patch(only=only) as patched:
        late = importlib.import_module("user_late")
        assert late.solve is not KEPT.original
        assert "user_late.solve" in patched.patched
        assert late.__spec__ is not None
        assert late.__loader__ is late.__spec__.loader
        importlib.reload(late)
        assert late.solve is not KEPT.original
    assert late.solve is KEPT.original
    assert "exec_module" not in vars(late.__loader__)


def test_later_imports_are_not_patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_late.py").write_text("from scipy.optimize import linear_sum_assignment as solve\n")
    monkeypatch.syspath_prepend(tmp_path)
    with mudsc_fast.patch():
        spec = importlib.util.find_spec("user_late")
        assert importlib.util.find_spec("user_nowhere") is None
    assert spec is not None
    assert spec.loader is not None
    late = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(late)
    assert late.solve is KEPT.original


def test_loader_of_several_modules_is_patched_and_restored() -> None:
    class Loader:
        """Makes modules that bind the function, like the import hooks of pytest and of packaging tools."""

        def __init__(self) -> None:
            self.exec_module = self.execute

        def create_module(self, _spec: ModuleSpec) -> None:
            return None

        def execute(self, module: ModuleType) -> None:
            module.__dict__["solve"] = KEPT.original
            if module.__name__ == "user_late":
                importlib.import_module("user_late_too")

    class Finder:
        def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
            del path, target
            return ModuleSpec(fullname, loader) if fullname.startswith("user_late") else None  # type: ignore[arg-type]

    loader, finder = Loader(), Finder()
    own = loader.exec_module
    sys.meta_path.insert(0, finder)
    try:
        with mudsc_fast.patch(only=["user_late", "user_late_too"]) as patched:
            importlib.import_module("user_late")
            assert patched.patched == ("user_late_too.solve", "user_late.solve")
        assert loader.exec_module is own
        assert sys.modules["user_late"].solve is sys.modules["user_late_too"].solve is KEPT.original
    finally:
        sys.meta_path.remove(finder)
        del sys.modules["user_late_too"]


def test_scipy_may_be_imported_after_the_patch() -> None:
    code = """
import sys
import mudsc_fast
assert not {name.partition(".")[0] for name in sys.modules} & {"scipy", "rebasin", "torchview", "networkx", "sklearn"}
# What only some programs use is loaded at first use.
deferred = ("mudsc_fast.compat", "mudsc_fast.merge", "mudsc_fast.spec")
assert not [name for name in sys.modules if name.startswith(deferred)]
assert {"compat", "patch"} <= set(dir(mudsc_fast))
with mudsc_fast.patch() as patched:
    assert "scipy" not in sys.modules
    import scipy.optimize
    from scipy.optimize import linear_sum_assignment
    assert type(linear_sum_assignment).__name__ == "function"
    assert "scipy.optimize._lsap.linear_sum_assignment" in patched.patched
from scipy.optimize import linear_sum_assignment as solve
assert type(solve).__name__ == "builtin_function_or_method"
assert linear_sum_assignment is solve is scipy.optimize._lsap.linear_sum_assignment
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_threads_patch_and_restore_independently() -> None:
    user = user_module("user", solve=KEPT.original)
    wrong: list[str] = []
    barrier = threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        for _ in range(8):
            with mudsc_fast.patch(), mudsc_fast.patch(only=["user"]):
                if user.solve is KEPT.original or user.solve(COST)[1].tolist() != [1, 0, 2]:
                    wrong.append("not patched")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert user.solve is KEPT.original


@pytest.mark.parametrize("only", ["rebasin", [1], 3])
def test_only_must_be_names(only: Any) -> None:
    with pytest.raises(TypeError, match="only must be a sequence of module names, got"):
        mudsc_fast.patch(only=only)
    assert scipy.optimize.linear_sum_assignment is KEPT.original
