"""Similarity of units in weight space.

A unit's vector is the concatenation, over every axis of its node, of that tensor's slice at the unit, after the
tensor's other axes have been re-indexed by the current matching of their nodes (Xu et al., "Training-Free Pretrained
Model Merging", CVPR 2024, section 3). The similarity of two units is the Pearson correlation of their vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.matching.apply import reindex, split_axes
from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.matching.slices import TensorSlice, tensor_slices
from mudsc_fast.ops.correlation import Blocks, CorrelationAccumulator, Precision, Workspace
from mudsc_fast.ops.permute import UnitMap
from mudsc_fast.spec.axes import Axis, Role, Segment
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: The first of some adjacent units of model 0, and the one after the last: rows of the similarity.
Rows = tuple[int, int]

#: Slices with fewer samples (of biases and norms) are concatenated before they are multiplied.
_MIN_SAMPLES = 512
#: Sums kept between visits use at most this multiple of the memory of the largest node's sums.
_MAX_KEPT = 4
#: Replacing a sample takes this many times as long as adding one: where units are reordered, and where clusters change.
_REORDER_WORK, _REPLACE_WORK = 1.4, 3.2


class WeightSimilarity:
    """Computes the weight similarity of a node under the current matching of its neighbors.

    The sums of a node are kept where memory allows. The next visit updates them incrementally: only the slices of those
    neighboring units whose matching has changed are replaced.

    Parameters
    ----------
    state_dicts
        The models' tensors by name.
    spec
        The axes map.
    blocks
        Which similarity blocks to compute, as for :class:`mudsc_fast.ops.CorrelationAccumulator`.
    model_weights
        The weights with which the models will be averaged.
    precision
        Of the products, as for :class:`mudsc_fast.ops.CorrelationAccumulator`.
    keep
        Whether to keep sums at all.
    own
        For each node the slices of tensors to compare, of :func:`tensor_slices`; all by default. Of several processes
        each has some.
    device
        Where to compute: tensors on other devices are moved there when they are needed. By default where the first
        tensor is.
    """

    def __init__(
        self,
        state_dicts: Sequence[Mapping[str, Tensor]],
        spec: PermutationSpec,
        blocks: Blocks,
        model_weights: Sequence[float],
        *,
        precision: Precision = "float32",
        keep: bool = True,
        own: Mapping[str, Sequence[TensorSlice]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._state_dicts = state_dicts
        self._spec = spec
        self._blocks = blocks
        self._precision: Precision = precision
        self._model_weights = model_weights
        self._units = spec.units(state_dicts[0])
        self._tensor_slices = tensor_slices(spec, state_dicts[0]) if own is None else own
        self.device = next(iter(state_dicts[0].values())).device if device is None else device
        self._kept: dict[str, _Kept] = {}
        self._keepable = nodes_to_keep(self._units) if keep else frozenset()

    def __call__(
        self, node: str, matching: Mapping[str, NodeMatching], other: Tensor | None = None, balance: float = 1.0
    ) -> Tensor:
        """Return the similarity blocks of a node; nodes without a matching are taken in their own order.

        If another similarity is given, e.g. that of activations, return ``balance * weight + (1 - balance) * other``.
        """
        return self.sums(node, matching).finalize(other=other, balance=balance)

    def sums(self, node: str, matching: Mapping[str, NodeMatching]) -> CorrelationAccumulator:
        """Return the sums that a node's similarity is computed from; do not modify them."""
        around = self._around(node, matching)
        kept = self._kept.get(node)
        update = None if kept is None else self._update(kept.around, around, self._tensor_slices[node])
        if update is not None:
            return self.updated(node, update)
        sums = self._computed(node, self._tensor_slices[node], around)
        self.keep(node, matching, sums)
        return sums

    def sums_of(
        self,
        node: str,
        matching: Mapping[str, NodeMatching],
        slices: Sequence[TensorSlice],
        rows: Rows | None = None,
    ) -> CorrelationAccumulator:
        """Return the sums over some slices of tensors, or some rows of these sums."""
        return self._computed(node, slices, self._around(node, matching), rows)

    def keep(self, node: str, matching: Mapping[str, NodeMatching], sums: CorrelationAccumulator) -> None:
        """Keep the sums of a node under the current matching of its neighbors, if memory allows."""
        if node in self._keepable:
            self._kept[node] = _Kept(sums, self._around(node, matching))

    def _around(self, node: str, matching: Mapping[str, NodeMatching]) -> dict[str, NodeMatching | None]:
        return {neighbor: matching.get(neighbor) for neighbor in self._spec.neighbors(node)}

    def _computed(
        self,
        node: str,
        slices: Sequence[TensorSlice],
        around: Mapping[str, NodeMatching | None],
        rows: Rows | None = None,
    ) -> CorrelationAccumulator:
        sums = self._no_sums(node)
        short: list[list[Tensor]] = []
        if rows is not None and rows[0] == rows[1]:
            return sums
        with sums.computing_in(Workspace()), sums._only_rows(rows):
            for part in slices:
                if part.samples >= _MIN_SAMPLES:
                    self._add(sums, part, around)
                else:
                    features = self._features(part, around)
                    short.append([feature.movedim(part.position + 1, 0).flatten(1) for feature in features])
            if short:
                sums.update(*(torch.cat(features, 1) for features in zip(*short, strict=True)), channel_axis=0)
        return sums

    def _no_sums(self, node: str) -> CorrelationAccumulator:
        return CorrelationAccumulator(
            len(self._state_dicts),
            self._units[node],
            blocks=self._blocks,
            device=self.device,
            precision=self._precision,
        )

    def _features(self, part: TensorSlice, around: Mapping[str, NodeMatching | None]) -> list[Tensor]:
        """Return the slices of all models."""
        chosen = self._chosen(part, around)
        return [self._slices(model, part, around, chosen) for model in range(len(self._state_dicts))]

    def _chosen(self, part: TensorSlice, around: Mapping[str, NodeMatching | None]) -> _Selection | None:
        """Return the merged units of a neighbor that a part is restricted to."""
        if part.chosen is None:
            return None
        position, begin, end = part.chosen
        axis = part.layout[position]
        assert axis is not None  # axes without a node are restricted by windows instead
        merged = torch.arange(begin, end, device="cpu")
        matched = around[axis.node]
        if matched is not None:
            merged = merged.to(matched.cluster_of_unit.device)
        return _selection(axis.node, matched, len(self._state_dicts), self._units[axis.node], merged)

    def _add(self, sums: CorrelationAccumulator, part: TensorSlice, around: Mapping[str, NodeMatching | None]) -> None:
        """Add the node's features in one part: those of :meth:`_slices`, re-indexed during summation."""
        if part.chosen is not None:
            sums.update(*self._features(part, around), channel_axis=part.position + 1)
            return
        maps = {axis: self._whole_map(axis, around[axis.node]) for axis in part.layout if axis is not None}
        views, channel_axis, by_axis = self._views(part, maps)
        sums.update(*views, channel_axis=channel_axis, maps=by_axis)

    def _views(
        self, part: TensorSlice, maps: Mapping[Axis, UnitMap | None]
    ) -> tuple[list[Tensor], int, dict[int, UnitMap]]:
        """Return a part of each model's tensor with every node on an axis of its own, the node's axis, and the maps."""
        windows = [self._window(model, part) for model in range(len(self._state_dicts))]
        split = split_axes(windows[0].shape, [(Segment(axis),) for axis in part.layout], maps.get)
        at = sum(split.factors[: part.position])
        shape = [*split.shape[:at], *part.split, *split.shape[at + 1 :]]
        by_axis = {axis if axis < at else axis + 2: unit_map for axis, unit_map in split.maps.items()}
        return [window.reshape(shape) for window in windows], at + 1, by_axis

    def _window(self, model: int, part: TensorSlice) -> Tensor:
        """Return the selected part of a model's tensor."""
        tensor = self._state_dicts[model][part.tensor].detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        for position, start, width in part.windows:
            tensor = tensor.narrow(position, start, width)
        return tensor.to(self.device)

    def update_of(
        self,
        node: str,
        before: Mapping[str, NodeMatching],
        now: Mapping[str, NodeMatching],
        slices: Sequence[TensorSlice],
    ) -> Update | None:
        """Return the update of the sums over some slices, as it is if they were kept; None if they are recomputed."""
        if node not in self._keepable:
            return None
        return self._update(self._around(node, before), self._around(node, now), slices)

    @property
    def divides_rows(self) -> bool:
        """Whether several processes can compute some rows of a node's sums each."""
        return self._blocks == "cross" and self.device.type == "cpu"

    def updated(self, node: str, update: Update, rows: Rows | None = None) -> CorrelationAccumulator:
        """Return the kept sums of a node after a part of their update. Other processes compute the other parts."""
        kept = self._kept[node]
        self._replace(kept.sums, update, rows)
        kept.around = update.now
        return kept.sums

    def kept_mean(self, node: str) -> Tensor:
        """Return the mean of each unit in the kept sums of a node: [models, units] float64."""
        return self._kept[node].sums._moments.mean

    def empty_mean(self, node: str) -> Tensor:
        """Return a tensor like :meth:`kept_mean`, of any values."""
        shape = (len(self._state_dicts), self._units[node])
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def difference(
        self, node: str, update: Update, mean: Tensor | None = None, rows: Rows | None = None
    ) -> CorrelationAccumulator:
        """Return what a part of an update adds to the co-moments of sums that another process keeps.

        The update must be divisible: means and variances then stay.

        Parameters
        ----------
        node, update
            The node, and the part of its update.
        mean
            The :meth:`kept_mean` of that process. It does not matter if the update is whole.
        rows
            The rows to compute; all by default.
        """
        sums = self._no_sums(node)
        if mean is not None:
            sums._moments.mean.copy_(mean)
        sums._moments.num_samples = sum(part.samples for part, _ in update.exchanged)
        self._replace(sums, update, rows)
        return sums

    def _changes(
        self, before: Mapping[str, NodeMatching | None], now: Mapping[str, NodeMatching | None]
    ) -> dict[str, _Change]:
        changes = {}
        for other, matched in now.items():
            change = _change(other, before[other], matched, len(self._state_dicts), self._units[other])
            if change is not None:
                changes[other] = change
        return changes

    def _update(
        self,
        before: Mapping[str, NodeMatching | None],
        now: Mapping[str, NodeMatching | None],
        slices: Sequence[TensorSlice],
    ) -> Update | None:
        """Return the update of sums over some slices; None if recomputing them is as cheap."""
        changes = self._changes(before, now)
        exchanged = []
        for part in slices:
            changed = [other for other in part.others if other in changes]
            if len(changed) > 1 or (changed and part.chosen is not None):
                return None
            if changed:
                exchanged.append((part, changes[changed[0]]))
        update = Update(before, now, exchanged)
        return None if exchanged and update.work >= sum(part.samples for part in slices) else update

    def _replace(self, sums: CorrelationAccumulator, update: Update, rows: Rows | None = None) -> None:
        """Replace the samples of an update, in some rows of the sums."""
        if rows is not None and rows[0] == rows[1]:
            return
        models = range(len(self._state_dicts))
        with sums.computing_in(Workspace()), sums._only_rows(rows):
            for part, change in update.exchanged:
                if change.reordered and len(part.others) == 1:
                    self._reorder(sums, part, change)
                    continue
                old = [self._slices(model, part, update.before, change.old) for model in models]
                new = [self._slices(model, part, update.now, change.new) for model in models]
                if change.reordered:
                    new[0] = old[0]  # alignments keep the first model's order
                sums.replace(old, new, channel_axis=part.position + 1, reordered=change.reordered)

    def _reorder(self, sums: CorrelationAccumulator, part: TensorSlice, change: _Change) -> None:
        """Replace samples of a part whose only other node is reordered."""
        axis = next(axis for axis in part.layout if axis is not None)
        old, new = change.old.members, [change.old.members[0], *change.new.members[1:]]
        unit_map = UnitMap.permutation(torch.stack(list(old)), units_in=self._units[axis.node])
        views, channel_axis, by_axis = self._views(part, {axis: unit_map})
        sums._reorder(*views, axis=next(iter(by_axis)), old=old, new=new, channel_axis=channel_axis)

    def _slices(
        self,
        model: int,
        part: TensorSlice,
        around: Mapping[str, NodeMatching | None],
        only: _Selection | None = None,
    ) -> Tensor:
        """Return one model's slices of a node, with all other axes in the order of the merged network.

        Axes that the tensor consumes are averaged over a cluster's members, and axes that it produces are summed: the
        published vectors use the two matrices of a cluster the other way round than the merge does. `only` restricts
        one neighbor to the merged units that it selects.
        """
        tensor = self._window(model, part)
        if only is not None and only.cluster_of_member is not None:
            tensor = only.of(model, tensor, part.layout)

        maps = {axis: self._map_of(model, axis, around[axis.node], only) for axis in part.layout if axis is not None}
        if any(unit_map is not None for unit_map in maps.values()):
            tensor = reindex([tensor], [(Segment(axis),) for axis in part.layout], maps.__getitem__, [1.0])
        return tensor.unflatten(part.position, part.split)  # type: ignore[no-any-return]

    def _map_of(self, model: int, axis: Axis, matched: NodeMatching | None, only: _Selection | None) -> UnitMap | None:
        """Return the map from one model's units on an axis to the (selected) merged units; None if they stay."""
        selected = only if only is not None and axis.node == only.node else None
        if selected is not None and selected.cluster_of_member is None:
            return UnitMap.permutation(selected.members[model][None], units_in=self._units[axis.node])
        whole = self._whole_map(axis, matched, model)
        return whole if selected is None or whole is None else selected.map_of_members(model, whole)

    def _whole_map(self, axis: Axis, matched: NodeMatching | None, model: int | None = None) -> UnitMap | None:
        """Return the map from all units on an axis, of one model or all, to the merged units; None if they stay."""
        if matched is None:
            return None
        opposite: Role = "produce" if axis.role == "consume" else "consume"
        return matched.unit_map(opposite, self._model_weights, model)


