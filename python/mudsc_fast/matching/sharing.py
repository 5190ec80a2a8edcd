"""Tasks of a wave that several ranks compute together, so that none of them waits for long."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast import _memory
from mudsc_fast.distributed.ranks import Message, OtherRankFailed, Ranks
from mudsc_fast.distributed.reduction import receive_difference, receive_sums, send_difference, send_sums
from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.matching.owners import Share
from mudsc_fast.matching.slices import TensorSlice, cut_all
from mudsc_fast.matching.sweep import Bundle
from mudsc_fast.matching.weight import Rows, Update, WeightSimilarity
from mudsc_fast.ops.correlation import CorrelationAccumulator

MATCHING = "matching units"

#: Minimum number of samples worth moving, by the type of the device: sending co-moments and adding them takes as long
#: as this number of samples. Measured on CPUs; estimated for GPUs, which compute faster than they send.
_MIN_MOVED_SAMPLES = {"cpu": 768, "cuda": 8192}

#: Minimum number of samples of a task of which rows are worth moving.
_MIN_SAMPLES_OF_ROWS = 512

#: Entries up to this size have sums of products that float32 can hold, whatever the size of the network.
_MAX_IN_FLOAT32 = 1e10

#: The sums of the nodes of a bundle.
Sums = dict[str, CorrelationAccumulator]


def wire_dtype(state_dict: Mapping[str, Tensor], largest: float) -> torch.dtype:
    """Return the dtype in which sums over tensors are sent, given the largest magnitude of an entry of any network.

    Where features are multiplied in float32, float32 can hold sums as exactly as they are known, if they are in range.
    """
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in state_dict.values())
    return torch.float64 if wide or largest > _MAX_IN_FLOAT32 else torch.float32


@dataclass(frozen=True)
class Task:
    """The sums of a bundle that one rank has to provide: over all slices, or over its own slices of a spread bundle."""

    bundle: Bundle
    holder: int


@dataclass(frozen=True)
class Plan:
    """How the tasks of a wave are computed, the same in all processes.

    Attributes
    ----------
    shares
        The tasks that several ranks compute, with the share of each rank.
    by_rows
        The shared tasks of which each rank computes some rows, over all samples. Of the others, it computes all rows
        over some of the samples.
    updates
        The tasks whose sums the holder has kept, with the update of each node.
    current
        The current matching of all nodes.
    """

    shares: Mapping[Task, Sequence[Share]]
    by_rows: Sequence[Task]
    updates: Mapping[Task, Mapping[str, Update]]
    current: Mapping[str, NodeMatching]

    @property
    def by_samples(self) -> list[Task]:
        """The other shared tasks."""
        return [task for task in self.shares if task not in self.by_rows]

    def helpers(self, task: Task) -> list[int]:
        """Return the ranks other than the holder that compute a share of a task."""
        return sorted({rank for rank, _, _ in self.shares.get(task, ())} - {task.holder})


class Sharing(ABC):
    """Computes the shares of this process in tasks that are divided in one way, and puts those of all together.

    Parameters
    ----------
    ranks
        The processes.
    weights
        Computes sums.
    state_dict
        The first network's tensors, of which only the shapes and dtypes are read.
    units
        The number of units of every node.
    slices
        For each rank and each node, the slices of tensors that the rank compares.
    dtype
        The dtype in which sums are sent, of :func:`wire_dtype`.
    """

    def __init__(
        self,
        ranks: Ranks,
        weights: WeightSimilarity,
        state_dict: Mapping[str, Tensor],
        units: Mapping[str, int],
        slices: Sequence[Mapping[str, Sequence[TensorSlice]]],
        dtype: torch.dtype,
    ) -> None:
        self._ranks, self._weights, self._state_dict, self._units = ranks, weights, state_dict, units
        self._slices = slices
        self.wire_dtype = dtype

    @abstractmethod
    def is_worth_moving(self, samples: float, fraction: float) -> bool:
        """Return whether it is worth moving a fraction of a task with this number of samples."""

    @abstractmethod
    def begin(self, plan: Plan) -> None:
        """Begin a wave; all processes must call this method."""

    @abstractmethod
    def compute(self, task: Task) -> Sums:
        """Return the sums of the share of a task that this process computes."""

    @abstractmethod
    def join(self, task: Task, sums: Sums) -> None:
        """Add the shares of other ranks to those of the holder."""


class SharingSamples(Sharing):
    """Ranks compute all rows of the sums, each over some of the samples."""

    def is_worth_moving(self, samples: float, fraction: float) -> bool:
        """Return whether the part that is moved has enough samples."""
        return fraction * samples >= _MIN_MOVED_SAMPLES.get(self._weights.device.type, _MIN_MOVED_SAMPLES["cuda"])

    def begin(self, plan: Plan) -> None:
        """Send the means of the sums that are updated to the ranks that help."""
        self._plan = plan
        self._means: dict[Task, dict[str, Tensor]] = {}
        for task in plan.by_samples:
            if task not in plan.updates:
                continue
            for rank in plan.helpers(task):
                if self._ranks.rank == task.holder:
                    own = [self._weights.kept_mean(node) for node in task.bundle]
                    self._ranks.send(own, rank, MATCHING)
                elif self._ranks.rank == rank:
                    means = self._means[task] = {node: self._weights.empty_mean(node) for node in task.bundle}
                    self._ranks.receive(list(means.values()), task.holder, MATCHING)

    def compute(self, task: Task) -> Sums:
        """Return the sums over the samples that this process has to add, or what these change."""
        plan, rank = self._plan, self._ranks.rank
        if task not in plan.updates:
            return {
                node: self._weights.sums_of(node, plan.current, self._cut(task, node, rank)) for node in task.bundle
            }
        own = [(begin, end) for other, begin, end in plan.shares[task] if other == rank]
        parts = {node: plan.updates[task][node].part(own) for node in task.bundle}
        if rank == task.holder:
            return {node: self._weights.updated(node, part) for node, part in parts.items()}
        return {node: self._weights.difference(node, part, self._means[task][node]) for node, part in parts.items()}

    def join(self, task: Task, sums: Sums) -> None:
        """Send the sums to the holder, which adds them to its own. Helpers call this, too, when all have computed."""
        is_update, wire = task in self._plan.updates, (self.wire_dtype, self._ranks, MATCHING)
        for node in task.bundle:
            for rank in self._plan.helpers(task):
                if self._ranks.rank == rank:
                    (send_difference if is_update else send_sums)(sums[node], task.holder, *wire)
                elif self._ranks.rank == task.holder and is_update:
                    receive_difference(sums[node], rank, *wire)
                elif self._ranks.rank == task.holder:
                    samples = sum(part.samples for part in self._cut(task, node, rank))
                    receive_sums(sums[node], samples, rank, *wire)

    def _cut(self, task: Task, node: str, rank: int) -> list[TensorSlice]:
        """Return the slices of a shared task that a rank computes."""
        return [
            part
            for other, begin, end in self._plan.shares[task]
            if other == rank
            for part in cut_all(self._slices[task.holder][node], begin, end, self._state_dict, self._units)
        ]


class SharingRows(Sharing):
    """Ranks compute some rows of the sums each, over all samples, and send them while they compute the next task.

    The units of other models are centered by every rank, but all else is divided: the products, the sums in float64 and
    what is sent.
    """

    def is_worth_moving(self, samples: float, fraction: float) -> bool:  # noqa: ARG002
        """Return whether the whole task has enough samples: a part has as many, in fewer rows."""
        return samples >= _MIN_SAMPLES_OF_ROWS

    def begin(self, plan: Plan) -> None:
        """Begin to receive the rows that other ranks will send."""
        self._plan = plan
        self._incoming: dict[tuple[Task, str, int], list[Message]] = {}
        self._outgoing: dict[Task, list[Message]] = {}
        for task in plan.by_rows:
            for rank in plan.helpers(task):
                for node in task.bundle:
                    memory = self._message_memory(task, node, rank) if self._ranks.rank == task.holder else []
                    if memory:
                        self._incoming[task, node, rank] = [
                            self._ranks.start_receiving(tensor, rank, MATCHING) for tensor in memory
                        ]

    def compute(self, task: Task) -> Sums:
        """Return the sums of the holder with the rows that it computes. Helpers send theirs and return nothing."""
        plan, rank = self._plan, self._ranks.rank
        rows = {node: self._rows(task, node, rank) for node in task.bundle}
        if task not in plan.updates:
            slices = self._slices[task.holder]
            sums = {node: self._weights.sums_of(node, plan.current, slices[node], rows[node]) for node in task.bundle}
        elif rank == task.holder:
            return {
                node: self._weights.updated(node, update, rows[node]) for node, update in plan.updates[task].items()
            }
        else:
            sums = {
                node: self._weights.difference(node, update, rows=rows[node])
                for node, update in plan.updates[task].items()
            }
        if rank == task.holder:
            return sums
        self._send(task, sums)
        return {}

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Context manager for code that computes and joins shares while messages are sent and received.

        After an error the others still get what they wait for, before they learn of it.
        """
        try:
            yield
        except Exception:
            for task in self._plan.by_rows:
                if self._ranks.rank in self._plan.helpers(task) and task not in self._outgoing:
                    self._send(task, None)
            self._complete()
            raise
        self._complete()

    def join(self, task: Task, sums: Sums) -> None:
        """Wait for the rows of the helpers, and put them into the sums. Only the holder calls this."""
        is_update = task in self._plan.updates
        for (other, node, rank), messages in self._incoming.items():
            if other != task:
                continue
            received = [message.wait() for message in messages]
            if received[-1].flatten()[:1].isnan().any():
                raise OtherRankFailed
            moments, part = sums[node]._moments, slice(*self._rows(task, node, rank))
            if is_update:
                none = torch.zeros_like(moments.mean[0])
                for comoment, added in zip(moments.comoments, received[0], strict=True):
                    moments.accumulate(comoment[part], added, none[part], none)
                continue
            moments.comoments[:, part] = received[0]
            moments.num_samples = sum(piece.samples for piece in self._slices[task.holder][node])
            for own, values in zip((moments.mean, moments.squares), received[1], strict=True):
                own[0, part], own[1:] = values[0, part], values[1:]

    def _rows(self, task: Task, node: str, rank: int) -> Rows:
        """Return the rows of the sums of a task's node that a rank computes."""
        shares = self._plan.shares[task]
        begin, end = next(((begin, end) for other, begin, end in shares if other == rank), (0.0, 0.0))
        return round(begin * self._units[node]), round(end * self._units[node])

    def _message_memory(self, task: Task, node: str, rank: int) -> list[Tensor]:
        """Return memory for what a rank sends of a task's node: co-moments and, unless they are a difference, moments.

        A share that is too small for one row sends nothing.
        """
        first, last = self._rows(task, node, rank)
        if first == last:
            return []
        mean = self._weights.empty_mean(node)
        models, units = mean.shape
        comoments = _memory.empty((models - 1, last - first, units), self.wire_dtype, mean.device)
        return [comoments] if task in self._plan.updates else [comoments, mean.new_empty(2, models, units)]

    def _send(self, task: Task, sums: Sums | None) -> None:
        """Begin to send the rows that this process computed. Without them, because it has failed, send NaN."""
        messages = self._outgoing[task] = []
        for node in task.bundle:
            memory = self._message_memory(task, node, self._ranks.rank)
            if sums is None:
                contents: list[Tensor] = [tensor.fill_(torch.nan) for tensor in memory]
            else:
                moments, rows = sums[node]._moments, slice(*self._rows(task, node, self._ranks.rank))
                contents = [moments.comoments[:, rows], torch.stack([moments.mean, moments.squares])]
            for tensor, content in zip(memory, contents, strict=False):
                messages.append(self._ranks.start_sending(tensor.copy_(content), task.holder, MATCHING))

    def _complete(self) -> None:
        for messages in (*self._incoming.values(), *self._outgoing.values()):
            for message in messages:
                message.wait()
        self._incoming, self._outgoing = {}, {}
