"""The CUDA kernel of zip, in the simulator and on a device, gives the result of the C++ kernel bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mudsc_fast.kernels.cpu import zip as cpu
from mudsc_fast.kernels.cuda import zip as cuda
from similarities import FAMILIES

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Numbers of models, of units in each, clusters to end with, merges inside each model and shrink.
PROBLEMS = [(2, 5, 5, 2, 0.5), (3, 7, 4, 4, 0.0), (1, 1, 1, 0, 0.5), (2, 33, 20, 0, 1.7), (4, 10, 9, 1, -1.0)]


def assert_same(similarity: Tensor, problem: tuple[int, int, int, int, float], device: str = "cpu") -> None:
    models, _, remaining, budget, shrink = problem
    expected = cpu.zip_units(similarity, models, remaining, budget, shrink)
    result = cuda.zip_units(similarity.to(device), models, remaining, budget, shrink)
    for found, wanted in zip(result, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_simulated(simulator: Any, family: str, problem: tuple[int, int, int, int, float]) -> None:
    units = problem[0] * problem[1]
    for seed, dtype in enumerate(DTYPES if family == "correlation" else DTYPES[2:3]):
        simulator.set_seed(seed + 1)
        assert_same(FAMILIES[family](units, seed).to(dtype), problem)


def test_simulated_without_shared_memory(simulator: Any) -> None:
    simulator.set_shared_memory_limit(9 * 1024)
    assert_same(FAMILIES["correlation"](140, 0), (2, 70, 50, 20, 0.5))


def test_simulated_strided_and_transposed_rows(simulator: Any) -> None:  # noqa: ARG001
    similarity = FAMILIES["asymmetric"](60, 0)
    assert_same(similarity[:40, 10:50], (2, 20, 20, 20, 0.5))
    assert_same(similarity[:40, 10:50].T, (2, 20, 20, 20, 0.5))


def test_no_units(simulator: Any) -> None:  # noqa: ARG001
    clusters, values = cuda.zip_units(torch.zeros(0, 0), 2, 0, 0, 0.5)
    assert clusters.shape == values.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("units", [16, 254, 2000])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_device(gpu: torch.device, family: str, units: int) -> None:  # noqa: ARG001
    for dtype in DTYPES:
        assert_same(FAMILIES[family](units, 1).to(dtype), (2, units // 2, units // 2, units // 8, 0.5), "cuda")
