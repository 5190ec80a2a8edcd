"""Targets of a merged network's units in terms of the units of the networks that were merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.spec.axes import Segment
from mudsc_fast.spec.permutation_spec import PermutationSpec


@dataclass(frozen=True)
class UnitTargets:
    """Which output of a merged layer each output of the networks' layers belongs to.

    Attributes
    ----------
    members
        For each network [its outputs] int64, on the CPU: the merged output that each of its outputs belongs to. None
        for networks that do not contribute.
    num_outputs
        Number of outputs of the merged layer.
    """

    members: Sequence[Tensor | None]
    num_outputs: int

    def weights(self, shares: Sequence[float]) -> list[Tensor | None]:
        """Return for each network [its outputs] float64: the weight of each output in the target it belongs to.

        The target is the weighted mean over the networks, by their shares, of the mean over the members in each
        network. Networks without a member are left out, and the remaining shares are normalized. If all of these are 0,
        the networks have equal shares. None stands for networks that no target depends on.

        Parameters
        ----------
        shares
            One number per network, 0 or more.
        """
        counts = torch.zeros(len(self.members), self.num_outputs, dtype=torch.float64)
        for index, members in enumerate(self.members):
            if members is not None:
                counts[index] = torch.bincount(members, minlength=self.num_outputs)
        present = (counts > 0).double()
        by_output = present * torch.tensor(shares, dtype=torch.float64)[:, None]
        by_output = torch.where(by_output.sum(0) > 0, by_output, present)
        by_output = by_output / by_output.sum(0).clamp(min=1e-300) / counts.clamp(min=1)
        return [
            None if members is None or not bool(by_output[index].any()) else by_output[index][members]
            for index, members in enumerate(self.members)
        ]

    def has_target(self) -> Tensor:
        """Return [outputs] bool: whether any network has an output that belongs to it."""
        found = torch.zeros(self.num_outputs, dtype=torch.bool)
        for members in self.members:
            if members is not None:
                found[members] = True
        return found


def shared_entries(
    spec: PermutationSpec, matching: Mapping[str, NodeMatching], tensor: str, axis: int, length: int, model: int
) -> Tensor:
    """Return [length] int64: the entry of a merged tensor's axis that each entry of a model's axis belongs to."""

    def units_of(segment: Segment) -> tuple[Tensor, int] | None:
        found = matching.get(segment.axis.node) if segment.axis is not None else None
        return None if found is None else (found.cluster_of_unit[model].cpu(), found.num_clusters)

    return _entries(spec, tensor, axis, length, units_of)


def task_entries(
    spec: PermutationSpec,
    matching: Mapping[str, NodeMatching],
    merged_nodes: frozenset[str],
    tensor: str,
    axis: int,
    length: int,
    model: int,
) -> Tensor:
    """Return [length] int64: like :func:`shared_entries`, for a tensor that each task keeps.

    Axes of nodes that the shared tensors have are merged. Axes of other nodes keep their order, except for groups that
    are tied to groups of a shared node.
    """
    partner = {n: other for bundle in spec.bundles for n in bundle for other in bundle if other in merged_nodes}

    def units_of(segment: Segment) -> tuple[Tensor, int] | None:
        assert segment.axis is not None  # segments without a node are not asked about
        node = segment.axis.node
        if node in merged_nodes:
            return matching[node].cluster_of_unit[model].cpu(), matching[node].num_clusters
        if node not in partner:
            return None
        width = length if segment.width is None else segment.width
        units = width // (segment.axis.inner * segment.axis.outer)
        order = matching[partner[node]].group_order(spec.groups(node).count, model).cpu()
        permutation = torch.arange(units).view(len(order), -1)[order].flatten()
        return torch.argsort(permutation), units

    return _entries(spec, tensor, axis, length, units_of)


def _entries(
    spec: PermutationSpec, tensor: str, axis: int, length: int, units_of: Callable[[Segment], tuple[Tensor, int] | None]
) -> Tensor:
    layout = spec.layouts.get(tensor, ())
    segments = layout[axis] if axis < len(layout) else (Segment(None),)
    parts, begin = [], 0
    for segment in segments:
        width = length if segment.width is None else segment.width
        found = None if segment.axis is None else units_of(segment)
        if found is None or segment.axis is None:
            parts.append(begin + torch.arange(width))
            begin += width
            continue
        clusters, num_clusters = found
        outer, inner = segment.axis.outer, segment.axis.inner
        repeats = torch.arange(outer)[:, None, None] * (num_clusters * inner)
        parts.append(begin + (repeats + clusters[None, :, None] * inner + torch.arange(inner)).flatten())
        begin += outer * num_clusters * inner
    return torch.cat(parts)
