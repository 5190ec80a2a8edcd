"""Sums of several processes, joined by torch.distributed."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from mudsc_fast.ops.correlation import Blocks, CorrelationAccumulator

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")

PROCESSES = 2
CASES: tuple[tuple[Blocks, tuple[int, ...]], ...] = (("cross", (30, 11)), ("full", (30, 11)), ("full", (0, 9)))


def features_of(rank: int, samples: int) -> list[Tensor]:
    """Return the samples of one process. Their means differ between processes."""
    generator = torch.Generator().manual_seed(rank)
    return [1e3 * rank + torch.randn(samples, 5, generator=generator) for _ in range(2)]


def accumulate(rank: int, blocks: Blocks, samples: int) -> CorrelationAccumulator:
    sums = CorrelationAccumulator(2, 5, blocks=blocks)
    sums.update(*features_of(rank, samples))
    return sums


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    states: list[dict[str, Any]] = []
    for blocks, samples in CASES:
        sums = accumulate(rank, blocks, samples[rank])
        sums.all_reduce()
        states.append(sums.state_dict())
    empty = CorrelationAccumulator(2, 5)
    empty.all_reduce()
    other = CorrelationAccumulator(2, 5 + rank)
    with pytest.raises(ValueError, match=r"configuration of rank 0, .*'units': 5.* got .*'units': 6.* in rank 1"):
        other.all_reduce()
    other = CorrelationAccumulator(2, 5)
    other._moments.in_range = torch.tensor(rank == 0)  # the state that an infinite feature on a CUDA device leaves
    with pytest.raises(ValueError, match=r"features must be finite, .* got others in .* in rank 1"):
        other.all_reduce()
    torch.save((states, empty.num_samples), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_every_process_gets_sums_of_all_samples(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_process, args=(rank, str(tmp_path))) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    for (blocks, samples), *states in zip(CASES, *(states for states, _ in results), strict=True):
        both = accumulate(0, blocks, samples[0])
        both.update(*features_of(1, samples[1]))
        for state in states:
            joined = CorrelationAccumulator(2, 5, blocks=blocks)
            joined.load_state_dict(state)
            assert joined.num_samples == sum(samples)
            torch.testing.assert_close(joined.finalize(), both.finalize(), rtol=0, atol=1e-6)
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]) if isinstance(value, Tensor) else value == states[1][name]
    assert [num_samples for _, num_samples in results] == [0, 0]


def test_without_process_group() -> None:
    with pytest.raises(RuntimeError, match="all_reduce needs a process group: call torch"):
        CorrelationAccumulator(2, 5).all_reduce()
