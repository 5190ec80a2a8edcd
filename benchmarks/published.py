"""The published procedure, with which benchmarks/bench_merge.py compares.

It is written from the description in Xu et al., "Training-Free Pretrained Model Merging", CVPR 2024: every tensor is
multiplied by dense permutation or cluster matrices, correlation matrices are computed as a whole, scipy solves the
assignments, the greedy loop searches the whole matrix for every merge, and every sweep recomputes every node.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mudsc_fast.kernels.reference import zip as reference
from mudsc_fast.spec import Axis, PermutationSpec

_EPS = 1e-7


@dataclass
class Published:
    """A merge of two networks.

    Attributes
    ----------
    spec, models, mode, balance
        As for :func:`mudsc_fast.merge`.
    seconds
        Seconds of each phase.
    merges, unmerges
        For each node [models * units, units]: the matrices of axes that produce and that consume its units.
    """

    spec: PermutationSpec
    models: Sequence[nn.Module]
    mode: str
    balance: float
    seconds: dict[str, float] = field(default_factory=dict)
    merges: dict[str, Tensor] = field(default_factory=dict)
    unmerges: dict[str, Tensor] = field(default_factory=dict)

    def run(self, batches: Iterable[Tensor] | None) -> dict[str, Tensor]:
        """Return the merged tensors."""
        states = [model.state_dict() for model in self.models]
        units = self.spec.units(states[0])
        begin = time.perf_counter()
        activation = {} if batches is None else self._activations(batches)
        self.seconds["activations"] = time.perf_counter() - begin
        begin = time.perf_counter()
        for node, similarity in activation.items():
            self._match(node, similarity, units[node])
        best, best_objective, misses = (dict(self.merges), dict(self.unmerges)), -float("inf"), 0
        generator = torch.Generator().manual_seed(0)
        self.sweeps = 0
        while misses < 5 and self.sweeps < 100:
            values = []
            for index in torch.randperm(len(self.spec.nodes), generator=generator).tolist():
                node = self.spec.nodes[index]
                similarity = _correlation(torch.cat([self._vectors(state, node, m) for m, state in enumerate(states)]))
                if activation:
                    similarity = self.balance * similarity + (1 - self.balance) * activation[node]
                values.append(self._match(node, similarity, units[node]))
            self.sweeps += 1
            self.objective = sum(values) / len(values)
            if self.objective > best_objective:
                best, best_objective, misses = (dict(self.merges), dict(self.unmerges)), self.objective, 0
            else:
                self.merges, self.unmerges, misses = dict(best[0]), dict(best[1]), misses + 1
        self.objective = best_objective
        merged = {
            name: sum(self._transformed(state[name], name, m, None) for m, state in enumerate(states)) / len(states)
            if states[0][name].is_floating_point()
            else states[0][name]
            for name in states[0]
        }
        self.seconds["sweeps"] = time.perf_counter() - begin
        return {name: torch.as_tensor(tensor) for name, tensor in merged.items()}

    def _activations(self, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the correlation of all units of both networks, at the input of each node's last consumer."""
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        count = 0
        seen: dict[tuple[int, str], Tensor] = {}
        handles = []
        for index, model in enumerate(self.models):
            for node in self.spec.nodes:
                (observation,) = self.spec.observations(node)

                def keep(
                    _module: nn.Module,
                    args: tuple[Tensor, ...],
                    output: Tensor,
                    key: tuple[int, str] = (index, node),
                    port: str = observation.port,
                ) -> None:
                    features = output if port == "output" else args[0]
                    seen[key] = features.movedim(1 if features.ndim == 4 else -1, 0).flatten(1)

                handles.append(model.get_submodule(observation.module).register_forward_hook(keep))
        with torch.inference_mode():
            for batch in batches:
                for model in self.models:
                    model(batch)
                for node in self.spec.nodes:
                    features = torch.cat([seen[index, node] for index in range(len(self.models))])
                    share = len(batch)
                    sums[node] = sums.get(node, torch.zeros(len(features))) + features.mean(1) * share
                    product = features @ features.T / features.shape[1] * share
                    squares[node] = squares[node] + product if node in squares else product
                count += len(batch)
        for handle in handles:
            handle.remove()
        result = {}
        for node in self.spec.nodes:
            mean = sums[node] / count
            covariance = squares[node] / count - torch.outer(mean, mean)
            result[node] = _normalized(covariance)
        return result

    def _vectors(self, state: Mapping[str, Tensor], node: str, model: int) -> Tensor:
        """Return [units, length]: every tensor's slices at the node's units, other axes re-indexed."""
        slices = []
        for use in self.spec.uses(node):
            if use.axis.compared:
                tensor = self._transformed(state[use.tensor], use.tensor, model, use.position)
                slices.append(tensor.movedim(use.position, 0).reshape(tensor.shape[use.position], -1))
        return torch.cat(slices, 1)

    def _transformed(self, tensor: Tensor, name: str, model: int, skip: int | None) -> Tensor:
        """Return a tensor with dense matrices multiplied along its axes.

        Vectors take the two matrices the opposite way to the merge itself.
        """
        for position, (segment,) in enumerate(self.spec.layouts.get(name, ())):
            axis = segment.axis
            if axis is None or position == skip or axis.node not in self.merges:
                continue
            produces = axis.role == "produce"
            matrix = (self.merges if produces == (skip is None) else self.unmerges)[axis.node]
            units = len(matrix) // len(self.models)
            block = matrix[model * units : (model + 1) * units]
            tensor = _along(tensor, position, axis, block)
        return tensor

    def _match(self, node: str, similarity: Tensor, units: int) -> float:
        """Match a node's units; keep the matrices and return the mean similarity of matched units."""
        num_models = len(self.models)
        if self.mode == "align":
            blocks, total = [torch.eye(units)], 0.0
            for model in range(1, num_models):
                block = similarity[:units, model * units : (model + 1) * units]
                columns = _assigned_in_groups(block, self.spec.groups(node).count)
                matrix = torch.zeros(units, units)
                matrix[columns, torch.arange(units)] = 1.0
                blocks.append(matrix)
                total += float(block[torch.arange(units), columns].double().mean())
            self.merges[node] = self.unmerges[node] = torch.cat(blocks)
            return total / (num_models - 1)
        clusters, values = reference.zip_units(
            similarity, num_models, units, units * (num_models - 1) // num_models, shrink=0.5
        )
        matrix = torch.zeros(len(similarity), units)
        matrix[torch.arange(len(similarity)), clusters] = 1.0
        self.unmerges[node] = matrix
        self.merges[node] = matrix / (matrix.sum(0) + 1e-5) * num_models
        return float(values.mean())


