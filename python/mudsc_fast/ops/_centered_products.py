"""Co-moments from centered features: center each model's samples, then multiply them with torch's matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

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
            memory = self._memory[name] = torch.empty(size, dtype=torch.uint8, device=device)
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
    numbers = moments.units * math.prod(chunk[0].shape)
    memory = [workspace.empty(f"centered {model}", numbers, dtype, moments.device) for model in range(len(chunk))]
    results = [center(one.view, m, one.outer, one.inner) for one, m in zip(chunk, memory, strict=True)]
    centered, means, squares, rests = zip(*results, strict=True)
    if not all(bool(mean.isfinite().all()) for mean in means):
        check()
    # If float32 cannot hold the squares, the products are computed in float64, which can.
    if dtype == torch.float32 and any(bool(s.max() > torch.finfo(dtype).max) for s in squares):
        centered = tuple(one.to(torch.float64) for one in centered)
    count = centered[0].shape[1]
    product = _product_memory(moments, workspace, centered[0].dtype)
    products = (
        _less_rest(_product(centered[i], centered[j], product), rests[i], rests[j], count) for i, j in moments.pairs
    )
    with _products_in(precision):
        moments.join(count, torch.stack(means), torch.stack(squares), products)


def exchange(
    moments: Moments,
    chunk: list[tuple[Tensor, Tensor]],
    stays: list[bool],
    dtype: torch.dtype,
    precision: Precision,
    workspace: Workspace,
    changes: tuple[Tensor, Tensor] | None,
) -> None:
    """Replace samples in the co-moments about the present mean.

    `changes`, if given, are [N, C] sums that the changes of each unit's sum and sum of squares are added to.
    """
    before, after = [], []
    for (old, new), same, mean in zip(chunk, stays, moments.mean, strict=True):
        before.append(_deviations(old, mean, dtype))
        after.append(before[-1] if same else _deviations(new, mean, dtype))
    none = torch.zeros_like(moments.mean[0])
    product = _product_memory(moments, workspace, dtype)
    for (i, j), own in zip(moments.pairs, moments.comoments, strict=True):
        with _products_in(precision):
            if stays[i]:
                torch.mm(after[i], (after[j] - before[j]).T, out=product)
            else:
                _product(after[i], after[j], product).addmm_(before[i], before[j].T, alpha=-1)
        moments.accumulate(own, product, none, none)
    if changes is not None:
        for i, (o, n) in enumerate(zip(before, after, strict=True)):
            changes[0][i] += (n - o).sum(1, dtype=torch.float64)
            changes[1][i] += _sum_of_squares(n) - _sum_of_squares(o)


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
    shape = moments.comoments.shape[1:]
    return workspace.empty("product", shape.numel(), dtype, moments.device).view(shape)


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


def _less_rest(product: Tensor, row_rest: Tensor | None, column_rest: Tensor | None, count: int) -> Tensor:
    """Return the product of samples about their means, given the product of samples whose sums are the rests."""
    if row_rest is None or column_rest is None:
        return product
    return product.addr_((row_rest / -count).to(product), column_rest.to(product))


def _deviations(features: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Return features [outer, C, inner] minus `mean` [C], as [C, samples], with NaN as 0."""
    units = features.transpose(0, 1).flatten(1).to(dtype)
    return units.nan_to_num(0.0).sub_(mean[:, None].to(dtype))


def _sum_of_squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


def _triton_serves(device: torch.device) -> bool:
    return device.type == "cuda" and not _triton.unavailable_reason(device.index)


def _center_by_triton(*arguments: Any) -> Centered:
    from mudsc_fast.kernels.triton import center  # importing triton takes a second; only CUDA tensors need it

    return center.center(*arguments)
