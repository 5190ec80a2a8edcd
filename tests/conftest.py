"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from mudsc_fast import _core
from mudsc_fast.kernels.cuda import _device

# No deadline, because the first call includes imports. Sanitized runs are slow and try fewer examples.
settings.register_profile(
    "default", deadline=None, print_blob=True, max_examples=int(os.environ.get("MUDSC_TEST_EXAMPLES", "25"))
)
settings.load_profile("default")

GOLDEN = Path(__file__).parent / "golden"

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no process runs one at the end while others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skip tests of Hugging Face models if the installed torch is too old for transformers."""
    try:
        return (yield)
    except Exception as error:
        if TORCH_VERSION < (2, 6) and "requires PyTorch >= " in str(error):
            pytest.skip("this version of transformers does not support this version of torch")
        raise


def load_golden(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(params=_core.isa_levels[: _core.supported_isa + 1])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once per instruction level that this processor has."""
    level = str(request.param)
    monkeypatch.setenv("MUDSC_ISA", level)
    return level


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, threads that share tiny tensors mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def simulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make the wrappers of the CUDA kernels launch them in the simulator, on tensors in host memory."""
    try:
        module = import_module("mudsc_fast._cuda_simulator")
    except ImportError:
        pytest.skip("the simulator is not built: install with --config-settings=cmake.define.MUDSC_CUDA_SIMULATOR=ON")
    monkeypatch.setattr(_device, "extension", lambda: module)
    yield module
    module.set_seed(0)
    module.set_shared_memory_limit(2**31)


@pytest.fixture
def gpu() -> torch.device:
    """Return a CUDA device; tests that ask for it run only where there is one."""
    if _device.unavailable_reason():
        pytest.skip(f"no CUDA device: {_device.unavailable_reason()}")
    return torch.device("cuda")