@dataclass
class _Kept:
    """A node's sums, and the matchings of its neighbors that they were computed with."""

    sums: CorrelationAccumulator
    around: Mapping[str, NodeMatching | None]


def nodes_to_keep(units: Mapping[str, int]) -> frozenset[str]:
    """Return the nodes whose sums are kept between visits, given the number of units of every node.

    The choice does not depend on the order of visits, so that any number of processes computes the same.
    """
    room = _MAX_KEPT * max(count**2 for count in units.values())
    kept = set()
    for node, count in units.items():
        if count**2 <= room:
            kept.add(node)
            room -= count**2
    return frozenset(kept)


@dataclass(frozen=True)
class Update:
    """How the sums of a node change when the matchings of its neighbors do.

    Attributes
    ----------
    before, now
        The matchings of the neighbors.
    exchanged
        The slices of which samples are replaced, and which samples.
    """

    before: Mapping[str, NodeMatching | None]
    now: Mapping[str, NodeMatching | None]
    exchanged: Sequence[tuple[TensorSlice, _Change]]

    @property
    def work(self) -> float:
        """How many samples take as long to add as these take to replace."""
        return sum(
            part.samples * change.share * (_REORDER_WORK if change.reordered else _REPLACE_WORK)
            for part, change in self.exchanged
        )

    @property
    def is_divisible(self) -> bool:
        """Whether several processes can each compute a part: the units of every model are only reordered."""
        return all(change.reordered for _, change in self.exchanged)

    def part(self, ranges: Sequence[tuple[float, float]]) -> Update:
        """Return the share of a divisible update in some ranges, whose ends are in [0, 1]."""
        total = sum(part.samples * change.share for part, change in self.exchanged)
        exchanged = []
        for begin, end in ranges:
            before = 0.0
            for part, change in self.exchanged:
                samples = part.samples * change.share
                first, last = (min(max((place * total - before) / samples, 0.0), 1.0) for place in (begin, end))
                before += samples
                found = change.part(first, last)
                if found is not None:
                    exchanged.append((part, found))
        return Update(self.before, self.now, exchanged)


