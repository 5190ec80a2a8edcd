"""The CUDA simulator must detect the errors planted in the kernels of csrc/cuda_sim/register_checks.cpp."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("seed", range(5))
def test_barriers_order_threads_under_every_schedule(simulator: Any, seed: int) -> None:
    simulator.set_seed(seed)
    assert simulator.check_sum(True) == sum(range(64))


def test_missing_barrier_makes_results_depend_on_schedule(simulator: Any) -> None:
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
def test_warp_function_with_exited_lane(simulator: Any, seed: int) -> None:
    simulator.set_seed(seed)
    with pytest.raises(RuntimeError, match=r"wait_for_the_exited: (a warp function waits|threads wait)"):
        simulator.check_exited_lane()


@pytest.mark.parametrize("threads", [0, 1025])
def test_failed_launch_names_kernel(simulator: Any, threads: int) -> None:
    with pytest.raises(RuntimeError, match="CUDA kernel wait_apart could not be launched: invalid configuration"):
        simulator.check_block_size(threads)


#: The mistakes that check_warpgroup can make; 0 is none.
STORES_FENCE, REGISTERS_FENCE, WAIT = 1, 2, 3


def product_of_warpgroup() -> torch.Tensor:
    k = torch.arange(8.0)
    return (torch.arange(64.0)[:, None] + k) @ (torch.arange(128.0)[:, None] - k).T


@pytest.mark.parametrize("seed", range(3))
def test_warpgroup_multiplies_according_to_descriptors(simulator: Any, seed: int) -> None:
    simulator.set_seed(seed)
    found = torch.tensor(simulator.check_warpgroup(0)).reshape(64, 128)
    assert torch.equal(found, product_of_warpgroup())


@pytest.mark.parametrize(
    ("forgotten", "message"),
    [(STORES_FENCE, "stored without fence.proxy.async"), (REGISTERS_FENCE, "without a wgmma.fence")],
)
def test_warpgroup_without_fence_is_detected(simulator: Any, forgotten: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"multiply_once: a .*{message}"):
        simulator.check_warpgroup(forgotten)


def test_warpgroup_reads_operands_late(simulator: Any) -> None:
    """If operands are overwritten before the wait, the product changes."""
    found = torch.tensor(simulator.check_warpgroup(WAIT)).reshape(64, 128)
    assert not torch.equal(found, product_of_warpgroup())
