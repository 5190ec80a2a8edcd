"""The self-tests of the CUDA kernels: detected errors, records of passed tests, and the fallback of a failed op."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mudsc_fast.kernels.cuda import _device, _self_test
from mudsc_fast.ops import _dispatch

CPU = torch.device("cpu")


@pytest.fixture
def device(simulator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make the simulator cuda:0, with no self-test done and an empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MUDSC_SELF_TEST", raising=False)
    monkeypatch.setenv("MUDSC_TENSOR_CORES", "mma.sync")
    monkeypatch.setattr(_self_test, "_results", {})
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_self_test, "_device_of", lambda _: CPU)
    monkeypatch.setattr(_device, "unavailable_reason", lambda *_: "")
    monkeypatch.setattr(_device, "is_built", lambda: True)
    return simulator


def skew(simulator: Any, monkeypatch: pytest.MonkeyPatch, kernel: str, argument: str) -> None:
    """Make a kernel return a slightly wrong result."""
    launch = getattr(simulator, kernel)

    def wrong(**given: Any) -> None:
        launch(**{**given, argument: given[argument] * 1.01 if isinstance(given[argument], float) else 0})

    monkeypatch.setattr(simulator, kernel, wrong)


@pytest.mark.parametrize("op", ["zip", "correlation", "correlation.finalize", "assignment"])
@pytest.mark.usefixtures("device")
def test_correct_kernels_pass(op: str) -> None:
    assert _self_test.failure(op, 0) == ""


def test_wrong_zip_is_detected_and_runs_on_cpu(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    skew(device, monkeypatch, "zip_units", "budget")
    assert "the self-test of zip failed" in _self_test.failure("zip", 0)
    with pytest.warns(UserWarning, match=r"does not use its CUDA kernels on cuda:0.* self-test of zip.* report this"):
        assert _dispatch.backend_for("zip", "cuda", 0) == "cpu"
    assert _dispatch.backend_for("zip", "cuda", 0) == "cpu"  # without a second warning
    assert _dispatch.backend_for("assignment", "cuda", 0) == "cuda"
    with _dispatch.use_backend("cuda"), pytest.raises(ValueError, match="self-test of zip failed"):
        _dispatch.backend_for("zip", "cuda", 0)


@pytest.mark.parametrize(
    ("kernel", "argument"),
    [("correlation_join", "weight"), ("correlation_moments", "updates"), ("correlation_blend", "eps")],
)
def test_wrong_correlation_is_detected(
    device: Any, monkeypatch: pytest.MonkeyPatch, kernel: str, argument: str
) -> None:
    if argument == "eps":  # no result of this case depends on this value, so make the error large
        launch = getattr(device, kernel)
        monkeypatch.setattr(device, kernel, lambda **given: launch(**{**given, "eps": 1e3}))
    else:
        skew(device, monkeypatch, kernel, argument)
    assert "correlations of torch.float32 features have an error of" in _self_test.failure("correlation", 0)


def test_pass_is_recorded_for_later_processes(device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _self_test.failure("zip", 0) == ""
    file = tmp_path / "mudsc_fast" / "self_test.json"
    assert len(json.loads(file.read_text())["passed"]) == 1
    monkeypatch.setattr(_self_test, "_results", {})  # as if in another process
    monkeypatch.setattr(device, "zip_units", None)  # what runs again would fail
    assert _self_test.failure("zip", 0) == ""
    monkeypatch.setattr(_self_test, "_results", {})
    monkeypatch.setattr(_self_test, "_identity", lambda _: "another build")
    with pytest.raises(TypeError):
        _self_test.failure("zip", 0)


@pytest.mark.parametrize("content", ["", "[]", '{"passed": 3}', "{"])
@pytest.mark.usefixtures("device")
def test_damaged_record_is_replaced(content: str, tmp_path: Path) -> None:
    file = tmp_path / "mudsc_fast" / "self_test.json"
    file.parent.mkdir()
    file.write_text(content)
    assert _self_test.failure("zip", 0) == ""
    assert len(json.loads(file.read_text())["passed"]) == 1


@pytest.mark.usefixtures("device")
def test_unwritable_record_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _self_test.failure("zip", 0) == ""


def test_failure_is_not_recorded(device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        skew(device, patch, "zip_units", "budget")
        assert _self_test.failure("zip", 0)
    monkeypatch.setattr(_self_test, "_results", {})
    assert not (tmp_path / "mudsc_fast" / "self_test.json").exists()
    assert _self_test.failure("zip", 0) == ""


def test_self_tests_can_be_skipped(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUDSC_SELF_TEST", "0")
    monkeypatch.setattr(device, "zip_units", None)
    assert _self_test.failure("zip", 0) == ""


@pytest.mark.usefixtures("device")
def test_first_use_in_graph_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "is_capturing", lambda _: True)
    with pytest.raises(RuntimeError, match="the first use of zip on a device runs a self-test, which a CUDA graph"):
        _self_test.failure("zip", 0)
    monkeypatch.setattr(_device, "is_capturing", lambda _: False)
    assert _self_test.failure("zip", 0) == ""
    monkeypatch.setattr(_device, "is_capturing", lambda _: True)
    assert _self_test.failure("zip", 0) == ""
