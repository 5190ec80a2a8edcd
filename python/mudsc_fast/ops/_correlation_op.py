"""The registered op behind :meth:`CorrelationAccumulator.update`, for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mudsc_fast.ops import _library
from mudsc_fast.ops._centered_products import Precision
from mudsc_fast.ops._moments import Blocks, Moments, pairs_of
from mudsc_fast.ops.correlation import CorrelationAccumulator


def _correlation_update(
    mean: Tensor,
    squares: Tensor,
    comoments: Tensor,
    num_samples: int,
    features: Sequence[Tensor],
    channel_axis: int,
    blocks: Blocks,
    precision: Precision,
) -> Tensor:
    """Add samples to sums that are given as tensors; return whether features that were not checked were in range."""
    num_models, units = mean.shape
    sums = CorrelationAccumulator(num_models, units, blocks=blocks, device="meta", precision=precision)
    sums._moments = Moments(pairs_of(num_models, blocks), mean, squares, comoments, num_samples)
    sums.update(*features, channel_axis=channel_axis)
    return sums.in_range


def _correlation_update_fake(
    mean: Tensor,
    squares: Tensor,  # noqa: ARG001
    comoments: Tensor,  # noqa: ARG001
    num_samples: int,  # noqa: ARG001
    features: Sequence[Tensor],  # noqa: ARG001
    channel_axis: int,  # noqa: ARG001
    blocks: str,  # noqa: ARG001
    precision: str,  # noqa: ARG001
) -> Tensor:
    return mean.new_empty((), dtype=torch.bool)


_library.define(
    "correlation_update(Tensor(a!) mean, Tensor(b!) squares, Tensor(c!) comoments, SymInt num_samples, "
    "Tensor[] features, int channel_axis, str blocks, str precision) -> Tensor",
    _correlation_update,
    _correlation_update_fake,
)
