"""Sweeps over the nodes: each node is matched given the current matching of the others, until nothing improves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mudsc_fast._progress import progress_bar
from mudsc_fast.matching.node import Matcher, NodeMatching
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Nodes that are matched in one step because their groups share an order.
Bundle = tuple[str, ...]

#: Returns a node's similarity blocks under the current matching of the other nodes.
SimilarityOfNode = Callable[[str, Mapping[str, NodeMatching]], Tensor]

#: Matches the nodes of bundles that are not neighbors of each other, given the current matching of all nodes.
Solver = Callable[[Sequence[Bundle], Mapping[str, NodeMatching]], dict[str, NodeMatching]]


@dataclass(frozen=True)
class SweepResult:
    """The best matching found, and the objective (mean similarity of the nodes) after each sweep."""

    matching: dict[str, NodeMatching]
    objectives: list[float]


@dataclass
class SweepState:
    """Everything that the next sweep depends on.

    Attributes
    ----------
    current, best
        The present matching and the best one.
    objectives
        The objective after each sweep.
    misses
        Number of sweeps in a row without improvement.
    generator
        The state of the generator that orders the nodes.
    visits
        For each bundle its latest result, and the neighbors' matchings that it was computed with.
    """

    current: dict[str, NodeMatching]
    best: dict[str, NodeMatching]
    generator: Tensor
    objectives: list[float] = field(default_factory=list)
    misses: int = 0
    visits: dict[Bundle, Visit] = field(default_factory=dict)

    @classmethod
    def first(cls, start: Mapping[str, NodeMatching], random_state: int) -> SweepState:
        """Return the state before the first sweep."""
        generator = torch.Generator().manual_seed(random_state)
        return cls(dict(start), dict(start), generator.get_state())


@dataclass(frozen=True)
class Visit:
    """The latest result for a bundle of nodes, and the neighbors' matchings that it was computed with."""

    neighbors: Mapping[str, NodeMatching]
    result: Mapping[str, NodeMatching]

    def saw(self, neighbors: Mapping[str, NodeMatching]) -> bool:
        """Return whether these are the matchings of the neighbors that the result was computed with."""
        return self.neighbors.keys() == neighbors.keys() and all(
            matching is self.neighbors[node] or matching.same_clusters(self.neighbors[node])
            for node, matching in neighbors.items()
        )


def sweep(
    spec: PermutationSpec,
    solve: Solver,
    start: Mapping[str, NodeMatching],
    *,
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    progress: bool | None = False,
    resume: SweepState | None = None,
    after_sweep: Callable[[SweepState], None] = lambda _: None,
) -> SweepResult:
    """Match all nodes repeatedly, in random order, and return the best matching.

    Each sweep visits the nodes in the order of ``torch.randperm``, from one generator seeded with `random_state`. If a
    sweep does not raise the mean similarity of the nodes above the best so far, the best matching is restored. The
    search stops after `patience` such sweeps in a row, or `max_sweeps` sweeps.

    Nodes with tied groups are visited together. A node is skipped if none of its neighbors' matchings has changed
    since its last visit: its similarity would be the same. Nodes that do not depend on each other are handed to `solve`
    together, in waves; the result is that of one node after the other.

    Parameters
    ----------
    spec
        The nodes, and which are neighbors.
    solve
        Matches the nodes of a wave.
    start
        The matching to begin with; nodes may be missing.
    random_state, max_sweeps, patience, progress
        As for :func:`mudsc_fast.merge`.
    resume
        A state to continue from, instead of `start`.
    after_sweep
        Called with the state after each sweep.
    """
    state = SweepState.first(start, random_state) if resume is None else resume
    generator = torch.Generator()
    generator.set_state(state.generator)
    with progress_bar(total=max_sweeps, description="sweeps", progress=progress) as bar:
        bar.update(len(state.objectives))
        while len(state.objectives) < max_sweeps and state.misses < patience:
            order = torch.randperm(len(spec.bundles), generator=generator, device="cpu").tolist()
            for wave in waves(spec, [spec.bundles[index] for index in order]):
                _visit(spec, wave, solve, state)
            objective = sum(state.current[node].similarity for node in spec.nodes) / len(spec.nodes)
            if objective > max(state.objectives, default=-float("inf")):
                state.best, state.misses = dict(state.current), 0
            else:
                state.current, state.misses = dict(state.best), state.misses + 1
            state.objectives.append(objective)
            state.generator = generator.get_state()
            after_sweep(state)
            bar.update()
            bar.set_postfix(objective=f"{max(state.objectives):.4f}")
    return SweepResult(state.best, state.objectives)


def waves(spec: PermutationSpec, order: Sequence[Bundle]) -> list[list[Bundle]]:
    """Divide visits into waves so that visiting one wave after the other gives the result of the order.

    A visit reads the matchings of its neighbors. So it must come after the visits of its neighbors before it in the
    order, and before those after it. Bundles of one wave are not neighbors and may be visited in any order, or
    together.
    """
    last: dict[str, int] = {}
    result: list[list[Bundle]] = []
    for bundle in order:
        around = {other for node in bundle for other in spec.neighbors(node)}.union(bundle)
        depth = 1 + max((last.get(node, -1) for node in around), default=-1)
        last.update(dict.fromkeys(bundle, depth))
        if depth == len(result):
            result.append([])
        result[depth].append(bundle)
    return result


def one_by_one(spec: PermutationSpec, similarity_of: SimilarityOfNode, match: Matcher) -> Solver:
    """Return a solver that computes one bundle after the other in this process."""

    def solve(bundles: Sequence[Bundle], current: Mapping[str, NodeMatching]) -> dict[str, NodeMatching]:
        matching: dict[str, NodeMatching] = {}
        for bundle in bundles:
            similarities = {node: similarity_of(node, current) for node in bundle}
            matching.update(match(similarities, spec.groups(bundle[0]).count))
        return matching

    return solve


def _visit(spec: PermutationSpec, wave: Sequence[Bundle], solve: Solver, state: SweepState) -> None:
    """Match the bundles of a wave, other than those whose neighbors have not changed since their last visit."""
    seen = {}
    for bundle in wave:
        around = {other for node in bundle for other in spec.neighbors(node)}
        neighbors = {other: state.current[other] for other in around if other in state.current}
        visit = state.visits.get(bundle)
        if visit is None or not visit.saw(neighbors):
            seen[bundle] = neighbors
    if seen:
        matching = solve(list(seen), state.current)
        for bundle, neighbors in seen.items():
            state.visits[bundle] = Visit(neighbors, {node: matching[node] for node in bundle})
    for bundle in wave:
        state.current.update(state.visits[bundle].result)
