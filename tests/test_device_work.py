"""How often `match` waits for a device, and how many operations it launches, counted on the CPU.

The tests count calls of torch that would wait if the tensors were on a CUDA device. Waits in kernels of this package
are not counted: with the backend `reference`, torch operations compute the similarities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mudsc_fast
from conftest import TORCH_VERSION
from mudsc_fast import Matching, _checks
from mudsc_fast.matching.node import Mode, align_units
from mudsc_fast.ops._dispatch import use_backend
from mudsc_fast.unit_map import UnitMap

#: Functions that read results of a device, or whose output shape depends on them.
WAITING = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal", "allclose",
    "unique", "unique_consecutive", "masked_select", "bincount", "is_nonzero", "argwhere",
}  # fmt: skip


class Waits(TorchFunctionMode):
    """Counts calls that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
        if name in WAITING or by_mask:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Counts operations that compute something, each of which is a launch on a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not func.is_view and not any(word in name for word in ("empty", "_local_scalar_dense", "detach")):
            self.count += 1
        return func(*args, **(kwargs or {}))


def work_of(call: Callable[[], object]) -> tuple[int, int]:
    """Return how often a call waits and how many operations it launches."""
    with use_backend("reference"), Waits() as waits, Launches() as launches:  # type: ignore[no-untyped-call]
        call()
    return waits.calls.total(), launches.count


def network(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def test_counters_count() -> None:
    values = torch.ones(4)
    waits, launches = work_of(lambda: (values + 1).sum().item())
    assert (waits, launches) == (1, 2)
    assert work_of(lambda: values[values > 0])[0] == 1
    assert work_of(lambda: values[None]) == (0, 0)


def test_checks_wait_once() -> None:
    assert work_of(lambda: _checks.check_finite("values", torch.ones(4, 4))) == (1, 3)  # with `ones`
    index = torch.arange(8)[None]
    waits, launches = work_of(lambda: UnitMap.permutation(index))
    assert waits == 1
    assert launches <= 3


@pytest.mark.parametrize("models", [1, 3])
def test_aligning_node_waits_twice(models: int) -> None:
    similarity = torch.rand(models, 16, 16)
    waits, launches = work_of(lambda: align_units({"node": similarity}))
    assert waits == 2  # for the gap and for both means; the solver itself checks the similarity
    assert launches <= 15


def match(mode: Mode, sweeps: int) -> Matching:
    models, batches = [network(0), network(1)], [torch.randn(32, 10) for _ in range(3)]
    options: dict[str, Any] = {"mode": mode, "balance": 0.5, "max_sweeps": sweeps, "patience": sweeps}
    return mudsc_fast.match(models, batches, **options, verify=False, progress=False)


@pytest.mark.skipif(TORCH_VERSION < (2, 5), reason="torch 2.4 launches more operations for the same calls")
@pytest.mark.parametrize(("mode", "most_waits", "most_launches"), [("align", 16, 125), ("zip", 17, 160)])
def test_first_sweep(mode: Mode, most_waits: int, most_launches: int) -> None:
    waits, launches = work_of(lambda: match(mode, 1))
    assert waits / 3 <= most_waits  # for each of three nodes, including the activation statistics
    assert launches / 3 <= most_launches


def test_later_visits_of_node() -> None:
    # In every sweep of this zip the neighbors of each node change, so its weights are compared again.
    (few_waits, few), (many_waits, many) = work_of(lambda: match("zip", 1)), work_of(lambda: match("zip", 4))
    assert (many_waits - few_waits) / 9 <= 16
    assert (many - few) / 9 <= 130
