"""What the units of a merged network should compute, given what the networks it was made of compute."""

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
    """Which outputs of a merged layer the outputs of each network become part of.

    Attributes
    ----------
    members
        For each network [outputs] int64: the merged output of each of its outputs; None for networks without a say.
    num_outputs
        Number of outputs of the merged layer.
    """

    members: Sequence[Tensor | None]
    num_outputs: int

    def mean(self, outputs: Sequence[Tensor | None], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return [outputs, samples], the target, and [outputs], whether an output has one.

        The target is the mean over the networks, by their shares, of the mean over the output's members in each. A
        network without members of an output has no share in it. Where all networks with members have share 0, they
        count alike.

        Parameters
        ----------
        outputs
            For each network [outputs, samples]; None where the target does not depend on it.
        shares
            One number per network, 0 or more.
        """
        first = next(one for one in outputs if one is not None)
        counts = first.new_zeros(len(outputs), self.num_outputs, dtype=torch.float64)
        for index, members in enumerate(self.members):
            if members is not None:
                counts[index] = torch.bincount(members.to(first.device), minlength=self.num_outputs)
        present = (counts > 0).double()
        weights = present * torch.tensor(shares, dtype=torch.float64, device=first.device)[:, None]
        weights = torch.where(weights.sum(0) > 0, weights, present)
        weights = weights / weights.sum(0).clamp(min=1e-300) / counts.clamp(min=1)
        target = first.new_zeros(self.num_outputs, first.shape[1])
        for index, (members, values) in enumerate(zip(self.members, outputs, strict=True)):
            if members is not None and values is not None:
                own = members.to(first.device)
                factors = weights[index][own].to(first.dtype)[:, None]
                target.index_add_(0, own, values.to(first.device) * factors)
        return target, present.any(0)

    def needs(self, shares: Sequence[float]) -> list[bool]:
        """Return which networks' outputs the target depends on."""
        needed = [share > 0 for share in shares]
        covered = torch.zeros(self.num_outputs, dtype=torch.bool)
        for members, share in zip(self.members, shares, strict=True):
            if members is not None and share > 0:
                covered[members.cpu()] = True
        return [
            members is not None and (need or not bool(covered[members.cpu()].all()))
            for members, need in zip(self.members, needed, strict=True)
        ]


def shared_entries(
    spec: PermutationSpec, matching: Mapping[str, NodeMatching], tensor: str, axis: int, length: int, model: int
) -> Tensor:
    """Return [length] int64: the entry of a merged tensor's axis that each entry of a model's becomes part of."""

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
    """Return [length] int64: as :func:`shared_entries`, of a tensor that each task keeps for itself.

    Its axes follow the nodes that the shared tensors have. Those of other nodes keep their order, but for groups that
    are tied to groups of a shared node.
    """
    partner = {n: other for bundle in spec.bundles for n in bundle for other in bundle if other in merged_nodes}

    def units_of(segment: Segment) -> tuple[Tensor, int] | None:
        assert segment.axis is not None  # of every segment that is asked about
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
