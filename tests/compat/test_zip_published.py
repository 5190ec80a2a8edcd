"""The zip of the published programs: recorded clusters against the kernel and the search of the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import load_golden
from mudsc_fast.compat import _zip
from mudsc_fast.compat._mudsc_match import aligned, match_clusters
from mudsc_fast.compat._zip import Zip, zip_published
from mudsc_fast.ops.zip import zip_within_budget


def recorded(name: str) -> tuple[Tensor, int, int, float, Tensor, float]:
    """Return similarity, models, groups, ratio, clusters and value."""
    golden = load_golden(name)
    clusters = torch.from_numpy(golden["unmerge"]).argmax(1)
    groups = int(golden.get("groups", 1))
    return (
        torch.from_numpy(golden["similarity"]),
        int(golden["num_models"]),
        groups,
        float(golden["ratio"]),
        clusters,
        float(golden["value"]),
    )


def sets_of(similarity: Tensor, num_models: int, groups: int) -> list[Tensor]:
    size = len(similarity) // (num_models * groups)
    _, group_of_set, _ = aligned(similarity, num_models, groups)
    return [
        torch.cat(
            [torch.arange(size) + (model * groups + int(group_of_set[model, s])) * size for model in range(num_models)]
        )
        for s in range(groups)
    ]


@pytest.mark.parametrize("number", range(3))
def test_recorded_groups(number: int) -> None:
    similarity, num_models, groups, ratio, clusters, value = recorded(f"group_zip_{number}")
    match = match_clusters(similarity, num_models, groups, ratio, shrink=0.5, inside=1.0)
    assert torch.equal(match.cluster_of_unit.flatten(), clusters)
    assert match.value == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("number", range(3))
def test_recorded_groups_by_full_search(number: int) -> None:
    similarity, num_models, groups, ratio, clusters, value = recorded(f"group_zip_{number}")
    sets = sets_of(similarity, num_models, groups)
    merges = int(len(similarity) * ratio + 0.5)
    found: Zip = _zip._zip_literally(
        similarity,
        num_models,
        (len(similarity) - merges) // groups,
        merges // num_models,
        0.5,
        sets,
        merges // (num_models * groups),
    )
    assert torch.equal(found.cluster_of_unit, clusters)
    assert found.value == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("search", [False, True])
def test_recorded_units(number: int, search: bool) -> None:
    golden = load_golden(f"zip_{number}")
    similarity, num_models, _, ratio, clusters, value = recorded(f"zip_{number}")
    remaining = int(len(similarity) * (1 - ratio) + 1e-4)
    budget = int((len(similarity) - remaining) // num_models * float(golden["b"]) + 1e-4)
    a = float(golden["a"])
    units = [torch.arange(len(similarity))]
    found = (
        _zip._zip_literally(similarity, num_models, remaining, budget, a, units, budget)
        if search
        else zip_published(similarity, num_models, remaining, budget, a)
    )
    assert torch.equal(found.cluster_of_unit, clusters)
    assert found.value == pytest.approx(value, abs=1e-6)


def test_budget_is_shared_by_groups_of_a_model() -> None:
    """If the first set of groups spends the budget, later sets only join units of different models."""
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(24, 24, generator=generator) * 0.1
    for group in range(4):  # two groups of six in each of two models; units of a group are most alike
        within = slice(6 * group, 6 * group + 6)
        similarity[within, within] += 0.8
    similarity = (similarity + similarity.T) / 2
    sets = [torch.cat([torch.arange(6), torch.arange(12, 18)]), torch.cat([torch.arange(6, 12), torch.arange(18, 24)])]
    found = zip_published(similarity, 2, 12, 1, 0.5, sets=sets, group_budget=3)
    clusters = found.cluster_of_unit.view(2, 2, 6)
    inside = [[6 - len(clusters[model, group].unique()) for group in range(2)] for model in range(2)]
    assert inside == [[1, 0], [1, 0]]
    free = zip_published(similarity, 2, 12, 6, 0.5, sets=sets, group_budget=3)
    clusters = free.cluster_of_unit.view(2, 2, 6)
    assert [[6 - len(clusters[model, group].unique()) for group in range(2)] for model in range(2)] == [[3, 3], [3, 3]]


def test_single_unit_groups_have_no_internal_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return zip_within_budget(*given)

    monkeypatch.setattr(_zip, "zip_within_budget", counted)
    sets = [torch.tensor([unit, unit + 4]) for unit in range(4)]
    found = zip_published(torch.eye(8), 2, 4, 2, 0.5, sets=sets, group_budget=0)
    assert found.cluster_of_unit.tolist() == [0, 1, 2, 3] * 2
    assert calls == 4  # by the kernel, a set at a time
