"""The interface of the MuDSC authors' program: ``WeightFusion`` and its perm dictionaries.

Source: Xu et al., "Training-Free Pretrained Model Merging", CVPR 2024, arXiv 2403.01753. Clusters are those of the
program. Where :func:`mudsc_fast.merge` differs from it, this module follows it: a merged unit is divided by the size of
its cluster + 1e-5, moments are kept in float32 and batches count by their samples, one merge inside a model is
allowed where its budget is 0, and queries are not observed. New code is better served by :func:`mudsc_fast.merge`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mudsc_fast._forward import preserve_training_mode, run_on_batch
from mudsc_fast.compat._mudsc_perm import (
    Look,
    Network,
    get_resnet_perm,
    get_resnet_perm_group,
    get_swin_perm,
    get_vit_clip_perm,
    get_vit_perm,
    read_perm,
)
from mudsc_fast.compat._zip import zip_published
from mudsc_fast.compat.zipit import CovarianceMetric, compute_correlation
from mudsc_fast.ops.assignment import linear_assignment
from mudsc_fast.ops.permute import UnitMap, permute_merge
from mudsc_fast.ops.zip import merges_inside

__all__ = [
    "WeightFusion",
    "get_resnet_perm",
    "get_resnet_perm_group",
    "get_swin_perm",
    "get_vit_clip_perm",
    "get_vit_perm",
]

_logger = logging.getLogger(__name__)

#: Sweeps in a row without progress after which the search ends, whatever `relax` says.
_PATIENCE = 5

StateDict = Mapping[str, Tensor]


class WeightFusion:
    """Merges networks under weight similarity, activation similarity or both.

    Parameters
    ----------
    reduce
        Share of the units of all models that a zip merges away. The merged network is larger than each model where that
        is less than ``1 - 1 / models``.
    a, b
        Factor on a merged cluster's similarities, and share of a model's merges that may be inside the model.
    relax
        Not used, as published: the search always ends after 5 sweeps in a row without progress.
    iter
        Most sweeps.
    use_cos
        Compare weights by cosine similarity instead of correlation.
    no_fusion
        Match units by their numbers: the plain average.
    fix_sims, fix_rate
        Whether sweeps blend the activations' similarity in, and the share of the weights' in the blend.
    use_permute
        Give each model a permutation onto the first instead of clustering.
    verbose
        Whether to log every sweep, at level INFO.

    Attributes
    ----------
    fusion_model
        The merged network, once :meth:`transform` was called.
    params
        The models' tensors, fused ones taken apart.
    """

    fusion_model: nn.Module
    params: list[dict[str, Tensor]]

    def __init__(
        self,
        reduce: float = 0.5,
        a: float = 0.5,
        b: float = 1,
        relax: int = 5,
        iter: int = 100,  # noqa: A002 - the published name
        use_cos: bool = False,
        no_fusion: bool = False,
        fix_sims: bool = False,
        fix_rate: float = 0.5,
        use_permute: bool = False,
        verbose: bool = True,
    ) -> None:
        self.reduce = reduce
        self.a = a
        self.b = b
        self.relax = relax
        self.iter = iter
        self.use_cos = use_cos
        self.no_fusion = no_fusion
        self.fix_sims = fix_sims
        self.fix_rate = fix_rate
        self.use_permute = use_permute
        self.verbose = verbose
        self._network: Network
        self._matching: dict[Hashable, _Match] = {}

    def transform(
        self,
        nets: Sequence[nn.Module],
        perm: Mapping[Any, Any],
        act_loader: Iterable[Any] | None = None,
        in_weight_space: bool = False,
        return_state_dict: bool = False,
        random_state: int = 0,
    ) -> Any:
        """Match the networks and return the merged one.

        Parameters
        ----------
        nets
            Two or more networks of one architecture, on one device. Not modified.
        perm
            Nodes, as from :func:`get_vit_perm`.
        act_loader
            Batches whose first entry is the networks' input: units are matched by their activations first.
        in_weight_space
            Whether sweeps over the weights follow; they are what there is without `act_loader`.
        return_state_dict
            Return what :meth:`apply_permute` gives for the networks with ``no_avg=True``, instead of a network.
        random_state
            Seed of the order in which sweeps visit the nodes.

        Raises
        ------
        ValueError
            If there are fewer than two networks, `perm` does not fit them, or a similarity is not finite.
        """
        if len(nets) < 2:
            raise ValueError(f"nets must hold at least two networks, got {len(nets)}")
        self._network = read_perm(perm)
        self._matching = {}
        self.params = [self._split(net.state_dict()) for net in nets]
        missing = [tensor for tensor in self._network.uses_of if tensor not in self.params[0]]
        if missing:
            raise ValueError(f"perm names tensors that the networks do not have: {', '.join(missing[:5])}")
        activations: dict[Hashable, Tensor] = {}
        if act_loader is not None:
            activations = _activation_similarities(nets, self._network, act_loader)
            for node, similarity in activations.items():
                self._matching[node] = self._match(node, similarity)
        if in_weight_space or act_loader is None:
            self._sweep(activations if self.fix_sims else {}, random_state)
        merged = self.apply_permute(self.params)
        self._join(merged)
        self.fusion_model = copy.deepcopy(nets[0])
        _resize(self.fusion_model, merged)
        self.fusion_model.load_state_dict(merged)
        return self.apply_permute(self.params, no_avg=True) if return_state_dict else self.fusion_model

    @property
    def perm_mats(self) -> dict[Hashable, tuple[Tensor, Tensor]]:
        """For each node `merge` and `unmerge`, both [models * units, clusters].

        `unmerge` has a one for every unit in its cluster's column; `merge` is that, divided by the columns' sums + 1e-5
        and times the number of models. Made anew at each look.
        """
        return {node: self._matching[node].matrices() for node in self._network.nodes}

    def apply_permute(self, params: Sequence[StateDict], no_avg: bool = False) -> dict[str, Any]:
        """Return tensors of the networks, or of others of the same architecture, re-indexed and averaged.

        Parameters
        ----------
        params
            State dicts, one for each network.
        no_avg
            Whether each re-indexed tensor is a list with one per network instead of their mean.

        Returns
        -------
        dict
            Tensors by name; those of a fused tensor are apart, under its name with a suffix. Tensors without nodes are
            averaged in either case.
        """
        split = [self._split(state) for state in params]
        merged: dict[str, Any] = {}
        for tensor, uses in self._network.uses_of.items():
            given = [state[tensor].detach() for state in split]
            # Merged where units are produced, unmerged where they are consumed.
            chosen = [(use.axis, self._matching[use.node], not use.consumes) for use in uses]
            if no_avg:
                merged[tensor] = [
                    permute_merge([one], {axis: match.map(merges, i) for axis, match, merges in chosen}, weights=[1.0])
                    for i, one in enumerate(given)
                ]
            else:
                merged[tensor] = permute_merge(given, {axis: match.map(merges) for axis, match, merges in chosen})
        for name in split[0]:
            if name not in merged:
                merged[name] = torch.stack([state[name].detach() for state in split]).sum(0) / len(split)
        return merged

    def _sweep(self, activations: Mapping[Hashable, Tensor], random_state: int) -> None:
        generator = torch.Generator().manual_seed(random_state)
        nodes = list(self._network.nodes)
        neighbours = {node: self._network.neighbours(node) for node in nodes}
        visits: dict[Hashable, tuple[dict[Hashable, _Match], _Match]] = {}
        best: dict[Hashable, _Match] | None = None
        best_value, misses = 0.0, 0
        for number in range(self.iter):
            for index in torch.randperm(len(nodes), generator=generator, device="cpu").tolist():
                node = nodes[index]
                seen = {other: self._matching[other] for other in neighbours[node] if other in self._matching}
                # Under neighbours that are matched as at its last visit, a node's weight vectors are the same.
                if node not in visits or not _same_matching(visits[node][0], seen):
                    similarity = self._weight_similarity(node)
                    if node in activations:
                        of_activations = activations[node][: len(similarity)]
                        similarity = similarity * self.fix_rate + of_activations * (1 - self.fix_rate)
                    visits[node] = (seen, self._match(node, similarity))
                self._matching[node] = visits[node][1]
            value = sum(match.value for match in self._matching.values()) / len(nodes)
            if self.verbose:
                _logger.info("sweep %d: %d without progress, mean similarity %.6f", number, misses, value)
            if best is None or value > best_value:
                best, best_value, misses = dict(self._matching), value, 0
            else:
                misses += 1
                if misses >= _PATIENCE:
                    break
                self._matching = dict(best)
        self._matching = self._matching if best is None else best

    def _weight_similarity(self, node: Hashable) -> Tensor:
        vectors: list[list[Tensor]] = [[] for _ in self.params]
        for use in self._network.nodes[node].uses:
            if not use.compared:
                continue
            others = [
                (other.axis, self._matching[other.node], other.consumes)
                for other in self._network.uses_of[use.tensor]
                if other.axis != use.axis and other.node in self._matching
            ]
            for i, state in enumerate(self.params):
                tensor = state[use.tensor].detach()
                if use.scaled:
                    tensor = tensor / (state[use.tensor.rpartition(".")[0] + ".running_var"] + 1e-7).sqrt()
                # The other way round than in the merge: what a tensor consumes is averaged, what it produces summed.
                maps = {axis: match.map(consumes, i) for axis, match, consumes in others}
                tensor = permute_merge([tensor], maps, weights=[1.0]) if maps else tensor
                vectors[i].append(tensor.movedim(use.axis, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None])
        joined = [torch.cat(of_model, dim=1) for of_model in vectors]
        joined = [one.float() if one.dtype in (torch.float16, torch.bfloat16) else one for one in joined]
        if self.use_cos:
            directions = functional.normalize(torch.cat(joined), dim=1, eps=1e-8)
            return directions @ directions.T
        if self.use_permute:
            return _correlation_with_first(joined)
        metric = CovarianceMetric()
        metric.update(1, *joined)
        return compute_correlation(metric.finalize(1))

    def _match(self, node: Hashable, similarity: Tensor) -> _Match:
        """Match a node's units by [models * units, models * units], or the first model's rows of it to permute."""
        num_models, groups = len(self.params), self._network.nodes[node].groups
        units = similarity.shape[1] // num_models
        if units % groups:
            raise ValueError(f"perm[{node!r}] has {units} units, which {groups} groups do not divide")
        if self.no_fusion:
            own = torch.arange(units, device=similarity.device).expand(num_models, units)
            return _Match(own, units, 1.0)
        if self.use_permute:
            columns, _, value = _aligned(similarity, num_models, groups)
            own = torch.arange(units, device=similarity.device)
            return _Match(torch.cat([own[None], columns.argsort(1)]), units, value)
        return self._zip(similarity, num_models, groups)

    def _zip(self, similarity: Tensor, num_models: int, groups: int) -> _Match:
        size = len(similarity) // (num_models * groups)
        remaining = groups * int(size * num_models * (1 - self.reduce) + 1e-4)
        merges = len(similarity) - remaining
        sets = None
        if groups > 1:
            _, group_of_set, _ = _aligned(similarity, num_models, groups)
            first = group_of_set.T * size + torch.arange(num_models, device=similarity.device) * groups * size
            sets = list((first[..., None] + torch.arange(size, device=similarity.device)).flatten(1))
        zipped = zip_published(
            similarity,
            num_models,
            remaining,
            merges_inside(merges, num_models, self.b),
            self.a,
            sets=sets,
            group_budget=merges // (num_models * groups),
        )
        return _Match(zipped.cluster_of_unit.view(num_models, -1), zipped.num_clusters, zipped.value)

    def _split(self, state: StateDict) -> dict[str, Tensor]:
        """Return a state dict with fused tensors' parts beside them."""
        parts = dict(state)
        for axis, tensor, suffixes in self._network.splits:
            if tensor not in parts:
                continue
            if parts[tensor].shape[axis] % len(suffixes):
                raise ValueError(
                    f"axis {axis} of {tensor!r} must be a multiple of {len(suffixes)}, got {parts[tensor].shape[axis]}"
                )
            chunks = parts[tensor].chunk(len(suffixes), dim=axis)
            parts.update({f"{tensor}_{suffix}": chunk for suffix, chunk in zip(suffixes, chunks, strict=True)})
        return parts

    def _join(self, state: dict[str, Tensor]) -> None:
        """Put fused tensors together of their parts, which are removed."""
        for axis, tensor, suffixes in self._network.splits:
            state[tensor] = torch.cat([state.pop(f"{tensor}_{suffix}") for suffix in suffixes], dim=axis)


