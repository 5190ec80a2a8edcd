"""The passes before and after the matrix product of a correlation, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast.kernels._samples import Centered, SampleOrder


def center(
    features: Tensor, memory: Tensor, outer_order: SampleOrder | None = None, inner_order: SampleOrder | None = None
) -> Centered:
    """Return features [outer, C, inner] minus their mean, as [C, samples] in `memory` [C * samples], with NaN as 0.

    The orders say which samples to take, or to sum, along the outer and the inner axis; None takes all of them.
    """
    for axis, order in ((0, outer_order), (2, inner_order)):
        if order is not None:
            features = _in_order(features, axis, order)
    units = features.transpose(0, 1).flatten(1).to(torch.float64)
    units = torch.where(units.isnan(), 0.0, units)
    mean = units.mean(1)
    centered = memory.view(units.shape).copy_(units - mean[:, None])
    return Centered(centered, mean, centered.to(torch.float64).square().sum(1))


def _in_order(features: Tensor, axis: int, order: SampleOrder) -> Tensor:
    if order.starts is None:
        return features.index_select(axis, order.members)
    chosen = features.index_select(axis, order.members[order.starts[0] : order.starts[-1]])
    chosen = chosen.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    shape = list(features.shape)
    shape[axis] = len(order)
    sample_of_member = torch.arange(len(order), device=features.device).repeat_interleave(order.starts.diff())
    sums = chosen.new_zeros(shape).index_add_(axis, sample_of_member, chosen)
    if order.scale is not None:
        sums *= order.scale.to(sums).reshape([-1 if other == axis else 1 for other in range(3)])
    return sums.to(features.dtype)


def accumulate(comoment: Tensor, product: Tensor, row_shift: Tensor, column_shift: Tensor) -> None:
    """Add `product` + outer(row_shift, column_shift) to `comoment` [R, C] float64."""
    comoment += product
    comoment += torch.outer(row_shift, column_shift)


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

    With another similarity, the result is ``balance`` times the quotient plus ``1 - balance`` times `other`, as
    torch.lerp computes it. If `mirror` is `out`, the upper triangle is mirrored into the lower one.
    """
    deviations = torch.outer(row_deviation, column_deviation)
    quotient = (comoment / (count * deviations.clamp_min(eps))).to(out.dtype)
    if other is not None:
        quotient = torch.lerp(other, quotient, balance)
    if mirror is out:
        quotient = quotient.triu() + quotient.triu(1).T
    elif mirror is not None:
        mirror.copy_(quotient.T)
    out.copy_(quotient)
