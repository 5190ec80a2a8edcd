"""Matching the units of one node like the MuDSC program: by index, by permutations, or by clusters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mudsc_fast.compat._zip import zip_published
from mudsc_fast.ops.assignment import linear_assignment
from mudsc_fast.ops.zip import merges_inside
from mudsc_fast.unit_map import UnitMap


@dataclass(frozen=True, eq=False)
class Match:
    """The cluster of every unit [models, units], the number of clusters, and the mean similarity of what is matched."""

    cluster_of_unit: Tensor
    num_clusters: int
    value: float

    def map(self, merges: bool, model: int | None = None) -> UnitMap:
        """Return how `merge` or `unmerge` re-indexes an axis, for all models or one."""
        chosen = self.cluster_of_unit if model is None else self.cluster_of_unit[model : model + 1]
        return UnitMap.clusters(chosen, self.num_clusters, self._scale() if merges else None)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return `merge` and `unmerge`."""
        unmerge = functional.one_hot(self.cluster_of_unit.flatten(), self.num_clusters).float()
        return unmerge * self._scale(), unmerge

    def _scale(self) -> Tensor:
        sizes = torch.bincount(self.cluster_of_unit.flatten(), minlength=self.num_clusters)
        return len(self.cluster_of_unit) / (sizes.float() + 1e-5)


def match_identity(units: int, num_models: int, device: torch.device) -> Match:
    """Match units by their index."""
    return Match(torch.arange(units, device=device).expand(num_models, units), units, 1.0)


def match_permutation(similarity: Tensor, num_models: int, groups: int) -> Match:
    """Permute the units of every model onto those of the first, given the first model's rows of the similarity."""
    columns, _, value = aligned(similarity, num_models, groups)
    own = torch.arange(columns.shape[1], device=similarity.device)
    return Match(torch.cat([own[None], columns.argsort(1)]), columns.shape[1], value)


def match_clusters(
    similarity: Tensor, num_models: int, groups: int, reduce: float, shrink: float, inside: float
) -> Match:
    """Cluster [models * units, models * units] units greedily; with groups, those of matched groups only.

    `reduce`, `shrink` and `inside` are `reduce`, `a` and `b` of ``WeightFusion``.
    """
    size = len(similarity) // (num_models * groups)
    remaining = groups * int(size * num_models * (1 - reduce) + 1e-4)
    merges = len(similarity) - remaining
    sets = None
    if groups > 1:
        _, group_of_set, _ = aligned(similarity, num_models, groups)
        first = group_of_set.T * size + torch.arange(num_models, device=similarity.device) * groups * size
        sets = list((first[..., None] + torch.arange(size, device=similarity.device)).flatten(1))
    zipped = zip_published(
        similarity,
        num_models,
        remaining,
        merges_inside(merges, num_models, inside),
        shrink,
        sets=sets,
        group_budget=merges // (num_models * groups),
    )
    return Match(zipped.cluster_of_unit.view(num_models, -1), zipped.num_clusters, zipped.value)


def same_matching(first: Mapping[Hashable, Match], second: Mapping[Hashable, Match]) -> bool:
    """Return whether two maps have the same nodes, matched alike."""
    return first.keys() == second.keys() and all(
        match is second[node]
        or (
            match.num_clusters == second[node].num_clusters
            and torch.equal(match.cluster_of_unit, second[node].cluster_of_unit)
        )
        for node, match in first.items()
    )


def correlation_with_first(vectors: Sequence[Tensor]) -> Tensor:
    """Return [units, models * units]: the correlation of the first model's weight vectors with all models'."""
    rows = torch.nan_to_num(torch.cat(list(vectors)), 0, 0, 0)
    first, mean = rows[: len(vectors[0])], rows.mean(1)
    deviation = (rows.square().mean(1) - mean.square()).clamp(min=0).sqrt()
    covariance = torch.addr(first @ rows.T / rows.shape[1], mean[: len(first)], mean, alpha=-1)
    return covariance / torch.outer(deviation[: len(first)], deviation).clamp(min=1e-7)


def aligned(similarity: Tensor, num_models: int, groups: int) -> tuple[Tensor, Tensor, float]:
    """Return the units [models - 1, units] and groups [models, groups] matched with the first model's, and the value.

    First the units of every pair of groups are assigned; then the groups, by their units' mean similarities.
    """
    units = similarity.shape[1] // num_models
    size = units // groups
    blocks = similarity[:units].view(groups, size, num_models, groups, size).permute(2, 0, 3, 1, 4)[1:]
    inner = linear_assignment(blocks).columns
    scores = blocks.gather(4, inner[..., None]).squeeze(4).mean(-1)
    partner = linear_assignment(scores).columns
    columns = inner.gather(2, partner[..., None, None].expand(-1, -1, 1, size)).squeeze(2) + partner[..., None] * size
    value = float(scores.gather(2, partner[..., None]).mean())
    own = torch.arange(groups, device=partner.device)[None]
    return columns.flatten(1), torch.cat([own, partner]), value
