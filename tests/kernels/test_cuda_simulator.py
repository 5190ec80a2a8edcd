"""The simulator of CUDA: it must find what is planted in the kernels of csrc/cuda_sim/register_checks.cpp."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("seed", range(5))
def test_barriers_order_threads_whatever_the_schedule(simulator: Any, seed: int) -> None:
    simulator.set_seed(seed)
    assert simulator.check_sum(True) == sum(range(64))


def test_a_missing_barrier_shows_as_results_that_depend_on_the_schedule(simulator: Any) -> None:
    results = set()
    for seed in range(5):
        simulator.set_seed(seed)
        results.add(simulator.check_sum(False))
    assert len(results) > 1


@pytest.mark.parametrize("seed", range(3))
def test_threads_at_different_barriers(simulator: Any, seed: int) -> None:
    simulator.set_seed(seed)
    with pytest.raises(RuntimeError, match=r"wait_apart: a warp function|wait_apart: threads wait for each other"):
        simulator.check_wait_apart()


@pytest.mark.parametrize("seed", range(3))
def test_a_warp_function_and_an_exited_lane(simulator: Any, seed: int) -> None:
    simulator.set_seed(seed)
    with pytest.raises(RuntimeError, match=r"wait_for_the_exited: (a warp function waits|threads wait)"):
        simulator.check_exited_lane()


@pytest.mark.parametrize("threads", [0, 1025])
def test_a_failed_launch_names_the_kernel(simulator: Any, threads: int) -> None:
    with pytest.raises(RuntimeError, match="CUDA kernel wait_apart could not be launched: invalid configuration"):
        simulator.check_block_size(threads)
