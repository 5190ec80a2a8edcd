"""Matching the nodes of a wave in several processes, each node on its owner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.reduction import receive_sums, reduce_sums, send_sums
from mudsc_fast.matching.node import Matcher, Mode, NodeMatching
from mudsc_fast.matching.owners import Owners, Share, share_out
from mudsc_fast.matching.slices import TensorSlice, cut_all, tensor_slices
from mudsc_fast.matching.sweep import Bundle, SimilarityOfNode
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.ops.correlation import CorrelationAccumulator
from mudsc_fast.spec.permutation_spec import PermutationSpec

_MATCHING = "matching units"

#: At most so many ranks send their parts of a node to its owner; of more, the sums are reduced by all ranks.
_MAX_SENDERS = 6

#: For each rank that computes a part of a bundle, the number of its samples of each node.
Senders = Mapping[int, Mapping[str, int]]

#: Turns the sums of a node's weights into its similarity, e.g. blended with that of its activations.
Finish = Callable[[str, CorrelationAccumulator], Tensor]


class ParallelSolver:
    """Matches the nodes of a wave on their owners; all processes get the result.

    The similarity of a spread node is summed over the processes, each of which computes the part of its tensors. Where
    a wave would leave processes idle, they compute parts of the similarities of other owners' nodes, too.

    Parameters
    ----------
    spec
        The spec of what is matched.
    state_dict
        The first network's tensors, of which only the shapes are read.
    ranks, owners
        The processes, and which of them computes what.
    weights
        Computes the sums of the tensors that this process owns.
    finish
        Turns sums into a similarity.
    match
        Matches the units of a bundle.
    exchange
        Gives all processes the result.
    timed
        Measures the time of the similarities.
    shares_nodes
        Whether processes can read the tensors of each other's nodes.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        state_dict: Mapping[str, Tensor],
        ranks: Ranks,
        owners: Owners,
        weights: WeightSimilarity,
        finish: Finish,
        match: Matcher,
        exchange: Exchange,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        shares_nodes: bool = True,
    ) -> None:
        self._spec, self._state_dict, self._ranks, self._owners = spec, state_dict, ranks, owners
        self._weights, self._finish, self._match = weights, finish, match
        self._units = spec.units(state_dict)
        self._slices = tensor_slices(spec, state_dict)
        self._shares_nodes = shares_nodes
        self._exchange, self._timed = exchange, timed
        self._few = self._senders_of_spread()
        #: For each node the matchings of its neighbors when its sums were last computed, by whichever process.
        self._before: dict[str, dict[str, NodeMatching]] = {}

    def __call__(self, bundles: Sequence[Bundle], current: Mapping[str, NodeMatching]) -> dict[str, NodeMatching]:
        """Return the matching of the nodes of bundles that are not neighbors of each other."""
        owner, rank = self._owners.owner, self._ranks.rank
        shares = self._shares(bundles, current) if self._shares_nodes else {}
        spread = [bundle for bundle in bundles if bundle in self._owners.spread]
        reduced = [bundle for bundle in spread if bundle not in self._few]
        sent = {**{bundle: self._few[bundle] for bundle in spread if bundle in self._few}, **self._sent(shares)}
        matching: dict[str, NodeMatching] = {}
        partial: dict[str, CorrelationAccumulator] = {}
        with self._ranks.step(_MATCHING):
            for bundle in bundles:
                if bundle in sent and rank != owner[bundle] and rank not in sent[bundle]:
                    continue
                if bundle in spread or bundle in shares:
                    partial.update(self._sums(bundle, current, shares.get(bundle)))
                    for node in bundle:
                        partial[node]._check_range()  # before others add it to theirs
                elif owner[bundle] == rank:
                    matching.update(self._matched(bundle, self._sums(bundle, current)))
        joined = self._join(sent, partial)
        whole = reduce_sums(
            {node: partial[node] for bundle in reduced for node in bundle},
            self._owners.samples,
            {node: owner[bundle] for bundle in reduced for node in bundle},
            self._ranks,
            _MATCHING,
        )
        if spread or shares:
            with self._ranks.step(_MATCHING):
                for bundle in [*spread, *shares]:
                    if owner[bundle] == rank:
                        matching.update(self._matched(bundle, {**joined, **whole}))
                for bundle in shares:
                    if owner[bundle] == rank:
                        for node in bundle:
                            self._weights.keep(node, current, joined[node])
        for bundle in bundles:
            for node in bundle:
                around = self._spec.neighbors(node)
                self._before[node] = {other: current[other] for other in around if other in current}
        return self._exchange(bundles, matching)

    def _senders_of_spread(self) -> dict[Bundle, Senders]:
        """Return the spread bundles of which few ranks compute a part: these send it, and no rank else takes part."""
        few: dict[Bundle, Senders] = {}
        for bundle in sorted(self._owners.spread):
            samples = {
                rank: {node: sum(part.samples for part in slices[node]) for node in bundle}
                for rank, slices in enumerate(self._owners.slices)
                if any(slices[node] for node in bundle)
            }
            if len(samples) <= 2 or (len(samples) < self._ranks.size and len(samples) <= _MAX_SENDERS):
                few[bundle] = samples
        return few

    def _sent(self, shares: Mapping[Bundle, Sequence[Share]]) -> dict[Bundle, Senders]:
        return {
            bundle: {
                rank: {node: sum(part.samples for part in self._cut(node, of_ranks, rank)) for node in bundle}
                for rank in sorted({rank for rank, _, _ in of_ranks})
            }
            for bundle, of_ranks in shares.items()
        }

    def _join(
        self, sent: Mapping[Bundle, Senders], partial: Mapping[str, CorrelationAccumulator]
    ) -> dict[str, CorrelationAccumulator]:
        """Return the sums of nodes that some ranks have parts of, in their owners.

        All processes go through the transfers in one order, so that none waits for another in a circle.
        """
        joined = {}
        for bundle, senders in sent.items():
            owner = self._owners.owner[bundle]
            others = {rank: samples for rank, samples in senders.items() if rank != owner}
            for node in bundle:
                if self._ranks.rank in others:
                    send_sums(partial[node], owner, self._ranks, _MATCHING)
                if self._ranks.rank != owner:
                    continue
                total: CorrelationAccumulator | None = None
                for rank, samples in others.items():
                    received = receive_sums(partial[node], samples[node], rank, self._ranks, _MATCHING)
                    if total is None:  # the part of this process may be kept for the next visit, so it is not changed
                        total = received
                        received = partial[node]
                    total.merge(received)
                joined[node] = partial[node] if total is None else total
        return joined

    def _sums(
        self, bundle: Bundle, current: Mapping[str, NodeMatching], shares: Sequence[Share] | None = None
    ) -> dict[str, CorrelationAccumulator]:
        """Return the sums over the slices that this process owns, or over its shares of all slices."""
        with self._timed():
            if shares is None:
                return {node: self._weights.sums(node, current) for node in bundle}
            slices = {node: self._cut(node, shares, self._ranks.rank) for node in bundle}
            return {node: self._weights.sums_of(node, current, slices[node]) for node in bundle}

    def _matched(self, bundle: Bundle, sums: Mapping[str, CorrelationAccumulator]) -> dict[str, NodeMatching]:
        with self._timed():
            similarities = {node: self._finish(node, sums[node]) for node in bundle}
        return self._match(similarities, self._spec.groups(bundle[0]).count)

    def _shares(self, bundles: Sequence[Bundle], current: Mapping[str, NodeMatching]) -> dict[Bundle, list[Share]]:
        """Return the bundles that several processes should compute, so that none waits for others for long."""
        loads = [0.0] * self._ranks.size
        works: dict[Bundle, float] = {}
        for bundle in bundles:
            if bundle in self._owners.spread:
                for rank, slices in enumerate(self._owners.slices):
                    loads[rank] += sum(self._work(node, slices[node]) for node in bundle)
            elif not any(self._is_updated(node, current) for node in bundle):
                works[bundle] = sum(self._work(node, self._slices[node]) for node in bundle)
        samples = {bundle: sum(self._owners.samples[node] for node in bundle) for bundle in works}
        return share_out(works, self._owners.owner, loads, samples)

    def _is_updated(self, node: str, current: Mapping[str, NodeMatching]) -> bool:
        """Return whether the owner of a node has its sums and updates them, which is less work than sharing it."""
        before = self._before.get(node)
        return before is not None and self._weights.follows(node, before, current, self._slices[node])

    def _work(self, node: str, slices: Sequence[TensorSlice]) -> float:
        return float(self._units[node]) ** 2 * sum(part.samples for part in slices)

    def _cut(self, node: str, shares: Sequence[Share], rank: int) -> list[TensorSlice]:
        """Return the slices of a shared node that a rank computes."""
        return [
            part
            for other, begin, end in shares
            if other == rank
            for part in cut_all(self._slices[node], begin, end, self._state_dict, self._units)
        ]


