"""CUDA graphs: ops that wait for the device raise an error during capture. The devices here are mocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import mudsc_fast
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.ops import _dispatch

SIMILARITY = torch.corrcoef(torch.randn(160, 200, generator=torch.Generator().manual_seed(0)))


def accumulated() -> mudsc_fast.CorrelationAccumulator:
    sums = mudsc_fast.CorrelationAccumulator(2, 3)
    sums.update(torch.randn(9, 3), torch.randn(9, 3))
    sums._moments.in_range = torch.tensor(True)  # as after an update on a CUDA device
    return sums


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "linear_assignment": lambda: lambda: mudsc_fast.linear_assignment(SIMILARITY, tolerance=0.1),
    "zip_units": lambda: lambda: mudsc_fast.zip_units(SIMILARITY, 2),
    "using the sums of a CorrelationAccumulator": lambda: accumulated().finalize,
    "an update with features that are centered first": lambda: lambda: accumulated(),
}


@pytest.mark.parametrize("what", CALLS)
def test_synchronizing_ops_reject_capture(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[what]()

    def refuse(name: str, device: torch.device) -> None:
        refuse_capture(name, torch.device("cuda", device.index or 0))

    refuse_capture = _device.refuse_capture
    monkeypatch.setattr(_device, "refuse_capture", refuse)
    monkeypatch.setattr(_device, "is_capturing", lambda _: True)
    with pytest.raises(RuntimeError, match=f"{what} makes the host wait for the device, which a CUDA graph"):
        call()


def test_cpu_tensors_are_not_affected_by_capture() -> None:
    _device.refuse_capture("zip_units", torch.device("cpu"))
    assert not _device.is_capturing(torch.device("cpu"))


def test_unusable_device_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users who pass a CUDA tensor get the message about an old driver or a device without compiled code."""
    reason = "the driver is for CUDA 12.4, older than the CUDA 13.0 that this package was built with: update the driver"
    monkeypatch.setattr(_device, "unavailable_reason", lambda *_: reason)
    monkeypatch.setattr(_device, "is_built", lambda: True)
    monkeypatch.setattr(_dispatch, "_warned", set())
    with pytest.warns(UserWarning, match=r"does not use its CUDA kernels on cuda:0, .*: the driver is for CUDA 12\.4"):
        assert _dispatch.backend_for("zip", "cuda", 0) == "cpu"
    assert _dispatch.backend_for("zip", "cuda", 0) == "cpu"
    assert _dispatch.backend_for("assignment", "cuda", 0) == "cpu"
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(_device, "is_built", lambda: False)
    assert _dispatch.backend_for("zip", "cuda", 0) == "cpu"  # no warning, because the user chose a build without CUDA
