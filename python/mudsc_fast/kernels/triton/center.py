"""Center features for the matrix product of a correlation, and sum them: features minus a shift near the mean.

Features are viewed as [outer, C, inner] with any strides and read through the order of their samples: in their own
order, gathered, or summed over clusters. Nothing is copied, transposed or re-indexed first.

Memory traffic: one read of the features, one write of the result. Subtracting the mean itself would take a second read.
The shift is the mean of a few hundred samples instead, and the rest of the mean, a small part of a deviation, is
subtracted from the product afterwards (`Centered.rest`). Each program writes the sums of its units, and torch adds up
those of all programs. There are no atomics, so that results do not depend on the order in which programs run.

Parallel shape: a program takes BLOCK_UNITS x BLOCK_SAMPLES at a time and goes along the samples. If the samples of a
unit are adjacent, or gathered from one line, it has few units and goes through the whole line, whose sectors, read in
any order, are then found in the first-level cache. If units are adjacent, it has a row of them. If there are too few
units to fill a GPU, samples are divided among several programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mudsc_fast.kernels._samples import Centered, SampleOrder
from mudsc_fast.kernels.triton._permute_arguments import CLUSTERS, GATHER, IDENTITY

#: Numbers of a tile: 16 per thread, or 4 if each thread also tracks the places of its clusters; and its units if these
#: are adjacent, 64 bytes in a half format, 128 in float32.
_TILE, _CLUSTERS_TILE, _ADJACENT_UNITS = 2048, 512, 32
_WARPS = 4
#: A shift is estimated from at least this many samples, if there are as many, and from less than twice as many.
_SHIFT_SAMPLES = 256
#: Programs that fill a large device twice.
_PROGRAMS = 264


@triton.jit
def _read(
    features, outer_members, inner_members, starts, scale, unit, sample, unit_mask, sample_mask,
    inner, outer_stride, unit_stride, inner_stride,
    OUTER_KIND: tl.constexpr, INNER_KIND: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return [units, samples], NaN as 0, in float32 (float64 of float64)."""
    number: tl.constexpr = tl.float64 if features.dtype.element_ty == tl.float64 else tl.float32
    outer_at = sample // inner
    inner_at = sample % inner
    line = (unit.to(tl.int64) * unit_stride)[:, None]
    if OUTER_KIND == CLUSTERS or INNER_KIND == CLUSTERS:
        at = outer_at if OUTER_KIND == CLUSTERS else inner_at
        begin = tl.load(starts + at, mask=sample_mask, other=0)
        count = tl.load(starts + at + 1, mask=sample_mask, other=0) - begin
        values = tl.zeros([unit.shape[0], sample.shape[0]], number)
        most = tl.max(count, 0)
        s = 0
        while s < most:
            has = sample_mask & (count > s)
            if OUTER_KIND == CLUSTERS:
                outer_at = tl.load(outer_members + begin + s, mask=has, other=0)
            else:
                inner_at = tl.load(inner_members + begin + s, mask=has, other=0)
            place = outer_at.to(tl.int64) * outer_stride + inner_at.to(tl.int64) * inner_stride
            mask = unit_mask[:, None] & has[None, :]
            values += tl.load(features + (line + place[None, :]), mask=mask, other=0.0).to(number)
            s += 1
        if SCALED:
            values *= tl.load(scale + at, mask=sample_mask, other=0.0)[None, :]
        # Rounded like features that hold the sums.
        values = values.to(features.dtype.element_ty).to(number)
    else:
        if OUTER_KIND == GATHER:
            outer_at = tl.load(outer_members + outer_at, mask=sample_mask, other=0)
        if INNER_KIND == GATHER:
            inner_at = tl.load(inner_members + inner_at, mask=sample_mask, other=0)
        place = outer_at.to(tl.int64) * outer_stride + inner_at.to(tl.int64) * inner_stride
        mask = unit_mask[:, None] & sample_mask[None, :]
        values = tl.load(features + (line + place[None, :]), mask=mask, other=0.0).to(number)
    return tl.where(values == values, values, 0.0)


@triton.jit
def shift_kernel(
    features, outer_members, inner_members, starts, scale, total, units, samples, step,
    inner, outer_stride, unit_stride, inner_stride,
    OUTER_KIND: tl.constexpr, INNER_KIND: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_UNITS: tl.constexpr, BLOCK_SAMPLES: tl.constexpr,
):  # fmt: skip
    """Write the sum of every `step`-th sample of a few units."""
    unit = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    unit_mask = unit < units
    sums = tl.zeros([BLOCK_UNITS], tl.float64)
    first = 0
    while first < samples:  # not for: triton 3.6's interpreter relies on what numpy 2.4 removed
        sample = first + tl.arange(0, BLOCK_SAMPLES) * step
        values = _read(
            features, outer_members, inner_members, starts, scale, unit, sample, unit_mask, sample < samples,
            inner, outer_stride, unit_stride, inner_stride, OUTER_KIND, INNER_KIND, SCALED,
        )  # fmt: skip
        sums += tl.sum(values.to(tl.float64), 1)
        first += BLOCK_SAMPLES * step
    tl.store(total + unit, sums, mask=unit_mask)


