"""The processes of a torch.distributed group: collectives, and errors when a process fails."""

from __future__ import annotations

import os
import socket
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")
Failure = TypeVar("Failure", bound=Exception)

#: Maximum size of a message of packed tensors, and the size from which a tensor is sent on its own, because copying it
#: takes longer than starting another message.
_BUCKET_BYTES, _ALONE_BYTES = 64 * 2**20, 8 * 2**20

#: Seconds that the remaining processes search for the one that is gone, and the interval between two checks.
_SEARCH_SECONDS, _POLL_SECONDS = 20.0, 0.05


#: Name of the attribute that marks an exception as raised by all ranks.
_AGREED = "_mudsc_fast_agreed"


class DistributedError(RuntimeError):
    """A process of the group failed or died. The others raise this error, which names the rank and the cause.

    Attributes
    ----------
    reporter
        The lowest remaining rank. Only this rank should print the message, so that it is shown once.
    """

    def __init__(self, message: str, reporter: int = 0) -> None:
        super().__init__(message)
        self.reporter = reporter


class OtherRankFailed(Exception):  # noqa: N818  not an error of this process
    """Raised in a step that cannot continue because another rank failed, which reports the cause."""


class Terminated(BaseException):
    """Raised when a signal asks this process to exit, so that it cleans up first."""


def is_reported_elsewhere(error: BaseException, rank: int) -> bool:
    """Return whether another rank prints this error, so that this rank must not."""
    if isinstance(error, DistributedError):
        return error.reporter != rank
    return rank != 0 and getattr(error, _AGREED, False)


def same_on_all(error: Failure, cause: BaseException | None = None) -> Failure:
    """Mark an error as raised by all ranks, and return it. If `cause` is given, mark it only if the cause is marked."""
    if cause is None or getattr(cause, _AGREED, False):
        setattr(error, _AGREED, True)
    return error


