"""Tensors as arguments of bindings: both ways of reading them make the same checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mudsc_fast
from mudsc_fast import UnitMap, _core

ISA, THREADS = 0, 1


@pytest.fixture(params=["DLPack", "attributes"])
def _reading(request: pytest.FixtureRequest) -> Iterator[None]:
    """Read tensors with torch's C functions, and as with versions of torch that lack them."""
    _core.read_tensors_by_attributes(request.param == "attributes")
    yield
    _core.read_tensors_by_attributes(False)


def accumulate(**changed: Any) -> None:
    tensors = {
        "comoment": torch.zeros(3, 3, dtype=torch.float64),
        "product": torch.ones(3, 3),
        "row_shift": torch.zeros(3, dtype=torch.float64),
        "column_shift": torch.zeros(3, dtype=torch.float64),
    }
    _core.accumulate_comoment(**{**tensors, **changed}, isa=ISA, threads=THREADS)


@pytest.mark.usefixtures("_reading")
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"product": [1.0]}, TypeError, "product must be a torch.Tensor, got list"),
        (
            {"product": torch.ones(3, 2)},
            ValueError,
            r"product must be of shape \[3, 3\], got float32 of shape \[3, 2\]",
        ),
        (
            {"product": torch.ones(3, 6)[:, ::2]},
            ValueError,
            r"product must be contiguous, got float32 of shape \[3, 3\]",
        ),
        ({"product": torch.ones(3, 3, dtype=torch.int64)}, ValueError, "product must be float16, .*, got int64"),
        ({"row_shift": torch.zeros(3)}, ValueError, "row_shift must be float64, got float32"),
        ({"row_shift": torch.zeros(3, dtype=torch.bool)}, ValueError, "row_shift must be float64, got other"),
        ({"column_shift": torch.zeros(4).double()}, ValueError, r"column_shift must be of shape \[3\]"),
    ],
)
def test_arguments_are_checked(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    accumulate()
    with pytest.raises(error, match=message):
        accumulate(**changed)


@pytest.mark.usefixtures("_reading")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_ways_of_reading_tensors_agree(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 1, 5, 1, 4, 2, 1, 1, 3, 1, generator=generator).to(dtype) for _ in range(2)]
    maps = {
        2: UnitMap.permutation(torch.tensor([[4, 2, 0, 1, 3]] * 2)),
        8: UnitMap.clusters(torch.tensor([[0, 1, 1]] * 2), 2, torch.tensor([1.0, 0.5])),
    }
    results = []
    for backend in ("cpu", "reference"):
        with mudsc_fast.use_backend(backend):
            results.append(mudsc_fast.permute_merge(tensors, maps))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.usefixtures("_reading")
def test_mismatched_maps_are_rejected() -> None:
    out, index = torch.zeros(3), torch.tensor([[0, 1, 2]])
    for unit_map, message in (
        (UnitMap.permutation(torch.tensor([[0, 1]])), r"maps\[0\] does not fit the tensors"),
        (UnitMap(index.int(), 3, 3, True), "index must be int64, got int32"),
        (UnitMap(index, 3, 2, True), r"index must be of shape \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.permute_merge([torch.zeros(3)], {0: unit_map}, [1.0], out, False, ISA, THREADS)
    with pytest.raises(ValueError, match="out must have the shape of the result"):
        _core.permute_merge(
            [torch.zeros(3)], {0: UnitMap.permutation(index)}, [1.0], torch.zeros(4), False, ISA, THREADS
        )