@dataclass(frozen=True, eq=False)
class _Match:
    """The cluster of every unit [models, units], the number of clusters, and the mean similarity of what is matched."""

    cluster_of_unit: Tensor
    num_clusters: int
    value: float

    def map(self, merges: bool, model: int | None = None) -> UnitMap:
        """Return how an axis is re-indexed by `merge` or `unmerge`: of all models, or of one."""
        chosen = self.cluster_of_unit if model is None else self.cluster_of_unit[model : model + 1]
        return UnitMap.clusters(chosen, self.num_clusters, self._scale() if merges else None)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return `merge` and `unmerge`."""
        unmerge = functional.one_hot(self.cluster_of_unit.flatten(), self.num_clusters).float()
        return unmerge * self._scale(), unmerge

    def _scale(self) -> Tensor:
        sizes = torch.bincount(self.cluster_of_unit.flatten(), minlength=self.num_clusters)
        return len(self.cluster_of_unit) / (sizes.float() + 1e-5)


def _same_matching(first: Mapping[Hashable, _Match], second: Mapping[Hashable, _Match]) -> bool:
    return first.keys() == second.keys() and all(
        match is second[node]
        or (
            match.num_clusters == second[node].num_clusters
            and torch.equal(match.cluster_of_unit, second[node].cluster_of_unit)
        )
        for node, match in first.items()
    )


def _correlation_with_first(vectors: Sequence[Tensor]) -> Tensor:
    """Return [units, models * units]: the correlation of the first model's weight vectors with all models'."""
    rows = torch.nan_to_num(torch.cat(list(vectors)), 0, 0, 0)
    first, mean = rows[: len(vectors[0])], rows.mean(1)
    deviation = (rows.square().mean(1) - mean.square()).clamp(min=0).sqrt()
    covariance = torch.addr(first @ rows.T / rows.shape[1], mean[: len(first)], mean, alpha=-1)
    return covariance / torch.outer(deviation[: len(first)], deviation).clamp(min=1e-7)


def _aligned(similarity: Tensor, num_models: int, groups: int) -> tuple[Tensor, Tensor, float]:
    """Return the units [models - 1, units] and groups [models, groups] matched with the first model's, and the value.

    Of every pair of groups the units are assigned first; their mean similarities are what groups are assigned by.
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


