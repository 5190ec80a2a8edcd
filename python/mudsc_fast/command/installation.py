"""Information about the installation."""

from __future__ import annotations

import platform

import torch

import mudsc_fast
from mudsc_fast import _core
from mudsc_fast.kernels.cpu._runtime import isa_level, threads
from mudsc_fast.kernels.cuda import _device, correlation
from mudsc_fast.ops._dispatch import KERNELS, backend_for


def info() -> str:
    """Return the versions, devices and kernels of this installation, one fact a line.

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
    """Return which instructions multiply matrices on each CUDA device, and why."""
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
