"""The result of a CorrelationAccumulator: quotients of its sums, blended with another similarity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mudsc_fast import _checks
from mudsc_fast.kernels.cpu import correlation as cpu
from mudsc_fast.kernels.cuda import correlation as cuda
from mudsc_fast.kernels.reference import correlation as reference
from mudsc_fast.ops import _dispatch
from mudsc_fast.ops._moments import Blocks, Moments


def correlations_of(
    moments: Moments, blocks: Blocks, dtype: torch.dtype, eps: float, other: Tensor | None, balance: float
) -> Tensor:
    """Return what :meth:`CorrelationAccumulator.finalize` documents, after checking `other` and `balance`."""
    models, units = moments.mean.shape
    shape = (models - 1, units, units) if blocks == "cross" else (models * units, models * units)
    result = torch.empty(shape, dtype=dtype, device=moments.device)
    other = _check_blend(other, balance, result)
    correlate = _dispatch.choose(
        "correlation.finalize",
        moments.device,
        {
            "cpu": cpu.correlate,
            "cuda": cuda.correlate,
            "triton": _correlate_by_triton,
            "reference": reference.correlate,
        },
    )
    deviation = (moments.squares / moments.num_samples).sqrt()
    for (i, j), comoment in zip(moments.pairs, moments.comoments, strict=True):
        out, mirror = _blocks_of(result, blocks, units, i, j)
        beside = None if other is None else _blocks_of(other, blocks, units, i, j)[0]
        correlate(comoment, deviation[i], deviation[j], moments.num_samples, eps, out, mirror, beside, balance)
    return result


def _blocks_of(result: Tensor, blocks: Blocks, units: int, i: int, j: int) -> tuple[Tensor, Tensor | None]:
    """Return the block of `result` for models i and j, and the block of its transpose if there is one."""
    if blocks == "cross":
        return result[j - 1], None
    rows = slice(i * units, (i + 1) * units)
    columns = slice(j * units, (j + 1) * units)
    block = result[rows, columns]
    return block, block if i == j else result[columns, rows]


def _check_blend(other: Tensor | None, balance: float, result: Tensor) -> Tensor | None:
    """Return `other`, checked, with rows of adjacent entries."""
    balance = _checks.check_number("balance", balance)
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must be in [0, 1], got {balance}")
    if other is None:
        if balance != 1:
            raise ValueError(f"balance must be 1 without other, got {balance}")
        return None
    other = _checks.check_tensor("other", other)
    if (other.shape, other.dtype, other.device) != (result.shape, result.dtype, result.device):
        raise ValueError(
            f"other must be {list(result.shape)} in {result.dtype} on {result.device}, "
            f"got {list(other.shape)} in {other.dtype} on {other.device}"
        )
    return other if other.stride(-1) == 1 else other.contiguous()


def _correlate_by_triton(*arguments: Any) -> None:
    from mudsc_fast.kernels.triton import correlation  # importing triton takes a second; only CUDA tensors need it

    correlation.correlate(*arguments)
