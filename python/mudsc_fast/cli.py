"""The command ``mudsc-fast``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mudsc_fast.command import torchrun
from mudsc_fast.command.arguments import build_parser
from mudsc_fast.command.installation import info
from mudsc_fast.command.terminal import Messages
from mudsc_fast.distributed.ranks import DistributedError, Terminated, is_reported_elsewhere

__all__ = ["info", "main"]

#: Errors whose text says what to do, without their type.
_PLAIN = (ValueError, OSError, DistributedError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Errors go to stderr with status 2, and no partial output is left behind. ``--debug`` shows the traceback.

    Parameters
    ----------
    arguments
        The arguments, by default those of the process.
    """
    parser = build_parser()
    given = parser.parse_args(arguments)
    given.command_line = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(parser.prog, given)
    finally:
        torchrun.free_group()


def _run(program: str, given: argparse.Namespace) -> int:
    """Run the command with parsed arguments and return its exit status."""
    rank = torchrun.rank()
    messages = Messages(f"{program} {given.command}", quiet=rank > 0 or getattr(given, "quiet", False))
    try:
        with messages:
            text = given.run(given)
    except KeyboardInterrupt:
        if rank == 0:
            messages.error("interrupted")
        return 130
    except Terminated:
        return 143
    except Exception as error:
        if getattr(given, "debug", False):
            raise
        if is_reported_elsewhere(error, rank):
            return 2
        text = str(error) if isinstance(error, _PLAIN) else f"{type(error).__name__}: {error}"
        messages.error(f"rank {rank}: {text}" if rank > 0 and not isinstance(error, DistributedError) else text)
        if not isinstance(error, (*_PLAIN, TypeError)):
            messages.hint("this may be a fault of mudsc_fast; --debug shows where the error arose")
        return 2
    if text and rank == 0:
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader has seen enough, as in `mudsc-fast inspect A | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
