"""Models, a spec and data in; a matching of their units out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mudsc_fast._forward import Forward
from mudsc_fast._models import Models, Networks
from mudsc_fast.matching.activation import MatchingStatistics, collect_statistics, observed_nodes
from mudsc_fast.matching.checks import check_networks
from mudsc_fast.matching.node import BLOCKS_OF_MODE, Mode, NodeMatching, align_units, zip_all_units
from mudsc_fast.matching.partial import divide
from mudsc_fast.matching.sweep import SweepResult, sweep
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.ops.assignment import Assignment
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.options import MatchOptions, Space, default_shrink, default_space
from mudsc_fast.results import Matching, Names, Phases, checked_weights, names
from mudsc_fast.spec.choose import SpecLike
from mudsc_fast.spec.permutation_spec import PermutationSpec

_log = logging.getLogger(__name__)


def match(
    models: Models,
    data: Iterable[Any] | MatchingStatistics | None = None,
    *,
    spec: SpecLike = None,
    mode: Mode = "align",
    balance: float = 0.5,
    space: Space | None = None,
    weights: Sequence[float] | None = None,
    shrink: float | None = None,
    budget: float = 1.0,
    task_heads: Names = (),
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    forward: Forward | None = None,
    precision: Precision = "float32",
    progress: bool | None = None,
) -> Matching:
    """Find which units of several networks of one architecture correspond.

    Parameters
    ----------
    models, data, spec, mode, balance, space, weights, shrink, budget, task_heads
        As for :func:`mudsc_fast.merge`. The weights count for the clusters of a zip, and are those that
        :meth:`Matching.merge` uses by default.
    random_state, max_sweeps, patience, forward, precision, progress
        As for :func:`mudsc_fast.merge`.

    Returns
    -------
    Matching
        Merges the networks, aligns one of them, can be saved, and prints as a table.

    Raises
    ------
    ValueError, TypeError
        As :func:`mudsc_fast.merge`.
    """
    options = MatchOptions(
        mode=mode,
        space=default_space(space, data is not None),
        balance=balance,
        shrink=shrink,
        budget=budget,
        random_state=random_state,
        max_sweeps=max_sweeps,
        patience=patience,
        forward=forward,
        precision=precision,
        progress=progress,
    )
    networks = Networks.of(models, run=options.space != "weight", task_heads=names("task_heads", task_heads))
    chosen, data = choose_spec_and_data(networks, spec, data)
    return PreparedMatching(networks, chosen, data, options, weights, task_heads).at(options.balance)


def choose_spec_and_data(
    networks: Networks, spec: SpecLike, data: Iterable[Any] | MatchingStatistics | None
) -> tuple[PermutationSpec, Iterable[Any] | MatchingStatistics | None]:
    """Return the spec of networks, by default that of statistics given as data, and the data, its first batch kept."""
    if not isinstance(data, MatchingStatistics):
        return networks.choose_spec(spec, data)
    return networks.choose_spec(data.spec if spec is None else spec, None)[0], data


class PreparedMatching:
    """All that a matching needs but for the balance: one pass over the data serves every balance.

    State dicts may make a tensor when it is asked for, as those of files do: each is asked for again and again, and
    kept no longer than it is needed.

    Parameters
    ----------
    networks, spec, data
        What is matched.
    options
        How; of it `balance` is not read.
    weights, task_heads
        As for :func:`mudsc_fast.merge`.
    """

    def __init__(
        self,
        networks: Networks,
        spec: PermutationSpec,
        data: Iterable[Any] | MatchingStatistics | None,
        options: MatchOptions,
        weights: Sequence[float] | None = None,
        task_heads: Names = (),
    ) -> None:
        self.phases = Phases()
        self._networks, self._spec, self._options = networks, spec, options
        self._task_heads = tuple(names("task_heads", task_heads))
        self._division = divide(networks.state_dicts, spec, (), self._task_heads)
        check_networks(networks.state_dicts, spec, self._division)
        self._weights = checked_weights(weights, len(networks))
        self._solutions: dict[str, Assignment] = {}
        self._activations: MatchingStatistics | None = None
        self._start: dict[str, NodeMatching] = {}
        self._observed = frozenset(observed_nodes(self._division.comparable))
        if options.space != "weight":
            self._match_activations(data)
        # Weights of 0 do not say how a cluster's members count: the units are then matched as for equal weights.
        shares = self._weights if min(self._weights) > 0 else [1 / len(networks)] * len(networks)
        self._weight_similarity = WeightSimilarity(
            networks.state_dicts,
            self._division.comparable,
            BLOCKS_OF_MODE[options.mode],
            shares,
            precision=options.precision,
        )

    def at(self, balance: float) -> Matching:
        """Return the matching at one balance."""
        found = self._by_activations() if self._options.space == "activation" else self._sweep(balance)
        comparable, first = self._division.comparable, self._networks.state_dicts[0]
        return Matching(
            spec=self._spec,
            nodes={node: found.matching[node] for node in comparable.nodes},
            mode=self._options.mode,
            space=self._options.space,
            balance=balance if self._options.space == "dual" else None,
            weights=tuple(self._weights),
            objectives=found.objectives,
            timings=dict(self.phases.seconds),
            shapes={name: tuple(first[name].shape) for name in comparable.layouts},
            task_heads=self._task_heads,
        )

    def _by_activations(self) -> SweepResult:
        """Return the matching by activations, in which nodes that cannot be observed are matched by their weights."""
        matching, comparable = dict(self._start), self._division.comparable
        rest = [bundle for bundle in comparable.bundles if bundle[0] not in matching]
        for bundle in [*rest, *rest]:  # twice, because they may depend on each other
            similarities = {node: self._weight_similarity(node, matching) for node in bundle}
            matching.update(self._match_nodes(similarities, comparable.groups(bundle[0]).count))
        return SweepResult(matching, [])

    def _sweep(self, balance: float) -> SweepResult:
        activations, blocks = self._activations, BLOCKS_OF_MODE[self._options.mode]

        def similarity_of(node: str, current: Mapping[str, NodeMatching]) -> Tensor:
            with self.phases.timed("weight similarity"):
                if activations is None or node not in self._observed:
                    return self._weight_similarity(node, current)
                return self._weight_similarity(node, current, activations.similarity(node, blocks), balance)

        return sweep(
            self._division.comparable,
            similarity_of,
            self._match_nodes,
            self._start,
            random_state=self._options.random_state,
            max_sweeps=self._options.max_sweeps,
            patience=self._options.patience,
            progress=self._options.progress,
        )

    def _match_nodes(self, similarities: Mapping[str, Tensor], groups: int) -> dict[str, NodeMatching]:
        options = self._options
        with self.phases.timed("matching"):
            if options.mode == "align":
                return align_units(similarities, groups, earlier=self._solutions)
            return zip_all_units(
                similarities,
                len(self._networks),
                groups,
                shrink=default_shrink(options.shrink, len(self._networks)),
                budget=options.budget,
            )

    def _match_activations(self, data: Iterable[Any] | MatchingStatistics | None) -> None:
        comparable, blocks = self._division.comparable, BLOCKS_OF_MODE[self._options.mode]
        with self.phases.timed("activations"):
            self._activations = self._collected(data)
        unobserved = [node for node in comparable.nodes if node not in self._observed]
        if unobserved:
            _log.warning(
                "spec does not say where to observe %s: they are matched by their weights", ", ".join(unobserved[:8])
            )
        for bundle in comparable.bundles:
            if not self._observed.issuperset(bundle):
                continue
            similarities = {node: self._activations.similarity(node, blocks) for node in bundle}
            self._start.update(self._match_nodes(similarities, comparable.groups(bundle[0]).count))

    def _collected(self, data: Iterable[Any] | MatchingStatistics | None) -> MatchingStatistics:
        networks, comparable = self._networks, self._division.comparable
        if isinstance(data, MatchingStatistics):
            if data.spec not in (self._spec, comparable) or data.num_models != len(networks):
                raise ValueError(
                    f"data was computed for {data.num_models} models with {data.spec!r}, "
                    f"got {len(networks)} models with {self._spec!r}"
                )
            return data
        if data is None:
            raise ValueError(
                f"data must be given to match in activation space, got None: space={self._options.space!r}"
            )
        if not networks.modules:
            raise TypeError(
                "models must be modules, or directories of Hugging Face, to match in activation space: got tensors"
            )
        return collect_statistics(
            networks.modules,
            data,
            spec=comparable,
            blocks=BLOCKS_OF_MODE[self._options.mode],
            forward=self._options.forward,
            precision=self._options.precision,
            progress=self._options.progress,
        )
