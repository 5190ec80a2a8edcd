"""Matching the units of one node, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mudsc_fast.ops.assignment import linear_assignment
from mudsc_fast.ops.correlation import Blocks
from mudsc_fast.ops.permute import UnitMap
from mudsc_fast.ops.zip import zip_units
from mudsc_fast.spec.axes import Role

Mode = Literal["align", "zip"]

#: The similarity blocks that a mode reads: model 0 with every other model, or all with all.
BLOCKS_OF_MODE: dict[Mode, Blocks] = {"align": "cross", "zip": "full"}


@dataclass(frozen=True)
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
    """

    mode: Mode
    cluster_of_unit: Tensor
    num_clusters: int
    similarity_before: float
    similarity: float

    @property
    def permutations(self) -> Tensor | None:
        """[models, units] int64 if the units were aligned: unit k of the result is unit ``permutations[i, k]``."""
        return None if self.mode == "zip" else torch.argsort(self.cluster_of_unit, dim=1)

    def same_clusters(self, other: NodeMatching) -> bool:
        """Return whether both say the same of every unit."""
        return self.num_clusters == other.num_clusters and torch.equal(self.cluster_of_unit, other.cluster_of_unit)

    def unit_map(self, role: Role, model_weights: Sequence[float], model: int | None = None) -> UnitMap:
        """Return how an axis is re-indexed: for all models together, or for one of them.

        Where units are produced a cluster is the weighted mean of its members, where they are consumed their sum;
        merged with weights w_i, a consumer then sees what it saw before. For equal weights the scale is
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


#: Matches the units of a node by their similarity blocks.
Matcher = Callable[[Tensor], NodeMatching]


def align_units(blocks: Tensor) -> NodeMatching:
    """Give every model but the first the permutation that maximises its summed similarity with the first.

    Parameters
    ----------
    blocks
        [models - 1, units, units]: similarity of model 0's units (rows) with another model's (columns).
    """
    columns = linear_assignment(blocks).columns
    units = blocks.shape[1]
    order = torch.arange(units, device=columns.device)
    cluster_of_unit = torch.cat([order[None], torch.argsort(columns, dim=1)])
    matched = blocks.gather(2, columns[..., None])
    return NodeMatching(
        mode="align",
        cluster_of_unit=cluster_of_unit,
        num_clusters=units,
        similarity_before=_mean(blocks.diagonal(dim1=1, dim2=2)),
        similarity=_mean(matched),
    )


def zip_all_units(similarity: Tensor, num_models: int, *, shrink: float = 0.5, budget: float = 1.0) -> NodeMatching:
    """Cluster the units of all models greedily, down to the number of units that each model has.

    Parameters
    ----------
    similarity
        [models * units, models * units].
    num_models, shrink, budget
        As in :func:`mudsc_fast.ops.zip_units`.
    """
    zipped = zip_units(similarity, num_models, shrink=shrink, budget=budget)
    units = similarity.shape[0] // num_models
    with_first = [similarity[:units, i * units : (i + 1) * units].diagonal() for i in range(1, num_models)]
    return NodeMatching(
        mode="zip",
        cluster_of_unit=zipped.cluster_of_unit.view(num_models, units),
        num_clusters=len(zipped.sizes),
        similarity_before=_mean(torch.stack(with_first)),
        similarity=zipped.value,
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0
