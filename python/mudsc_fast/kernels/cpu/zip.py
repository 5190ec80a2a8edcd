"""Greedy zip in C++ (csrc/cpu/zip.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast import _checks, _core
from mudsc_fast.kernels.cpu import _runtime


def zip_units(similarity: Tensor, num_models: int, remaining: int, budget: int, shrink: float) -> tuple[Tensor, Tensor]:
    """Cluster units like the function of this name in `kernels.reference`, with the same result bit for bit.

    Raises
    ------
    ValueError
        If `similarity` holds NaN or inf: the kernel checks entries as it reads them.
    """
    source = similarity.detach().cpu()
    if source.stride(1) != 1:  # rows may have any distance, but the entries of a row must be adjacent
        source = source.contiguous()
    units = len(source)
    cluster_of_unit = torch.empty(units, dtype=torch.int64, device="cpu")
    values = torch.empty(units - remaining, dtype=torch.float64, device="cpu")
    merges: int = _core.zip_units(
        source, num_models, remaining, budget, shrink, cluster_of_unit, values, _runtime.isa_level()
    )
    if merges == _core.ZIP_NOT_FINITE:
        _checks.check_finite("similarity", similarity)
    return cluster_of_unit.to(similarity.device), values[:merges].to(similarity.device)
