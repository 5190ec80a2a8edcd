"""Sweeps over the nodes: each node is matched given the current matching of the others, until nothing improves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast._progress import progress_bar
from mudsc_fast.matching.node import Matcher, NodeMatching
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Returns a node's similarity blocks under the current matching of the other nodes.
SimilarityOfNode = Callable[[str, Mapping[str, NodeMatching]], Tensor]


@dataclass(frozen=True)
class SweepResult:
    """The best matching found, and the objective (mean similarity of the nodes) after each sweep."""

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
    progress: bool | None = False,
) -> SweepResult:
    """Match all nodes repeatedly, in random order, and return the best matching.

    Each sweep visits the nodes in the order of ``torch.randperm``, from one generator seeded with `random_state`. If a
    sweep does not raise the mean similarity of the nodes above the best so far, the best matching is restored. The
    search stops after `patience` such sweeps in a row, or `max_sweeps` sweeps.

    Nodes with tied groups are visited together. A node is skipped if none of its neighbours' matchings has changed
    since its last visit: its similarity would be the same.
    """
    generator = torch.Generator().manual_seed(random_state)
    current = dict(start)
    best: dict[str, NodeMatching] = dict(start)
    best_objective = -float("inf")
    objectives: list[float] = []
    misses = 0
    visits: dict[tuple[str, ...], _Visit] = {}
    with progress_bar(total=max_sweeps, description="sweeps", progress=progress) as bar:
        while len(objectives) < max_sweeps and misses < patience:
            for index in torch.randperm(len(spec.bundles), generator=generator, device="cpu").tolist():
                bundle = spec.bundles[index]
                around = {other for node in bundle for other in spec.neighbors(node)}
                seen = {other: current[other] for other in around if other in current}
                visit = visits.get(bundle)
                if visit is None or not visit.saw(seen):
                    similarities = {node: similarity_of(node, current) for node in bundle}
                    visit = visits[bundle] = _Visit(seen, match(similarities, spec.groups(bundle[0]).count))
                current.update(visit.result)
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
    """The latest result for a bundle of nodes, and the neighbours' matchings that it was computed with."""

    neighbours: Mapping[str, NodeMatching]
    result: Mapping[str, NodeMatching]

    def saw(self, neighbours: Mapping[str, NodeMatching]) -> bool:
        return self.neighbours.keys() == neighbours.keys() and all(
            matching is self.neighbours[node] or matching.same_clusters(self.neighbours[node])
            for node, matching in neighbours.items()
        )
