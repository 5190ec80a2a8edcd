"""The command ``mudsc-fast``."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence

import torch

import mudsc_fast
from mudsc_fast import _core
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.ops._dispatch import KERNELS, backend_for, isa_level, threads


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (those of the process by default) and return its exit status."""
    parser = argparse.ArgumentParser(prog="mudsc-fast", description="Merge pretrained networks without training.")
    parser.add_argument("--version", action="version", version=f"mudsc_fast {mudsc_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show versions, devices and which kernel serves which op")
    parser.parse_args(arguments)
    try:
        text = info()
    except ValueError as error:
        parser.error(str(error))
    print(text)
    return 0


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
        "CUDA kernels": f"off ({_device.unavailable_reason()})" if _device.unavailable_reason() else "on",
        "instruction levels": f"{', '.join(_core.isa_levels)}; in use: {_core.isa_levels[isa_level()]}",
        "devices": ", ".join(devices),
        "threads": str(threads()),
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    lines += ["", f"{'op':<12} {'cpu tensors':<12} {'cuda tensors':<26} other devices"]
    lines += [
        f"{op:<12} {_kernel_name(op, 'cpu'):<12} {_kernel_name(op, 'cuda'):<26} {_kernel_name(op, 'other')}"
        for op in KERNELS
    ]
    return "\n".join(lines)


def _kernel_name(op: str, device_type: str) -> str:
    backend = backend_for(op, device_type)
    name = {"cpu": "C++", "cuda": "CUDA", "reference": "PyTorch"}.get(backend, backend)
    return f"{name}, through host memory" if backend == "cpu" and device_type != "cpu" else name
