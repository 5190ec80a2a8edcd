"""The subcommands, which turn arguments into calls of :mod:`mudsc_fast.io`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from mudsc_fast.command import torchrun

if TYPE_CHECKING:
    from mudsc_fast.io import WriteResult

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def merge(given: argparse.Namespace) -> str:
    """Merge networks, or say what merging would do, and return what to show."""
    from mudsc_fast.io import merge_checkpoints
    from mudsc_fast.io.planning import plan_merge

    weights = _numbers(given.weights)
    if given.dry_run:
        shared = _shared(given)
        for name in ("progress", "random_state", "balance", "patience", "precision", "verify"):
            shared.pop(name)
        return str(plan_merge(given.inputs, given.output, mode=given.mode, **shared))
    device = torchrun.device(given.device)
    with torchrun.process_group(given.timeout, device) as group:
        result = merge_checkpoints(
            given.inputs,
            given.output,
            mode=given.mode,
            weights=weights,
            shrink=given.shrink,
            budget=given.budget,
            dtype=None if given.dtype is None else DTYPES[given.dtype],
            command=shlex.join(["mudsc-fast", *given.command_line]),
            device=device,
            group=group,
            checkpoint=given.checkpoint,
            **_shared(given),
        )
    return _shown(given, result)


def align(given: argparse.Namespace) -> str:
    """Align a network and return what to show."""
    from mudsc_fast.io import align_checkpoints

    torchrun.refuse("align")
    result = align_checkpoints(given.base, given.other, given.output, check=not given.no_check, **_shared(given))
    return _shown(given, result)


def inspect(given: argparse.Namespace) -> str:
    """Return the inspection of a network."""
    from mudsc_fast.io.inspection import inspect_checkpoint

    data, build = _data_and_model(given)
    spec = None if given.spec == "auto" else given.spec
    return inspect_checkpoint(given.path, spec=spec, data=data, build=build).report(tensors=given.tensors)


def _data_and_model(given: argparse.Namespace) -> tuple[Any, Any]:
    """Return the batches of ``--data`` and the function of ``--model``."""
    from mudsc_fast.checkpoints.models import import_function, users_code
    from mudsc_fast.io import CheckpointError

    data = None
    if given.data is not None:
        function = import_function("--data", given.data)
        with users_code("the data function"):
            data = function()
        if not isinstance(data, Iterable):
            raise CheckpointError(
                f"--data {given.data}: must return batches to iterate over, got {type(data).__name__}"
            )
        data = torchrun.own_share(data)
    return data, None if given.model is None else import_function("--model", given.model)


def _shared(given: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that merging and aligning have in common; a report that cannot be written is an error."""
    from mudsc_fast.io import CheckpointError

    if given.report is not None and (given.report.is_dir() or not given.report.absolute().parent.is_dir()):
        raise CheckpointError(f"--report {given.report}: must be a file in a directory that exists")
    data, build = _data_and_model(given)
    return {
        "spec": None if given.spec == "auto" else given.spec,
        "data": data,
        "build": build,
        "space": given.space,
        "balance": given.balance,
        "random_state": given.random_state,
        "max_sweeps": given.max_sweeps,
        "patience": given.patience,
        "precision": given.precision,
        "task_heads": given.task_heads,
        "ignore": given.ignore,
        "dequantize": given.dequantize,
        "verify": not given.no_verify,
        "file_format": given.format,
        "shard_size": given.shard_size,
        "progress": not given.quiet and sys.stderr.isatty(),
    }


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights must be numbers with commas between, got {text!r}") from None


def _shown(given: argparse.Namespace, result: WriteResult) -> str:
    """Write the report that was asked for and return what to show."""
    if given.report is not None and torchrun.rank() == 0:
        from mudsc_fast.io.writing import write_json

        left_out = ("report", "quiet", "debug", "run", "command_line")
        asked = {name: value for name, value in vars(given).items() if name not in left_out}
        write_json(given.report, {"arguments": asked, **result.to_json()})
    return "" if given.quiet else str(result)
