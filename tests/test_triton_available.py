"""If Triton is too old or has no compiler, there is one warning, and the reference is used."""

from __future__ import annotations

import pytest

from mudsc_fast.kernels import _triton
from mudsc_fast.ops import _dispatch


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_triton, "is_installed", lambda: True)
    for name in ("_version_problem", "_compile_problem"):
        monkeypatch.setattr(_triton, name, getattr(_triton, name).__wrapped__)  # forget earlier results


@pytest.mark.parametrize("installed", ["3.0.0", "3.2.0", "2.3.1"])
def test_old_triton_is_not_used(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "version", lambda _: installed)
    with pytest.warns(UserWarning, match=rf"Triton kernels on cuda:0.*: triton {installed} is older than 3\.3"):
        assert _dispatch.backend_for("permute", "cuda", 0) == "reference"
    assert _dispatch.backend_for("permute", "cuda", 0) == "reference"
    with pytest.raises(ValueError, match="backend must be one of cpu, reference, got 'triton'"):
        _dispatch.use_backend("triton").__enter__()


@pytest.mark.parametrize("installed", ["3.3.0", "3.6.0", "3.10.1", "4.0.0"])
def test_newer_triton_is_used(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "version", lambda _: installed)
    monkeypatch.setattr(_triton, "_compile_problem", lambda _: "")
    assert _dispatch.backend_for("permute", "cuda", 0) == "triton"


def test_triton_without_compiler_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no device here, so compiling for one fails, as it does without a C compiler."""
    monkeypatch.setattr(_triton, "version", lambda _: "3.6.0")
    with pytest.warns(UserWarning, match=r"triton cannot compile kernels \(.*\); it needs a C compiler such as gcc"):
        assert _dispatch.backend_for("permute", "cuda", 0) == "reference"
    assert _dispatch.backend_for("permute", "cuda", 0) == "reference"


def test_missing_triton_gives_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "is_installed", lambda: False)
    assert _dispatch.backend_for("permute", "cuda", 0) == "reference"
