"""Sweeps over the nodes: each is matched again under the current matching of the others, until nothing improves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mudsc_fast.matching.node import Matcher, NodeMatching
from mudsc_fast.spec.axes import PermutationSpec

#: Returns a node's similarity blocks under the current matching of the other nodes.
SimilarityOfNode = Callable[[str, Mapping[str, NodeMatching]], Tensor]


@dataclass(frozen=True)
class SweepResult:
    """The best matching found, and the objective (mean similarity over the nodes) after every sweep."""

    matching: dict[str, NodeMatching]
    objectives: list[float]


def sweep(
    spec: PermutationSpec,
    similarity_of: SimilarityOfNode,
    match: Matcher,
    start: Mapping[str, NodeMatching],
    *,
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    progress: bool = False,
) -> SweepResult:
    """Match every node again and again, in random order, and keep the best.

    Nodes are visited in the order of ``torch.randperm`` from one generator seeded with `random_state`. After a sweep
    that did not raise the mean of the nodes' similarities above the best so far, the best matching is restored; after
    `patience` such sweeps in a row, or `max_sweeps` in all, the search ends.

    A node keeps its last result while no neighbour's matching has changed since: its similarity would be the same.
    """
    generator = torch.Generator().manual_seed(random_state)
    current = dict(start)
    best: dict[str, NodeMatching] = dict(start)
    best_objective = -float("inf")
    objectives: list[float] = []
    misses = 0
    visits: dict[str, _Visit] = {}
    with tqdm(total=max_sweeps, desc="sweeps", disable=not progress) as bar:
        while len(objectives) < max_sweeps and misses < patience:
            for index in torch.randperm(len(spec.nodes), generator=generator).tolist():
                node = spec.nodes[index]
                seen = {other: current[other] for other in spec.neighbours(node) if other in current}
                visit = visits.get(node)
                if visit is None or not visit.saw(seen):
                    visit = visits[node] = _Visit(seen, match(similarity_of(node, current)))
                current[node] = visit.result
            objective = sum(current[node].similarity for node in spec.nodes) / len(spec.nodes)
            objectives.append(objective)
            if objective > best_objective:
                best, best_objective, misses = dict(current), objective, 0
            else:
                current, misses = dict(best), misses + 1
            bar.update()
            bar.set_postfix(objective=f"{best_objective:.4f}")
    return SweepResult(best, objectives)


@dataclass(frozen=True)
class _Visit:
    """A node's latest result and the neighbours' matchings it was computed under."""

    neighbours: Mapping[str, NodeMatching]
    result: NodeMatching

    def saw(self, neighbours: Mapping[str, NodeMatching]) -> bool:
        return self.neighbours.keys() == neighbours.keys() and all(
            matching is self.neighbours[node] or matching.same_clusters(self.neighbours[node])
            for node, matching in neighbours.items()
        )
