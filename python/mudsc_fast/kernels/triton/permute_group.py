"""Weighted sums of many groups of re-indexed tensors in one launch.

A table holds the sizes and addresses of all tensors, which may have any sizes; each program finds its tensor by the
number of its first program, reads the kinds of both axes and takes one of three branches: rows (or nothing) gathered,
columns gathered, clusters. If all tensors are aligned, whole vectors are read and written. The table is copied from
pinned memory; while a CUDA graph is captured, each group is a launch of its own.

Tensors are viewed, and sums computed, as in `permute.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mudsc_fast.kernels._permute import view_of
from mudsc_fast.kernels.cuda import _device
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
from mudsc_fast.kernels.triton.permute import permute_merge
from mudsc_fast.unit_map import UnitMap

#: Fields of a problem in the table, before the addresses of the models' tensors.
GROUP_FIELDS = tl.constexpr(17)


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
        copied = is_copy(by_axis, weights)
        if not serves(tensors, by_axis, copied) or math.prod(shape) == 0:
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
        self._block_lines = VECTORS_PER_THREAD
        self._vector = VECTOR_BYTES // like.element_size()
        self._block_items = 32 * WARPS * self._vector
        self._aligned = True

    def add(self, tensors: Sequence[Tensor], maps: Mapping[int, UnitMap], result: Tensor) -> None:
        """Add a problem."""
        inputs = [tensor.detach().contiguous() for tensor in tensors]
        view = view_of(tensors[0].shape, maps)
        rows = Axis.of(view.row_map, view.rows, self._like)
        columns = Axis.of(view.column_map, view.columns, self._like)
        lines = view.outer * rows.units_out * view.middle
        items = columns.units_out * view.inner
        addresses = [result.data_ptr(), *(tensor.data_ptr() for tensor in inputs)]
        self._aligned &= not any(address % VECTOR_BYTES for address in addresses)
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
        like = self._like.view(INTEGERS[self._like.element_size()]) if self._copies else self._like
        with device_of(self._like):
            merge_group_kernel[(self._programs,)](
                table, like, tuple(weights),
                NUM_MODELS=len(weights), FIELDS=len(self._rows[0]), PROBLEMS=padded, COPY=self._copies,
                VECTOR=self._vector if self._aligned else 1, BLOCK_LINES=self._block_lines,
                BLOCK_ITEMS=self._block_items, MOVED_ITEMS=2 * self._block_items, num_warps=WARPS,
                enable_fp_fusion=False,
            )  # fmt: skip
