"""ZipIt's functions against recorded results and a plain implementation of the procedure."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import load_golden
from mudsc_fast.compat import zipit
from mudsc_fast.compat._zip import zip_published


def random_covariance(units: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    features = torch.randn(units, 3 * units, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    features += 0.5 * features.roll(units // 2, 0)
    return torch.cov(features)


@pytest.mark.parametrize("number", range(3))
def test_recorded_matchings(number: int) -> None:
    golden = load_golden(f"zipit_{number}")
    covariance = torch.from_numpy(golden["covariance"])
    metric = {"covariance": covariance.clone(), "magnitudes": torch.ones(len(covariance))}
    ratio, add_bias = float(golden["ratio"]), bool(golden["add_bias"])
    arguments = {"a": float(golden["a"]), "b": float(golden["b"])}
    for name in ("zipit", "permute", "identity"):
        match = getattr(zipit, f"match_tensors_{name}")
        merge, unmerge = match(metric, r=ratio, add_bias=add_bias, **arguments)
        assert torch.equal(unmerge, torch.from_numpy(golden[f"{name}_unmerge"])), name
        torch.testing.assert_close(merge, torch.from_numpy(golden[f"{name}_merge"]), rtol=1e-6, atol=0)
    assert torch.equal(metric["covariance"], covariance)
    assert torch.equal(metric["magnitudes"], torch.ones(len(covariance)))


@pytest.mark.parametrize("number", range(3))
def test_recorded_covariance(number: int) -> None:
    golden = load_golden(f"zipit_{number}")
    metric = zipit.CovarianceMetric()
    for batch, size in enumerate((80, 80, 40)):
        features = [torch.from_numpy(golden[f"feats{batch}_{i}"]) for i in range(int(golden["num_models"]))]
        metric.update(size, *features)
    for _ in range(2):  # asking twice gives the same
        torch.testing.assert_close(metric.finalize(200), torch.from_numpy(golden["covariance"]), rtol=1e-5, atol=1e-5)


def test_covariance_counts_nan_as_zero_and_weights_batches_by_size() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(4, 10, generator=generator), torch.randn(4, 6, generator=generator)
    first[0, 0] = torch.nan
    metric = zipit.CovarianceMetric()
    metric.update(3, first[:2], first[2:], batch="ignored")
    metric.update(1, second[:2], second[2:])
    known = np.nan_to_num(first.double().numpy()), second.double().numpy()
    mean = (3 * known[0].mean(1) + known[1].mean(1)) / 4
    moment = (3 * known[0] @ known[0].T / 10 + known[1] @ known[1].T / 6) / 4
    expected = torch.from_numpy(moment - np.outer(mean, mean))
    torch.testing.assert_close(metric.finalize(4).double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="call update before finalize"):
        zipit.CovarianceMetric().finalize(1)


def zipped_by_hand(similarity: Tensor, num_models: int, remaining: int, budget: int, shrink: float) -> Tensor:
    """Return [units, clusters]: the published steps on lists, one entry at a time."""
    units = len(similarity)
    rows = [[float("-inf") if i == j else float(similarity[i, j]) for j in range(units)] for i in range(units)]
    members = [{i} for i in range(units)]
    model = [i * num_models // units for i in range(units)]
    left = [budget] * num_models
    size = units // num_models
    while len(rows) > remaining:
        _, i, j = max((value, -i, -j) for i, row in enumerate(rows) for j, value in enumerate(row))
        i, j = sorted((-i, -j))
        models = model[i], model[j]
        for row in rows:
            row[i] = min(row[i], row[j]) * (shrink if shrink > 0 else 1)
        if shrink <= 0:
            for place, row in enumerate(rows):
                if place // size in models:
                    row[i] = float("-inf")
        for row in rows:
            del row[j]
        rows[i] = [min(pair) * (shrink if shrink > 0 else 1) for pair in zip(rows[i], rows[j], strict=True)]
        if shrink <= 0:
            rows[i] = [float("-inf") if place // size in models else value for place, value in enumerate(rows[i])]
        del rows[j]
        members[i] |= members.pop(j)
        del model[j]
        if models[0] == models[1]:
            left[models[0]] -= 1
            if left[models[0]] <= 0:
                for p, row in enumerate(rows):
                    for q in range(len(row)):
                        if model[p] == model[q] == models[0]:
                            row[q] = float("-inf")
    return torch.tensor([[float(unit in cluster) for cluster in members] for unit in range(units)])


@pytest.mark.parametrize(
    ("models", "units", "a", "b"),
    [
        (2, 10, 0.3, 0.125),
        (2, 12, 0.5, 1.0),
        (2, 12, 0.5, 0.0),
        (3, 6, 0.3, 0.1),
        (2, 12, 0.0, 1.0),
        (2, 13, -1.0, 0.25),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_zip_matches_published_procedure(models: int, units: int, a: float, b: float, seed: int) -> None:
    # Python's numbers are float64, so both make exactly the same merges.
    covariance = random_covariance(models * units, seed, torch.float64)
    ratio = 1 - 1 / models
    similarity = zipit.compute_correlation(covariance)
    merges = models * units - int(models * units * (1 - ratio) + 1e-4)
    expected = zipped_by_hand(
        similarity,
        models,
        models * units - merges,
        int(merges // models * b + 1e-4),
        a,
    )
    merge, unmerge = zipit.match_tensors_zipit({"covariance": covariance}, r=ratio, a=a, b=b)
    assert torch.equal(unmerge, expected)
    torch.testing.assert_close(merge, (expected / (expected.sum(0) + 1e-5)).T)


def test_full_search_matches_kernel() -> None:
    covariance = random_covariance(36, 5)
    similarity = zipit.compute_correlation(covariance)
    for budget in (0, 1, 4, 9):
        fast = zip_published(similarity, 2, 18, budget, 0.5)
        sets = [torch.arange(36)]
        # The kernel does not support a budget per group that exceeds the budget of the model.
        slow = zip_published(similarity, 2, 18, budget, 0.5, sets=sets, group_budget=max(1, budget) + 1)
        assert torch.equal(fast.cluster_of_unit, slow.cluster_of_unit)
        assert fast.value == pytest.approx(slow.value, rel=1e-6)


def test_cosine_similarity_and_value() -> None:
    similarity = zipit.compute_correlation(random_covariance(16))
    merge, unmerge, value = zipit.match_tensors_zipit({"cossim": similarity}, get_merge_value=True, unknown=1)
    assert merge.shape == (8, 16)
    assert unmerge.sum() == 16
    assert 0 < value < 1
    assert float(similarity.diagonal().min()) > 0.9  # the caller's diagonal is left alone


def test_permute_returns_permutation_and_value() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    features = torch.randn(9, 200, generator=torch.Generator().manual_seed(2))
    covariance = torch.cov(torch.cat([features, features[order]]))
    merge, unmerge, value = zipit.match_tensors_permute({"covariance": covariance}, get_merge_value=True)
    assert torch.equal(unmerge[:9], torch.eye(9))
    assert torch.equal(unmerge[9:].argmax(1), order)
    assert value == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(merge @ torch.ones(18), torch.ones(9), rtol=0, atol=1e-5)


def test_merges_are_logged_on_request(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        zipit.match_tensors_zipit({"covariance": random_covariance(16)}, print_merges=True)
    assert "clusters of the first half" in caplog.text


def test_errors_explain_the_problem() -> None:
    with pytest.raises(ValueError, match="metric must hold 'covariance' or 'cossim', got 'mean'"):
        zipit.match_tensors_zipit({"mean": torch.ones(4)})
    with pytest.raises(ValueError, match=r"r must be in \[0, 1\), got 1"):
        zipit.match_tensors_identity({"covariance": torch.eye(4)}, r=1)
    with pytest.raises(ValueError, match="no legal merge is left"):
        zipit.match_tensors_zipit({"covariance": random_covariance(15)}, r=2 / 3, a=0.0, b=1.0)
