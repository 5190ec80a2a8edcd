"""Settings of the C++ kernels: instruction level and number of threads."""

from __future__ import annotations

import os

import torch

from mudsc_fast import _core


def isa_level() -> int:
    """Return the instruction level for C++ kernels: the processor's best, capped by ``MUDSC_ISA``."""
    cap = os.environ.get("MUDSC_ISA")
    if not cap:
        return _core.supported_isa
    if cap not in _core.isa_levels:
        raise ValueError(
            f"the environment variable MUDSC_ISA must be one of {', '.join(_core.isa_levels)}, got {cap!r}"
        )
    return min(_core.supported_isa, _core.isa_levels.index(cap))


def threads() -> int:
    """Return the number of threads a C++ kernel may use, which is torch's setting."""
    return torch.get_num_threads()
