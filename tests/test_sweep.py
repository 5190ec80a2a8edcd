from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from architectures import VisionTransformer, randomize
from mudsc_fast.matching.node import BLOCKS_OF_MODE, Matcher, Mode, NodeMatching, align_units, zip_all_units
from mudsc_fast.matching.sweep import one_by_one, sweep
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.ops.correlation import CorrelationAccumulator
from mudsc_fast.spec import PermutationSpec, vit
from networks import CONV_SPEC, MLP_SPEC, ConvNet, make_mlp


def matcher(mode: Mode) -> Matcher:
    if mode == "align":
        return align_units
    return lambda similarities, groups: zip_all_units(similarities, 2, groups)


def plain_sweep(
    spec: PermutationSpec, similarity_of: WeightSimilarity, match: Matcher, random_state: int
) -> tuple[dict[str, NodeMatching], list[float]]:
    """Return the matching and the objectives of a search that recomputes every node in every sweep."""
    generator = torch.Generator().manual_seed(random_state)
    current: dict[str, NodeMatching] = {}
    best: dict[str, NodeMatching] = {}
    objectives: list[float] = []
    misses = 0
    while misses < 5 and len(objectives) < 100:
        for index in torch.randperm(len(spec.bundles), generator=generator).tolist():
            bundle = spec.bundles[index]
            similarities = {node: similarity_of(node, current) for node in bundle}
            current.update(match(similarities, spec.groups(bundle[0]).count))
        objective = sum(current[node].similarity for node in spec.nodes) / len(spec.nodes)
        if not objectives or objective > max(objectives):
            best, misses = dict(current), 0
        else:
            current, misses = dict(best), misses + 1
        objectives.append(objective)
    return best, objectives


def spec_and_states(network: str) -> tuple[PermutationSpec, list[dict[str, Tensor]]]:
    if network == "mlp":
        return MLP_SPEC, [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    if network == "convolutional":
        return CONV_SPEC, [ConvNet(seed).state_dict() for seed in (0, 1)]
    return vit(2, 3, 24), [randomize(VisionTransformer(), seed).state_dict() for seed in (0, 1)]


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("network", ["mlp", "convolutional", "vit"])
@pytest.mark.parametrize("random_state", [0, 7])
def test_cached_results_match_recomputed(network: str, mode: Mode, random_state: int) -> None:
    spec, states = spec_and_states(network)
    similarity_of = WeightSimilarity(states, spec, BLOCKS_OF_MODE[mode], [0.5, 0.5])
    calls = 0

    def counted(node: str, matching: Mapping[str, NodeMatching]) -> Tensor:
        nonlocal calls
        calls += 1
        return similarity_of(node, matching)

    swept = sweep(spec, one_by_one(spec, counted, matcher(mode)), {}, random_state=random_state)
    plain = WeightSimilarity(states, spec, BLOCKS_OF_MODE[mode], [0.5, 0.5], keep=False)
    expected, objectives = plain_sweep(spec, plain, matcher(mode), random_state)
    assert swept.objectives == pytest.approx(objectives, abs=1e-6)
    assert calls < len(objectives) * len(spec.nodes)
    for node in spec.nodes:
        assert swept.matching[node].same_clusters(expected[node])
        assert swept.matching[node].similarity == pytest.approx(expected[node].similarity, abs=1e-6)


def test_patience_and_max_sweeps() -> None:
    similarity = torch.eye(4)[None]
    for max_sweeps, patience, expected in [(3, 5, 3), (100, 2, 3), (100, 5, 6)]:
        solve = one_by_one(MLP_SPEC, lambda *_: similarity, align_units)
        result = sweep(MLP_SPEC, solve, {}, max_sweeps=max_sweeps, patience=patience)
        assert len(result.objectives) == expected


def test_weight_similarity_is_correlation_of_weight_vectors() -> None:
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


def test_weight_vectors_follow_neighbor_matching() -> None:
    states = [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    order = torch.randperm(32)
    neighbor = NodeMatching("align", torch.stack([torch.arange(32), torch.argsort(order)]), 32, 0.0, 0.0)
    vectors = [
        torch.cat([s["fc1.weight"], s["fc1.bias"][:, None], s["fc2.weight"][rows].T], dim=1)
        for s, rows in zip(states, [torch.arange(32), order], strict=True)
    ]
    expected = torch.corrcoef(torch.cat(vectors).double()).float()
    similarity = WeightSimilarity(states, MLP_SPEC, "full", [0.5, 0.5])("fc1", {"fc2": neighbor})
    torch.testing.assert_close(similarity, expected, rtol=0, atol=1e-5)


def random_matching(
    mode: Mode, units: int, seed: int, like: NodeMatching | None = None, moved: int = 4
) -> NodeMatching:
    """Return a random matching of two models, or one that differs from `like` in a few units."""
    generator = torch.Generator().manual_seed(seed)
    if like is None:
        clusters = torch.stack([torch.arange(units), torch.randperm(units, generator=generator)])
        if mode == "zip":
            clusters = torch.arange(2 * units) % units
            clusters = clusters[torch.randperm(2 * units, generator=generator)].view(2, units)
    else:
        clusters = like.cluster_of_unit.clone()
        model = 1 if mode == "align" else 0
        places = torch.randperm(units, generator=generator)[:moved]
        clusters[model, places] = clusters[model, places.roll(1)]
        if mode == "zip":  # the same clusters with other numbers
            clusters = torch.randperm(units, generator=generator)[clusters]
    return NodeMatching(mode, clusters, units, 0.0, 0.0)


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("network", ["mlp", "convolutional", "vit"])
def test_sums_follow_neighbors(network: str, mode: Mode) -> None:
    spec, states = spec_and_states(network)
    units = spec.units(states[0])
    followed, anew = (
        WeightSimilarity(states, spec, BLOCKS_OF_MODE[mode], [0.3, 0.7], keep=keep) for keep in (True, False)
    )
    matching: dict[str, NodeMatching] = {}
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        for node in spec.nodes:
            torch.testing.assert_close(followed(node, matching), anew(node, matching), rtol=0, atol=5e-6)
        node = spec.nodes[int(torch.randint(len(spec.nodes), (), generator=generator))]
        like = matching.get(node) if step % 4 else None
        matching[node] = random_matching(mode, units[node], step, like)


def test_renumbered_clusters_reuse_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    similarity = WeightSimilarity(states, MLP_SPEC, "full", [0.5, 0.5])
    first = random_matching("zip", 32, 0)
    before = similarity("fc1", {"fc2": first})
    second = random_matching("zip", 32, 1, first, moved=0)
    assert not torch.equal(first.cluster_of_unit, second.cluster_of_unit)

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(CorrelationAccumulator, "replace", unexpected)
    monkeypatch.setattr(CorrelationAccumulator, "update", unexpected)
    assert torch.equal(similarity("fc1", {"fc2": second}), before)
    with pytest.raises(AssertionError, match="computed again"):
        similarity("fc1", {"fc2": random_matching("zip", 32, 2, first)})