def _activation_similarities(
    nets: Sequence[nn.Module], network: Network, batches: Iterable[Any]
) -> dict[Hashable, Tensor]:
    unseen = [node for node, described in network.nodes.items() if not described.looks]
    if unseen:
        raise ValueError(f"perm[{unseen[0]!r}] must say where its activations are seen: by an axis with 'in'")
    device = next(iter(nets[0].state_dict().values())).device
    metrics = {node: CovarianceMetric() for node in network.nodes}
    seen: list[dict[tuple[Hashable, int], Tensor]] = [{} for _ in nets]
    samples = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for net, features in zip(nets, seen, strict=True):
            stack.enter_context(preserve_training_mode(net))
            net.eval()
            for node, described in network.nodes.items():
                for index, look in enumerate(described.looks):
                    stack.callback(_observe(net, look, features, (node, index)))
        for batch in batches:
            for net in nets:
                run_on_batch(net, batch, device, None)
            for node, metric in metrics.items():
                looks = range(len(network.nodes[node].looks))
                stacked = [torch.stack([features[node, i].float() for i in looks], -1) for features in seen]
                count = len(stacked[0])
                metric.update(count, *(values.transpose(0, 1).flatten(1) for values in stacked))
            samples += count
    if samples == 0:
        raise ValueError("act_loader must yield at least one batch, got none")
    return {node: compute_correlation(metric.finalize(samples)) for node, metric in metrics.items()}


