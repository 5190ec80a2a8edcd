"""The command in several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from mudsc_fast.distributed.ranks import DistributedError, Ranks, Terminated, first_line, same_on_all

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


def device(text: str) -> torch.device:
    """Return the device that this process computes on: of several processes of a machine each gets a GPU of its own.

    Parameters
    ----------
    text
        ``"cpu"``, ``"cuda"`` or, for one process, ``"cuda:N"``.

    Raises
    ------
    ValueError
        If the text is another, or there is no such GPU.
    """
    kind, _, number = text.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdecimal())):
        raise same_on_all(ValueError(f"--device must be cpu, cuda or cuda:N, got {text!r}"))
    if kind == "cpu":
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        raise same_on_all(
            ValueError(
                f"--device {text}: torch {torch.__version__} finds no GPU on this machine: leave out --device to "
                "compute on the CPU, or install a torch with CUDA and a driver"
            )
        )
    several = _num_processes() > 1
    if several and number:
        raise same_on_all(
            ValueError(f"--device {text}: processes cannot share a GPU: pass --device cuda, which gives each its own")
        )
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if several else 1
    if num_local > num_gpus:
        raise same_on_all(
            ValueError(
                f"--device {text}: torchrun started {num_local} processes on this machine, which has {num_gpus} "
                f"{'GPU' if num_gpus == 1 else 'GPUs'}: start at most one for each (--nproc-per-node {num_gpus})"
            )
        )
    index = int(os.environ.get("LOCAL_RANK", "0")) if several else int(number or 0)
    if index >= num_gpus:
        raise ValueError(f"--device {text}: the GPUs of this machine are cuda:0 to cuda:{num_gpus - 1}")
    return torch.device("cuda", index)


@contextmanager
def process_group(timeout: float | None, device: torch.device) -> Iterator[ProcessGroup | None]:
    """Join the processes that ``torchrun`` started, if it did; else yield None.

    ``torchrun`` ends all processes with SIGTERM when one of them fails. The signal is raised as an exception, so that
    nothing of an output is left behind.

    Parameters
    ----------
    timeout
        Seconds after which a process that does not respond counts as failed; that of torch by default.
    device
        Where this process computes. Tensors on a GPU are sent by NCCL, and all else by gloo.

    Raises
    ------
    DistributedError
        If the processes cannot reach each other, or one of them has died.
    """
    if _num_processes() == 1:
        yield None
        return
    from torch import distributed

    limit = None if timeout is None else timedelta(seconds=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=limit)
    except RuntimeError as error:
        raise DistributedError(
            f"rank {rank()} cannot reach the other processes: {first_line(error)}. Check that torchrun was started on "
            "all machines with the same --nnodes and --rdzv-endpoint",
            rank(),
        ) from error
    # Not before: while processes wait for each other to start, Python does not call handlers of signals.
    takes_signals = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if takes_signals else None
    try:
        yield distributed.group.WORLD
        if takes_signals:
            signal.signal(signal.SIGTERM, before)
    except Terminated as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it was heard
        ranks = None if Ranks.latest is None else Ranks.latest()
        if ranks is None:
            raise
        raise ranks.explain(error) from None
    except Exception:
        if takes_signals:  # torchrun terminates all processes: show the error first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        distributed.destroy_process_group()


def free_group() -> None:
    """Free the process group after the command, also if it failed.

    The threads of the group must end before Python exits, or they may abort it. They end when the group is freed.
    Reference cycles delay that, such as those of errors, or those that the first import of torch.export leaves behind.
    """
    if _num_processes() > 1:
        gc.collect()


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
