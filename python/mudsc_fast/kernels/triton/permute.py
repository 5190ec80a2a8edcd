"""Weighted sum of re-indexed tensors in one launch. `permute_group.py` has the sums of many groups of tensors.

Tensors are viewed as [outer, rows, middle, columns, inner], as in csrc/cpu/permute.cpp; a line is the [columns, inner]
part of one row, its items are the single entries. Memory traffic: one read of each input, one write of the result. Maps
are read once per tile of lines and stay in the second-level cache.

Parallel shape: a program writes a tile of BLOCK_LINES x BLOCK_ITEMS. If columns stay in place, that is all it does. If
they move, the program goes on through the whole line, tile after tile, so that the sectors of the line, read in any
order, are fetched once and then found in the first-level cache. Each thread holds 16 bytes of a line at a time.

Launch heuristic (`launch_of`): BLOCK_ITEMS is the length of the line rounded up to a power of two, at most one 16-byte
vector per thread. BLOCK_LINES fills four vectors per thread, so that several loads are in flight before the first is
needed (one vector if there are clusters, whose loops keep more in registers). 4 warps keep tiles small enough for many
programs per multiprocessor. `fastest_launch` measures the neighbors of that choice on request.

Sums of float16, bfloat16 and float32 are computed in float32 and rounded once. One model gathered with weight 1 is
copied as integers of its width, bit for bit, float64 too; other sums in float64 are left to the reference. Products are
rounded before they are added, as in the C++ kernels. Offsets have 64 bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from mudsc_fast.kernels._permute import view_of
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.kernels.triton._permute_arguments import (
    CLUSTERS,
    GATHER,
    IDENTITY,
    INTEGERS,
    VECTOR_BYTES,
    VECTORS_PER_THREAD,
    WARPS,
    Axis,
    device_of,
    is_copy,
    serves,
)
from mudsc_fast.unit_map import UnitMap


@triton.jit
def _add_cluster(
    sums, tensor, weight, row_index, row_begin, rows, column_index, column_begin, columns,
    outer, rows_in, middle_at, middle, line_length, inner_at, inner, line_mask, item_mask,
    ROW_KIND: tl.constexpr, COLUMN_KIND: tl.constexpr,
):  # fmt: skip
    """Add one model's tensor: every member of a tile's rows, and of its columns, in turn.

    A row has `rows` members from `row_begin` in `row_index` (CLUSTERS), or `row_begin` is its only one.
    """
    most_rows = tl.max(rows, 0)
    most_columns = tl.max(columns, 0)
    s = 0
    while s < most_rows:
        row_mask = line_mask & (rows > s)
        row = row_begin
        if ROW_KIND == CLUSTERS:
            row = tl.load(row_index + row_begin + s, mask=row_mask, other=0)
        line = ((outer * rows_in + row) * middle + middle_at) * line_length
        t = 0
        while t < most_columns:
            column_mask = item_mask & (columns > t)
            column = column_begin
            if COLUMN_KIND == CLUSTERS:
                column = tl.load(column_index + column_begin + t, mask=column_mask, other=0)
            place = line[:, None] + (column * inner + inner_at)[None, :]
            values = tl.load(tensor + place, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
            # Widened before any arithmetic.
            sums += values.to(tl.float32) * weight
            t += 1
        s += 1
    return sums


@triton.jit
def _write_tile(
    tensors, weights, out, row_index, row_offsets, row_scale, column_index, column_offsets, column_scale,
    line, at, lines, rows_in, rows_out, middle, columns_in, columns_out,
    INNER: tl.constexpr, ROW_KIND: tl.constexpr, COLUMN_KIND: tl.constexpr, ROW_SCALED: tl.constexpr,
    COLUMN_SCALED: tl.constexpr, COPY: tl.constexpr, NUM_MODELS: tl.constexpr,
):  # fmt: skip
    """Write the entries [line, at] of the result."""
    line_mask = line < lines
    item_mask = at < columns_out * INNER
    mask = line_mask[:, None] & item_mask[None, :]
    middle_at = line % middle
    row_out = line // middle % rows_out
    outer = line // middle // rows_out
    column_out = at // INNER
    inner_at = at % INNER
    if COPY:
        sums = tl.zeros([line.shape[0], at.shape[0]], out.dtype.element_ty)
    else:
        sums = tl.zeros([line.shape[0], at.shape[0]], tl.float32)
    for model in tl.static_range(NUM_MODELS):
        row = row_out
        column = column_out
        row_count = tl.full(line.shape, 1, tl.int32)
        column_count = tl.full(at.shape, 1, tl.int32)
        if ROW_KIND == GATHER:
            row = tl.load(row_index + model * rows_out + row_out, mask=line_mask, other=0)
        elif ROW_KIND == CLUSTERS:
            place = row_offsets + model * (rows_out + 1) + row_out
            row = tl.load(place, mask=line_mask, other=0)
            row_count = tl.load(place + 1, mask=line_mask, other=0) - row
        if COLUMN_KIND == GATHER:
            column = tl.load(column_index + model * columns_out + column_out, mask=item_mask, other=0)
        elif COLUMN_KIND == CLUSTERS:
            place = column_offsets + model * (columns_out + 1) + column_out
            column = tl.load(place, mask=item_mask, other=0)
            column_count = tl.load(place + 1, mask=item_mask, other=0) - column
        if ROW_KIND == CLUSTERS or COLUMN_KIND == CLUSTERS:
            sums = _add_cluster(
                sums, tensors[model], weights[model], row_index, row, row_count, column_index, column, column_count,
                outer, rows_in, middle_at, middle, columns_in * INNER, inner_at, INNER, line_mask, item_mask,
                ROW_KIND, COLUMN_KIND,
            )  # fmt: skip
        else:
            source = ((outer * rows_in + row) * middle + middle_at) * (columns_in * INNER)
            # If columns stay, `at` itself is contiguous, so that vectors are loaded.
            item = at if COLUMN_KIND == IDENTITY else column * INNER + inner_at
            values = tl.load(tensors[model] + (source[:, None] + item[None, :]), mask=mask, other=0)
            if COPY:
                sums = values
            else:
                # Widened before any arithmetic.
                sums += values.to(tl.float32) * weights[model]
    if ROW_SCALED:
        sums *= tl.load(row_scale + row_out, mask=line_mask, other=0.0)[:, None]
    if COLUMN_SCALED:
        sums *= tl.load(column_scale + column_out, mask=item_mask, other=0.0)[None, :]
    place = line[:, None] * (columns_out * INNER) + at[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def merge_kernel(
    tensors, weights, out, row_index, row_offsets, row_scale, column_index, column_offsets, column_scale,
    lines, rows_in, rows_out, middle, columns_in, columns_out,
    INNER: tl.constexpr, ROW_KIND: tl.constexpr, COLUMN_KIND: tl.constexpr, ROW_SCALED: tl.constexpr,
    COLUMN_SCALED: tl.constexpr, COPY: tl.constexpr, NUM_MODELS: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_ITEMS: tl.constexpr,
):  # fmt: skip
    """Write a tile or, where columns move, all tiles of some lines. `tensors` and `weights` are tuples."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns_out * INNER, BLOCK_ITEMS)
    in_line = tl.arange(0, BLOCK_ITEMS)
    if COLUMN_KIND == IDENTITY:
        line = program // tiles * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
        at = (program % tiles).to(tl.int32) * BLOCK_ITEMS + in_line
        _write_tile(
            tensors, weights, out, row_index, row_offsets, row_scale, column_index, column_offsets, column_scale,
            line, at, lines, rows_in, rows_out, middle, columns_in, columns_out,
            INNER, ROW_KIND, COLUMN_KIND, ROW_SCALED, COLUMN_SCALED, COPY, NUM_MODELS,
        )  # fmt: skip
    else:
        line = program * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
        tile = 0
        while tile < tiles:  # not for: triton 3.6's interpreter relies on what numpy 2.4 removed
            _write_tile(
                tensors, weights, out, row_index, row_offsets, row_scale, column_index, column_offsets, column_scale,
                line, tile * BLOCK_ITEMS + in_line, lines, rows_in, rows_out, middle, columns_in, columns_out,
                INNER, ROW_KIND, COLUMN_KIND, ROW_SCALED, COLUMN_SCALED, COPY, NUM_MODELS,
            )  # fmt: skip
            tile += 1


