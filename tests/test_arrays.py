"""Arrays of other libraries as input of the ops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mudsc_fast
from mudsc_fast import CorrelationAccumulator, UnitMap


class Exporting:
    """An array with DLPack support, like those of JAX and CuPy."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tensor.__dlpack__(*args, **kwargs)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


class Convertible:
    """An array that NumPy can convert."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        del copy
        return self._tensor.numpy().astype(dtype or self._tensor.numpy().dtype)


class Inconvertible(Exporting):
    """An array that NumPy must not convert, like those of CuPy."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        raise TypeError("implicit conversion to a NumPy array is not allowed")


class Unexportable(Convertible):
    """An array whose DLPack export fails, for example because torch does not know its device."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        raise BufferError("not on this device")


def as_array(kind: str, tensor: Tensor) -> Any:
    if kind in ("read-only", "reversed", "foreign"):
        array = tensor.numpy().copy()
        if kind == "read-only":
            array.flags.writeable = False
        return array[::-1].copy()[::-1] if kind == "reversed" else array.astype(">f4") if kind == "foreign" else array
    if kind == "tensor":
        return tensor
    if kind == "numpy":
        return tensor.numpy()
    wrappers = {
        "dlpack": Exporting,
        "array": Convertible,
        "unexportable": Unexportable,
        "inconvertible": Inconvertible,
    }
    return wrappers[kind](tensor)


KINDS = ("tensor", "numpy", "dlpack", "array", "unexportable", "inconvertible", "read-only", "reversed", "foreign")
SIMILARITY = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_op_accepts_every_array(kind: str) -> None:
    similarity = as_array(kind, SIMILARITY)
    expected = mudsc_fast.linear_assignment(SIMILARITY)
    assert torch.equal(mudsc_fast.linear_assignment(similarity).columns, expected.columns)
    rows, columns = mudsc_fast.linear_sum_assignment(similarity, maximize=True)
    assert isinstance(columns, Tensor if kind == "tensor" else np.ndarray)
    assert columns.tolist() == expected.columns.tolist()
    assert rows.tolist() == list(range(12))
    zipped = mudsc_fast.zip_units(similarity, 2)
    assert torch.equal(zipped.cluster_of_unit, mudsc_fast.zip_units(SIMILARITY, 2).cluster_of_unit)
    merged = mudsc_fast.permute_merge([similarity, similarity], {})
    assert torch.equal(merged, SIMILARITY)
    accumulators = [CorrelationAccumulator(2, 12) for _ in range(2)]
    for accumulator, features in zip(accumulators, (similarity, SIMILARITY), strict=True):
        accumulator.update(features, features)
    assert torch.equal(accumulators[0].finalize(), accumulators[1].finalize())


@pytest.mark.parametrize("kind", ["numpy", "dlpack", "array"])
def test_maps_accept_arrays(kind: str) -> None:
    index = torch.tensor([[1, 0, 2]])
    assert torch.equal(UnitMap.permutation(as_array(kind, index)).index, index)
    scale = torch.ones(3)
    made = UnitMap.clusters(as_array(kind, index), 3, as_array(kind, scale))
    assert torch.equal(made.index, index)


def test_memory_is_shared_if_possible() -> None:
    from mudsc_fast._arrays import as_tensor

    tensor = torch.ones(3)
    assert as_tensor("x", tensor.numpy()).data_ptr() == tensor.data_ptr()
    assert as_tensor("x", Exporting(tensor)).data_ptr() == tensor.data_ptr()


def test_half_dtypes_of_other_libraries_are_kept() -> None:
    similarity = SIMILARITY.bfloat16()
    columns = mudsc_fast.linear_assignment(Exporting(similarity)).columns
    assert torch.equal(columns, mudsc_fast.linear_assignment(similarity).columns)


def test_other_objects_are_rejected() -> None:
    class Broken:
        def __dlpack__(self) -> Any:
            raise BufferError("no")

    with pytest.raises(TypeError, match=r"similarity must be a torch.Tensor, got list, which has neither"):
        mudsc_fast.zip_units([[1.0]], 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="similarity must be an array that torch can read by __dlpack__"):
        mudsc_fast.zip_units(Broken(), 1)
    with pytest.raises(TypeError, match="similarity must be of a dtype that torch has, got object"):
        mudsc_fast.zip_units(np.array([[None]]), 1)


@pytest.mark.parametrize("size", [1, 12])
@pytest.mark.parametrize("contiguous", [False, True])
def test_negated_views_keep_their_signs(size: int, contiguous: bool) -> None:
    random = torch.Generator().manual_seed(0)
    negated = torch.randn(size, size, dtype=torch.complex64, generator=random).conj().imag
    if contiguous:
        negated = negated.as_strided((size, size), (size, 1))
    plain = negated.clone()
    assert negated.is_neg()
    order = mudsc_fast.UnitMap.permutation(torch.randperm(size, generator=random).expand(1, -1))
    assert torch.equal(mudsc_fast.permute_merge([negated], {0: order}), mudsc_fast.permute_merge([plain], {0: order}))
    for maximize in (True, False):
        found, expected = (mudsc_fast.linear_assignment(one, maximize=maximize) for one in (negated, plain))
        assert torch.equal(found.objective, expected.objective)
    sums = []
    for one in (negated, plain):
        accumulator = mudsc_fast.CorrelationAccumulator(2, size)
        accumulator.update(one, plain, channel_axis=1)
        sums.append(accumulator.finalize())
    assert torch.equal(*sums)
