"""The command ``mudsc-fast``."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

import mudsc_fast
from mudsc_fast import _core
from mudsc_fast.kernels.cpu._runtime import isa_level, threads
from mudsc_fast.kernels.cuda import _device, correlation
from mudsc_fast.matching.node import Mode
from mudsc_fast.ops._dispatch import KERNELS, backend_for
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.options import Space

if TYPE_CHECKING:
    from mudsc_fast.io import WriteResult

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (those of the process by default) and return its exit status.

    Mistakes in what the command is given are told on standard error, with status 2.
    """
    parser = argparse.ArgumentParser(prog="mudsc-fast", description="Merge pretrained networks without training.")
    parser.add_argument("--version", action="version", version=f"mudsc_fast {mudsc_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show versions, devices and which kernel serves which op")
    _add_merge(commands.add_parser("merge", help="merge networks in files into a new one"))
    _add_align(commands.add_parser("align", help="write a network with its units in the order of another one's"))
    given = parser.parse_args(arguments)
    try:
        text = {"info": lambda _: info(), "merge": _merge, "align": _align}[given.command](given)
    except (ValueError, TypeError, OSError) as error:
        if getattr(given, "debug", False):
            raise
        print(f"{parser.prog} {given.command}: error: {error}", file=sys.stderr)
        return 2
    if text:
        print(text)
    return 0


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="CHECKPOINT", help="file or directory; two or more")
    _add_shared(parser)
    parser.add_argument("--mode", choices=get_args(Mode), default="align", help="permute units or cluster them")
    parser.add_argument("--weights", help="the networks' shares, e.g. 0.7,0.3; equal by default")
    parser.add_argument("--shrink", type=float, default=0.5, help="of the zip: how similarities shrink in clusters")
    parser.add_argument("--budget", type=float, default=1.0, help="of the zip: share of merges within a network")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the output's floating point tensors; by default as they are"
    )


def _add_align(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="file or directory whose order of units is kept")
    parser.add_argument("other", metavar="OTHER", help="file or directory to write in that order")
    _add_shared(parser)
    parser.add_argument("--no-check", action="store_true", help="do not compare the network's outputs before and after")


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="a new directory, or a new file by its suffix")
    parser.add_argument("--spec", default="auto", help="auto, derive, NAME, NAME:number=value,... or FILE.json")
    parser.add_argument("--space", choices=get_args(Space), help="by default dual if there is --data, else weight")
    parser.add_argument("--balance", type=float, default=0.5, help="share of the weights in the dual space")
    parser.add_argument("--data", metavar="MODULE:FUNCTION", help="a function that returns or yields batches")
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="a function that builds the network, for --data")
    parser.add_argument("--random-state", type=int, default=0, help="seed of the order of the sweeps")
    parser.add_argument("--max-sweeps", type=int, default=100, help="most sweeps over the nodes")
    parser.add_argument("--patience", type=int, default=5, help="sweeps without improvement before the end")
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="float32", help="of the products that compare units"
    )
    parser.add_argument("--format", choices=("safetensors", "torch"), help="by default that of the first input")
    parser.add_argument("--shard-size", help="most bytes of a file in a directory, e.g. 200MB; 5GB by default")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was done as JSON")
    parser.add_argument("--quiet", action="store_true", help="show nothing but errors")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def _merge(given: argparse.Namespace) -> str:
    from mudsc_fast.io import merge_checkpoints

    return _told(
        given,
        merge_checkpoints(
            given.inputs,
            given.output,
            mode=given.mode,
            weights=_numbers(given.weights),
            shrink=given.shrink,
            budget=given.budget,
            dtype=None if given.dtype is None else _DTYPES[given.dtype],
            **_shared(given),
        ),
    )


def _align(given: argparse.Namespace) -> str:
    from mudsc_fast.io import align_checkpoints

    result = align_checkpoints(given.base, given.other, given.output, check=not given.no_check, **_shared(given))
    return _told(given, result)


def _shared(given: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that merging and aligning have in common; what cannot be written is found out first."""
    from mudsc_fast.io import CheckpointError
    from mudsc_fast.io.models import import_function, users_code

    if given.report is not None and (given.report.is_dir() or not given.report.absolute().parent.is_dir()):
        raise CheckpointError(f"--report {given.report}: must be a file in a directory that exists")
    data = None
    if given.data is not None:
        function = import_function("--data", given.data)
        with users_code("the data function"):
            data = function()
        if not isinstance(data, Iterable):
            raise CheckpointError(
                f"--data {given.data}: must return batches to iterate over, got {type(data).__name__}"
            )
    return {
        "spec": None if given.spec == "auto" else given.spec,
        "data": data,
        "build": None if given.model is None else import_function("--model", given.model),
        "space": given.space,
        "balance": given.balance,
        "random_state": given.random_state,
        "max_sweeps": given.max_sweeps,
        "patience": given.patience,
        "precision": given.precision,
        "file_format": given.format,
        "shard_size": given.shard_size,
        "progress": not given.quiet and sys.stderr.isatty(),
    }


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights must be numbers with commas between, got {text!r}") from None


def _told(given: argparse.Namespace, result: WriteResult) -> str:
    """Write the report that was asked for and return what to show."""
    if given.report is not None:
        from mudsc_fast.io.writing import write_json

        asked = {name: value for name, value in vars(given).items() if name not in ("report", "quiet", "debug")}
        write_json(given.report, {"arguments": asked, **result.to_json()})
    return "" if given.quiet else str(result)


def info() -> str:
    """Return what there is to know of this installation, one fact a line.

    Raises
    ------
    ValueError
        If an environment variable of mudsc_fast has an unknown value.
    """
    devices = ["cpu"] + [
        f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())
    ]
    facts = {
        "mudsc_fast": mudsc_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "extension": f"built by {_core.compiler}",
        "CUDA kernels": _device.build_description(),
        **_kernels_by_device(),
        **_tensor_cores(),
        "instruction levels": f"{', '.join(_core.isa_levels)}; in use: {_core.isa_levels[isa_level()]}",
        "devices": ", ".join(devices),
        "threads": str(threads()),
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    lines += ["", f"{'op':<20} {'cpu tensors':<12} {'cuda tensors':<26} other devices"]
    lines += [
        f"{op:<20} {_kernel_name(op, 'cpu'):<12} {_kernel_name(op, 'cuda'):<26} {_kernel_name(op, 'other')}"
        for op in KERNELS
    ]
    return "\n".join(lines)


def _kernels_by_device() -> dict[str, str]:
    """Return whether the CUDA kernels run on each device."""
    indices = range(torch.cuda.device_count())
    return {f"CUDA kernels on cuda:{index}": _device.device_description(index) for index in indices}


def _tensor_cores() -> dict[str, str]:
    """Return what multiplies on each CUDA device, and why."""
    if _device.unavailable_reason():
        return {}
    found = []
    for index in range(torch.cuda.device_count()):
        if _device.unavailable_reason(index):
            continue
        try:
            instructions, reason = correlation.tensor_cores(torch.device("cuda", index))
        except RuntimeError as error:
            instructions, reason = "none", str(error)
        found.append(f"cuda:{index} {instructions} ({reason})")
    return {"tensor cores": ", ".join(found)}


def _kernel_name(op: str, device_type: str) -> str:
    backend = backend_for(op, device_type)
    name = {"cpu": "C++", "cuda": "CUDA", "reference": "PyTorch", "triton": "Triton"}.get(backend, backend)
    return f"{name}, through host memory" if backend == "cpu" and device_type != "cpu" else name
