"""Sums of the moments of several processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.ops._moments import Moments
from mudsc_fast.ops.correlation import CorrelationAccumulator


def all_reduce_sums(accumulators: Sequence[CorrelationAccumulator], ranks: Ranks, doing: str) -> None:
    """Add the samples of all processes to each accumulator, in place and in all processes.

    All accumulators are reduced together: one message for the means of all, then messages of many accumulators each,
    instead of several messages for each of them. The co-moments are summed in place.
    """
    if ranks.alone or not accumulators:
        return
    with ranks.step(doing):
        for accumulator in accumulators:
            accumulator._check_range()
    all_moments = [accumulator._moments for accumulator in accumulators]
    counts = torch.tensor([m.num_samples for m in all_moments], dtype=torch.int64, device=all_moments[0].device)
    ranks.all_reduce([counts], doing)
    _center(all_moments, counts.tolist(), ranks, doing)
    ranks.all_reduce([sums for m in all_moments for sums in (m.squares, m.comoments)], doing)


def reduce_sums(
    accumulators: Mapping[str, CorrelationAccumulator],
    totals: Mapping[str, int],
    roots: Mapping[str, int],
    ranks: Ranks,
    doing: str,
) -> dict[str, CorrelationAccumulator]:
    """Return the accumulators, with the samples of all processes, whose root is this process.

    Parameters
    ----------
    accumulators
        By node; they are left as they were. The same nodes in the same order in all processes. Their features must be
        known to be in range.
    totals, roots
        For each node the number of samples in all processes, and the rank that gets the sums.
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


def send_sums(accumulator: CorrelationAccumulator, to: int, ranks: Ranks, doing: str) -> None:
    """Send an accumulator to another process, which must call :func:`receive_sums`."""
    moments = accumulator._moments
    ranks.send([moments.mean, moments.squares, moments.comoments], to, doing)


def receive_sums(
    like: CorrelationAccumulator, samples: int, source: int, ranks: Ranks, doing: str
) -> CorrelationAccumulator:
    """Return the accumulator that another process sends, of this number of samples and the configuration of `like`."""
    received = copy.copy(like)
    own = like._moments
    mean, squares, comoments = (torch.empty_like(tensor) for tensor in (own.mean, own.squares, own.comoments))
    ranks.receive([mean, squares, comoments], source, doing)
    received._moments = Moments(own.pairs, mean, squares, comoments, samples)
    return received


def _center(all_moments: Sequence[Moments], totals: Sequence[int], ranks: Ranks, doing: str) -> None:
    """Make the moments of each process ones about the mean of all processes: such moments can be added."""
    means = [m.mean * (m.num_samples / max(total, 1)) for m, total in zip(all_moments, totals, strict=True)]
    ranks.all_reduce(means, doing)
    for moments, mean, total in zip(all_moments, means, totals, strict=True):
        shift = moments.mean - mean
        for (i, j), own in zip(moments.pairs, moments.comoments, strict=True):
            own.addr_(moments.num_samples * shift[i], shift[j])
        moments.squares += moments.num_samples * shift * shift
        moments.mean, moments.num_samples = mean, total
