"""Short-lived groups of torch.distributed processes for tests, on this machine, with gloo."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from mudsc_fast.distributed.ranks import Ranks

#: Modules that the fork server imports once, so that the processes forked from it need not.
_PRELOADED = [
    "pytest",
    "torch.distributed.launcher.api",
    "mudsc_fast",
    "mudsc_fast.cli",
    "mudsc_fast.io",
    "architectures",
    "networks",
]

#: Timeout in seconds, long enough for a busy machine. Only a test that fails waits this long.
TIMEOUT = 300


def run_processes(function: Callable[..., None], count: int, folder: Path, *arguments: Any) -> list[int]:
    """Run ``function(rank, folder, *arguments)`` in `count` processes of one group, and return their exit codes.

    The exit code of a killed process is -9. All processes have ended when this returns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = _context()
    processes = [
        context.Process(target=_in_group, args=(function, rank, count, folder, arguments)) for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [-1 if process.exitcode is None else process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _context() -> Any:
    """Return the context that starts processes: a fork server, which has no threads, if the platform supports it."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


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
    gc.collect()
    # Threads of a group that something refers to can abort Python when it exits.
    assert Ranks.latest is None or Ranks.latest() is None
    distributed.destroy_process_group()


def run_command(arguments: Sequence[str], count: int, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder` as ``torchrun --nproc-per-node COUNT -m mudsc_fast`` does.

    The agent of torchrun starts and monitors the processes. They are forked, so they need not import torch first.
    """
    streams = [folder / ".stdout", folder / ".stderr"]
    agent = _context().Process(target=_agent, args=(list(arguments), count, folder, streams))
    agent.start()
    try:
        agent.join(TIMEOUT)
        code = -1 if agent.exitcode is None else agent.exitcode
        return subprocess.CompletedProcess(arguments, code, *(path.read_text(encoding="utf-8") for path in streams))
    finally:
        if agent.is_alive():
            agent.terminate()
            agent.join()
        for path in streams:
            path.unlink(missing_ok=True)


def _agent(arguments: list[str], count: int, folder: Path, streams: list[Path]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for stream, path in zip((1, 2), streams, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(config, _command)(arguments)
    except ChildFailedError:
        sys.exit(1)


def _command(arguments: list[str]) -> None:
    from mudsc_fast.cli import main

    torch.set_num_threads(1)
    gc.disable()
    code = main(arguments)
    assert Ranks.latest is None or Ranks.latest() is None, "the command left the process group in a reference cycle"
    sys.stdout.flush()
    if code:
        sys.exit(code)
