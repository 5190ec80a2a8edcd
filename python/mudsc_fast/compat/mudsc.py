"""The interface of the MuDSC authors' program: ``WeightFusion`` and its perm dictionaries.

Source: Xu et al., "Training-Free Pretrained Model Merging", CVPR 2024, arXiv 2403.01753. Clusters equal the
program's. Where :func:`mudsc_fast.merge` differs from it, this module follows the program: a merged unit is divided by
the size of its cluster + 1e-5, moments are float32 and batches are weighted by their samples, one merge inside a model
is allowed where the budget is 0, and queries are not observed. New code should use :func:`mudsc_fast.merge`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mudsc_fast.compat._mudsc_activations import activation_similarities
from mudsc_fast.compat._mudsc_match import (
    Match,
    correlation_with_first,
    match_clusters,
    match_identity,
    match_permutation,
    same_matching,
)
from mudsc_fast.compat._mudsc_perm import (
    Network,
    get_resnet_perm,
    get_resnet_perm_group,
    get_swin_perm,
    get_vit_clip_perm,
    get_vit_perm,
    read_perm,
)
from mudsc_fast.compat.zipit import CovarianceMetric, compute_correlation
from mudsc_fast.ops.permute import permute_merge

__all__ = [
    "WeightFusion",
    "get_resnet_perm",
    "get_resnet_perm_group",
    "get_swin_perm",
    "get_vit_clip_perm",
    "get_vit_perm",
]

_logger = logging.getLogger(__name__)

#: Consecutive sweeps without progress after which the search ends, whatever `relax` says.
_PATIENCE = 5

StateDict = Mapping[str, Tensor]


class WeightFusion:
    """Merges networks under weight similarity, activation similarity or both.

    Parameters
    ----------
    reduce
        Fraction of the units of all models that a zip merges away. Below ``1 - 1 / models`` the merged network is
        larger than each model.
    a, b
        Factor on the similarities of a merged cluster, and fraction of a model's merges that may be inside the model.
    relax
        Not used, as in the program: the search always ends after 5 consecutive sweeps without progress.
    iter
        Maximum number of sweeps.
    use_cos
        Compare weights by cosine similarity instead of correlation.
    no_fusion
        Match units by their index: the plain average.
    fix_sims, fix_rate
        Whether sweeps mix in the similarity of activations, and the fraction of the weights' similarity in the mix.
    use_permute
        Permute each model onto the first instead of clustering.
    verbose
        Whether to log every sweep, at level INFO.

    Attributes
    ----------
    fusion_model
        The merged network, after a call of :meth:`transform`.
    params
        The models' tensors, fused ones split.
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
        self._matching: dict[Hashable, Match] = {}

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
            Batches whose first entry is the networks' input; units are first matched by their activations.
        in_weight_space
            Whether sweeps over the weights follow. Without `act_loader` there are only these.
        return_state_dict
            Return the result of :meth:`apply_permute` with ``no_avg=True`` instead of a network.
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
            activations = activation_similarities(nets, self._network, act_loader)
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
        and times the number of models. Recomputed at each access.
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
            Tensors by name; a fused tensor is split, each part under its name with a suffix. Tensors without nodes are
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
        neighbors = {node: self._network.neighbors(node) for node in nodes}
        visits: dict[Hashable, tuple[dict[Hashable, Match], Match]] = {}
        best: dict[Hashable, Match] | None = None
        best_value, misses = 0.0, 0
        for number in range(self.iter):
            for index in torch.randperm(len(nodes), generator=generator, device="cpu").tolist():
                node = nodes[index]
                seen = {other: self._matching[other] for other in neighbors[node] if other in self._matching}
                # If the matchings of its neighbors have not changed since the last visit, neither have a node's weight
                # vectors.
                if node not in visits or not same_matching(visits[node][0], seen):
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
                # The opposite of the merge: consumed axes are averaged, produced axes are summed.
                maps = {axis: match.map(consumes, i) for axis, match, consumes in others}
                tensor = permute_merge([tensor], maps, weights=[1.0]) if maps else tensor
                vectors[i].append(tensor.movedim(use.axis, 0).flatten(1) if tensor.ndim > 1 else tensor[:, None])
        joined = [torch.cat(of_model, dim=1) for of_model in vectors]
        joined = [one.float() if one.dtype in (torch.float16, torch.bfloat16) else one for one in joined]
        if self.use_cos:
            directions = functional.normalize(torch.cat(joined), dim=1, eps=1e-8)
            return directions @ directions.T
        if self.use_permute:
            return correlation_with_first(joined)
        metric = CovarianceMetric()
        metric.update(1, *joined)
        return compute_correlation(metric.finalize(1))

    def _match(self, node: Hashable, similarity: Tensor) -> Match:
        """Match a node's units by [models * units, models * units], or the first model's rows of it to permute."""
        num_models, groups = len(self.params), self._network.nodes[node].groups
        units = similarity.shape[1] // num_models
        if units % groups:
            raise ValueError(f"perm[{node!r}] has {units} units, which {groups} groups do not divide")
        if self.no_fusion:
            return match_identity(units, num_models, similarity.device)
        if self.use_permute:
            return match_permutation(similarity, num_models, groups)
        return match_clusters(similarity, num_models, groups, self.reduce, self.a, self.b)

    def _split(self, state: StateDict) -> dict[str, Tensor]:
        """Return a state dict with the parts of fused tensors added."""
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
        """Concatenate the parts of fused tensors, and remove the parts."""
        for axis, tensor, suffixes in self._network.splits:
            state[tensor] = torch.cat([state.pop(f"{tensor}_{suffix}") for suffix in suffixes], dim=axis)


def _resize(model: nn.Module, state: StateDict) -> None:
    """Resize a network's tensors to the shapes in `state`, and its layers accordingly."""
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