@dataclass(frozen=True)
class Launch:
    """Shape of a program's tile, and its warps."""

    block_lines: int
    block_items: int
    num_warps: int = WARPS


def launch_of(items: int, element_size: int, has_clusters: bool = False) -> Launch:
    """Return the launch for lines of so many items, by the heuristic described at the top."""
    per_vector = 32 * WARPS * VECTOR_BYTES // element_size
    block_items = min(triton.next_power_of_2(max(items, 1)), per_vector)
    vectors = 1 if has_clusters else VECTORS_PER_THREAD
    return Launch(vectors * per_vector // block_items, block_items)


def permute_merge(
    tensors: Sequence[Tensor],
    maps: Mapping[int, UnitMap],
    weights: Sequence[float],
    out: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """Return sum_i weights[i] * tensors[i] re-indexed along each axis of `maps` (non-negative axes).

    The reference takes three mapped axes, sums in float64 and lines of 2^31 entries.
    """
    first = tensors[0]
    shape = list(first.shape)
    for axis, unit_map in maps.items():
        shape[axis] = unit_map.units_out
    copied = is_copy(maps, weights)
    if not serves(tensors, maps, copied) or math.prod(shape) == 0:
        return reference.permute_merge(tensors, maps, weights, out)
    result = out if out is not None and out.is_contiguous() else first.new_empty(shape)
    inputs = [tensor.detach().contiguous() for tensor in tensors]
    view = view_of(first.shape, maps)
    rows, columns = Axis.of(view.row_map, view.rows, first), Axis.of(view.column_map, view.columns, first)
    lines, items = view.outer * rows.units_out * view.middle, columns.units_out * view.inner
    has_clusters = CLUSTERS.value in (rows.kind, columns.kind)
    chosen = launch_of(items, first.element_size(), has_clusters) if launch is None else launch
    programs = triton.cdiv(lines, chosen.block_lines)
    if columns.kind == IDENTITY.value:
        programs *= triton.cdiv(items, chosen.block_items)
    if copied:
        integers = INTEGERS[first.element_size()]
        inputs, target = [tensor.view(integers) for tensor in inputs], result.view(integers)
    else:
        target = result
    with device_of(first):
        merge_kernel[(programs,)](
            tuple(inputs), tuple(weights), target,
            rows.index, rows.offsets, rows.scale, columns.index, columns.offsets, columns.scale,
            lines, view.rows, rows.units_out, view.middle, view.columns, columns.units_out,
            INNER=view.inner, ROW_KIND=rows.kind, COLUMN_KIND=columns.kind, ROW_SCALED=rows.scale is not None,
            COLUMN_SCALED=columns.scale is not None, COPY=copied, NUM_MODELS=len(tensors),
            BLOCK_LINES=chosen.block_lines, BLOCK_ITEMS=chosen.block_items, num_warps=chosen.num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    return result if out is None or out is result else out.copy_(result)


def fastest_launch(
    tensors: Sequence[Tensor],
    maps: Mapping[int, UnitMap],
    weights: Sequence[float],
    milliseconds: Callable[[Callable[[], object]], float] = triton.testing.do_bench,
) -> Launch:
    """Return the fastest of the heuristic's launch and its neighbors, for the `launch` of :func:`permute_merge`."""
    view = view_of(tensors[0].shape, maps)
    units_out = view.columns if view.column_map is None else view.column_map.units_out
    has_clusters = not all(unit_map.is_permutation for unit_map in maps.values())
    first = launch_of(units_out * view.inner, tensors[0].element_size(), has_clusters)
    candidates = [
        Launch(max(1, first.block_lines * lines // 2), first.block_items, warps)
        for lines, warps in itertools.product((1, 2, 4), (WARPS // 2, WARPS, 2 * WARPS))
    ]
    return min(candidates, key=lambda launch: milliseconds(lambda: permute_merge(tensors, maps, weights, None, launch)))
