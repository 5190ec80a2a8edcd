from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from mudsc_fast.matching.node import BLOCKS_OF_MODE, Matcher, Mode, NodeMatching, align_units, zip_all_units
from mudsc_fast.matching.sweep import sweep
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.spec import PermutationSpec
from networks import CONV_SPEC, MLP_SPEC, ConvNet, make_mlp


def matcher(mode: Mode) -> Matcher:
    if mode == "align":
        return align_units
    return lambda similarities, groups: zip_all_units(similarities, 2, groups)


def plain_sweep(
    spec: PermutationSpec, similarity_of: WeightSimilarity, match: Matcher, random_state: int
) -> tuple[dict[str, NodeMatching], list[float]]:
    """Visit and recompute every node in every sweep."""
    generator = torch.Generator().manual_seed(random_state)
    current: dict[str, NodeMatching] = {}
    best: dict[str, NodeMatching] = {}
    objectives: list[float] = []
    misses = 0
    while misses < 5 and len(objectives) < 100:
        for index in torch.randperm(len(spec.nodes), generator=generator).tolist():
            node = spec.nodes[index]
            current.update(match({node: similarity_of(node, current)}, 1))
        objective = sum(current[node].similarity for node in spec.nodes) / len(spec.nodes)
        if not objectives or objective > max(objectives):
            best, misses = dict(current), 0
        else:
            current, misses = dict(best), misses + 1
        objectives.append(objective)
    return best, objectives


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("network", ["mlp", "convolutional"])
@pytest.mark.parametrize("random_state", [0, 7])
def test_keeping_results_changes_nothing(network: str, mode: Mode, random_state: int) -> None:
    if network == "mlp":
        spec, states = MLP_SPEC, [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    else:
        spec, states = CONV_SPEC, [dict(ConvNet(seed).state_dict()) for seed in (0, 1)]
    similarity_of = WeightSimilarity(states, spec, BLOCKS_OF_MODE[mode], [0.5, 0.5])
    calls = 0

    def counted(node: str, matching: Mapping[str, NodeMatching]) -> Tensor:
        nonlocal calls
        calls += 1
        return similarity_of(node, matching)

    swept = sweep(spec, counted, matcher(mode), {}, random_state=random_state)
    expected, objectives = plain_sweep(spec, similarity_of, matcher(mode), random_state)
    assert swept.objectives == objectives
    assert calls < len(objectives) * len(spec.nodes)
    for node in spec.nodes:
        assert swept.matching[node].same_clusters(expected[node])
        assert swept.matching[node].similarity == expected[node].similarity


def test_patience_and_most_sweeps() -> None:
    similarity = torch.eye(4)[None]
    for max_sweeps, patience, expected in [(3, 5, 3), (100, 2, 3), (100, 5, 6)]:
        result = sweep(MLP_SPEC, lambda *_: similarity, align_units, {}, max_sweeps=max_sweeps, patience=patience)
        assert len(result.objectives) == expected


def test_weight_similarity_is_the_correlation_of_weight_vectors() -> None:
    states = [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    vectors = torch.cat(
        [torch.cat([s["fc1.weight"], s["fc1.bias"][:, None], s["fc2.weight"].T], dim=1) for s in states]
    )
    expected = torch.corrcoef(vectors.double()).float()
    torch.testing.assert_close(
        WeightSimilarity(states, MLP_SPEC, "full", [0.5, 0.5])("fc1", {}), expected, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        WeightSimilarity(states, MLP_SPEC, "cross", [0.5, 0.5])("fc1", {})[0],
        expected[:32, 32:],
        rtol=0,
        atol=1e-5,
    )


def test_weight_vectors_follow_the_neighbours_matching() -> None:
    states = [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    order = torch.randperm(32)
    neighbour = NodeMatching("align", torch.stack([torch.arange(32), torch.argsort(order)]), 32, 0.0, 0.0)
    vectors = [
        torch.cat([s["fc1.weight"], s["fc1.bias"][:, None], s["fc2.weight"][rows].T], dim=1)
        for s, rows in zip(states, [torch.arange(32), order], strict=True)
    ]
    expected = torch.corrcoef(torch.cat(vectors).double()).float()
    similarity = WeightSimilarity(states, MLP_SPEC, "full", [0.5, 0.5])("fc1", {"fc2": neighbour})
    torch.testing.assert_close(similarity, expected, rtol=0, atol=1e-5)
