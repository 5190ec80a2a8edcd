"""The passes around the matrix product of a correlation (csrc/cpu/correlation.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._samples import Centered, SampleOrder
from mudsc_fast.kernels._scalar_types import SCALAR_TYPES
from mudsc_fast.kernels.cpu import _runtime


def center(
    features: Tensor, memory: Tensor, outer_order: SampleOrder | None = None, inner_order: SampleOrder | None = None
) -> Centered:
    """Return features [outer, C, inner] less their mean, as [C, samples] in `memory` [C * samples], with NaN as 0.

    The result keeps the features' own order in memory where units are adjacent: it may be the transpose of a contiguous
    tensor. The orders say which samples to take along the outer and the inner axis, all as they are if None. Where
    one sums samples, which it does as features of their dtype would hold the sums, the other is None.
    """
    units = features.shape[1]
    outer = features.shape[0] if outer_order is None else len(outer_order)
    inner = features.shape[2] if inner_order is None else len(inner_order)
    samples = outer * inner
    unit_major = features.stride(1) != 1 or (features.stride(2) == 1 and inner > 1)
    centered = memory.view((units, samples) if unit_major else (samples, units))
    mean, squares = torch.empty(2, units, dtype=torch.float64, device="cpu")
    _core.center_features(
        isa=_runtime.isa_level(),
        threads=_runtime.threads(),
        dtype=SCALAR_TYPES[features.dtype],
        features=features.data_ptr(),
        outer=outer,
        units=units,
        inner=inner,
        outer_stride=features.stride(0),
        unit_stride=features.stride(1),
        inner_stride=features.stride(2),
        outer_order=_addresses(outer_order),
        inner_order=_addresses(inner_order),
        centered_dtype=SCALAR_TYPES[memory.dtype],
        unit_major=unit_major,
        centered=centered.data_ptr(),
        mean=mean.data_ptr(),
        squares=squares.data_ptr(),
    )
    return Centered(centered if unit_major else centered.T, mean, squares)


def _addresses(order: SampleOrder | None) -> tuple[int, int, int]:
    if order is None:
        return 0, 0, 0
    return (
        order.members.data_ptr(),
        0 if order.starts is None else order.starts.data_ptr(),
        0 if order.scale is None else order.scale.data_ptr(),
    )


def accumulate(comoment: Tensor, product: Tensor, row_shift: Tensor, column_shift: Tensor) -> None:
    """Add `product` + outer(row_shift, column_shift) to `comoment` [C, C] float64; all contiguous."""
    _core.accumulate_comoment(
        isa=_runtime.isa_level(),
        threads=_runtime.threads(),
        product_dtype=SCALAR_TYPES[product.dtype],
        product=product.data_ptr(),
        row_shift=row_shift.data_ptr(),
        column_shift=column_shift.data_ptr(),
        units=comoment.shape[0],
        comoment=comoment.data_ptr(),
    )


def correlate(
    comoment: Tensor,
    row_deviation: Tensor,
    column_deviation: Tensor,
    count: int,
    eps: float,
    out: Tensor,
    mirror: Tensor | None,
    other: Tensor | None,
    balance: float,
) -> None:
    """Write comoment / count / max(row_deviation * column_deviation, eps) to `out`, transposed to `mirror`.

    With another similarity, what is written is ``balance`` times the quotient and ``1 - balance`` times `other`, as by
    torch.lerp. If `mirror` is `out`, the upper triangle is mirrored into the lower one. Both are blocks of one matrix:
    rows of contiguous entries, one distance apart.
    """
    _core.correlate(
        isa=_runtime.isa_level(),
        threads=_runtime.threads(),
        comoment=comoment.data_ptr(),
        row_deviation=row_deviation.data_ptr(),
        column_deviation=column_deviation.data_ptr(),
        units=comoment.shape[0],
        count=count,
        eps=eps,
        dtype=SCALAR_TYPES[out.dtype],
        out=out.data_ptr(),
        mirror=0 if mirror is None else mirror.data_ptr(),
        row_stride=out.stride(0),
        other=0 if other is None else other.data_ptr(),
        other_stride=0 if other is None else other.stride(0),
        balance=balance,
    )
