"""Results do not depend on torch's default device and dtype: every allocation names both."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast import CorrelationAccumulator, UnitMap, compat
from mudsc_fast.kernels.cuda import _tensor_cores, assignment
from mudsc_fast.ops import _dispatch

GENERATOR = torch.Generator().manual_seed(0)
SIMILARITY = torch.randn(40, 40, generator=GENERATOR)
LARGE = torch.randn(900, 900, generator=GENERATOR)
FEATURES = [torch.randn(30, 40, generator=GENERATOR) for _ in range(2)]
ORDER = torch.stack([torch.randperm(40, generator=GENERATOR) for _ in range(2)])


def layers(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


MODELS = [layers(seed) for seed in range(2)]
SPEC = mudsc_fast.spec.mlp(["0", "2", "4"])
BATCHES = [torch.randn(50, 6, generator=GENERATOR) for _ in range(2)]


def correlate(blocks: Any) -> list[Tensor]:
    sums = CorrelationAccumulator(2, 40, blocks=blocks)
    sums.update(*FEATURES)
    sums.replace(FEATURES, [FEATURES[0], FEATURES[1] + 1])
    maps = {0: UnitMap.clusters(torch.zeros(2, 30, dtype=torch.int64, device="cpu"), 1)}
    sums.update(*FEATURES, maps=maps)
    return [sums.finalize(), *(value for value in sums.state_dict().values() if isinstance(value, Tensor))]


def merged(mode: Any) -> list[Tensor]:
    model = mudsc_fast.merge(MODELS, BATCHES, spec=SPEC, mode=mode, balance=0.5).model
    assert model is not None
    return list(model.state_dict().values())


def permuted() -> list[Tensor]:
    maps = {0: UnitMap.permutation(ORDER), 1: UnitMap.clusters(ORDER // 2, 20)}
    one = mudsc_fast.permute_(SIMILARITY.clone(), {0: UnitMap.permutation(ORDER[:1])})
    pair = [SIMILARITY, SIMILARITY]
    return [one, mudsc_fast.permute_merge(pair, maps), *mudsc_fast.permute_merge_group([pair, pair], [maps, maps])]


def rebasin() -> list[Tensor]:
    random.seed(0)
    torch.manual_seed(0)
    spec = compat.rebasin.permutation_spec_from_axes_to_perm({"w": ("P", None), "v": (None, "P")})
    params = [{"w": LARGE[:20, at : at + 9], "v": LARGE[:7, at : at + 20]} for at in (0, 100)]
    return list(compat.rebasin.weight_matching(spec, params[0], params[1]).values())


def assigned(similarity: Tensor) -> list[Tensor]:
    found = mudsc_fast.linear_assignment(similarity)
    return [found.columns, found.objective, found.row_duals, found.column_duals, found.gap]


def zipped() -> list[Tensor]:
    found = mudsc_fast.zip_units(SIMILARITY @ SIMILARITY.T, 2)
    return [found.cluster_of_unit, found.sizes]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "assignment": lambda: assigned(SIMILARITY),
    "large assignment": lambda: assigned(LARGE),
    "scipy's function": lambda: list(mudsc_fast.linear_sum_assignment(SIMILARITY)),
    "zip": zipped,
    "correlation": lambda: correlate("cross"),
    "full correlation": lambda: correlate("full"),
    "permute": permuted,
    "merge by align": lambda: merged("align"),
    "merge by zip": lambda: merged("zip"),
    "rebasin": rebasin,
}
#: Left out, because the reference is slow on large matrices and uses the same code for all sizes.
SLOW = ("large assignment", "reference")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check(case: str) -> None:
    expected = CASES[case]()
    for dtype in (torch.float64, torch.float16):
        _tensor_cores._compared.clear()
        with torch.device("meta"), default_dtype(dtype):
            found = CASES[case]()
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, backend) for case in CASES for backend in ("cpu", "reference") if (case, backend) != SLOW],
)
def test_results_do_not_depend_on_defaults(case: str, backend: str) -> None:
    with mudsc_fast.ops.use_backend(backend):
        check(case)


@pytest.mark.parametrize("case", ["assignment", "large assignment", "zip", "correlation", "full correlation"])
@pytest.mark.usefixtures("simulator")
def test_simulated_kernels_do_not_depend_on_defaults(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_unusable_reason", lambda *_: "")
    monkeypatch.setattr(assignment, "MIN_BATCH", 1)
    monkeypatch.setattr(_tensor_cores, "WGMMA_CONFIRMED", frozenset({(9, 0)}))
    # Includes the comparison of instructions at the first product, here with few units and samples.
    monkeypatch.delenv("MUDSC_TENSOR_CORES", raising=False)
    monkeypatch.setattr(_tensor_cores, "_compared", {})
    monkeypatch.setattr(_tensor_cores, "_UNITS", 24)
    monkeypatch.setattr(_tensor_cores, "_SAMPLES", 70)
    kernels = {op: {"cpu": ("cuda",), "other": ()} for op in ("assignment", "zip", "correlation")}
    monkeypatch.setattr(_dispatch, "KERNELS", {**_dispatch.KERNELS, **kernels})
    # Small matrices in host memory take a fast path unless a backend is requested.
    with contextlib.nullcontext() if "correlation" in case else mudsc_fast.ops.use_backend("cuda"):
        check(case)