@dataclass(frozen=True)
class _Selection:
    """Some merged units of a node, and the units of each model that they are made of.

    Attributes
    ----------
    node
        The node's name.
    members
        For each model, the units.
    merged
        The selected merged units.
    cluster_of_member
        For each model, the position in `merged` of every member's cluster. None if the members are the merged units.
    """

    node: str
    members: Sequence[Tensor]
    merged: Tensor
    cluster_of_member: Sequence[Tensor] | None

    def of(self, model: int, tensor: Tensor, layout: Sequence[Axis | None]) -> Tensor:
        """Return the members' part of a model's tensor."""
        for position, axis in enumerate(layout):
            if axis is not None and axis.node == self.node:
                split = tensor.unflatten(position, (axis.outer, -1, axis.inner))
                chosen = split.index_select(position + 1, self.members[model])
                tensor = chosen.flatten(position, position + 2)
        return tensor

    def units(self, first: int, last: int) -> _Selection:
        """Return some of the merged units, where each has one member of each model."""
        return _Selection(self.node, [chosen[first:last] for chosen in self.members], self.merged[first:last], None)

    def map_of_members(self, model: int, whole: UnitMap) -> UnitMap:
        """Return how the members of :meth:`of` become the selected clusters; `whole` is the map of all units."""
        assert self.cluster_of_member is not None  # only clusters have members
        scale = None if whole.scale is None else whole.scale[self.merged]
        return UnitMap.clusters(self.cluster_of_member[model][None], len(self.merged), scale)


