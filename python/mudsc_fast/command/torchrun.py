"""The command in several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mudsc_fast.distributed.ranks import Ranks, Terminated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rank() -> int:
    """Return the number of this process among those that were started together, 0 if it is alone."""
    return int(os.environ["RANK"]) if _num_processes() > 1 else 0


def _num_processes() -> int:
    """Return the number of processes that ``torchrun`` started together."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return 1
    return int(os.environ["WORLD_SIZE"])


@contextmanager
def process_group(timeout: float | None) -> Iterator[ProcessGroup | None]:
    """Join the processes that ``torchrun`` started, if it did; else yield None.

    ``torchrun`` ends all processes with SIGTERM when one of them fails. The signal is raised as an exception, so that
    nothing of an output is left behind.

    Parameters
    ----------
    timeout
        Seconds after which a process that does not answer counts as failed; that of torch by default.
    """
    if _num_processes() == 1:
        yield None
        return
    from torch import distributed

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    limit = None if timeout is None else timedelta(seconds=timeout)
    distributed.init_process_group("gloo", timeout=limit)
    try:
        yield distributed.group.WORLD
    except Terminated as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it was heard
        if Ranks.latest is None:
            raise
        raise Ranks.latest.explain(error) from None
    finally:
        distributed.destroy_process_group()


def refuse(command: str) -> None:
    """Raise a ValueError if several processes run a command that is for one."""
    if _num_processes() > 1:
        raise ValueError(f"{command} runs in one process: start it without torchrun")


def own_share(data: Iterable[Any]) -> Iterable[Any]:
    """Return the batches of this process: every n-th of n processes, unless a DistributedSampler divides them."""
    from torch.utils.data import DistributedSampler

    count = _num_processes()
    if count == 1 or isinstance(getattr(data, "sampler", None), DistributedSampler):
        return data
    return _Share(data, rank(), count)


class _Share(Iterable[Any]):
    """Every n-th batch, each time that the batches are iterated over."""

    def __init__(self, data: Iterable[Any], first: int, step: int) -> None:
        self._data, self._first, self._step = data, first, step

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._data, self._first, None, self._step)


def _terminate(*_: object) -> None:
    raise Terminated("SIGTERM")
