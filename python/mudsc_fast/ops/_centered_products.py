"""Co-moments from centered features: center each model's samples, then multiply them with torch's matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from mudsc_fast import _memory
from mudsc_fast.kernels import _triton
from mudsc_fast.kernels._samples import Centered
from mudsc_fast.kernels.cpu import correlation as cpu
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.kernels.reference import correlation as reference
from mudsc_fast.ops import _dispatch
from mudsc_fast.ops._features import Samples
from mudsc_fast.ops._moments import Moments

#: Precision to which the operands of the matrix products are rounded.
Precision = Literal["float32", "bfloat16"]

#: Samples that are centered and multiplied at a time: enough that the product dominates (at least this many, and half
#: as many as there are units, because adding a product to the sums moves 20 bytes per pair of units), and otherwise no
#: more than fill this many numbers over all models.
_MIN_CHUNK = 2048
_CHUNK_NUMBERS = 2**23

#: Rows of a symmetric product that are computed at a time. Fewer rows compute less of the other triangle, more rows let
#: torch reuse its packed operands. For 1024 units, blocks of 192 rows take 1.21 times half a product, blocks of 256
#: 1.31.
_TRIANGLE_BLOCK = 192


class Workspace:
    """Scratch memory of an update that later updates reuse.

    Allocating fresh memory for an update of a few megabytes takes longer than the centering that fills it. A tensor is
    valid until the next request for the same name.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def empty(self, name: str, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialized numbers, [numbers]."""
        size = numbers * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size or memory.device != device:
            self._memory.pop(name, None)  # free the old memory first
            memory = self._memory[name] = _memory.empty((size,), torch.uint8, device)
        return memory[:size].view(dtype)


def chunk_samples(num_models: int, units: int) -> int:
    """Return how many samples to add at a time."""
    return max(_MIN_CHUNK, units // 2, _CHUNK_NUMBERS // (num_models * units))


def add(
    moments: Moments,
    chunk: list[Samples],
    dtype: torch.dtype,
    precision: Precision,
    workspace: Workspace,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Add some samples of each model, computing in `dtype`.

    `check` is called if the features may be infinite, before the moments change; it raises an error if they are.
    """
    centered = list(_centered(moments, dict(enumerate(chunk)), dtype, workspace, check=check).values())
    product = _product_memory(moments, workspace, centered[0].values.dtype)
    products = (_centered_product(centered[i], centered[j], product) for i, j in moments.pairs)
    means = torch.stack([one.mean for one in centered])
    squares = torch.stack([one.squares for one in centered])
    with _products_in(precision):
        moments.join(centered[0].values.shape[1], means, squares, products)


def exchange(
    moments: Moments,
    old: list[Samples],
    new: list[Samples],
    stays: list[bool],
    dtype: torch.dtype,
    precision: Precision,
    workspace: Workspace,
    changes: tuple[Tensor, Tensor] | None,
) -> None:
    """Replace samples in the co-moments about the present mean, computing in `dtype`.

    Parameters
    ----------
    old, new
        Finite samples of each model, equally many.
    stays
        For each model, whether its new samples are the old ones. They are then read once.
    changes
        [N, C] sums to which the changes of each unit's sum and sum of squares are added, or None.
    """
    moving = {model: one for model, one in enumerate(new) if not stays[model]}
    before = _centered(moments, dict(enumerate(old)), dtype, workspace, name="old")
    after = before | _centered(moments, moving, dtype, workspace, name="new")
    if len({one.values.dtype for side in (before, after) for one in side.values()}) > 1:
        before, after = ({model: _in_float64(one) for model, one in side.items()} for side in (before, after))
    count, rows = before[0].values.shape[1], moments.rows
    was, now = (torch.stack([side[model].mean for model in range(len(old))]) - moments.mean for side in (before, after))
    product = _product_memory(moments, workspace, before[0].values.dtype)
    for (i, j), own in zip(moments.pairs, moments.comoments, strict=True):
        if stays[i] and stays[j]:
            continue
        with _products_in(precision):
            if stays[i]:
                moved = _difference(after[j], before[j], workspace)
                _centered_product(before[i], moved, product)
                moments.accumulate(own[rows], product, count * was[i, rows], now[j] - was[j])
            else:
                _centered_product(after[i], after[j], product)
                moments.accumulate(own[rows], product, count * now[i, rows], now[j])
                _centered_product(before[i], before[j], product)
                moments.accumulate(own[rows], product.neg_(), -count * was[i, rows], was[j])
    if changes is not None:
        squares = torch.stack([after[model].squares - before[model].squares for model in range(len(old))])
        changes[0].add_(now - was, alpha=count)
        changes[1].add_(squares).add_(now.square() - was.square(), alpha=count)


def _centered(
    moments: Moments,
    chunk: dict[int, Samples],
    dtype: torch.dtype,
    workspace: Workspace,
    *,
    name: str = "centered",
    check: Callable[[], None] = lambda: None,
) -> dict[int, Centered]:
    """Return the samples of some models in `dtype`, or in float64 if float32 cannot hold their squares.

    If only R rows of the co-moments are updated, the values of model 0 are [R, samples]. Its mean is then the present
    one in all other rows.
    """
    _device.refuse_capture("an update with features that are centered first", moments.device)
    center = _dispatch.choose(
        "correlation",
        moments.device,
        {
            "cpu": cpu.center,
            # For features that the tensor-core kernel does not take.
            "cuda": _center_by_triton if _triton_serves(moments.device) else reference.center,
            "triton": _center_by_triton,
            "reference": reference.center,
        },
    )
    results = {}
    for model, one in chunk.items():
        rows = moments.rows if model == 0 else slice(None)
        view = one.view[:, rows]
        memory = workspace.empty(f"{name} {model}", view.shape[1] * math.prod(one.shape), dtype, moments.device)
        results[model] = center(view, memory, one.outer, one.inner)
        if view.shape != one.view.shape:
            mean, squares = moments.mean[model].clone(), torch.zeros_like(moments.squares[model])
            mean[rows], squares[rows] = results[model].mean, results[model].squares
            results[model] = results[model]._replace(mean=mean, squares=squares)
    if not all(bool(one.mean.isfinite().all()) for one in results.values()):
        check()
    if dtype == torch.float32 and any(bool(one.squares.max() > torch.finfo(dtype).max) for one in results.values()):
        results = {model: _in_float64(one) for model, one in results.items()}
    return results


def _in_float64(one: Centered) -> Centered:
    return one._replace(values=one.values.to(torch.float64))


def _difference(one: Centered, other: Centered, workspace: Workspace) -> Centered:
    """Return the values of some samples minus those of as many others of the same model, for products alone."""
    values, rest = one.values, None
    memory = workspace.empty("difference", values.numel(), values.dtype, values.device)
    if one.rest is not None and other.rest is not None:
        rest = one.rest - other.rest
    difference = torch.sub(values, other.values, out=memory.as_strided(values.shape, values.stride()))
    return one._replace(values=difference, rest=rest)


def can_round_products() -> bool:
    """Return whether this version of torch can round the operands of float32 products."""
    return _product_settings() is not None


def _product_settings() -> Any:
    """Return torch's settings of matrix products on the CPU; None if this version of torch has none."""
    return getattr(torch.backends.mkldnn, "matmul", None)


@contextmanager
def _products_in(precision: Precision) -> Iterator[None]:
    """Let torch's float32 products on the CPU round their operands while the enclosed code runs."""
    if precision == "float32":
        yield
        return
    settings = _product_settings()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _product_memory(moments: Moments, workspace: Workspace, dtype: torch.dtype) -> Tensor:
    shape = len(range(moments.units)[moments.rows]), moments.units
    return workspace.empty("product", math.prod(shape), dtype, moments.device).view(shape)


def _product(rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Return rows @ columns.T in `out`; of a product with itself only the upper triangle is used.

    Blocks below the diagonal are then zeros, so that a product with itself costs little more than half.
    """
    if rows is not columns or len(rows) < 2 * _TRIANGLE_BLOCK:
        return torch.mm(rows, columns.T, out=out)
    for first in range(0, len(rows), _TRIANGLE_BLOCK):
        last = min(first + _TRIANGLE_BLOCK, len(rows))
        torch.mm(rows[first:last], columns[first:].T, out=out[first:last, first:])
        out[first:last, :first].zero_()
    return out


def _centered_product(one: Centered, other: Centered, out: Tensor) -> Tensor:
    """Return in `out` the product of samples about their means, from values about the means or about shifts."""
    product = _product(one.values, other.values, out)
    if one.rest is None or other.rest is None:
        return product
    return product.addr_((one.rest / -one.values.shape[1]).to(product), other.rest.to(product))


def _triton_serves(device: torch.device) -> bool:
    return device.type == "cuda" and not _triton.unavailable_reason(device.index)


def _center_by_triton(*arguments: Any) -> Centered:
    from mudsc_fast.kernels.triton import center  # importing triton takes a second; only CUDA tensors need it

    return center.center(*arguments)