@dataclass(frozen=True)
class _Change:
    """The merged units of a node that changed, before and after.

    Attributes
    ----------
    share
        Their share of all merged units.
    reordered
        Whether each model has the same units in another order, and the first model in the same order.
    """

    old: _Selection
    new: _Selection
    share: float
    reordered: bool

    def part(self, begin: float, end: float) -> _Change | None:
        """Return the change of the units from `begin` to `end`, both in [0, 1], of a reordering; None if of no unit."""
        count = len(self.old.merged)
        first, last = round(begin * count), round(end * count)
        if first == last:
            return None
        return _Change(
            self.old.units(first, last), self.new.units(first, last), self.share * (last - first) / count, True
        )


def _change(
    node: str, old: NodeMatching | None, new: NodeMatching | None, num_models: int, units: int
) -> _Change | None:
    """Return what changed between two matchings of a node, None if nothing did."""
    if old is new:
        return None
    modes = {matching.mode for matching in (old, new) if matching is not None}
    if "zip" not in modes:
        orders = [_order(matching, num_models, units) for matching in (old, new)]
        changed = [(orders[0] != orders[1]).any(0).nonzero().squeeze(1)] * 2
    elif old is not None and new is not None:
        changed = _changed_clusters(old, new)
    else:
        changed = [torch.arange(units, device="cpu")] * 2
    if len(changed[0]) == 0:
        return None
    return _Change(
        old=_selection(node, old, num_models, units, changed[0]),
        new=_selection(node, new, num_models, units, changed[1]),
        share=len(changed[0]) / units,
        reordered="zip" not in modes,
    )


