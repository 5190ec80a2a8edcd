"""Match the units of models, given a spec and optionally data."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mudsc_fast._forward import Forward
from mudsc_fast._models import Models, Networks, checksum
from mudsc_fast._phases import Phases
from mudsc_fast._similar_names import similar_names
from mudsc_fast._tensors import without_entries
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.report import Distribution
from mudsc_fast.matching.activation import check_varied, collect
from mudsc_fast.matching.checkpoint import Checkpoint, checkpoint_directory
from mudsc_fast.matching.checks import check_compatible, check_entries, warn_of_unnamed
from mudsc_fast.matching.exchange import Exchange, solve_on_owners
from mudsc_fast.matching.inputs import input_parts, tensor_checksums, whole_models
from mudsc_fast.matching.node import BLOCKS_OF_MODE, Mode, NodeMatching, align_units, zip_all_units
from mudsc_fast.matching.observer import observed_nodes
from mudsc_fast.matching.owners import pack
from mudsc_fast.matching.parallel import ParallelSolver
from mudsc_fast.matching.sharing import wire_dtype
from mudsc_fast.matching.statistics import MatchingStatistics
from mudsc_fast.matching.sweep import Solver, SweepResult, SweepState, sweep, waves
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.matching_result import Matching
from mudsc_fast.merge_matched import checked_weights
from mudsc_fast.ops.assignment import Assignment
from mudsc_fast.ops.correlation import CorrelationAccumulator, Precision
from mudsc_fast.options import Expand, MatchOptions, Space, default_balance, default_space, zip_factors
from mudsc_fast.prepare import Activations, Names, Prepared, prepare
from mudsc_fast.spec.choose import SpecLike
from mudsc_fast.spec.permutation_spec import PermutationSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger(__name__)


def match(
    models: Models,
    data: Iterable[Any] | MatchingStatistics | None = None,
    *,
    spec: SpecLike = None,
    mode: Mode = "align",
    balance: float | None = None,
    space: Space | None = None,
    weights: Sequence[float] | None = None,
    shrink: float | None = None,
    budget: float = 1.0,
    expand: Expand = 1.0,
    task_heads: Names = (),
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    forward: Forward | None = None,
    precision: Precision = "float32",
    verify: bool = True,
    progress: bool | None = None,
    group: ProcessGroup | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Matching:
    """Find which units of several networks of one architecture correspond.

    Parameters
    ----------
    models, data, spec, mode, balance, space, weights, shrink, budget, expand, task_heads
        As for :func:`mudsc_fast.merge`. The weights count for the clusters of a zip, and are those that
        :meth:`Matching.merge` uses by default.
    random_state, max_sweeps, patience, forward, precision, verify, progress, group, checkpoint
        As for :func:`mudsc_fast.merge`.

    Returns
    -------
    Matching
        Merges the networks, aligns one of them, can be saved, and prints as a table.

    Raises
    ------
    ValueError, TypeError, DistributedError
        As :func:`mudsc_fast.merge`.
    """
    ranks = Ranks(group)
    with ranks.step("checking the arguments"):
        options = MatchOptions(
            mode=mode,
            space=default_space(space, data is not None),
            balance=default_balance(balance, space, data is not None),
            shrink=shrink,
            budget=budget,
            expand=expand,
            random_state=random_state,
            max_sweeps=max_sweeps,
            patience=patience,
            forward=forward,
            precision=precision,
            progress=ranks.progress(progress),
        )
    run = options.space != "weight"
    inputs = prepare(models, spec, data, run=run, task_heads=task_heads, forward=forward, verify=verify, ranks=ranks)
    return PreparedMatching(inputs, options, weights, ranks, checkpoint).at(options.balance)


class PreparedMatching:
    """Everything a matching needs except the balance, so that one pass over the data serves every balance.

    State dicts may create tensors on access, as those of files do: each is accessed repeatedly, and
    kept no longer than it is needed.

    Parameters
    ----------
    prepared
        What is matched.
    options
        How; of it `balance` is not read.
    weights
        As for :func:`mudsc_fast.merge`.
    ranks
        The processes that match together; this one alone by default.
    checkpoint
        As for :func:`mudsc_fast.merge`.
    device
        Where units are compared and matched; by default where the tensors are.
    """

    def __init__(
        self,
        prepared: Prepared,
        options: MatchOptions,
        weights: Sequence[float] | None = None,
        ranks: Ranks | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.phases = Phases()
        networks, spec, sharded = prepared.networks, prepared.spec, prepared.sharded
        self._networks, self._spec, self._options = networks, spec, options
        self._task_heads = prepared.task_heads
        self._ranks = ranks = Ranks() if ranks is None else ranks
        with ranks.step("checking the arguments"):
            # Tensors of files are opened when they are asked for: once for all checks.
            opened = [list(tensors.values()) for tensors in networks.state_dicts]
            self._weights = checked_weights(weights, len(networks))
            self._division = prepared.divide()
            comparable = self._division.comparable
            check_compatible(networks.state_dicts, spec, self._division)
            if options.expand != 1:
                _check_expand(options.expand, comparable, networks, ranks)
            self._shapes = without_entries(networks.state_dicts[0])
            inputs = {}
            if not ranks.alone or checkpoint is not None:
                inputs = input_parts(networks.state_dicts, spec, options, self._weights, self._task_heads)
            del opened
            directory = None if checkpoint is None else checkpoint_directory(checkpoint)
        ranks.check_same({**inputs, "checkpoint": repr(None if directory is None else str(directory))})
        given = next(iter(networks.state_dicts[0].values())).device if sharded is None else sharded.device
        self._device = given if device is None else device
        self.owners = pack(comparable, self._shapes, ranks.size)
        self._sharded = sharded
        self.state_dicts: Sequence[Mapping[str, Tensor]] = networks.state_dicts
        if sharded is not None:
            held = {name for name, rank in self.owners.holder.items() if rank == ranks.rank}
            self.state_dicts = sharded.gathered(held | self.owners.needed(ranks.rank))
        with ranks.step("checking the tensors"):
            own = {name for name, rank in self.owners.holder.items() if rank == ranks.rank}
            largest = check_entries(self.state_dicts, spec, own)
            warn_of_unnamed(self.state_dicts[0], spec, self._division)
            checksums = [] if directory is None else tensor_checksums(self.state_dicts, own)
        of_ranks = ranks.gather_objects((largest, checksums), "checking the tensors")
        self._wire_dtype = wire_dtype(self._shapes, max(largest for largest, _ in of_ranks))
        self._checkpoint = None
        if directory is not None:
            inputs.update(whole_models([checksums for _, checksums in of_ranks]))
            if isinstance(prepared.data, MatchingStatistics):
                inputs["statistics as data"] = prepared.data.checksum()
            self._checkpoint = Checkpoint(directory, inputs, ranks)
        self._solutions: dict[str, Assignment] = {}
        self._activations: MatchingStatistics | None = None
        self._start: dict[str, NodeMatching] = {}
        self._statistics_bytes, self._sweep_bytes = 0, list[int]()
        self._observed = frozenset(observed_nodes(comparable))
        self._exchange = Exchange(
            comparable,
            comparable.units(self._shapes),
            ranks,
            self.owners.owner,
            options.mode,
            len(networks),
            self._device,
        )
        if options.space != "weight":
            self._match_activations(prepared.data)
        # With weights of 0 the shares of a cluster's members are undefined; units are then matched as for equal
        # weights.
        shares = self._weights if min(self._weights) > 0 else [1 / len(networks)] * len(networks)
        self._weight_similarity = WeightSimilarity(
            self.state_dicts,
            comparable,
            BLOCKS_OF_MODE[options.mode],
            shares,
            precision=options.precision,
            own=self.owners.slices[ranks.rank],
            device=self._device,
        )

    def at(self, balance: float) -> Matching:
        """Return the matching at one balance."""
        solve = ParallelSolver(
            self._division.comparable,
            self._shapes,
            self._ranks,
            self.owners,
            self._weight_similarity,
            functools.partial(self._similarity, balance),
            self._match_nodes,
            self._exchange,
            self._wire_dtype,
            functools.partial(self.phases.timed, "weight similarity"),
            shares_tasks=self._sharded is None,
        )
        found = self._by_activations(solve) if self._options.space == "activation" else self._sweep(solve)
        comparable = self._division.comparable
        return Matching(
            spec=self._spec,
            nodes={node: found.matching[node] for node in comparable.nodes},
            mode=self._options.mode,
            space=self._options.space,
            balance=balance if self._options.space == "dual" else None,
            weights=tuple(self._weights),
            objectives=found.objectives,
            timings=dict(self.phases.seconds),
            shapes={name: tuple(self._shapes[name].shape) for name in comparable.layouts},
            task_heads=self._task_heads,
            distribution=self._distribution(),
            fingerprints=tuple(checksum(tensors, comparable.layouts) for tensors in self._networks.state_dicts),
        )

    def _by_activations(self, solve: Solver) -> SweepResult:
        """Return the matching by activations, in which nodes that cannot be observed are matched by their weights."""
        matching, comparable = dict(self._start), self._division.comparable
        rest = [bundle for bundle in comparable.bundles if bundle[0] not in matching]
        for wave in waves(comparable, [*rest, *rest]):  # twice, because they may depend on each other
            matching.update(solve(wave, matching))
        return SweepResult(matching, [])

    def _sweep(self, solve: Solver) -> SweepResult:
        kept = self._checkpoint
        sent: list[int] = []

        def after_sweep(state: SweepState) -> None:
            sent.append(self._ranks.bytes_sent)
            if kept is not None:
                kept.save_state(state)

        before = self._ranks.bytes_sent
        found = sweep(
            self._division.comparable,
            solve,
            self._start,
            random_state=self._options.random_state,
            max_sweeps=self._options.max_sweeps,
            patience=self._options.patience,
            progress=self._options.progress,
            resume=None if kept is None else kept.load_state(self._device),
            after_sweep=after_sweep,
        )
        self._sweep_bytes = [now - last for last, now in zip([before, *sent], sent, strict=False)]
        return found

    def _distribution(self) -> Distribution | None:
        if self._ranks.alone:
            return None
        sent = self._ranks.gather_objects([self._statistics_bytes, *self._sweep_bytes], "matching units")
        statistics, *sweeps = (sum(counts) for counts in zip(*sent, strict=True))
        return Distribution(self.owners.work, statistics, tuple(sweeps))

    def _similarity(self, balance: float, node: str, sums: CorrelationAccumulator) -> Tensor:
        """Return the similarity of a node from the sums over its weights."""
        if self._options.space != "dual" or self._activations is None or node not in self._observed:
            return sums.finalize()
        return sums.finalize(other=self._activation_similarity(self._activations, node), balance=balance)

    def _activation_similarity(self, activations: MatchingStatistics, node: str) -> Tensor:
        """Return the similarity of a node's activations.

        Units that are constant correlate with nothing. In a zip of three or more models they count as alike, or
        clusters of other units would join each other before these. For two models the zip is as published.
        """
        similarity = activations.similarity(node, BLOCKS_OF_MODE[self._options.mode])
        if self._options.mode == "align" or zip_factors(self._options.shrink, len(self._networks))[1] == 1:
            return similarity
        constant = activations.constant_units(node).flatten()
        if not bool(constant.any()):
            return similarity
        return similarity.masked_fill(constant[:, None] & constant, 1.0)

    def _match_nodes(self, similarities: Mapping[str, Tensor], groups: int) -> dict[str, NodeMatching]:
        options = self._options
        with self.phases.timed("matching"):
            if options.mode == "align":
                return align_units(similarities, groups, earlier=self._solutions)
            shrink, within = zip_factors(options.shrink, len(self._networks))
            return zip_all_units(
                similarities,
                len(self._networks),
                groups,
                shrink=shrink,
                within=within,
                budget=options.budget,
                expand={node: options.expansion(node) for node in similarities},
            )

    def _match_activations(self, data: Activations) -> None:
        comparable = self._division.comparable
        with self.phases.timed("activations"):
            self._activations = activations = self._kept_or_collected(data)
        self._statistics_bytes = self._ranks.bytes_sent
        unobserved = [node for node in comparable.nodes if node not in self._observed]
        if unobserved:
            _log.warning(
                "spec does not say where to observe %s: they are matched by their weights", ", ".join(unobserved[:8])
            )
        check_varied(activations)
        self._start = solve_on_owners(
            [bundle for bundle in comparable.bundles if self._observed.issuperset(bundle)],
            {},
            lambda node, _: self._activation_similarity(activations, node),
            self._match_nodes,
            comparable,
            self._ranks,
            self.owners,
            self._exchange,
        )

    def _kept_or_collected(self, data: Activations) -> MatchingStatistics:
        """Return the statistics of an interrupted run, or collect them and keep them for the next run."""
        if self._checkpoint is None:
            return self._collected(data)
        statistics = self._checkpoint.load_statistics(self._device)
        if statistics is None:
            statistics = self._collected(data)
            self._checkpoint.save_statistics(statistics)
        elif self._ranks.rank == 0 and not isinstance(data, MatchingStatistics):
            _log.warning(
                "%s has the statistics of all batches of an earlier run, so the batches are not read again. If they "
                "have changed, remove the directory and start again",
                self._checkpoint,
            )
        return statistics

    def _collected(self, data: Activations) -> MatchingStatistics:
        networks, comparable = self._networks, self._division.comparable
        if isinstance(data, MatchingStatistics):
            if data.spec not in (self._spec, comparable) or data.num_models != len(networks):
                raise ValueError(
                    f"data was computed for {data.num_models} models with {data.spec!r}, "
                    f"got {len(networks)} models with {self._spec!r}"
                )
            self._ranks.check_same({"statistics as data": data.checksum()})
            return data
        # A checkpoint is written by one process, which needs all sums.
        roots = None
        if self._checkpoint is None:
            roots = {node: rank for bundle, rank in self.owners.owner.items() for node in bundle}
        if callable(data):
            return data(roots)
        if data is None:
            raise ValueError(
                f"data must be given to match in activation space, got None: space={self._options.space!r}"
            )
        if not networks.modules:
            raise TypeError(
                "models must be modules, or Hugging Face directories, to match in activation space: got tensors"
            )
        return collect(
            self._ranks,
            networks.modules,
            data,
            spec=comparable,
            blocks=BLOCKS_OF_MODE[self._options.mode],
            forward=self._options.forward,
            precision=self._options.precision,
            progress=self._options.progress,
            roots=roots,
        )


def _check_expand(expand: Expand, spec: PermutationSpec, networks: Networks, ranks: Ranks) -> None:
    """Raise an error if nodes to expand do not exist, or the networks cannot be expanded."""
    if not ranks.alone:
        raise ValueError(f"expand={expand} is not supported with group: match in one process")
    if networks.pieces:
        raise TypeError("expand needs modules or state dicts, got files: load them, and pass what was loaded")
    unknown = [node for node in expand if node not in spec.nodes] if isinstance(expand, Mapping) else []
    if unknown:
        raise ValueError(
            f"expand names {unknown[0]!r}, which is not a node; {similar_names(unknown[0], (), spec.nodes)}"
        )
    grouped = [node for node in expand if spec.groups(node).count > 1] if isinstance(expand, Mapping) else []
    if grouped:
        raise ValueError(f"expand names the node {grouped[0]!r}, whose units form groups: only other nodes can expand")
