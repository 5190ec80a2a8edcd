"""The last pass of a correlation: quotients of float64 co-moments, blended with another similarity, and their mirror.

Memory traffic: one read of the co-moments and of the other similarity, one write of the result; the mirror image is
written from the same tile. A program takes one tile of 32 x 32; in a symmetric block, programs of tiles below the
diagonal end at once. The quotient is in float64, the blend in float32 (float64 for float64), as in
csrc/cpu/correlation.cpp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32


@triton.jit
def correlate_kernel(
    comoment, row_deviation, column_deviation, out, mirror, other, units, count, row_stride, other_stride, balance,
    EPS: tl.constexpr, MIRRORED: tl.constexpr, SYMMETRIC: tl.constexpr, BLENDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one tile. EPS is compiled in, with all its digits; Triton passes other numbers as float32 or integers."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK
    first_column = tl.program_id(1).to(tl.int64) * BLOCK
    if SYMMETRIC:  # noqa: SIM102 - compiled away where it is false
        if first_row >= first_column + BLOCK:
            return
    row = first_row + tl.arange(0, BLOCK)
    column = first_column + tl.arange(0, BLOCK)
    mask = (row < units)[:, None] & (column < units)[None, :]
    if SYMMETRIC:
        mask = mask & (row[:, None] <= column[None, :])
    rows = tl.load(row_deviation + row, mask=row < units, other=0.0)
    columns = tl.load(column_deviation + column, mask=column < units, other=0.0)
    deviations = rows[:, None] * columns[None, :]
    least = tl.zeros([BLOCK, BLOCK], tl.float64) + EPS
    sums = tl.load(comoment + row[:, None] * units + column[None, :], mask=mask, other=0.0)
    values = sums / (tl.where(deviations > least, deviations, least) * count)
    if out.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    # Rounded to the type of the result first, as if it were blended afterwards.
    values = values.to(out.dtype.element_ty).to(values.dtype)
    if BLENDED:
        beside = tl.load(other + row[:, None] * other_stride + column[None, :], mask=mask, other=0.0).to(values.dtype)
        near = beside + balance * (values - beside)
        far = values - (values - beside) * (1 - balance)
        values = tl.where(balance < 0.5, near, far)
    result = values.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * row_stride + column[None, :], result, mask=mask)
    if MIRRORED:
        place = mirror + column[:, None] * row_stride + row[None, :]
        tl.store(place, tl.trans(result), mask=tl.trans(mask))


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

    With another similarity, the result is ``balance`` times the quotient plus ``1 - balance`` times `other`. If
    `mirror` is `out`, the upper triangle is mirrored into the lower one.
    """
    units = comoment.shape[0]
    tiles = triton.cdiv(units, _BLOCK)
    with torch.cuda.device_of(comoment):
        correlate_kernel[(tiles, tiles)](
            comoment, row_deviation.contiguous(), column_deviation.contiguous(), out, mirror, other,
            units, count, out.stride(0), 0 if other is None else other.stride(0), float(balance),
            EPS=eps, MIRRORED=mirror is not None, SYMMETRIC=mirror is out, BLENDED=other is not None, BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip
