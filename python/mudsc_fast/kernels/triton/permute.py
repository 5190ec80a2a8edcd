"""Weighted sum of re-indexed tensors in one launch, and many small ones in one launch.

Tensors are seen as [outer, rows, middle, columns, inner], as in csrc/cpu/permute.cpp; a line is the [columns, inner]
part of one row, its items the single entries. Memory traffic: one read of each input, one write of the result; maps
are read once per tile of lines and stay in the second-level cache.

Parallel shape: a program writes a tile of BLOCK_LINES x BLOCK_ITEMS. Where columns stay in place a tile is all it does.
Where they move, the program goes on through the whole line, tile after tile, so that the line's sectors, read in any
order, are fetched once and found in the first-level cache after. Each thread holds 16 bytes of a line at a time.

Launch heuristic (`launch_of`): BLOCK_ITEMS is the line's length rounded up to a power of two, at most one 16-byte
vector for each thread; BLOCK_LINES fills four vectors a thread, so that several loads are in flight before the first is
needed (one vector where there are clusters, whose loops keep more in registers); 4 warps, which keeps tiles small
enough for many programs per multiprocessor. `fastest_launch` measures the neighbours of that choice on request.

Sums of halves, bfloat16 and float32 are in float32, and are rounded once. One model gathered with weight 1 is copied as
integers of its width, bit for bit, float64 too; sums in float64 are left to the reference. Products are rounded before
they are added, as in the C++ kernels. Offsets have 64 bits.
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
from mudsc_fast.kernels.reference import permute as reference
from mudsc_fast.unit_map import UnitMap

# How an axis is re-indexed: not at all, by one input unit, or by the members of a cluster.
IDENTITY, GATHER, CLUSTERS = (tl.constexpr(kind) for kind in range(3))

#: Bytes that one thread reads or writes at once: the widest access there is.
_VECTOR_BYTES = 16
_WARPS = 4
_VECTORS_PER_THREAD = 4
#: Models that one kernel is compiled for; more are rare, and left to the reference.
_MOST_MODELS = 16
#: Sizes and lengths of lines are 32-bit numbers.
_MOST_ITEMS = 2**31 - 2**16
#: Columns of the table of a grouped launch before the addresses of the models' tensors.
_GROUP_FIELDS = 14
#: Tiles of a grouped launch: small tensors are vectors and short lines.
_GROUP_LINES, _GROUP_ITEMS = 4, 128

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
            # Not by way of column and inner_at where columns stay: contiguous, so that vectors are loaded.
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
        while tile < tiles:  # not for: the interpreter of triton 3.6 counts on what numpy 2.4 no longer does
            _write_tile(
                tensors, weights, out, row_index, row_offsets, row_scale, column_index, column_offsets, column_scale,
                line, tile * BLOCK_ITEMS + in_line, lines, rows_in, rows_out, middle, columns_in, columns_out,
                INNER, ROW_KIND, COLUMN_KIND, ROW_SCALED, COLUMN_SCALED, COPY, NUM_MODELS,
            )  # fmt: skip
            tile += 1


@triton.jit
def merge_group_kernel(
    table, program_problem, program_tile, like, weights,
    NUM_MODELS: tl.constexpr, FIELDS: tl.constexpr, BLOCK_LINES: tl.constexpr, BLOCK_ITEMS: tl.constexpr,
):  # fmt: skip
    """Write one tile of one of many problems, whose sizes and addresses are a row of `table`.

    Every axis is given by members and offsets, whatever it is: small tensors are bound by the launch, not by reads.
    `like` is a pointer of the tensors' type.
    """
    program = tl.program_id(0)
    problem = table + tl.load(program_problem + program) * FIELDS
    tile = tl.load(program_tile + program)
    out = tl.load(problem).to(like.dtype)
    row_index = tl.load(problem + 1).to(tl.pointer_type(tl.int32))
    row_offsets = tl.load(problem + 2).to(tl.pointer_type(tl.int32))
    row_scale = tl.load(problem + 3).to(tl.pointer_type(tl.float32))
    column_index = tl.load(problem + 4).to(tl.pointer_type(tl.int32))
    column_offsets = tl.load(problem + 5).to(tl.pointer_type(tl.int32))
    column_scale = tl.load(problem + 6).to(tl.pointer_type(tl.float32))
    lines = tl.load(problem + 7)
    rows_in = tl.load(problem + 8)
    rows_out = tl.load(problem + 9)
    middle = tl.load(problem + 10)
    columns_in = tl.load(problem + 11)
    columns_out = tl.load(problem + 12)
    inner = tl.load(problem + 13)
    tiles = tl.cdiv(columns_out * inner, BLOCK_ITEMS)
    line = tile // tiles * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    at = tile % tiles * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    line_mask = line < lines
    item_mask = at < columns_out * inner
    row_out = line // middle % rows_out
    column_out = at // inner
    sums = tl.zeros([BLOCK_LINES, BLOCK_ITEMS], tl.float32)
    for model in range(NUM_MODELS):
        row_place = row_offsets + model * (rows_out + 1) + row_out
        row = tl.load(row_place, mask=line_mask, other=0)
        rows = tl.load(row_place + 1, mask=line_mask, other=0) - row
        column_place = column_offsets + model * (columns_out + 1) + column_out
        column = tl.load(column_place, mask=item_mask, other=0)
        columns = tl.load(column_place + 1, mask=item_mask, other=0) - column
        sums = _add_cluster(
            sums, tl.load(problem + 14 + model).to(like.dtype), tl.load(weights + model),
            row_index, row, rows, column_index, column, columns,
            line // middle // rows_out, rows_in, line % middle, middle, columns_in * inner, at % inner, inner,
            line_mask, item_mask, CLUSTERS, CLUSTERS,
        )  # fmt: skip
    sums *= tl.load(row_scale + row_out, mask=line_mask, other=0.0)[:, None]
    sums *= tl.load(column_scale + column_out, mask=item_mask, other=0.0)[None, :]
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

    What the kernel does not take goes to the reference: three mapped axes, sums in float64, lines of 2^31 entries.
    """
    first = tensors[0]
    shape = list(first.shape)
    for axis, unit_map in maps.items():
        shape[axis] = unit_map.units_out
    copied = len(tensors) == 1 and weights[0] == 1 and all(unit_map.is_permutation for unit_map in maps.values())
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
    """Return :func:`permute_merge` of every group of tensors, one dtype for all, in one launch."""
    results: list[Tensor | None] = [None] * len(groups)
    problems: list[list[int]] = []
    programs: list[tuple[int, int]] = []
    kept: list[object] = []  # their addresses are in the table
    like = groups[0][0]
    for number, (tensors, by_axis) in enumerate(zip(groups, maps, strict=True)):
        shape = [by_axis[axis].units_out if axis in by_axis else n for axis, n in enumerate(tensors[0].shape)]
        if not _serves(tensors, by_axis, False) or math.prod(shape) == 0:
            results[number] = reference.permute_merge(tensors, by_axis, weights, None)
            continue
        inputs = [tensor.detach().contiguous() for tensor in tensors]
        result = results[number] = like.new_empty(shape)
        view = view_of(tensors[0].shape, by_axis)
        rows = _Axis.as_clusters(view.row_map, view.rows, len(tensors), like)
        columns = _Axis.as_clusters(view.column_map, view.columns, len(tensors), like)
        kept += [inputs, rows, columns]
        lines = view.outer * rows.units_out * view.middle
        tiles = triton.cdiv(lines, _GROUP_LINES) * triton.cdiv(columns.units_out * view.inner, _GROUP_ITEMS)
        programs += [(len(problems), tile) for tile in range(tiles)]
        problems.append(
            [result.data_ptr(), *rows.addresses(), *columns.addresses(), lines, view.rows, rows.units_out, view.middle,
             view.columns, columns.units_out, view.inner, *(tensor.data_ptr() for tensor in inputs)]
        )  # fmt: skip
    if problems:
        table = torch.tensor(problems, dtype=torch.int64, device=like.device)
        program_problem, program_tile = torch.tensor(
            list(zip(*programs, strict=True)), dtype=torch.int64, device=like.device
        )
        factors = torch.tensor(weights, dtype=torch.float32, device=like.device)
        with _device_of(like):
            merge_group_kernel[(len(programs),)](
                table, program_problem, program_tile, like, factors,
                NUM_MODELS=len(weights), FIELDS=table.shape[1], BLOCK_LINES=_GROUP_LINES, BLOCK_ITEMS=_GROUP_ITEMS,
                enable_fp_fusion=False,
            )  # fmt: skip
    return [result for result in results if result is not None]


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
    if len(maps) > 2 or len(tensors) > _MOST_MODELS or (first.dtype == torch.float64 and not copied):
        return False
    view = view_of(first.shape, maps)
    items_out = (view.columns if view.column_map is None else view.column_map.units_out) * view.inner
    return max(view.columns * view.inner, items_out) <= _MOST_ITEMS


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
        index, offsets = (part.to(like.device) for part in unit_map.members)
        if unit_map.is_permutation:
            return cls(GATHER.value, unit_map.units_out, index)
        scale = None if unit_map.scale is None else unit_map.scale.to(like.device, torch.float32)
        return cls(CLUSTERS.value, unit_map.units_out, index, offsets, scale)

    @classmethod
    def as_clusters(cls, unit_map: UnitMap | None, length: int, num_models: int, like: Tensor) -> _Axis:
        """Return an axis with index, offsets and scale, whatever it is."""
        if unit_map is None:
            order = torch.arange(length, device=like.device, dtype=torch.int32).repeat(num_models, 1)
            starts = torch.arange(num_models, device=like.device, dtype=torch.int32)[:, None] * length
            offsets = torch.arange(length + 1, device=like.device, dtype=torch.int32) + starts
            return cls(CLUSTERS.value, length, order, offsets, like.new_ones(length, dtype=torch.float32))
        axis = cls.of(unit_map, length, like)
        offsets = unit_map.members[1].to(like.device)
        scale = like.new_ones(axis.units_out, dtype=torch.float32) if axis.scale is None else axis.scale
        return cls(CLUSTERS.value, axis.units_out, axis.index, offsets, scale)

    def addresses(self) -> list[int]:
        return [0 if part is None else part.data_ptr() for part in (self.index, self.offsets, self.scale)]


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's device, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