@triton.jit
def center_kernel(
    features, outer_members, inner_members, starts, scale, shift, centered, sums, units, samples, samples_per_part,
    inner, outer_stride, unit_stride, inner_stride, to_unit_stride, to_sample_stride,
    OUTER_KIND: tl.constexpr, INNER_KIND: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_UNITS: tl.constexpr, BLOCK_SAMPLES: tl.constexpr,
):  # fmt: skip
    """Write a few units' samples minus their shift, and their sums and sums of squares to `sums` [parts, 2, units]."""
    unit = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    unit_mask = unit < units
    part = tl.program_id(1)
    begin = part * samples_per_part
    end = tl.minimum(begin + samples_per_part, samples)
    shifts = tl.load(shift + unit, mask=unit_mask, other=0.0)[:, None]
    total = tl.zeros([BLOCK_UNITS], tl.float64)
    squares = tl.zeros([BLOCK_UNITS], tl.float64)
    line = (unit.to(tl.int64) * to_unit_stride)[:, None]
    first = begin
    while first < end:
        sample = first + tl.arange(0, BLOCK_SAMPLES)
        values = _read(
            features, outer_members, inner_members, starts, scale, unit, sample, unit_mask, sample < end,
            inner, outer_stride, unit_stride, inner_stride, OUTER_KIND, INNER_KIND, SCALED,
        )  # fmt: skip
        mask = unit_mask[:, None] & (sample < end)[None, :]
        less = tl.where(mask, values.to(shift.dtype.element_ty) - shifts, 0.0)
        tl.store(centered + (line + (sample.to(tl.int64) * to_sample_stride)[None, :]), less, mask=mask)
        exact = less.to(tl.float64)
        total += tl.sum(exact, 1)
        squares += tl.sum(exact * exact, 1)
        first += BLOCK_SAMPLES
    tl.store(sums + part * 2 * units + unit, total, mask=unit_mask)
    tl.store(sums + part * 2 * units + units + unit, squares, mask=unit_mask)


def center(
    features: Tensor, memory: Tensor, outer_order: SampleOrder | None = None, inner_order: SampleOrder | None = None
) -> Centered:
    """Return features [outer, C, inner] minus a shift near their mean, as [C, samples] in `memory` [C * samples].

    NaN counts as 0. The orders say which samples to take along the outer and the inner axis; None takes all of them. If
    one of them sums samples, rounding the sums to the dtype of the features, the other must be None.
    """
    units = features.shape[1]
    outer = features.shape[0] if outer_order is None else len(outer_order)
    inner = features.shape[2] if inner_order is None else len(inner_order)
    samples = outer * inner
    unit_major = features.stride(1) != 1 or (features.stride(2) == 1 and inner > 1)
    centered = memory.view(units, samples) if unit_major else memory.view(samples, units).T
    kinds = [_kind(order) for order in (outer_order, inner_order)]
    summed = next((one for one in (outer_order, inner_order) if one is not None and one.starts is not None), None)
    scale = None if summed is None or summed.scale is None else summed.scale.to(_number(features.dtype))
    block_units, block_samples, parts, samples_per_part = launch_of(units, samples, unit_major, summed is not None)
    total = torch.empty(units, dtype=torch.float64, device=features.device)
    sums = torch.empty(parts, 2, units, dtype=torch.float64, device=features.device)
    source = (
        features, None if outer_order is None else outer_order.members,
        None if inner_order is None else inner_order.members, None if summed is None else summed.starts, scale,
    )  # fmt: skip
    options = {
        "OUTER_KIND": kinds[0], "INNER_KIND": kinds[1], "SCALED": scale is not None,
        "BLOCK_UNITS": block_units, "BLOCK_SAMPLES": block_samples, "num_warps": _WARPS, "enable_fp_fusion": False,
    }  # fmt: skip
    step = max(1, samples // _SHIFT_SAMPLES)
    strides = (inner, *features.stride())
    tiles = triton.cdiv(units, block_units)
    with torch.cuda.device_of(features):
        shift_kernel[(tiles,)](*source, total, units, samples, step, *strides, **options)
        shift = (total / triton.cdiv(samples, step)).to(memory.dtype)
        center_kernel[(tiles, parts)](
            *source, shift, centered, sums, units, samples, samples_per_part, *strides, *centered.stride(), **options
        )
    rest, squares = sums.sum(0)
    about_mean = (squares - rest * rest / samples).clamp_min(0)
    return Centered(centered, shift + rest / samples, about_mean, rest)


def launch_of(units: int, samples: int, unit_major: bool, clusters: bool = False) -> tuple[int, int, int, int]:
    """Return the units and samples of a tile, the number of parts of the samples, and the samples of a part."""
    tile = _CLUSTERS_TILE if clusters and unit_major else _TILE
    block_units = tile // min(tile, max(128, triton.next_power_of_2(samples))) if unit_major else _ADJACENT_UNITS
    block_samples = tile // block_units
    wanted = max(1, min(_PROGRAMS // triton.cdiv(units, block_units), triton.cdiv(samples, 4 * block_samples)))
    samples_per_part = triton.cdiv(samples, wanted * block_samples) * block_samples
    return block_units, block_samples, triton.cdiv(samples, samples_per_part), samples_per_part


def _number(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kind(order: SampleOrder | None) -> int:
    if order is None:
        return int(IDENTITY)
    return int(GATHER if order.starts is None else CLUSTERS)