def _order(matching: NodeMatching | None, num_models: int, units: int) -> Tensor:
    """Return [models, units]: the unit of each model that each merged unit consists of."""
    permutations = None if matching is None else matching.permutations
    return torch.arange(units, device="cpu").expand(num_models, units) if permutations is None else permutations


def _changed_clusters(old: NodeMatching, new: NodeMatching) -> list[Tensor]:
    """Return for each of two matchings the clusters that the other one lacks, regardless of their numbers."""
    first, size = zip(*(_first_and_size(matching) for matching in (old, new)), strict=True)
    # A cluster whose members all share their first member and their number in the other matching is a cluster there.
    moved = (first[0] != first[1]) | (size[0] != size[1])
    changed = []
    for matching in (old, new):
        counts = torch.zeros(matching.num_clusters, dtype=torch.int64, device=moved.device)
        counts.index_add_(0, matching.cluster_of_unit.flatten(), moved.to(torch.int64))
        changed.append(counts.nonzero().squeeze(1))
    return changed


def _first_and_size(matching: NodeMatching) -> tuple[Tensor, Tensor]:
    """Return for every unit of all models the first unit of its cluster and the size of the cluster."""
    clusters = matching.cluster_of_unit.flatten()
    units = torch.arange(len(clusters), device=clusters.device)
    first = units.new_full((matching.num_clusters,), len(clusters)).scatter_reduce_(0, clusters, units, "amin")
    # Not bincount, which waits for the device to learn the length of its result.
    sizes = clusters.new_zeros(matching.num_clusters).index_add_(0, clusters, torch.ones_like(clusters))
    return first[clusters], sizes[clusters]


def _selection(node: str, matching: NodeMatching | None, num_models: int, units: int, merged: Tensor) -> _Selection:
    if matching is None or matching.mode == "align":
        return _Selection(node, list(_order(matching, num_models, units)[:, merged]), merged, None)
    place = torch.full((matching.num_clusters,), -1, dtype=torch.int64, device=merged.device)
    place[merged] = torch.arange(len(merged), device=merged.device)
    places = [place[clusters] for clusters in matching.cluster_of_unit]
    members = [(chosen >= 0).nonzero().squeeze(1) for chosen in places]
    return _Selection(node, members, merged, [chosen[units] for chosen, units in zip(places, members, strict=True)])
