"""Greedy zip in PyTorch: the published procedure, step by step."""

from __future__ import annotations

import torch
from torch import Tensor


def zip_units(similarity: Tensor, num_models: int, remaining: int, budget: int, shrink: float) -> tuple[Tensor, Tensor]:
    """Merge the most similar pair of clusters until `remaining` are left, or no legal pair is left.

    Parameters
    ----------
    similarity
        ``[N * C, N * C]``, float16, bfloat16, float32 or float64, finite. Half types are computed in float32.
    num_models
        N; unit u belongs to model ``u // C``.
    remaining
        Number of clusters to end with.
    budget
        Number of merges allowed inside each model.
    shrink
        Factor on a merged cluster's similarities; if it is not positive, the cluster's similarities to clusters
        of both models become -inf instead.

    Returns
    -------
    cluster_of_unit
        ``[N * C]`` int64, numbered in the order of each cluster's first unit.
    values
        ``[merges made]`` float64, the similarity at which each merge was made.
    """
    dtype = torch.float64 if similarity.dtype == torch.float64 else torch.float32
    working = similarity.detach().to(dtype, copy=True).fill_diagonal_(-torch.inf)
    cluster_of_unit = torch.arange(len(working), device=working.device)
    model_of_cluster = cluster_of_unit // max(1, len(working) // num_models)
    budgets = [budget] * num_models
    values = []

    def separate(model: int) -> None:
        inside = model_of_cluster == model
        working[inside[:, None] & inside[None, :]] = -torch.inf

    if budget == 0:
        for model in range(num_models):
            separate(model)
    while len(working) > remaining:
        row, column = divmod(int(working.argmax()), len(working))
        value = float(working[row, column])
        if value == -torch.inf:
            break
        values.append(value)
        kept, gone = min(row, column), max(row, column)
        models = [int(model_of_cluster[kept]), int(model_of_cluster[gone])]
        cluster_of_unit[cluster_of_unit == gone] = kept
        cluster_of_unit[cluster_of_unit > gone] -= 1

        left = torch.arange(len(working), device=working.device) != gone
        working[:, kept] = torch.minimum(working[:, kept], working[:, gone])
        if shrink > 0:
            working[:, kept] *= shrink
        working = working[:, left]
        working[kept] = torch.minimum(working[kept], working[gone])
        if shrink > 0:
            working[kept] *= shrink
        working = working[left]
        model_of_cluster = model_of_cluster[left]

        if shrink <= 0:
            severed = (model_of_cluster == models[0]) | (model_of_cluster == models[1])
            working[severed, kept] = -torch.inf
            working[kept, severed] = -torch.inf
        if models[0] == models[1]:
            budgets[models[0]] -= 1
            if budgets[models[0]] == 0:
                separate(models[0])
    return cluster_of_unit, torch.tensor(values, dtype=torch.float64, device=working.device)
