"""The greedy zip of the published programs of ZipIt and MuDSC, with the fast kernel if results are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast import _checks
from mudsc_fast.ops.zip import zip_within_budget


@dataclass(frozen=True)
class Zip:
    """Clusters [N * C] of all units, their number, and the mean similarity at which they were merged."""

    cluster_of_unit: Tensor
    num_clusters: int
    value: float


def zip_published(
    similarity: Tensor,
    num_models: int,
    remaining: int,
    budget: int,
    shrink: float,
    *,
    sets: Sequence[Tensor] | None = None,
    group_budget: int | None = None,
) -> Zip:
    """Cluster units greedily, merge for merge as the published programs do.

    They differ from :func:`mudsc_fast.zip_units` in two ways. A budget is looked at only after it was drawn on, so that
    one merge inside a model is allowed where the budget is 0. And if `shrink` is not positive, what a merged cluster
    is severed from are the places that its units' models had in the matrix at the start, though clusters have moved up
    since.

    Parameters
    ----------
    similarity
        [N * C, N * C]; not modified.
    num_models
        N.
    remaining
        Total number of clusters at the end.
    budget
        Merges allowed inside each model.
    shrink
        Factor on the similarities of a merged cluster.
    sets
        Units that are clustered separately, one set after the other: [N * G] indices each, a group of G units of each
        model in turn. Clusters are numbered by set. All units form one set by default.
    group_budget
        Merges allowed inside each group of a set.

    Raises
    ------
    ValueError
        If a similarity is not finite or no allowed merge is left.
    """
    if sets is None:
        sets, group_budget = [torch.arange(len(similarity), device=similarity.device)], budget
    assert group_budget is not None  # given with the sets
    allowed, allowed_inside_groups = max(1, budget), max(1, group_budget)
    per_set = remaining // len(sets)
    # Groups of one unit have no merges inside. Otherwise a model's budget must cover the merges of all its groups.
    lasts = len(sets[0]) == num_models or len(sets) * allowed_inside_groups <= allowed
    if shrink <= 0 or not lasts:
        return _zip_literally(similarity, num_models, per_set, allowed, shrink, sets, allowed_inside_groups)
    cluster_of_unit = torch.empty(len(similarity), dtype=torch.int64, device=similarity.device)
    total = 0.0
    for position, units in enumerate(sets):
        within = similarity if len(sets) == 1 else similarity[units][:, units]
        zipped = zip_within_budget(within, num_models, per_set, allowed_inside_groups, shrink)
        cluster_of_unit[units] = zipped.cluster_of_unit + position * per_set
        total += zipped.value
    return Zip(cluster_of_unit, per_set * len(sets), total / len(sets))


def _zip_literally(
    similarity: Tensor,
    num_models: int,
    per_set: int,
    budget: int,
    shrink: float,
    sets: Sequence[Tensor],
    group_budget: int,
) -> Zip:
    """Search the whole matrix for each merge: for settings in which sets depend on each other or on positions."""
    _checks.check_finite("similarity", similarity)
    dtype = torch.float64 if similarity.dtype == torch.float64 else torch.float32
    working = similarity.detach().to("cpu", dtype, copy=True).fill_diagonal_(-torch.inf)
    units = len(working)
    unit = torch.arange(units, device="cpu")
    model = unit // (units // num_models)
    set_of_unit = torch.empty_like(unit)
    for position, members in enumerate(sets):
        set_of_unit[members.cpu()] = position
    group = set_of_unit * num_models + model
    left, root, values = unit, unit.clone(), []
    used_of_model, used_of_group = unit.new_zeros(num_models), unit.new_zeros(len(sets) * num_models)
    for position, members in enumerate(sets):
        for _ in range(len(members) - per_set):
            outside = set_of_unit[left] != position
            seen = working.masked_fill(outside[:, None] | outside[None, :], -torch.inf)
            first, second = divmod(int(seen.argmax()), len(seen))
            if seen[first, second] == -torch.inf:
                raise ValueError(
                    f"no legal merge is left: budget allows {budget} merges inside each model, a={shrink}; "
                    "raise b or make a positive"
                )
            values.append(float(seen[first, second]))
            kept, gone = sorted((first, second))
            units_joined = left[[kept, gone]]
            root[root == units_joined[1]] = units_joined[0]
            size = units // num_models
            severed = [slice(m * size, (m + 1) * size) for m in model[units_joined].tolist()]
            working = _join_rows(working.T, kept, gone, shrink, severed)
            working = _join_rows(working.T, kept, gone, shrink, severed)
            left = torch.cat([left[:gone], left[gone + 1 :]])
            for used, most, owner in ((used_of_model, budget, model), (used_of_group, group_budget, group)):
                owners = owner[units_joined]
                if owners[0] == owners[1]:
                    used[owners[0]] += 1
                    if used[owners[0]] >= most:
                        own = owner[left] == owners[0]
                        working[own[:, None] & own[None, :]] = -torch.inf
    order = torch.cat([left[group[left] == which] for which in range(len(sets) * num_models)])
    cluster_of_unit = torch.empty_like(unit)
    cluster_of_unit[order] = unit[: len(order)]
    mean = sum(values) / len(values) if values else 0.0
    return Zip(cluster_of_unit[root].to(similarity.device), len(order), mean)


def _join_rows(rows: Tensor, kept: int, gone: int, shrink: float, severed: Sequence[slice]) -> Tensor:
    """Return the matrix with row `gone` merged into row `kept`: the elementwise minimum, shrunk or severed."""
    joined = torch.minimum(rows[kept], rows[gone])
    if shrink > 0:
        joined *= shrink
    else:
        for places in severed:
            joined[places] = -torch.inf
    left = torch.cat([rows[:gone], rows[gone + 1 :]])
    left[kept] = joined
    return left
