"""Greedy zip in CUDA (csrc/cuda/zip.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from mudsc_fast.kernels._scalar_types import SCALAR_TYPES
from mudsc_fast.kernels.cuda import _device


def zip_units(similarity: Tensor, num_models: int, remaining: int, budget: int, shrink: float) -> tuple[Tensor, Tensor]:
    """Cluster units like the function of this name in `kernels.reference`, with the same result bit for bit.

    The host waits once, at the end, for the number of merges.
    """
    source = similarity.detach()
    if source.stride(1) != 1:  # rows may have any distance, but the entries of a row must be adjacent
        source = source.contiguous()
    units, device = len(source), source.device
    cluster_of_unit = torch.empty(units, dtype=torch.int64, device=device)
    values = torch.empty(units - remaining, dtype=torch.float64, device=device)
    if units == 0:
        return cluster_of_unit, values
    merges = torch.empty(1, dtype=torch.int64, device=device)
    cuda = _device.extension()
    size = cuda.zip_workspace_bytes(SCALAR_TYPES[source.dtype], units, num_models)
    workspace = _device.workspace(size, device)
    with _device.launching_on(device) as launch:
        cuda.zip_units(
            similarity=source,
            num_models=num_models,
            remaining=remaining,
            budget=budget,
            shrink=shrink,
            cluster_of_unit=cluster_of_unit,
            values=values,
            workspace=workspace,
            merges=merges,
            device=launch.device,
            stream=launch.stream,
        )
    return cluster_of_unit, values[: int(merges)]
