"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from mudsc_fast import _core

# No deadline: a first call pays for imports. Sanitized runs are slow and try fewer examples.
settings.register_profile(
    "default", deadline=None, print_blob=True, max_examples=int(os.environ.get("MUDSC_TEST_EXAMPLES", "100"))
)
settings.load_profile("default")

GOLDEN = Path(__file__).parent / "golden"


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
    """Keep torch from splitting tiny tensors: on a busy machine its threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
