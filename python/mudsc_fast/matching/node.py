"""Matching the units of one node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mudsc_fast.ops.assignment import Assignment, linear_assignment
from mudsc_fast.ops.correlation import Blocks
from mudsc_fast.ops.permute import UnitMap
from mudsc_fast.ops.zip import merges_inside, zip_within_budget
from mudsc_fast.spec.axes import Role

Mode = Literal["align", "zip"]

#: With at least this many units, a solution is kept to warm-start the next visit. Smaller problems are solved in
#: milliseconds, and their solutions would fragment the heap.
_MIN_UNITS_TO_KEEP = 2048

#: A weight used instead of 0: it vanishes beside 1 in float64, and float32 can represent it.
_VANISHING = 1e-18

#: The similarity blocks that a mode reads: model 0 with every other model, or all with all.
BLOCKS_OF_MODE: dict[Mode, Blocks] = {"align": "cross", "zip": "full"}


@dataclass(frozen=True, eq=False, repr=False)
class NodeMatching:
    """How the units of all models correspond at one node.

    Attributes
    ----------
    mode
        ``"align"`` (a permutation per model) or ``"zip"`` (clusters of units, also of one model).
    cluster_of_unit
        [models, units] int64: the merged unit that each unit becomes part of.
    num_clusters
        Number of merged units.
    similarity_before
        Mean similarity of equally numbered units of model 0 and every other model.
    similarity
        Mean similarity of matched units. Align: over all pairs of model 0 with another model. Zip: over the merges,
        each with the similarity its two clusters had when they were merged.
    gap
        Align: the most by which the mean similarity of the assignment may be below the optimum, by its certificate.
        None for a zip, which is greedy.
    """

    mode: Mode
    cluster_of_unit: Tensor
    num_clusters: int
    similarity_before: float
    similarity: float
    gap: float | None = None

    def __repr__(self) -> str:
        models, units = self.cluster_of_unit.shape
        return (
            f"NodeMatching({self.mode!r}, {models} models, {units} units, "
            f"similarity {self.similarity_before:.4f} -> {self.similarity:.4f})"
        )

    @property
    def permutations(self) -> Tensor | None:
        """[models, units] int64 if the units were aligned: unit k of the result is unit ``permutations[i, k]``."""
        return None if self.mode == "zip" else torch.argsort(self.cluster_of_unit, dim=1)

    def to(self, device: torch.device) -> NodeMatching:
        """Return the matching with its tensor on a device."""
        return replace(self, cluster_of_unit=self.cluster_of_unit.to(device))

    def same_clusters(self, other: NodeMatching) -> bool:
        """Return whether both matchings assign every unit to the same cluster."""
        return self.num_clusters == other.num_clusters and torch.equal(self.cluster_of_unit, other.cluster_of_unit)

    def unit_map(self, role: Role, model_weights: Sequence[float], model: int | None = None) -> UnitMap:
        """Return how an axis is re-indexed: for all models together, or for one of them.

        A cluster is the weighted mean of its members where units are produced, and their sum where they are consumed:
        a consumer merged with weights w_i then computes what it computed before. For equal weights the scale is
        models / members, the published merge matrix without the 1e-5 in its denominator.
        """
        chosen = slice(None) if model is None else slice(model, model + 1)
        permutations = self.permutations
        if permutations is not None:
            return UnitMap.permutation(permutations[chosen])
        scale = None
        if role == "produce":
            share = torch.tensor(model_weights, dtype=torch.float64, device=self.cluster_of_unit.device)
            share = share[:, None].expand(self.cluster_of_unit.shape)
            total = share.new_zeros(self.num_clusters).index_add_(0, self.cluster_of_unit.flatten(), share.flatten())
            scale = total.reciprocal()
        return UnitMap.clusters(self.cluster_of_unit[chosen], self.num_clusters, scale)

    def task_map(self, role: Role, model: int) -> UnitMap:
        """Return how one model's own tensor is re-indexed to fit merged tensors.

        Where it consumes the units, each unit of the model reads the cluster that it belongs to. Where it produces
        them, a cluster gets the mean of the model's own members. A cluster without any gets 0; no tensor of this model
        reads it.
        """
        permutations = self.permutations
        if permutations is not None:
            return UnitMap.permutation(permutations[model : model + 1])
        own = self.cluster_of_unit[model : model + 1]
        scale = None
        if role == "produce":
            scale = torch.bincount(own[0], minlength=self.num_clusters).clamp(min=1).double().reciprocal()
        return UnitMap.clusters(own, self.num_clusters, scale)

    def group_order(self, groups: int, model: int) -> Tensor:
        """Return [groups] int64: the group of a model that becomes each group of the result."""
        units = self.cluster_of_unit.shape[1]
        return torch.argsort(self.cluster_of_unit[model, :: units // groups] // (self.num_clusters // groups))


def effective_weights(weights: Sequence[float], nodes: Mapping[str, NodeMatching]) -> list[float]:
    """Return the weights to merge with where some are 0.

    The mean of a cluster's members is not defined if all of them come from models of weight 0. Such models then get a
    weight that vanishes beside the others' even in float64, and the cluster the mean that it has in the limit.
    """
    if min(weights) > 0 or not any(_has_unweighted_cluster(weights, matched) for matched in nodes.values()):
        return list(weights)
    return [weight or _VANISHING for weight in weights]


def _has_unweighted_cluster(weights: Sequence[float], matched: NodeMatching) -> bool:
    weighted = [index for index, weight in enumerate(weights) if weight > 0]
    counts = torch.bincount(matched.cluster_of_unit[weighted].flatten(), minlength=matched.num_clusters)
    return bool((counts == 0).any())


#: Matches the units of all nodes of a bundle, by the nodes' similarity blocks and the number of groups.
Matcher = Callable[[Mapping[str, Tensor], int], dict[str, NodeMatching]]


def align_units(
    blocks: Mapping[str, Tensor], groups: int = 1, *, earlier: dict[str, Assignment] | None = None
) -> dict[str, NodeMatching]:
    """Give every model except the first the permutation that maximizes its summed similarity with the first.

    If the units of a node form groups, a permutation of the groups is found first, by the mean similarity of their
    units under the best matching of each pair of groups. Several nodes share one permutation of groups.

    Parameters
    ----------
    blocks
        For each node [models - 1, units, units]: similarity of model 0's units (rows) with another model's (columns).
    groups
        Number of groups, of consecutive units, that each node's units form.
    earlier
        Solutions for similar problems, by node, which warm-start the search. Replaced by the new solutions.
    """
    pairs, inner, gaps = _pair_groups(blocks, groups, earlier)
    matching = {}
    for node, similarity in blocks.items():
        models, units = similarity.shape[:2]
        size = units // groups
        chosen = inner[node].gather(2, pairs[:, :, None, None].expand(models, groups, 1, size)).squeeze(2)
        columns = (pairs[..., None] * size + chosen).view(models, units)
        order = torch.arange(units, device=columns.device)
        before, after = _means(similarity.diagonal(dim1=1, dim2=2), similarity.gather(2, columns[..., None]))
        matching[node] = NodeMatching(
            mode="align",
            cluster_of_unit=torch.cat([order[None], torch.argsort(columns, dim=1)]),
            num_clusters=units,
            similarity_before=before,
            similarity=after,
            gap=gaps[node],
        )
    return matching


def zip_all_units(
    similarities: Mapping[str, Tensor],
    num_models: int,
    groups: int = 1,
    *,
    shrink: float = 0.5,
    within: float = 1.0,
    budget: float = 1.0,
    expand: Mapping[str, float] | None = None,
) -> dict[str, NodeMatching]:
    """Cluster the units of all models greedily, down to the number of units of one model, or to more.

    If the units of a node form groups, the groups of all models are first paired with those of the first model, as in
    :func:`align_units`. The units of each set of paired groups are then clustered separately.

    Parameters
    ----------
    similarities
        For each node [models * units, models * units].
    num_models, shrink, budget
        As in :func:`mudsc_fast.ops.zip_units`.
    within
        Factor of positive similarities of units of one model. The similarity of two clusters is that of their least
        similar members, so below 1 it also keeps clusters apart that both have members of one model.
    expand
        For each node, the number of clusters to keep for each unit of a model; by default 1. At most all units are
        kept. Nodes whose units form groups are not expanded.
    groups
        Number of groups, of consecutive units, that each node's units form in each model.
    """
    if groups == 1:
        members = {
            node: torch.arange(len(similarity), device=similarity.device)[None]
            for node, similarity in similarities.items()
        }
    else:
        blocks = {node: with_first(similarity, num_models) for node, similarity in similarities.items()}
        pairs, _, _ = _pair_groups(blocks, groups)
        own = torch.arange(groups, device=pairs.device)[None]
        members = {
            node: _units_of_sets(torch.cat([own, pairs]), len(similarity) // num_models)
            for node, similarity in similarities.items()
        }
    matching = {}
    for node, similarity in similarities.items():
        units = len(similarity) // num_models
        factor = 1.0 if expand is None or groups > 1 else expand[node]
        kept = min(round(units * factor), len(similarity))
        size = kept // groups
        cluster_of_unit = torch.empty(len(similarity), dtype=torch.int64, device=similarity.device)
        allowed = merges_inside(len(similarity) - kept, num_models, budget, groups)
        values = []
        for position, rows in enumerate(members[node]):
            part = similarity if groups == 1 else similarity[rows][:, rows]
            with _scaled_within_models(part, num_models, within):
                zipped = zip_within_budget(part, num_models, size, allowed, shrink)
            cluster_of_unit[rows] = zipped.cluster_of_unit + position * size
            values.append(zipped.value)
        matching[node] = NodeMatching(
            mode="zip",
            cluster_of_unit=cluster_of_unit.view(num_models, units),
            num_clusters=kept,
            similarity_before=_means(
                torch.stack([similarity.diagonal(i * units)[:units] for i in range(1, num_models)])
            )[0],
            # Every set makes as many merges, so the mean over the sets is the mean over all merges.
            similarity=sum(values) / len(values),
        )
    return matching


@contextmanager
def _scaled_within_models(similarity: Tensor, num_models: int, factor: float) -> Iterator[None]:
    """Multiply positive similarities of units of one model while the enclosed code runs, without a copy of the rest."""
    if factor == 1:
        yield
        return
    units = len(similarity) // num_models
    blocks = [similarity[i * units : (i + 1) * units, i * units : (i + 1) * units] for i in range(num_models)]
    originals = [block.clone() for block in blocks]
    try:
        for block, original in zip(blocks, originals, strict=True):
            torch.minimum(original, original * factor, out=block)
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            block.copy_(original)


def with_first(similarity: Tensor, num_models: int) -> Tensor:
    """Return [models - 1, units, units], the blocks of model 0 with every other model, of a whole similarity."""
    units = len(similarity) // num_models
    return torch.stack([similarity[:units, i * units : (i + 1) * units] for i in range(1, num_models)])


def _pair_groups(
    blocks: Mapping[str, Tensor], groups: int, earlier: dict[str, Assignment] | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Return [models - 1, groups], the group paired with each of model 0's, each node's columns within pairs, and gaps.

    The columns are [models - 1, groups, groups, units of a group]: for every pair of groups, paired or not, the best
    assignment of the units of one to those of the other.
    """
    scores: Tensor | None = None
    inner = {}
    gaps = {}
    for node, similarity in blocks.items():
        models, units = similarity.shape[:2]
        size = units // groups
        split = similarity.view(models, groups, size, groups, size).transpose(2, 3)
        solution = linear_assignment(split, warm_start=None if earlier is None else earlier.get(node))
        if earlier is not None and similarity.shape[-1] >= _MIN_UNITS_TO_KEEP:
            # Copies, because the solver's results share memory with its workspaces and would keep that memory in use.
            earlier[node] = solution.clone()
        inner[node] = solution.columns
        gaps[node] = _largest(solution.gap) / max(size, 1)
        if groups == 1:
            continue
        matched = split.gather(4, inner[node][..., None]).squeeze(4).double().mean(-1)
        scores = matched if scores is None else scores + matched
    if groups == 1:  # there is only one way to pair them
        first = next(iter(inner.values()))
        return first.new_zeros(len(first), 1), inner, gaps
    assert scores is not None  # not empty: a bundle has at least one node
    paired = linear_assignment(scores)
    across = _largest(paired.gap) / groups
    return paired.columns, inner, {node: gap + across for node, gap in gaps.items()}


def _units_of_sets(group_of_set: Tensor, units: int) -> Tensor:
    """Return [groups, models * units of a group]: the units of each set, given [models, groups] the sets' groups."""
    models, groups = group_of_set.shape
    size = units // groups
    first = group_of_set.T[..., None] * size + torch.arange(models, device=group_of_set.device)[:, None] * units
    return (first + torch.arange(size, device=group_of_set.device)).reshape(groups, models * size)


def _largest(gaps: Tensor) -> float:
    return float(gaps.max()) if gaps.numel() else 0.0


def _means(*values: Tensor) -> list[float]:
    """Return the mean of each tensor, 0 if it is empty; the host waits for the device once."""
    means = [one.double().mean() if one.numel() else one.new_zeros((), dtype=torch.float64) for one in values]
    result: list[float] = torch.stack(means).tolist()
    return result
