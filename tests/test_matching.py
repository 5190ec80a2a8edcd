from __future__ import annotations

import pytest
import torch

import mudsc_fast
from conftest import load_golden
from mudsc_fast.matching import node as node_module
from mudsc_fast.matching.node import align_units, with_first, zip_all_units
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.ops.assignment import Assignment
from mudsc_fast.spec import Axis, PermutationSpec


@pytest.mark.parametrize("number", range(4))
def test_golden_alignments(number: int) -> None:
    golden = load_golden(f"align_{number}")
    similarity, num_models = torch.from_numpy(golden["similarity"]), int(golden["num_models"])
    blocks = with_first(similarity, num_models)
    match = align_units({"node": blocks})["node"]
    assert torch.equal(match.cluster_of_unit.flatten(), torch.from_numpy(golden["unmerge"]).argmax(1))
    assert match.similarity == pytest.approx(float(golden["value"]), abs=1e-6)


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_golden_zips(number: int) -> None:
    golden = load_golden(f"zip_{number}")
    match = zip_all_units(
        {"node": torch.from_numpy(golden["similarity"])},
        int(golden["num_models"]),
        shrink=float(golden["a"]),
        budget=float(golden["b"]),
    )["node"]
    assert torch.equal(match.cluster_of_unit.flatten(), torch.from_numpy(golden["unmerge"]).argmax(1))
    assert match.similarity == pytest.approx(float(golden["value"]), abs=1e-6)


def test_similarity_before() -> None:
    similarity = torch.rand(12, 12)
    blocks = torch.stack([similarity[:4, 4:8], similarity[:4, 8:]])
    expected = float(torch.cat([blocks[0].diagonal(), blocks[1].diagonal()]).double().mean())
    assert align_units({"node": blocks})["node"].similarity_before == pytest.approx(expected)
    assert zip_all_units({"node": similarity}, 3)["node"].similarity_before == pytest.approx(expected)


@pytest.mark.parametrize("number", range(3))
def test_golden_group_alignments(number: int) -> None:
    golden = load_golden(f"group_align_{number}")
    blocks = with_first(torch.from_numpy(golden["similarity"]), int(golden["num_models"]))
    match = align_units({"node": blocks}, int(golden["groups"]))["node"]
    assert torch.equal(match.cluster_of_unit.flatten(), torch.from_numpy(golden["unmerge"]).argmax(1))
    assert match.similarity == pytest.approx(float(golden["value"]), abs=1e-6)


@pytest.mark.parametrize("number", range(3))
def test_golden_group_zips(number: int) -> None:
    golden = load_golden(f"group_zip_{number}")
    match = zip_all_units(
        {"node": torch.from_numpy(golden["similarity"])},
        int(golden["num_models"]),
        int(golden["groups"]),
        shrink=float(golden["a"]),
        budget=float(golden["b"]),
    )["node"]
    assert torch.equal(match.cluster_of_unit.flatten(), torch.from_numpy(golden["unmerge"]).argmax(1))
    assert match.similarity == pytest.approx(float(golden["value"]), abs=1e-6)


def test_tied_nodes_share_group_order() -> None:
    torch.manual_seed(0)
    blocks = {"queries": torch.rand(2, 12, 12), "values": torch.rand(2, 20, 20)}
    matching = align_units(blocks, groups=4)
    orders = {}
    for node, match in matching.items():
        assert match.permutations is not None
        size = match.num_clusters // 4
        group = (match.permutations // size).view(3, 4, size)
        assert torch.equal(group, group[..., :1].expand(group.shape))
        orders[node] = group[..., 0]
    assert torch.equal(orders["queries"], orders["values"])
    alone = align_units({"values": blocks["values"]}, groups=4)["values"]
    assert alone.similarity >= matching["values"].similarity


def test_running_statistics_follow_and_are_not_compared() -> None:
    statistics = Axis("units", "produce", compared=False)
    alone = PermutationSpec({"fc.weight": ("units", None)})
    normalized = PermutationSpec({"fc.weight": ("units", None), "bn.running_mean": (statistics,)})
    states = [{"fc.weight": torch.randn(6, 5), "bn.running_mean": torch.randn(6)} for _ in range(2)]
    expected = WeightSimilarity(states, alone, "full", [0.5, 0.5])("units", {})
    assert torch.equal(WeightSimilarity(states, normalized, "full", [0.5, 0.5])("units", {}), expected)
    order = torch.tensor([3, 0, 1, 5, 2, 4])
    permuted = mudsc_fast.permute_state_dict(states[0], normalized, {"units": order})
    assert torch.equal(permuted["bn.running_mean"], states[0]["bn.running_mean"][order])


@pytest.mark.parametrize(("units", "groups"), [(300, 1), (24, 4)])
def test_warm_start_does_not_change_result(monkeypatch: pytest.MonkeyPatch, units: int, groups: int) -> None:
    monkeypatch.setattr(node_module, "_MIN_UNITS_TO_KEEP", 0)
    torch.manual_seed(0)
    similarity = torch.randn(2, units, units)
    earlier: dict[str, Assignment] = {}
    for step in range(3):
        similarity = similarity + 0.01 * torch.randn(2, units, units)
        expected = align_units({"node": similarity}, groups)["node"]
        found = align_units({"node": similarity}, groups, earlier=earlier)["node"]
        assert found.same_clusters(expected), step
        assert float(earlier["node"].gap.max()) < 1e-9