class Exchange:
    """Gives all processes the matchings that the owners of nodes found: one message for all nodes.

    Parameters
    ----------
    spec, units
        The spec, and the number of units of every node.
    ranks, owner
        The processes, and which of them owns a bundle.
    mode, num_models, device
        Of the matching.
    """

    #: Number of 32-bit words for the three 64-bit numbers stored with a matching's clusters.
    _FIGURES = 6

    def __init__(
        self,
        spec: PermutationSpec,
        units: Mapping[str, int],
        ranks: Ranks,
        owner: Mapping[Bundle, int],
        mode: Mode,
        num_models: int,
        device: torch.device,
    ) -> None:
        self._spec, self._units, self._ranks, self._owner = spec, units, ranks, owner
        self._mode: Mode = mode
        self._num_models, self._device = num_models, device

    def __call__(self, bundles: Sequence[Bundle], matching: Mapping[str, NodeMatching]) -> dict[str, NodeMatching]:
        """Return the matchings of all nodes of `bundles`, given those that this process owns."""
        if self._ranks.alone:
            return dict(matching)
        nodes = [(node, self._owner[bundle] == self._ranks.rank) for bundle in bundles for node in bundle]
        lengths = [self._num_models * self._units[node] + self._FIGURES for node, _ in nodes]
        # Every number is 0 in all processes but one, so that their sum is that number.
        message = torch.zeros(sum(lengths), dtype=torch.int32, device=self._device)
        for (node, own), part in zip(nodes, message.split(lengths), strict=True):
            if own:
                self._pack(matching[node], part)
        self._ranks.all_reduce([message], "exchanging matchings")
        return {node: self._unpack(part) for (node, _), part in zip(nodes, message.split(lengths), strict=True)}

    def _pack(self, matched: NodeMatching, part: Tensor) -> None:
        gap = float("nan") if matched.gap is None else matched.gap
        figures = torch.tensor([matched.similarity_before, matched.similarity, gap], dtype=torch.float64, device="cpu")
        part[: -self._FIGURES] = matched.cluster_of_unit.flatten()
        part[-self._FIGURES :] = figures.view(torch.int32)

    def _unpack(self, part: Tensor) -> NodeMatching:
        clusters = part[: -self._FIGURES].to(torch.int64).view(self._num_models, -1)
        before, similarity, gap = part[-self._FIGURES :].clone().view(torch.float64).tolist()
        return NodeMatching(
            mode=self._mode,
            cluster_of_unit=clusters,
            num_clusters=clusters.shape[1],
            similarity_before=before,
            similarity=similarity,
            gap=None if gap != gap else gap,
        )


def solve_on_owners(
    bundles: Sequence[Bundle],
    current: Mapping[str, NodeMatching],
    similarity_of: SimilarityOfNode,
    match: Matcher,
    spec: PermutationSpec,
    ranks: Ranks,
    owners: Owners,
    exchange: Exchange,
) -> dict[str, NodeMatching]:
    """Match bundles whose similarities every process can compute alone, each on its owner."""
    matching: dict[str, NodeMatching] = {}
    with ranks.step(_MATCHING):
        for bundle in bundles:
            if owners.owner[bundle] == ranks.rank:
                similarities = {node: similarity_of(node, current) for node in bundle}
                matching.update(match(similarities, spec.groups(bundle[0]).count))
    return exchange(bundles, matching)
