"""Exchange of matchings between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.matching.node import Matcher, Mode, NodeMatching
from mudsc_fast.matching.owners import Owners
from mudsc_fast.matching.sweep import Bundle, SimilarityOfNode
from mudsc_fast.spec.permutation_spec import PermutationSpec


class Exchange:
    """Sends the matchings that the owners of nodes found to all processes, in one message.

    Parameters
    ----------
    spec, units
        The spec, and the number of units of every node.
    ranks, owner
        The processes, and the rank that owns each bundle.
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
    """Match each bundle on its owner. Every process must be able to compute the similarities alone."""
    matching: dict[str, NodeMatching] = {}
    with ranks.step("matching units"):
        for bundle in bundles:
            if owners.owner[bundle] == ranks.rank:
                similarities = {node: similarity_of(node, current) for node in bundle}
                matching.update(match(similarities, spec.groups(bundle[0]).count))
    return exchange(bundles, matching)
