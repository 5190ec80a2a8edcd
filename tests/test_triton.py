"""The Triton kernels, with and without a GPU: each file of tests/triton_kernels runs in a separate process.

Triton reads TRITON_INTERPRET when it is imported and then patches itself, so one process cannot do both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mudsc_fast.kernels import _triton

REASON = _triton.unavailable_reason()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "interpret"),
    [
        ("against_reference.py", "1"),
        ("compiled.py", "0"),
        pytest.param(
            "against_reference.py",
            "0",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
            ],
        ),
    ],
)
def test_triton_kernels(file: str, interpret: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent / "triton_kernels" / file),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
