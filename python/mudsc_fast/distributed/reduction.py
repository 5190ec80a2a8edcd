"""Reductions of the moments of several processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.ops._moments import Moments
from mudsc_fast.ops.correlation import CorrelationAccumulator


def all_reduce_sums(accumulators: Sequence[CorrelationAccumulator], ranks: Ranks, doing: str) -> None:
    """Add the samples of all processes to each accumulator, in place and in all processes.

    All accumulators are reduced together: one message holds all means, and further messages hold the sums of many
    accumulators each. The co-moments are summed in place.
    """
    if ranks.alone or not accumulators:
        return
    all_moments = _checked_and_centered(accumulators, ranks, doing)
    ranks.all_reduce([sums for m in all_moments for sums in (m.squares, m.comoments)], doing)


def reduce_to_roots(
    accumulators: Mapping[str, CorrelationAccumulator], roots: Mapping[str, int], ranks: Ranks, doing: str
) -> None:
    """Add the samples of all processes to those accumulators whose root is this process.

    All processes get the means and variances. The co-moments, which are nearly all of the bytes, are sent to the root
    only, which is half of what an all-reduce sends. The accumulators of other roots lose their co-moments and must not
    be used any more.
    """
    all_moments = dict(zip(accumulators, _checked_and_centered(list(accumulators.values()), ranks, doing), strict=True))
    ranks.all_reduce([moments.squares for moments in all_moments.values()], doing)
    for root in sorted({roots[node] for node in all_moments}):
        ranks.reduce([m.comoments for node, m in all_moments.items() if roots[node] == root], root, doing)
    for node, moments in all_moments.items():
        if roots[node] != ranks.rank:
            moments.comoments = moments.comoments.new_empty(0)


def reduce_sums(
    accumulators: Mapping[str, CorrelationAccumulator],
    totals: Mapping[str, int],
    roots: Mapping[str, int],
    ranks: Ranks,
    doing: str,
) -> dict[str, CorrelationAccumulator]:
    """Return the accumulators whose root is this process, with the samples of all processes.

    Parameters
    ----------
    accumulators
        By node, with the same nodes in the same order in all processes. They are not modified. Their features must be
        known to be in range.
    totals, roots
        For each node, the total number of samples of all processes, and the rank that gets the sums.
    """
    if not accumulators:
        return {}
    copies = {node: copy.deepcopy(accumulator) for node, accumulator in accumulators.items()}
    all_moments = [copied._moments for copied in copies.values()]
    _center(all_moments, [totals[node] for node in copies], ranks, doing)
    for root in sorted({roots[node] for node in copies}):
        own = [copied._moments for node, copied in copies.items() if roots[node] == root]
        ranks.reduce([sums for m in own for sums in (m.squares, m.comoments)], root, doing)
    return {node: copied for node, copied in copies.items() if roots[node] == ranks.rank}


def send_sums(accumulator: CorrelationAccumulator, to: int, dtype: torch.dtype, ranks: Ranks, doing: str) -> None:
    """Send an accumulator to another process, which must call :func:`receive_sums`.

    The co-moments are sent in `dtype`. Float32 is precise enough for the sums of one process if the features are
    multiplied in float32.
    """
    moments = accumulator._moments
    ranks.send([moments.mean, moments.squares], to, doing)
    ranks.send([moments.comoments.to(dtype)], to, doing)


def receive_sums(
    into: CorrelationAccumulator, samples: int, source: int, dtype: torch.dtype, ranks: Ranks, doing: str
) -> None:
    """Add the accumulator that another process sends, which has the given number of samples."""
    own = into._moments
    mean, squares = torch.empty_like(own.mean), torch.empty_like(own.squares)
    comoments = torch.empty_like(own.comoments, dtype=dtype)
    ranks.receive([mean, squares], source, doing)
    ranks.receive([comoments], source, doing)
    own.join(samples, mean, squares, comoments)


def send_difference(accumulator: CorrelationAccumulator, to: int, dtype: torch.dtype, ranks: Ranks, doing: str) -> None:
    """Send the co-moments of an accumulator to another process, which must call :func:`receive_difference`."""
    ranks.send([accumulator._moments.comoments.to(dtype)], to, doing)


def receive_difference(into: CorrelationAccumulator, source: int, dtype: torch.dtype, ranks: Ranks, doing: str) -> None:
    """Add the co-moments that another process sends. Means and variances do not change."""
    own = into._moments
    difference = torch.empty_like(own.comoments, dtype=dtype)
    ranks.receive([difference], source, doing)
    none = torch.zeros_like(own.mean[0])
    for comoment, added in zip(own.comoments, difference, strict=True):
        own.accumulate(comoment, added, none, none)


def _checked_and_centered(accumulators: Sequence[CorrelationAccumulator], ranks: Ranks, doing: str) -> list[Moments]:
    """Check the ranges of all features, and return the moments of each accumulator about the mean of all processes."""
    with ranks.step(doing):
        for accumulator in accumulators:
            accumulator._check_range()
    all_moments = [accumulator._moments for accumulator in accumulators]
    counts = torch.tensor([m.num_samples for m in all_moments], dtype=torch.int64, device=all_moments[0].device)
    ranks.all_reduce([counts], doing)
    _center(all_moments, counts.tolist(), ranks, doing)
    return all_moments


def _center(all_moments: Sequence[Moments], totals: Sequence[int], ranks: Ranks, doing: str) -> None:
    """Shift moments to the mean of all processes, so that those of different processes can be added."""
    means = [m.mean * (m.num_samples / max(total, 1)) for m, total in zip(all_moments, totals, strict=True)]
    ranks.all_reduce(means, doing)
    for moments, mean, total in zip(all_moments, means, totals, strict=True):
        moments.center_about(mean, total)