def _assigned(similarity: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(similarity.double().numpy(), maximize=True)[1])


def _assigned_in_groups(similarity: Tensor, groups: int) -> Tensor:
    """Return the column of each row: an assignment for every pair of groups, and one of the groups."""
    if groups == 1:
        return _assigned(similarity)
    size = len(similarity) // groups
    split = similarity.view(groups, size, groups, size).transpose(1, 2)
    inner = torch.stack([torch.stack([_assigned(block) for block in row]) for row in split])
    scores = split.gather(3, inner[..., None]).squeeze(3).mean(2)
    pairs = _assigned(scores)
    return (pairs[:, None] * size + inner[torch.arange(groups), pairs]).flatten()


def _along(tensor: Tensor, position: int, axis: Axis, matrix: Tensor) -> Tensor:
    split = tensor.unflatten(position, (axis.outer, -1, axis.inner))
    return (
        torch.movedim(split, position + 1, -1).matmul(matrix).movedim(-1, position + 1).flatten(position, position + 2)
    )


def _correlation(rows: Tensor) -> Tensor:
    centered = rows - rows.mean(1, keepdim=True)
    return _normalized(centered @ centered.T / rows.shape[1])


def _normalized(covariance: Tensor) -> Tensor:
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    return covariance / torch.outer(deviation, deviation).clamp_min(_EPS)
