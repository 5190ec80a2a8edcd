"""Matching the nodes of a wave in several processes, each node on its owner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.reduction import (
    receive_difference,
    receive_rows,
    receive_sums,
    reduce_sums,
    send_difference,
    send_rows,
    send_sums,
)
from mudsc_fast.matching.exchange import Exchange
from mudsc_fast.matching.node import Matcher, NodeMatching
from mudsc_fast.matching.owners import Owners, Share, share_out
from mudsc_fast.matching.slices import TensorSlice, cut_all, tensor_slices
from mudsc_fast.matching.sweep import Bundle
from mudsc_fast.matching.weight import Rows, Update, WeightSimilarity
from mudsc_fast.ops.correlation import CorrelationAccumulator
from mudsc_fast.spec.permutation_spec import PermutationSpec

_MATCHING = "matching units"

#: At most this many ranks send their parts of a node to its owner; of more, the sums are reduced by all ranks.
_MAX_SENDERS = 6

#: Minimum number of samples worth moving, by the type of the device: sending co-moments and adding them takes as long
#: as this number of samples. Measured on CPUs; reckoned for GPUs, which compute faster than they send.
_MIN_MOVED_SAMPLES = {"cpu": 768, "cuda": 8192}

#: Minimum number of samples of a task of which some rows are worth moving, however many.
_MIN_SAMPLES_OF_ROWS = 512

#: The similarity and the assignment of a node take about as long as adding this many samples.
_MATCHING_SAMPLES = 300

#: Turns the sums of a node's weights into its similarity, e.g. blended with that of its activations.
Finish = Callable[[str, CorrelationAccumulator], Tensor]

#: The sums of the nodes of a bundle.
Sums = dict[str, CorrelationAccumulator]


@dataclass(frozen=True)
class Task:
    """The sums of a bundle that one rank has to provide: over all slices, or over its own slices of a spread bundle."""

    bundle: Bundle
    holder: int


class ParallelSolver:
    """Matches the nodes of a wave on their owners; all processes get the result.

    The similarity of a spread node is summed over the processes, each of which computes the part of its tensors. Where
    a wave would leave processes idle, they compute parts of what others have to compute, too.

    Parameters
    ----------
    spec
        The spec of what is matched.
    state_dict
        The first network's tensors, of which only the shapes and dtypes are read.
    ranks, owners
        The processes, and which of them computes what.
    weights
        Computes the sums of the tensors that this process owns.
    finish
        Turns sums into a similarity.
    match
        Matches the units of a bundle.
    exchange
        Gives all processes the result.
    timed
        Measures the time of the similarities.
    shares_tasks
        Whether processes can read the tensors of each other's tasks.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        state_dict: Mapping[str, Tensor],
        ranks: Ranks,
        owners: Owners,
        weights: WeightSimilarity,
        finish: Finish,
        match: Matcher,
        exchange: Exchange,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        shares_tasks: bool = True,
    ) -> None:
        self._spec, self._state_dict, self._ranks, self._owners = spec, state_dict, ranks, owners
        self._weights, self._finish, self._match = weights, finish, match
        self._units = spec.units(state_dict)
        self._slices = tensor_slices(spec, state_dict)
        self._shares_tasks = shares_tasks and not ranks.alone
        self._exchange, self._timed = exchange, timed
        wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in state_dict.values())
        self._wire_dtype = torch.float64 if wide else torch.float32
        #: For each node the matchings of its neighbors when its sums were last computed, by whichever process.
        self._before: dict[str, dict[str, NodeMatching]] = {}

    def __call__(self, bundles: Sequence[Bundle], current: Mapping[str, NodeMatching]) -> dict[str, NodeMatching]:
        """Return the matching of the nodes of bundles that are not neighbors of each other."""
        tasks = self._tasks(bundles)
        updates: dict[Task, dict[str, Update]] = {}
        shares: dict[Task, list[Share]] = {}
        if self._shares_tasks:
            updates = self._updates(tasks, current)
            shares = self._shares(tasks, updates)
        means: dict[Task, dict[str, Tensor]] = {}
        if not self._weights.divides_rows:
            means = self._means_of_updated({task: shares[task] for task in tasks if task in shares and task in updates})
        matching: dict[str, NodeMatching] = {}
        partial: dict[Task, Sums] = {}
        with self._ranks.step(_MATCHING):
            for task in tasks:
                if self._ranks.rank not in _ranks_of(task, shares):
                    continue
                if task in shares and task in updates:
                    sums = self._updated_sums(task, updates[task], shares[task], means.get(task, {}))
                elif task in shares:
                    sums = self._shared_sums(task, shares[task], current)
                else:
                    with self._timed():
                        sums = {node: self._weights.sums(node, current) for node in task.bundle}
                if task not in shares and task.bundle not in self._owners.spread:
                    matching.update(self._matched(task.bundle, sums))
                    continue
                partial[task] = sums
                for node in task.bundle:
                    sums[node]._check_range()  # before others add it to theirs
        for task, of_ranks in shares.items():
            self._join(task, of_ranks, partial.get(task, {}), is_update=task in updates)
        spread = [bundle for bundle in bundles if bundle in self._owners.spread]
        joined = self._join_spread(spread, partial)
        if spread or shares:
            with self._ranks.step(_MATCHING):
                for bundle in spread:
                    if self._owners.owner[bundle] == self._ranks.rank:
                        matching.update(self._matched(bundle, joined))
                for task in shares:
                    if task.holder == self._ranks.rank:
                        self._keep(task, current, partial[task])
                        if task.bundle not in self._owners.spread:
                            matching.update(self._matched(task.bundle, partial[task]))
        for bundle in bundles:
            for node in bundle:
                around = self._spec.neighbors(node)
                self._before[node] = {other: current[other] for other in around if other in current}
        return self._exchange(bundles, matching)

    def _tasks(self, bundles: Sequence[Bundle]) -> list[Task]:
        """Return what the ranks have to compute, in one order in all processes."""
        tasks = []
        for bundle in bundles:
            if bundle not in self._owners.spread:
                tasks.append(Task(bundle, self._owners.owner[bundle]))
                continue
            senders = self._senders(bundle)
            tasks += [Task(bundle, rank) for rank in (senders or range(self._ranks.size))]
        return tasks

    def _senders(self, bundle: Bundle) -> list[int]:
        """Return the ranks that send their parts of a spread bundle to its owner; none if all ranks reduce them."""
        ranks = [rank for rank, slices in enumerate(self._owners.slices) if any(slices[node] for node in bundle)]
        ranks = sorted({*ranks, self._owners.owner[bundle]})
        return ranks if len(ranks) <= 2 or (len(ranks) < self._ranks.size and len(ranks) <= _MAX_SENDERS) else []

    def _slices_of(self, task: Task, node: str) -> Sequence[TensorSlice]:
        return self._owners.slices[task.holder][node] if task.bundle in self._owners.spread else self._slices[node]

    # Who computes what

    def _updates(self, tasks: Sequence[Task], current: Mapping[str, NodeMatching]) -> dict[Task, dict[str, Update]]:
        """Return the tasks for which the holder updates the sums that it kept, and the updates of each node."""
        updates = {}
        for task in tasks:
            found = {}
            for node in task.bundle:
                before = self._before.get(node)
                update = None
                if before is not None:
                    update = self._weights.update_of(node, before, current, self._slices_of(task, node))
                if update is not None:
                    found[node] = update
            if len(found) == len(task.bundle):
                updates[task] = found
        return updates

    def _shares(self, tasks: Sequence[Task], updates: Mapping[Task, Mapping[str, Update]]) -> dict[Task, list[Share]]:
        """Return the tasks that several processes should compute, so that none waits for others for long."""
        loads = [0.0] * self._ranks.size
        works, samples = {}, {}
        for task in tasks:
            update = updates.get(task)
            # Spread bundles are matched later, when all ranks have computed their parts.
            matching = 0 if task.bundle in self._owners.spread else _MATCHING_SAMPLES
            of_nodes = {
                node: matching + (update[node].work if update else sum(p.samples for p in self._slices_of(task, node)))
                for node in task.bundle
            }
            if update is None or all(of_node.is_divisible for of_node in update.values()):
                works[task], samples[task] = self._work(of_nodes), sum(of_nodes.values())
            else:
                loads[task.holder] += self._work(of_nodes)

        def is_worth_moving(task: Task, fraction: float) -> bool:
            if self._weights.divides_rows:
                return samples[task] >= _MIN_SAMPLES_OF_ROWS
            min_moved = _MIN_MOVED_SAMPLES.get(self._weights.device.type, _MIN_MOVED_SAMPLES["cuda"])
            return fraction * samples[task] >= min_moved

        return share_out(works, {task: task.holder for task in works}, loads, is_worth_moving)

    def _work(self, samples: Mapping[str, float]) -> float:
        """Return the work of adding some samples of each node."""
        return sum(self._units[node] ** 2 * count for node, count in samples.items())

    def _cut(self, task: Task, node: str, shares: Sequence[Share], rank: int) -> list[TensorSlice]:
        """Return the slices of a shared task that a rank computes."""
        return [
            part
            for other, begin, end in shares
            if other == rank
            for part in cut_all(self._slices_of(task, node), begin, end, self._state_dict, self._units)
        ]

    def _rows(self, node: str, shares: Sequence[Share], rank: int | None = None) -> Rows:
        """Return the rows of the sums of a shared task's node that a rank computes, by default this one."""
        rank = self._ranks.rank if rank is None else rank
        begin, end = next(((begin, end) for other, begin, end in shares if other == rank), (0.0, 0.0))
        return round(begin * self._units[node]), round(end * self._units[node])

    # What this process computes

    def _shared_sums(self, task: Task, shares: Sequence[Share], current: Mapping[str, NodeMatching]) -> Sums:
        """Return the sums over the shares of a task that this process computes."""
        with self._timed():
            if self._weights.divides_rows:
                return {
                    node: self._weights.sums_of(node, current, self._slices_of(task, node), self._rows(node, shares))
                    for node in task.bundle
                }
            slices = {node: self._cut(task, node, shares, self._ranks.rank) for node in task.bundle}
            return {node: self._weights.sums_of(node, current, slices[node]) for node in task.bundle}

    def _updated_sums(
        self, task: Task, updates: Mapping[str, Update], shares: Sequence[Share], means: Mapping[str, Tensor]
    ) -> Sums:
        """Return the sums of the holder after its share of an update, or what the shares of another process add."""
        own = [(begin, end) for rank, begin, end in shares if rank == self._ranks.rank]
        with self._timed():
            rows: dict[str, Rows | None] = dict.fromkeys(task.bundle)
            parts = updates
            if self._weights.divides_rows:
                rows = {node: self._rows(node, shares) for node in task.bundle}
            else:
                parts = {node: updates[node].part(own) for node in task.bundle}
            if task.holder == self._ranks.rank:
                return {node: self._weights.updated(node, parts[node], rows[node]) for node in task.bundle}
            return {
                node: self._weights.difference(node, parts[node], means.get(node), rows[node]) for node in task.bundle
            }

    def _matched(self, bundle: Bundle, sums: Mapping[str, CorrelationAccumulator]) -> dict[str, NodeMatching]:
        with self._timed():
            similarities = {node: self._finish(node, sums[node]) for node in bundle}
        return self._match(similarities, self._spec.groups(bundle[0]).count)

    def _keep(self, task: Task, current: Mapping[str, NodeMatching], sums: Sums) -> None:
        for node in task.bundle:
            self._weights.keep(node, current, sums[node])

    # What processes tell each other, all in one order, so that none waits for another in a circle

    def _means_of_updated(self, shares: Mapping[Task, Sequence[Share]]) -> dict[Task, dict[str, Tensor]]:
        """Send the means of the sums that are updated to the ranks that help; return those sent to this rank."""
        means: dict[Task, dict[str, Tensor]] = {}
        for task, of_ranks in shares.items():
            for rank in _helpers(task, of_ranks):
                if self._ranks.rank == task.holder:
                    own = [self._weights.kept_mean(node) for node in task.bundle]
                    self._ranks.send(own, rank, _MATCHING)
                elif self._ranks.rank == rank:
                    means[task] = {node: self._weights.empty_mean(node) for node in task.bundle}
                    self._ranks.receive(list(means[task].values()), task.holder, _MATCHING)
        return means

    def _join(self, task: Task, shares: Sequence[Share], sums: Sums, *, is_update: bool) -> None:
        """Add the shares of a task to that of its holder."""
        for node in task.bundle:
            for rank in _helpers(task, shares):
                if self._ranks.rank not in (rank, task.holder):
                    continue
                wire = (self._wire_dtype, self._ranks, _MATCHING)
                if self._weights.divides_rows:
                    rows = self._rows(node, shares, rank)
                    if self._ranks.rank == rank:
                        send_rows(sums[node], rows, task.holder, *wire, is_difference=is_update)
                    else:
                        samples = sum(part.samples for part in self._slices_of(task, node))
                        receive_rows(sums[node], rows, samples, rank, *wire, is_difference=is_update)
                elif self._ranks.rank == rank:
                    (send_difference if is_update else send_sums)(sums[node], task.holder, *wire)
                elif is_update:
                    receive_difference(sums[node], rank, *wire)
                else:
                    samples = sum(part.samples for part in self._cut(task, node, shares, rank))
                    receive_sums(sums[node], samples, rank, *wire)

    def _join_spread(self, spread: Sequence[Bundle], partial: Mapping[Task, Sums]) -> Sums:
        """Return the sums of spread bundles in their owners. The parts are kept for the next visit, and not changed."""
        joined: Sums = {}
        rank = self._ranks.rank
        reduced: Sums = {}
        for bundle in spread:
            own = partial.get(Task(bundle, rank), {})
            senders, owner = self._senders(bundle), self._owners.owner[bundle]
            if not senders:
                reduced.update(own)
                continue
            for node in bundle:
                if rank == owner:
                    joined[node] = copy.deepcopy(own[node])
                for sender in senders:
                    if sender == owner:
                        continue
                    if rank == sender:
                        send_sums(own[node], owner, self._wire_dtype, self._ranks, _MATCHING)
                    elif rank == owner:
                        samples = sum(part.samples for part in self._owners.slices[sender][node])
                        receive_sums(joined[node], samples, sender, self._wire_dtype, self._ranks, _MATCHING)
        roots = {node: self._owners.owner[bundle] for bundle in spread for node in bundle}
        joined.update(reduce_sums(reduced, self._owners.samples, roots, self._ranks, _MATCHING))
        return joined


def _helpers(task: Task, shares: Sequence[Share]) -> list[int]:
    """Return the ranks that compute a share of a task of another rank."""
    return sorted({rank for rank, _, _ in shares} - {task.holder})


def _ranks_of(task: Task, shares: Mapping[Task, Sequence[Share]]) -> list[int]:
    """Return the ranks that compute a task or a share of it."""
    return [task.holder, *_helpers(task, shares.get(task, ()))]
