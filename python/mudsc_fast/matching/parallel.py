"""Matching of the nodes of a wave in several processes, each node on its owner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.reduction import receive_sums, reduce_sums, send_sums
from mudsc_fast.matching.exchange import Exchange
from mudsc_fast.matching.node import Matcher, NodeMatching
from mudsc_fast.matching.owners import Owners, Share, share_out
from mudsc_fast.matching.sharing import MATCHING, Plan, Sharing, SharingRows, SharingSamples, Sums, Task
from mudsc_fast.matching.sweep import Bundle
from mudsc_fast.matching.weight import Update, WeightSimilarity
from mudsc_fast.ops.correlation import CorrelationAccumulator
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Up to this many ranks send their parts of a node to its owner. More ranks reduce the sums together.
_MAX_SENDERS = 6

#: Number of samples per unit above which a task is shared by samples. A helper that computes rows centers all samples
#: of the other models' units. With many samples, that takes longer than sending all rows of the sums.
_MANY_SAMPLES = 3

#: The similarity and the assignment of a node take about as long as adding this many samples.
_MATCHING_SAMPLES = 300

#: Returns the similarity of a node, given the sums of its weights. It may be blended with that of its activations.
Finish = Callable[[str, CorrelationAccumulator], Tensor]


class ParallelSolver:
    """Matches the nodes of a wave on their owners, and sends the result to all processes.

    The sums of a spread node are added over the processes, each of which computes the sums over its own tensors.
    Processes that would be idle in a wave compute a part of the work of others.

    Parameters
    ----------
    spec
        The spec of what is matched.
    state_dict
        The first network's tensors, of which only the shapes and dtypes are read.
    ranks, owners
        The processes, and the distribution of work over them.
    weights
        Computes the sums of the tensors that this process owns.
    finish
        Returns the similarity of a node, given its sums.
    match
        Matches the units of a bundle.
    exchange
        Sends matchings to all processes.
    dtype
        The dtype in which sums are sent.
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
        dtype: torch.dtype,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        shares_tasks: bool = True,
    ) -> None:
        self._spec, self._ranks, self._owners = spec, ranks, owners
        self._weights, self._finish, self._match = weights, finish, match
        self._units = spec.units(state_dict)
        self._shares_tasks = shares_tasks and not ranks.alone
        self._exchange, self._timed = exchange, timed
        self._divides_rows = weights.divides_rows and ranks.sends_from_host
        self._rows = SharingRows(ranks, weights, state_dict, self._units, owners.slices, dtype)
        self._samples = SharingSamples(ranks, weights, state_dict, self._units, owners.slices, dtype)
        #: For each node the matchings of its neighbors when its sums were last computed, by whichever process.
        self._before: dict[str, dict[str, NodeMatching]] = {}

    def __call__(self, bundles: Sequence[Bundle], current: Mapping[str, NodeMatching]) -> dict[str, NodeMatching]:
        """Return the matching of the nodes of bundles that are not neighbors of each other."""
        tasks = self._tasks(bundles)
        plan = self._plan(tasks, current)
        rank = self._ranks.rank
        self._rows.begin(plan)
        self._samples.begin(plan)
        matching: dict[str, NodeMatching] = {}
        sums: dict[Task, Sums] = {}
        with self._ranks.step(MATCHING), self._rows.exchanging():
            for task in plan.shares:  # first, because others wait for these, and in the order in which they do
                if rank in plan.helpers(task):
                    sums[task] = self._computed(task, plan)
            for task in tasks:
                if task.holder != rank:
                    continue
                found = self._computed(task, plan)
                if task in plan.shares or task.bundle in self._owners.spread:
                    sums[task] = found
                else:
                    matching.update(self._matched(task.bundle, found))
            for task in plan.by_rows:
                if task.holder == rank:
                    self._rows.join(task, sums[task])
                    matching.update(self._completed(task, sums, current))
        for task in plan.by_samples:
            self._samples.join(task, sums.get(task, {}))
        if plan.by_samples:
            with self._ranks.step(MATCHING):
                for task in plan.by_samples:
                    if task.holder == rank:
                        matching.update(self._completed(task, sums, current))
        spread = [bundle for bundle in bundles if bundle in self._owners.spread]
        joined = self._join_spread(spread, sums)
        if spread:
            with self._ranks.step(MATCHING):
                for bundle in spread:
                    if self._owners.owner[bundle] == rank:
                        matching.update(self._matched(bundle, joined))
        for bundle in bundles:
            for node in bundle:
                around = self._spec.neighbors(node)
                self._before[node] = {other: current[other] for other in around if other in current}
        return self._exchange(bundles, matching)

    def _computed(self, task: Task, plan: Plan) -> Sums:
        """Return the sums of a task, or of this process's share of it."""
        with self._timed():
            if task in plan.shares:
                sums = (self._rows if task in plan.by_rows else self._samples).compute(task)
            else:
                sums = {node: self._weights.sums(node, plan.current) for node in task.bundle}
        for accumulator in sums.values():
            accumulator._check_range()  # before others add these sums to theirs
        return sums

    def _completed(
        self, task: Task, sums: dict[Task, Sums], current: Mapping[str, NodeMatching]
    ) -> dict[str, NodeMatching]:
        """Keep the complete sums of a shared task, and match its nodes unless they are spread."""
        for node in task.bundle:
            self._weights.keep(node, current, sums[task][node])
        if task.bundle in self._owners.spread:
            return {}
        return self._matched(task.bundle, sums.pop(task))

    def _tasks(self, bundles: Sequence[Bundle]) -> list[Task]:
        """Return the tasks of all ranks, in the same order in all processes."""
        tasks = []
        for bundle in bundles:
            if bundle not in self._owners.spread:
                tasks.append(Task(bundle, self._owners.owner[bundle]))
                continue
            senders = self._senders(bundle)
            tasks += [Task(bundle, rank) for rank in (senders or range(self._ranks.size))]
        return tasks

    def _senders(self, bundle: Bundle) -> list[int]:
        """Return the ranks that send their parts of a spread bundle to its owner. Empty if all ranks reduce them."""
        ranks = [rank for rank, slices in enumerate(self._owners.slices) if any(slices[node] for node in bundle)]
        ranks = sorted({*ranks, self._owners.owner[bundle]})
        return ranks if len(ranks) <= 2 or (len(ranks) < self._ranks.size and len(ranks) <= _MAX_SENDERS) else []

    def _plan(self, tasks: Sequence[Task], current: Mapping[str, NodeMatching]) -> Plan:
        if not self._shares_tasks:
            return Plan({}, [], {}, current)
        updates = self._updates(tasks, current)
        shares = self._shares(tasks, updates)
        return Plan(shares, [task for task in shares if self._sharing(task, updates) is self._rows], updates, current)

    def _sharing(self, task: Task, updates: Mapping[Task, object]) -> Sharing:
        """Return the way in which a task is shared, if it is."""
        if not self._divides_rows:
            return self._samples
        many = all(
            sum(part.samples for part in self._owners.slices[task.holder][node]) > _MANY_SAMPLES * self._units[node]
            for node in task.bundle
        )
        return self._samples if many and task not in updates else self._rows

    def _updates(self, tasks: Sequence[Task], current: Mapping[str, NodeMatching]) -> dict[Task, dict[str, Update]]:
        """Return the updates of each node for the tasks whose holder updates the sums that it kept."""
        updates = {}
        for task in tasks:
            found = {}
            for node in task.bundle:
                before = self._before.get(node)
                update = None
                if before is not None:
                    update = self._weights.update_of(node, before, current, self._owners.slices[task.holder][node])
                if update is not None:
                    found[node] = update
            if len(found) == len(task.bundle):
                updates[task] = found
        return updates

    def _shares(self, tasks: Sequence[Task], updates: Mapping[Task, Mapping[str, Update]]) -> dict[Task, list[Share]]:
        """Return the tasks that several ranks should compute together, so that no rank waits long for others."""
        loads = [0.0] * self._ranks.size
        works, samples, after = {}, {}, {}
        for task in tasks:
            update, slices = updates.get(task), self._owners.slices[task.holder]
            of_nodes = {
                node: update[node].work if update else sum(part.samples for part in slices[node])
                for node in task.bundle
            }
            # The owner of a spread bundle matches it while all others wait.
            is_matched = task.bundle not in self._owners.spread
            matching = self._work(dict.fromkeys(task.bundle, _MATCHING_SAMPLES)) if is_matched else 0.0
            if update is None or all(of_node.is_divisible for of_node in update.values()):
                works[task], samples[task], after[task] = self._work(of_nodes), sum(of_nodes.values()), matching
            else:
                loads[task.holder] += self._work(of_nodes) + matching
        return share_out(
            works,
            {task: task.holder for task in works},
            loads,
            after,
            lambda task, fraction: self._sharing(task, updates).is_worth_moving(samples[task], fraction),
        )

    def _work(self, samples: Mapping[str, float]) -> float:
        """Return the work of adding some samples of each node."""
        return sum(self._units[node] ** 2 * count for node, count in samples.items())

    def _matched(self, bundle: Bundle, sums: Mapping[str, CorrelationAccumulator]) -> dict[str, NodeMatching]:
        with self._timed():
            similarities = {node: self._finish(node, sums[node]) for node in bundle}
        return self._match(similarities, self._spec.groups(bundle[0]).count)

    def _join_spread(self, spread: Sequence[Bundle], partial: Mapping[Task, Sums]) -> Sums:
        """Return the total sums of the spread bundles that this rank owns. The parts are not modified."""
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
                        send_sums(own[node], owner, self._samples.wire_dtype, self._ranks, MATCHING)
                    elif rank == owner:
                        samples = sum(part.samples for part in self._owners.slices[sender][node])
                        receive_sums(joined[node], samples, sender, self._samples.wire_dtype, self._ranks, MATCHING)
        roots = {node: self._owners.owner[bundle] for bundle in spread for node in bundle}
        joined.update(reduce_sums(reduced, self._owners.samples, roots, self._ranks, MATCHING))
        return joined
