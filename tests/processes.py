"""Process groups of torch.distributed for tests: short-lived processes on this machine, joined by gloo."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

#: Seconds that a busy machine may take; nothing waits so long where nothing is wrong.
TIMEOUT = 120


def run_processes(function: Callable[..., None], count: int, folder: Path, *arguments: Any) -> list[int]:
    """Run ``function(rank, folder, *arguments)`` in processes of one group, and return their exit codes.

    A code of -9 is that of a process that was killed. No process is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_in_group, args=(function, rank, count, folder, arguments)) for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        return [-1 if process.exitcode is None else process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _in_group(function: Callable[..., None], rank: int, count: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT // 2),
    )
    function(rank, folder, *arguments)
    sys.stdout.flush()
    distributed.destroy_process_group()