class Ranks:
    """The processes of a group, or this process alone.

    All processes must call the same methods in the same order. Without a group, no method communicates.

    Parameters
    ----------
    group
        The process group, or None for this process alone.

    Attributes
    ----------
    rank, size
        The rank of this process in the group, and the number of processes.
    bytes_sent
        Number of bytes of the tensors that this process has sent.

    Raises
    ------
    TypeError
        If `group` is not a process group.
    ValueError
        If this process is not a member of the group.
    RuntimeError
        If torch.distributed is not initialized.
    """

    #: The most recent instance with more than one process. A weak reference, because the group's threads must have
    #: ended before Python exits, which takes until the last reference to the group is gone.
    latest: ClassVar[weakref.ref[Ranks] | None] = None

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.bytes_sent = 0
        self._group = group
        self.rank, self.size = 0, 1
        self._direct: set[str] = set()
        self._hosts: list[tuple[str, int]] = []
        if group is None:
            return
        if not distributed.is_available():
            raise RuntimeError("group requires a build of torch with torch.distributed")
        if not isinstance(group, distributed.ProcessGroup):
            if group is distributed.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("group must contain this process: call this function only in its members")
            raise TypeError(
                f"group must be a process group such as torch.distributed.group.WORLD, got {type(group).__name__}"
            )
        if not distributed.is_initialized():
            raise RuntimeError("group requires torch.distributed: call torch.distributed.init_process_group first")
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self._direct = _devices_sent_from(distributed.get_backend_config(group))
        if self.size > 1:
            self._hosts = self.gather_objects((socket.gethostname(), os.getpid()), "starting")
            Ranks.latest = weakref.ref(self)

    @property
    def has_group(self) -> bool:
        """Whether there is a process group, even one of a single process."""
        return self._group is not None

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    def progress(self, progress: bool | None) -> bool | None:
        """Return `progress` on rank 0, and False on other ranks, which show no progress bars."""
        return progress if self.rank == 0 else False

    @contextmanager
    def step(self, doing: str) -> Iterator[None]:
        """Context manager for code that does not communicate. On exit, check that it succeeded in all processes.

        Parameters
        ----------
        doing
            What the code does, for error messages, for example "matching units".

        Raises
        ------
        DistributedError
            If the code raised an exception in some processes. If it raised the same exception in all of them, that
            exception is raised instead.
        """
        if self.alone:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        except BaseException as error:  # interrupted: exit without a collective
            self._leave_note(f"was stopped while {doing} ({type(error).__name__})")
            raise
        self._agree(doing, failure)

    def _agree(self, doing: str, failure: Exception | None) -> None:
        reported = failure is not None and not isinstance(failure, OtherRankFailed)
        if reported:  # another process may be waiting for this one in the step
            self._leave_note(f"failed while {doing}: {type(failure).__name__}: {failure}")
        failed = torch.tensor([failure is not None], dtype=torch.int32, device=self._wire_device("cpu"))
        with self._communicating(doing):
            distributed.all_reduce(failed, op=distributed.ReduceOp.MAX, group=self._group)
        if not int(failed):
            return
        if reported:
            self._remove_note()
        own = (type(failure).__name__, str(failure)) if reported else None
        reports = self.gather_objects(own, doing)
        if failure is not None and own is not None and all(report == own for report in reports):
            raise same_on_all(failure)
        rank, (kind, text) = next((rank, report) for rank, report in enumerate(reports) if report is not None)
        raise DistributedError(f"rank {rank} failed while {doing}: {kind}: {text}") from failure

    def check_same(self, parts: Mapping[str, str]) -> None:
        """Raise a ValueError in all processes if `parts` differ between processes. It names the first difference."""
        if self.alone:
            return
        first, *others = self.gather_objects(dict(parts), "comparing the inputs")
        for rank, other in enumerate(others, start=1):
            for part in {**first, **other}:
                here, there = first.get(part, "none"), other.get(part, "none")
                if here != there:
                    raise same_on_all(
                        ValueError(
                            f"all ranks must be given the same {part}: got {_shortened(here)} on rank 0, but "
                            f"{_shortened(there)} on rank {rank}"
                        )
                    )

    def gather_objects(self, value: Value, doing: str) -> list[Value]:
        """Return the values of all processes, in the order of ranks. Values are pickled, so they should be small."""
        if self.alone:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self._communicating(doing), self._on_own_gpu():
            distributed.all_gather_object(gathered, value, group=self._group)
        return gathered

    def broadcast_object(self, value: Value, doing: str, root: int = 0) -> Value:
        """Return the value of rank `root`."""
        if self.alone:
            return value
        values = [value]
        with self._communicating(doing), self._on_own_gpu():
            distributed.broadcast_object_list(values, src=self._global(root), group=self._group)
        return values[0]

    def all_reduce(self, tensors: Sequence[Tensor], doing: str) -> None:
        """Sum tensors of one dtype over all processes, in place. Small tensors share a message."""
        if self.alone:
            return
        with self._communicating(doing):
            for bucket in _buckets(tensors):
                with self._on_wire(bucket) as flat:
                    self.bytes_sent += flat.nbytes
                    distributed.all_reduce(flat, group=self._group)

    def reduce(self, tensors: Sequence[Tensor], root: int, doing: str) -> None:
        """Sum tensors of one dtype over all processes into those of rank `root`, and overwrite those of others."""
        if self.alone:
            return
        with self._communicating(doing):
            for bucket in _buckets(tensors):
                with self._on_wire(bucket) as flat:
                    self.bytes_sent += flat.nbytes if self.rank != root else 0
                    distributed.reduce(flat, dst=self._global(root), group=self._group)

    def broadcast(self, tensors: Sequence[Tensor], root: int, doing: str) -> None:
        """Overwrite tensors of one dtype with those of rank `root`."""
        if self.alone:
            return
        with self._communicating(doing):
            for bucket in _buckets(tensors):
                with self._on_wire(bucket) as flat:
                    self.bytes_sent += flat.nbytes if self.rank == root else 0
                    distributed.broadcast(flat, src=self._global(root), group=self._group)

    def send(self, tensors: Sequence[Tensor], to: int, doing: str) -> None:
        """Send tensors of one dtype to another rank, which must call :meth:`receive`."""
        with self._communicating(doing):
            for bucket in _buckets(tensors):
                with self._on_wire(bucket, back=False) as flat:
                    self.bytes_sent += flat.nbytes
                    distributed.send(flat, dst=self._global(to), group=self._group)

    def receive(self, tensors: Sequence[Tensor], source: int, doing: str) -> None:
        """Overwrite tensors of one dtype with those that another rank sends."""
        with self._communicating(doing):
            for bucket in _buckets(tensors):
                with self._on_wire(bucket) as flat:
                    distributed.recv(flat, src=self._global(source), group=self._group)

    @property
    def sends_from_host(self) -> bool:
        """Whether the group sends tensors on the CPU without a copy to another device."""
        return "cpu" in self._direct

    def start_sending(self, tensor: Tensor, to: int, doing: str) -> Message:
        """Send a contiguous tensor on the CPU while this process continues; see :meth:`start_receiving`."""
        self.bytes_sent += tensor.nbytes
        with self._communicating(doing):
            work = distributed.isend(tensor, dst=self._global(to), group=self._group)
        return Message(self, work, tensor, doing)

    def start_receiving(self, into: Tensor, source: int, doing: str) -> Message:
        """Receive a tensor from another rank, which must call :meth:`start_sending`, while this process continues.

        Messages between two ranks are matched in the order of these calls.
        """
        with self._communicating(doing):
            work = distributed.irecv(into, src=self._global(source), group=self._group)
        return Message(self, work, into, doing)

    def _global(self, rank: int) -> int:
        assert self._group is not None
        return distributed.get_global_rank(self._group, rank)

    def _wire_device(self, device: torch.device | str) -> torch.device:
        """Return the device from which the group sends tensors of `device`.

        This is `device` itself if the group has a backend for it. Gloo counts as a backend for the CPU only.
        """
        device = torch.device(device)
        if device.type in self._direct or not self._direct:
            return device
        return torch.device("cpu") if "cpu" in self._direct else self._own_gpu()

    def _own_gpu(self) -> torch.device:
        """Return the GPU of this process: the one that the group is bound to, otherwise the current one."""
        bound: torch.device | None = getattr(self._group, "bound_device_id", None)
        return torch.device("cuda", torch.cuda.current_device()) if bound is None else bound

    @contextmanager
    def _on_own_gpu(self) -> Iterator[None]:
        """Make the GPU of this process current if the group sends from GPUs only: torch pickles objects to that GPU."""
        if self._direct != {"cuda"}:
            yield
            return
        with torch.cuda.device(self._own_gpu()):
            yield

    @contextmanager
    def _on_wire(self, bucket: Sequence[Tensor], *, back: bool = True) -> Iterator[Tensor]:
        """Yield one tensor with the contents of a bucket. If it is a copy and `back` is set, copy it back."""
        device = self._wire_device(bucket[0].device)
        if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].device == device:
            yield bucket[0]
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(device)
        yield flat
        if not back:
            return
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @contextmanager
    def _communicating(self, doing: str) -> Iterator[None]:
        """Replace the error of a collective by one that names the process that is gone."""
        try:
            yield
        except RuntimeError as error:
            raise self._why_lost(doing, error) from error

    def explain(self, error: Terminated) -> BaseException:
        """Return an error that names the process whose death made torchrun terminate all processes, or else `error`."""
        if any(self._has_died(rank) for rank in range(self.size) if rank != self.rank):
            return self._why_lost("waiting for it", error)
        return error

    def _why_lost(self, doing: str, error: BaseException) -> DistributedError:
        """Find out which process is gone. The first process to know tells the others through the store of the group."""
        try:
            store = self._store()
            store.set(f"waiting {self.rank}", "")
            missing, notes = self._search(store)
            left = [rank for rank in range(self.size) if rank not in missing]
            causes = "; ".join(f"rank {rank} {notes.get(rank, 'is gone')}" for rank in missing)
            if not missing:
                causes = f"the processes cannot reach each other ({first_line(error)})"
            message = f"{causes}; noticed while {doing}"
            found = store.compare_set("verdict", "", f"{min(left, default=self.rank)} {message}").decode()
            reporter, _, message = found.partition(" ")
            return DistributedError(message, int(reporter))
        except RuntimeError:  # the store is gone: it is in the process of rank 0, unless torchrun keeps it
            return DistributedError(
                f"rank 0 is gone, and with it the store of the process group; noticed while {doing}",
                next((rank for rank in range(1, self.size) if not self._has_died(rank)), self.rank),
            )

    def _store(self) -> Any:
        """Return the key-value store of the process group."""
        assert self._group is not None
        return distributed.distributed_c10d.PrefixStore(
            f"mudsc_fast {self._group.group_name}", distributed.distributed_c10d._get_default_store()
        )

    def _search(self, store: Any) -> tuple[list[int], dict[int, str]]:
        """Return the ranks that are gone, and the reason for each."""
        notes: dict[int, str] = {}
        others = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + _SEARCH_SECONDS
        while True:
            notes = {rank: store.get(_note(rank)).decode() for rank in range(self.size) if store.check([_note(rank)])}
            dead = {rank: "was killed, or exited without an error" for rank in others if self._has_died(rank)}
            notes = {**dead, **notes}
            silent = [rank for rank in others if rank not in notes and not store.check([f"waiting {rank}"])]
            if store.check(["verdict"]) or notes or not silent:
                return sorted(notes), notes
            if time.monotonic() > deadline:
                return silent, dict.fromkeys(silent, "does not respond: it hangs, or has already exited")
            time.sleep(_POLL_SECONDS)

    def _has_died(self, rank: int) -> bool:
        """Return whether the process of a rank is known to have exited. False for processes on other machines."""
        if rank >= len(self._hosts) or self._hosts[rank][0] != socket.gethostname():
            return False
        process = self._hosts[rank][1]
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False  # the process of another user
        try:
            state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return False  # not on Linux
        return state in ("Z", "X")

    def _leave_note(self, text: str) -> None:
        """Tell the other processes why this one exits or has failed."""
        try:
            self._store().set(_note(self.rank), text)
        except RuntimeError:
            return  # the store is gone

    def _remove_note(self) -> None:
        try:
            self._store().delete_key(_note(self.rank))
        except RuntimeError:
            return  # the store is gone


