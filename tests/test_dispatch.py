from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

import mudsc_fast
from mudsc_fast import _core
from mudsc_fast.kernels.cpu import _runtime
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.ops import _dispatch


def test_requested_backend_is_used_inside_context_only() -> None:
    with mudsc_fast.use_backend("reference"):
        assert _dispatch.backend_for("zip", "cpu") == "reference"
        with mudsc_fast.use_backend("cpu"):
            assert _dispatch.backend_for("zip", "cpu") == "cpu"
        assert _dispatch.backend_for("zip", "cpu") == "reference"
    assert _dispatch.backend_for("zip", "cpu") == "cpu"


def test_environment_requests_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUDSC_BACKEND", "reference")
    assert _dispatch.backend_for("permute", "cpu") == "reference"
    with mudsc_fast.use_backend("cpu"):
        assert _dispatch.backend_for("permute", "cpu") == "cpu"
    monkeypatch.setenv("MUDSC_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"MUDSC_BACKEND must be one of cpu, reference.*, got 'abacus'"):
        _dispatch.backend_for("permute", "cpu")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of cpu, reference.*, got 'abacus'"):
        mudsc_fast.use_backend("abacus").__enter__()


def test_requested_backend_must_support_device() -> None:
    with mudsc_fast.use_backend("cpu"), pytest.raises(ValueError, match="no permute kernel for cuda tensors"):
        _dispatch.backend_for("permute", "cuda")


def test_cuda_tensors_use_triton_if_installed() -> None:
    usable = find_spec("triton") and tuple(map(int, version("triton").split(".")[:2])) >= (3, 3)
    assert _dispatch.backend_for("permute", "cuda") == ("triton" if usable else "reference")
    assert _dispatch.backend_for("permute", "mps") == "reference"


def test_devices_without_code_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "unavailable_reason", lambda index=None: "no kernel image" if index == 1 else "")
    monkeypatch.setenv("MUDSC_SELF_TEST", "0")  # there is no device to test
    kernels = {"cuda": lambda: 0, "cpu": lambda: 1, "reference": lambda: 2}
    assert _dispatch.choose("zip", torch.device("cuda:0"), kernels) is kernels["cuda"]
    assert _dispatch.choose("zip", torch.device("cuda:1"), kernels) is kernels["cpu"]


def test_devices_are_not_queried_without_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Querying devices would keep processes that are forked later from using one."""

    def fail(index: int | None = None) -> str:
        raise AssertionError(index)

    monkeypatch.setattr(_device, "unavailable_reason", fail)
    monkeypatch.setenv("MUDSC_BACKEND", "reference")
    assert _dispatch.backend_for("zip", "cpu") == "reference"
    with mudsc_fast.use_backend("cpu"):
        assert _dispatch.backend_for("zip", "cpu") == "cpu"


def test_instruction_level_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _runtime.isa_level() == _core.supported_isa
    for index, level in enumerate(_core.isa_levels):
        monkeypatch.setenv("MUDSC_ISA", level)
        assert _runtime.isa_level() == min(index, _core.supported_isa)
    monkeypatch.setenv("MUDSC_ISA", "sse9")
    with pytest.raises(ValueError, match=r"MUDSC_ISA must be one of baseline.*got 'sse9'"):
        mudsc_fast.zip_units(torch.eye(4), 2)


def test_versions_agree() -> None:
    assert _core.__version__ == mudsc_fast.__version__
