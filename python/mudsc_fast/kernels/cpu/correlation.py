"""The passes before and after the matrix product of a correlation (csrc/cpu/correlation.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.kernels._samples import Centered, SampleOrder
from mudsc_fast.kernels.cpu import _runtime


def center(
    features: Tensor, memory: Tensor, outer_order: SampleOrder | None = None, inner_order: SampleOrder | None = None
) -> Centered:
    """Return features [outer, C, inner] minus their mean, as [C, samples] in `memory` [C * samples], with NaN as 0.

    If units are adjacent in the features, they are adjacent in the result, which then is the transpose of a contiguous
    tensor. The orders say which samples to take along the outer and the inner axis; None takes all of them. If one of
    them sums samples, rounding the sums to the dtype of the features, the other must be None.
    """
    units = features.shape[1]
    outer = features.shape[0] if outer_order is None else len(outer_order)
    inner = features.shape[2] if inner_order is None else len(inner_order)
    samples = outer * inner
    unit_major = features.stride(1) != 1 or (features.stride(2) == 1 and inner > 1)
    centered = memory.view(units, samples) if unit_major else memory.view(samples, units).T
    mean, squares = torch.empty(2, units, dtype=torch.float64, device="cpu")
    _core.center_features(
        features,
        None if outer_order is None else outer_order.parts,
        None if inner_order is None else inner_order.parts,
        centered,
        mean,
        squares,
        _runtime.isa_level(),
        _runtime.threads(),
    )
    return Centered(centered, mean, squares)


def accumulate(comoment: Tensor, product: Tensor, row_shift: Tensor, column_shift: Tensor) -> None:
    """Add `product` + outer(row_shift, column_shift) to `comoment` [R, C] float64; all contiguous."""
    _core.accumulate_comoment(comoment, product, row_shift, column_shift, _runtime.isa_level(), _runtime.threads())


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
    """Write comoment / count / max(row_deviation * column_deviation, eps) to `out`, and transposed to `mirror`.

    With another similarity, the result is ``balance`` times the quotient plus ``1 - balance`` times `other`, as
    torch.lerp computes it. If `mirror` is `out`, the upper triangle is mirrored into the lower one. Both are blocks of
    one matrix: their rows are contiguous, at the same distance from each other.
    """
    _core.correlate(
        comoment,
        row_deviation,
        column_deviation,
        count,
        eps,
        out,
        mirror,
        other,
        balance,
        _runtime.isa_level(),
        _runtime.threads(),
    )
