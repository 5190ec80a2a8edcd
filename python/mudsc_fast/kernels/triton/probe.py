"""A tiny kernel, to find out whether Triton can compile and launch kernels on a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def probe_kernel(out):
    """Write 1."""
    tl.store(out, 1)


def launch(device: torch.device) -> None:
    """Compile and launch the kernel on a device.

    Raises
    ------
    RuntimeError
        If the result is wrong. Errors of the compiler are passed on.
    """
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(out):
        probe_kernel[(1,)](out)
    if int(out) != 1:
        raise RuntimeError("a kernel that writes 1 wrote something else")
