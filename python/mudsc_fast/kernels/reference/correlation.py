"""The passes around the matrix product of a correlation, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor


def center(
    features: Tensor, memory: Tensor, outer_index: Tensor | None = None, inner_index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features [outer, C, inner] less their mean, as [C, samples] in `memory` [C * samples], with NaN as 0.

    The second and third results are [C] in float64: the mean, and the sum of squares of the first. The
    indices, int32, are of the features to take along the outer and the inner axis; all in order if None.
    """
    for axis, index in ((0, outer_index), (2, inner_index)):
        if index is not None:
            features = features.index_select(axis, index)
    units = features.transpose(0, 1).flatten(1).to(torch.float64)
    units = torch.where(units.isnan(), 0.0, units)
    mean = units.mean(1)
    centered = memory.view(units.shape).copy_(units - mean[:, None])
    return centered, mean, centered.to(torch.float64).square().sum(1)


def accumulate(comoment: Tensor, product: Tensor, row_shift: Tensor, column_shift: Tensor) -> None:
    """Add `product` + outer(row_shift, column_shift) to `comoment` [C, C] float64."""
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

    With another similarity, what is written is ``balance`` times the quotient and ``1 - balance`` times `other`, as by
    torch.lerp. If `mirror` is `out`, the upper triangle is mirrored into the lower one.
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