def _observe(
    net: nn.Module, look: Look, features: dict[tuple[Hashable, int], Tensor], key: tuple[Hashable, int]
) -> Callable[[], None]:
    """Have what a module takes or gives put into `features`, units on axis 1; return what ends that."""
    try:
        module = net.get_submodule(look.module)
    except AttributeError:
        raise ValueError(f"perm[{key[0]!r}] is observed at {look.module!r}, which the networks do not have") from None

    def keep(values: Tensor) -> None:
        features[key] = values.movedim(look.axis, 1) if look.reshape is None else look.reshape(values)

    if look.hook == "pre":
        return module.register_forward_pre_hook(lambda _module, inputs: keep(inputs[0])).remove
    return module.register_forward_hook(lambda _module, _inputs, output: keep(output)).remove


def _resize(model: nn.Module, state: StateDict) -> None:
    """Give a network's tensors the shapes of those in `state`, and its layers the sizes that go with them."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in state.items():
        if own[name].shape == tensor.shape:
            continue
        own[name].data = own[name].new_empty(tensor.shape)
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        if kind != "weight":
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = tensor.shape
        elif isinstance(module, nn.modules.conv._ConvNd):
            module.out_channels, module.in_channels = tensor.shape[0], tensor.shape[1] * module.groups
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(tensor.shape)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = len(tensor)
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = len(tensor)
        else:
            raise ValueError(f"reduce changes the size of {name!r}, a {type(module).__name__}, which is not supported")
