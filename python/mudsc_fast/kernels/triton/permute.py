"""Weighted sum of re-indexed tensors in one launch, and the sums of many groups of tensors in one launch.

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

Grouped launch (`merge_group_kernel`): a table holds the sizes and addresses of all tensors, which may have any sizes;
each program finds its tensor by the number of its first program, reads the kinds of both axes and takes one of three
branches: rows (or nothing) gathered, columns gathered, clusters. If all tensors are aligned, whole vectors are read and
written. The table is copied from pinned memory; while a CUDA graph is captured, each group is a launch of its own.

Sums of float16, bfloat16 and float32 are computed in float32 and rounded once. One model gathered with weight 1 is
copied as integers of its width, bit for bit, float64 too; other sums in float64 are left to the reference. Products are
rounded before they are added, as in the C++ kernels. Offsets have 64 bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mudsc_fast.kernels._permute import view_of
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.unit_map import UnitMap

# How an axis is re-indexed: not at all, by one input unit each, or by the members of clusters.
IDENTITY, GATHER, CLUSTERS = (tl.constexpr(kind) for kind in range(3))

#: Bytes that one thread reads or writes at once: the widest access.
_VECTOR_BYTES = 16
_WARPS = 4
_VECTORS_PER_THREAD = 4
#: Largest number of models that a kernel is compiled for. More are rare, and left to the reference.
_MAX_MODELS = 16
#: Lengths of lines are 32-bit numbers.
_MAX_ITEMS = 2**31 - 2**16
#: Fields of a problem in the table of a grouped launch, before the addresses of the models' tensors.
GROUP_FIELDS = tl.constexpr(17)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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


@triton.jit
def _members(kind, offsets, model, length, unit, mask):
    """Return where the members of output units begin, and how many there are, for an axis of any kind."""
    place = offsets + model * (length + 1) + unit
    clustered = unit * 0 + kind == CLUSTERS
    begin = tl.load(place, mask=mask & clustered, other=0)
    count = tl.load(place + 1, mask=mask & clustered, other=1) - begin
    return tl.where(clustered, begin, model * length + unit), tl.where(clustered, count, 1)


@triton.jit
def _add_members(
    sums, tensor, weight, row_index, row_kind, row_begin, rows, row_out, column_index, column_kind, column_begin,
    columns, column_out, outer, rows_in, middle_at, middle, line_length, inner_at, inner, line_mask, item_mask,
):  # fmt: skip
    """Add one model's tensor: every member of a tile's rows and columns in turn, for axes of any kind."""
    most_rows = tl.max(rows, 0)
    most_columns = tl.max(columns, 0)
    rows_move = row_out * 0 + row_kind != IDENTITY
    columns_move = column_out * 0 + column_kind != IDENTITY
    s = 0
    while s < most_rows:
        row_mask = line_mask & (rows > s)
        row = tl.load(row_index + row_begin + s, mask=row_mask & rows_move, other=0)
        row = tl.where(rows_move, row, row_out)
        line = ((outer * rows_in + row) * middle + middle_at) * line_length
        t = 0
        while t < most_columns:
            column_mask = item_mask & (columns > t)
            column = tl.load(column_index + column_begin + t, mask=column_mask & columns_move, other=0)
            column = tl.where(columns_move, column, column_out)
            place = line[:, None] + (column * inner + inner_at)[None, :]
            values = tl.load(tensor + place, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
            sums += values.to(tl.float32) * weight
            t += 1
        s += 1
    return sums


@triton.jit
def _aligned(number, unit: tl.constexpr):
    """Return a number that is a multiple of `unit`, so that the compiler knows it to be one."""
    return number // unit * unit


@triton.jit
def _group_tile(
    problem, like, weights, line, at, MOVES: tl.constexpr, COPY: tl.constexpr, NUM_MODELS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Write the entries [line, at] of one problem without clusters; with MOVES, its columns are gathered."""
    out = tl.multiple_of(tl.load(problem + 1).to(like.dtype), 16 if VECTOR > 1 else 1)
    row_index = tl.load(problem + 2).to(tl.pointer_type(tl.int32))
    row_kind = tl.load(problem + 5)
    column_index = tl.load(problem + 6).to(tl.pointer_type(tl.int32))
    lines = tl.load(problem + 10)
    rows_in = tl.load(problem + 11)
    rows_out = tl.load(problem + 12)
    middle = tl.load(problem + 13)
    columns_out = tl.load(problem + 15)
    inner = tl.load(problem + 16).to(tl.int32)
    # Multiples of a vector, where the host found them to be: then whole vectors are loaded and stored.
    length_in = _aligned(tl.load(problem + 14) * inner, VECTOR)
    length_out = _aligned(columns_out.to(tl.int32) * inner, VECTOR)
    line_mask = line < lines
    gathers = line * 0 + row_kind != IDENTITY
    item_mask = at < length_out
    mask = line_mask[:, None] & item_mask[None, :]
    middle_at = line % middle
    row_out = line // middle % rows_out
    outer = line // middle // rows_out
    if COPY:
        sums = tl.zeros([line.shape[0], at.shape[0]], like.dtype.element_ty)
    else:
        sums = tl.zeros([line.shape[0], at.shape[0]], tl.float32)
    for model in tl.static_range(NUM_MODELS):
        tensor = tl.load(problem + GROUP_FIELDS + model).to(like.dtype)
        tensor = tl.multiple_of(tensor, 16 if VECTOR > 1 else 1)
        row = tl.load(row_index + model * rows_out + row_out, mask=line_mask & gathers, other=0)
        row = tl.where(gathers, row, row_out)
        source = ((outer * rows_in + row) * middle + middle_at) * length_in
        if MOVES:
            column = tl.load(column_index + model * columns_out + at // inner, mask=item_mask, other=0)
            item = column * inner + at % inner
        else:
            item = at
        values = tl.load(tensor + (source[:, None] + item[None, :]), mask=mask, other=0)
        if COPY:
            sums = values
        else:
            # Widened before any arithmetic.
            sums += values.to(tl.float32) * weights[model]
    tl.store(out + (line[:, None] * length_out + at[None, :]), sums.to(like.dtype.element_ty), mask=mask)


@triton.jit
def merge_group_kernel(
    table, like, weights,
    NUM_MODELS: tl.constexpr, FIELDS: tl.constexpr, PROBLEMS: tl.constexpr, COPY: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_ITEMS: tl.constexpr, MOVED_ITEMS: tl.constexpr,
):  # fmt: skip
    """Write a tile, or some lines, of one of several problems of any sizes.

    `table` holds the first program of each problem, padded to PROBLEMS, then the sizes and addresses of each problem.
    `like` is a pointer of the tensors' type, `weights` a tuple.
    """
    program = tl.program_id(0).to(tl.int64)
    begins = tl.load(table + tl.arange(0, PROBLEMS))
    number = tl.sum((begins <= program).to(tl.int64), 0) - 1
    problem = table + PROBLEMS + number * FIELDS
    program -= tl.load(problem)
    row_kind = tl.load(problem + 5)
    column_kind = tl.load(problem + 9)
    length_out = (tl.load(problem + 15) * tl.load(problem + 16)).to(tl.int32)
    if (row_kind == CLUSTERS) | (column_kind == CLUSTERS):
        if not COPY:
            tiles = tl.cdiv(length_out, BLOCK_ITEMS)
            items = (program % tiles).to(tl.int32) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
            s = 0
            while s < BLOCK_LINES:  # line by line: the loops over members leave few registers for sums
                one_line = program // tiles * BLOCK_LINES + s + tl.arange(0, 1)
                _group_clusters(problem, like, weights, one_line, items, row_kind, column_kind, NUM_MODELS)
                s += 1
    elif column_kind == IDENTITY:
        tiles = tl.cdiv(length_out, BLOCK_ITEMS)
        line = program // tiles * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
        at = (program % tiles).to(tl.int32) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
        _group_tile(problem, like, weights, line, at, False, COPY, NUM_MODELS, VECTOR)
    else:
        # A program goes through a whole line, whose sectors, read in any order, stay in the first-level cache.
        whole_line = program + tl.arange(0, 1)
        first = 0
        while first < length_out:
            part = first + tl.arange(0, MOVED_ITEMS)
            _group_tile(problem, like, weights, whole_line, part, True, COPY, NUM_MODELS, VECTOR)
            first += MOVED_ITEMS


@triton.jit
def _group_clusters(problem, like, weights, line, at, row_kind, column_kind, NUM_MODELS: tl.constexpr):
    """Write the entries [line, at] of one problem with clusters along an axis."""
    out = tl.load(problem + 1).to(like.dtype)
    row_index = tl.load(problem + 2).to(tl.pointer_type(tl.int32))
    row_offsets = tl.load(problem + 3).to(tl.pointer_type(tl.int32))
    row_scale = tl.load(problem + 4)
    column_index = tl.load(problem + 6).to(tl.pointer_type(tl.int32))
    column_offsets = tl.load(problem + 7).to(tl.pointer_type(tl.int32))
    column_scale = tl.load(problem + 8)
    lines = tl.load(problem + 10)
    rows_in = tl.load(problem + 11)
    rows_out = tl.load(problem + 12)
    middle = tl.load(problem + 13)
    columns_in = tl.load(problem + 14)
    columns_out = tl.load(problem + 15)
    inner = tl.load(problem + 16).to(tl.int32)
    line_mask = line < lines
    item_mask = at < columns_out * inner
    row_out = line // middle % rows_out
    column_out = at // inner
    sums = tl.zeros([line.shape[0], at.shape[0]], tl.float32)
    for model in tl.static_range(NUM_MODELS):
        row, rows = _members(row_kind, row_offsets, model, rows_out, row_out, line_mask)
        column, columns = _members(column_kind, column_offsets, model, columns_out, column_out, item_mask)
        sums = _add_members(
            sums, tl.load(problem + GROUP_FIELDS + model).to(like.dtype), weights[model],
            row_index, row_kind, row, rows, row_out, column_index, column_kind, column, columns, column_out,
            line // middle // rows_out, rows_in, line % middle, middle, columns_in * inner, at % inner, inner,
            line_mask, item_mask,
        )  # fmt: skip
    scales = row_scale.to(tl.pointer_type(tl.float32)) + row_out
    sums *= tl.load(scales, mask=line_mask & (line * 0 + row_scale != 0), other=1.0)[:, None]
    scales = column_scale.to(tl.pointer_type(tl.float32)) + column_out
    sums *= tl.load(scales, mask=item_mask & (at * 0 + column_scale != 0), other=1.0)[None, :]
    place = line[:, None] * (columns_out * inner) + at[None, :]
    tl.store(out + place, sums.to(like.dtype.element_ty), mask=line_mask[:, None] & item_mask[None, :])


@dataclass(frozen=True)
class Launch:
    """Shape of a program's tile, and its warps."""

    block_lines: int
    block_items: int
    num_warps: int = _WARPS


def launch_of(items: int, element_size: int, has_clusters: bool = False) -> Launch:
    """Return the launch for lines of so many items, by the heuristic described at the top."""
    per_vector = 32 * _WARPS * _VECTOR_BYTES // element_size
    block_items = min(triton.next_power_of_2(max(items, 1)), per_vector)
    vectors = 1 if has_clusters else _VECTORS_PER_THREAD
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
    copied = _is_copy(maps, weights)
    if not _serves(tensors, maps, copied) or math.prod(shape) == 0:
        return reference.permute_merge(tensors, maps, weights, out)
    result = out if out is not None and out.is_contiguous() else first.new_empty(shape)
    inputs = [tensor.detach().contiguous() for tensor in tensors]
    view = view_of(first.shape, maps)
    rows, columns = _Axis.of(view.row_map, view.rows, first), _Axis.of(view.column_map, view.columns, first)
    lines, items = view.outer * rows.units_out * view.middle, columns.units_out * view.inner
    has_clusters = CLUSTERS.value in (rows.kind, columns.kind)
    chosen = launch_of(items, first.element_size(), has_clusters) if launch is None else launch
    programs = triton.cdiv(lines, chosen.block_lines)
    if columns.kind == IDENTITY.value:
        programs *= triton.cdiv(items, chosen.block_items)
    if copied:
        integers = _INTEGERS[first.element_size()]
        inputs, target = [tensor.view(integers) for tensor in inputs], result.view(integers)
    else:
        target = result
    with _device_of(first):
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


def permute_merge_group(
    groups: Sequence[Sequence[Tensor]], maps: Sequence[Mapping[int, UnitMap]], weights: Sequence[float]
) -> list[Tensor]:
    """Return :func:`permute_merge` of every group of tensors, all of one dtype, in one launch.

    Groups that are copied bit for bit (one model of weight 1 without clusters) and others take a launch each. While a
    CUDA graph is captured, each group takes a launch: the table of a grouped launch is copied from the host.
    """
    like = groups[0][0]
    if _device.is_capturing(like.device):
        return [permute_merge(tensors, by_axis, weights, None) for tensors, by_axis in zip(groups, maps, strict=True)]
    results: list[Tensor | None] = [None] * len(groups)
    tables = {True: _Table(like, copies=True), False: _Table(like, copies=False)}
    for number, (tensors, by_axis) in enumerate(zip(groups, maps, strict=True)):
        shape = [by_axis[axis].units_out if axis in by_axis else n for axis, n in enumerate(tensors[0].shape)]
        copied = _is_copy(by_axis, weights)
        if not _serves(tensors, by_axis, copied) or math.prod(shape) == 0:
            results[number] = reference.permute_merge(tensors, by_axis, weights, None)
            continue
        results[number] = result = like.new_empty(shape)
        tables[copied].add(tensors, by_axis, result)
    for table in tables.values():
        table.launch(weights)
    return [result for result in results if result is not None]


class _Table:
    """The problems of a grouped launch, as merge_group_kernel reads them."""

    def __init__(self, like: Tensor, copies: bool) -> None:
        self._like = like
        self._copies = copies
        self._begins: list[int] = []
        self._rows: list[list[int]] = []
        self._programs = 0
        self._kept: list[object] = []  # tensors whose addresses are in the table
        # As in `launch_of`: a vector for each thread and line, and four of these.
        self._block_lines = _VECTORS_PER_THREAD
        self._vector = _VECTOR_BYTES // like.element_size()
        self._block_items = 32 * _WARPS * self._vector
        self._aligned = True

    def add(self, tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], result: Tensor) -> None:
        """Add a problem."""
        inputs = [tensor.detach().contiguous() for tensor in tensors]
        view = view_of(tensors[0].shape, maps)
        rows = _Axis.of(view.row_map, view.rows, self._like)
        columns = _Axis.of(view.column_map, view.columns, self._like)
        lines = view.outer * rows.units_out * view.middle
        items = columns.units_out * view.inner
        addresses = [result.data_ptr(), *(tensor.data_ptr() for tensor in inputs)]
        self._aligned &= not any(address % _VECTOR_BYTES for address in addresses)
        self._aligned &= items % self._vector == 0 and view.columns * view.inner % self._vector == 0
        self._begins.append(self._programs)
        self._rows.append(
            [self._programs, addresses[0], *rows.addresses(), rows.kind, *columns.addresses(), columns.kind, lines,
             view.rows, rows.units_out, view.middle, view.columns, columns.units_out, view.inner, *addresses[1:]]
        )  # fmt: skip
        self._kept += [inputs, rows, columns]
        if columns.kind == GATHER.value and rows.kind != CLUSTERS.value:
            self._programs += lines
        else:
            self._programs += triton.cdiv(lines, self._block_lines) * triton.cdiv(items, self._block_items)

    def launch(self, weights: Sequence[float]) -> None:
        """Solve all problems, if there are any."""
        if not self._rows:
            return
        padded = triton.next_power_of_2(len(self._rows))
        begins = self._begins + [2**62] * (padded - len(self._begins))
        table = torch.tensor([*begins, *itertools.chain.from_iterable(self._rows)], dtype=torch.int64, device="cpu")
        if self._like.is_cuda:  # from pinned memory the copy does not make the host wait
            table = table.pin_memory().to(self._like.device, non_blocking=True)
        like = self._like.view(_INTEGERS[self._like.element_size()]) if self._copies else self._like
        with _device_of(self._like):
            merge_group_kernel[(self._programs,)](
                table, like, tuple(weights),
                NUM_MODELS=len(weights), FIELDS=len(self._rows[0]), PROBLEMS=padded, COPY=self._copies,
                VECTOR=self._vector if self._aligned else 1, BLOCK_LINES=self._block_lines,
                BLOCK_ITEMS=self._block_items, MOVED_ITEMS=2 * self._block_items, num_warps=_WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip


def _is_copy(maps: Mapping[int, UnitMap], weights: Sequence[float]) -> bool:
    """Return whether the result is one model's tensor, re-indexed and otherwise unchanged."""
    return len(weights) == 1 and weights[0] == 1 and all(unit_map.is_permutation for unit_map in maps.values())


def fastest_launch(
    tensors: Sequence[Tensor],
    maps: Mapping[int, UnitMap],
    weights: Sequence[float],
    milliseconds: Callable[[Callable[[], object]], float] = triton.testing.do_bench,
) -> Launch:
    """Return the fastest of the heuristic's launch and its neighbours, for the `launch` of :func:`permute_merge`."""
    view = view_of(tensors[0].shape, maps)
    units_out = view.columns if view.column_map is None else view.column_map.units_out
    has_clusters = not all(unit_map.is_permutation for unit_map in maps.values())
    first = launch_of(units_out * view.inner, tensors[0].element_size(), has_clusters)
    candidates = [
        Launch(max(1, first.block_lines * lines // 2), first.block_items, warps)
        for lines, warps in itertools.product((1, 2, 4), (_WARPS // 2, _WARPS, 2 * _WARPS))
    ]
    return min(candidates, key=lambda launch: milliseconds(lambda: permute_merge(tensors, maps, weights, None, launch)))


def _serves(tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], copied: bool) -> bool:
    first = tensors[0]
    if len(maps) > 2 or len(tensors) > _MAX_MODELS or (first.dtype == torch.float64 and not copied):
        return False
    view = view_of(first.shape, maps)
    items_out = (view.columns if view.column_map is None else view.column_map.units_out) * view.inner
    return max(view.columns * view.inner, items_out) <= _MAX_ITEMS


@dataclass(frozen=True)
class _Axis:
    """One axis as the kernels read it."""

    kind: int
    units_out: int
    index: Tensor | None = None
    offsets: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, unit_map: UnitMap | None, length: int, like: Tensor) -> _Axis:
        if unit_map is None:
            return cls(IDENTITY.value, length)
        if unit_map.index.device != like.device and _device.is_capturing(like.device):
            raise RuntimeError(
                f"a UnitMap on {unit_map.index.device} cannot be used while a CUDA graph is captured, because its "
                f"indices would be copied: make it from an index on {like.device}"
            )
        index, offsets = (part.to(like.device) for part in unit_map.members)
        if unit_map.is_permutation:
            return cls(GATHER.value, unit_map.units_out, index)
        scale = None if unit_map.scale is None else unit_map.scale.to(like.device, torch.float32)
        return cls(CLUSTERS.value, unit_map.units_out, index, offsets, scale)

    def addresses(self) -> list[int]:
        return [0 if part is None else part.data_ptr() for part in (self.index, self.offsets, self.scale)]


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's device, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