class Message:
    """A tensor that is being sent or received."""

    def __init__(self, ranks: Ranks, work: Any, tensor: Tensor, doing: str) -> None:
        self._ranks, self._work, self._tensor, self._doing = ranks, work, tensor, doing

    def wait(self) -> Tensor:
        """Wait until the tensor has been sent or received, and return it."""
        if self._work is not None:
            with self._ranks._communicating(self._doing):
                self._work.wait()
            self._work = None
        return self._tensor


def _note(rank: int) -> str:
    """Return the name of the entry of the store in which a rank says why it does not continue."""
    return f"note {rank}"


def _devices_sent_from(backends: str) -> set[str]:
    """Return the device types whose tensors a group sends without a copy to another device.

    Parameters
    ----------
    backends
        The backend configuration of the group, such as ``"cpu:gloo,cuda:nccl"``. Gloo may be listed for GPUs, too, but
        it supports only some collectives there, and copies through host memory.
    """
    pairs = (pair.partition(":")[::2] for pair in backends.split(","))
    return {device for device, backend in pairs if backend != "gloo" or device == "cpu"}


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors into messages: first the small tensors, packed in order, then each large tensor on its own."""
    bucket: list[Tensor] = []
    size = 0
    large = []
    for tensor in tensors:
        if tensor.nbytes >= _ALONE_BYTES:
            large.append(tensor)
            continue
        if bucket and size + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
    for tensor in large:
        yield [tensor]


def _shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[:length] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of the text of an error, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
