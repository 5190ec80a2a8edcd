"""Distribution of nodes and tensors over ranks, waves of nodes, and shares of the work on a node."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mudsc_fast.distributed import Ranks
from mudsc_fast.matching.node import BLOCKS_OF_MODE, Mode, NodeMatching, align_units, zip_all_units
from mudsc_fast.matching.owners import pack, share_out
from mudsc_fast.matching.sharing import Plan, SharingRows, Task
from mudsc_fast.matching.slices import cut_all, tensor_slices
from mudsc_fast.matching.sweep import waves
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.ops.correlation import CorrelationAccumulator
from mudsc_fast.spec import PermutationSpec, llama, mlp
from networks import CONV_SPEC, MLP_SPEC, ConvNet, make_mlp


def llama_shapes(layers: int, width: int, hidden: int, heads: int, kv_heads: int, tokens: int) -> dict[str, Tensor]:
    """Return meta tensors with the shapes of a LLaMA."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (tokens, width)}
    for layer in range(layers):
        attention, forward = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        narrow = width // heads * kv_heads
        shapes |= {f"model.layers.{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes |= {f"{attention}.{name}_proj.weight": (width, width) for name in ("q", "o")}
        shapes |= {f"{attention}.{name}_proj.weight": (narrow, width) for name in ("k", "v")}
        shapes |= {f"{forward}.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{forward}.down_proj.weight": (width, hidden)}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (tokens, width)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def mlp_shapes(layers: int, width: int) -> dict[str, Tensor]:
    return {
        f"fc{layer}.{kind}": torch.empty(shape, device="meta")
        for layer in range(layers)
        for kind, shape in (("weight", (width, width)), ("bias", (width,)))
    }


NETWORKS = {
    "llama 8B": (llama(32, 32, 8, 128), llama_shapes(32, 4096, 14336, 32, 8, 128256)),
    "llama of four layers": (llama(4, 16, 4, 64), llama_shapes(4, 1024, 2816, 16, 4, 1000)),
    "mlp": (mlp([f"fc{layer}" for layer in range(3)]), mlp_shapes(3, 512)),
    "convolutional": (CONV_SPEC, ConvNet(0).state_dict()),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("network", NETWORKS)
def test_ranks_get_equal_work(network: str, ranks: int) -> None:
    spec, tensors = NETWORKS[network]
    if network == "convolutional" and ranks > 3:
        pytest.skip("the network has too few units for this many ranks")
    owners = pack(spec, tensors, ranks)
    assert sum(owners.work) == pytest.approx(1)
    assert max(owners.work) < 1.1 / ranks
    assert min(owners.work) > 0.9 / ranks
    units = spec.units(tensors)
    works = [
        sum(units[node] ** 2 * part.samples for node, parts in slices.items() for part in parts)
        for slices in owners.slices
    ]
    assert [work / sum(works) for work in works] == pytest.approx(list(owners.work))
    for node, parts in tensor_slices(spec, tensors).items():
        held = [part for slices in owners.slices for part in slices[node]]
        assert sum(part.samples for part in held) == sum(part.samples for part in parts) == owners.samples[node]
    assert set(owners.holder) == set(tensors)
    assert set(owners.owner) == set(spec.bundles)


def test_only_the_residual_stream_is_spread() -> None:
    owners = pack(*NETWORKS["llama 8B"], ranks=8)
    assert owners.spread == {("stream",)}
    for bundle, rank in owners.owner.items():
        if bundle != ("stream",):
            for node in bundle:
                assert [bool(slices[node]) for slices in owners.slices] == [rank == other for other in range(8)]


def test_sweep_over_a_transformer_has_three_waves() -> None:
    spec, _ = NETWORKS["llama 8B"]
    order = list(spec.bundles)
    stream = order.index(("stream",))
    order[stream], order[20] = order[20], order[stream]
    found = waves(spec, order)
    assert found == [order[:20], [("stream",)], order[21:]]


def test_waves_keep_the_order_of_neighbors() -> None:
    spec = mlp([f"fc{layer}" for layer in range(6)])
    for order in itertools.islice(itertools.permutations(spec.bundles), 0, None, 7):
        place = {bundle: number for number, wave in enumerate(waves(spec, order)) for bundle in wave}
        assert len(place) == len(order)
        for (first, one), (second, other) in itertools.combinations(enumerate(order), 2):
            if other[0] in spec.neighbors(one[0]):
                assert first < second
                assert place[one] < place[other]


def test_bundle_visited_twice_is_in_two_waves() -> None:
    assert waves(MLP_SPEC, [("fc1",), ("fc1",), ("fc2",)]) == [[("fc1",)], [("fc1",)], [("fc2",)]]


def test_idle_ranks_get_shares() -> None:
    works, holder, none = {"a": 90.0, "b": 10.0}, {"a": 0, "b": 1}, {"a": 0.0, "b": 0.0}
    fractions = {}

    def always(task: str, fraction: float) -> bool:
        fractions[task] = fraction
        return True

    shares = share_out(works, holder, [0.0, 0.0], none, always)
    assert fractions == pytest.approx({"a": 40 / 90})
    assert list(shares) == ["a"]
    parts = sorted(shares["a"], key=lambda share: share[1])
    assert [rank for rank, _, _ in parts] == [0, 1]
    assert [parts[0][1], parts[1][2]] == [0.0, 1.0]
    assert parts[0][2] == parts[1][1] == pytest.approx(50 / 90)
    assert share_out(works, holder, [0.0, 0.0], none, lambda *_: False) == {}
    assert share_out(works, holder, [0.0, 80.0], none, always) == {}
    # The holder completes the task when the helper has finished, while this rank does its own work, if it has any.
    after = {"a": 10.0, "b": 10.0}
    shares = share_out({"a": 90.0}, holder, [0.0, 0.0], after, always)
    assert sorted(shares["a"]) == [(0, 0.0, 0.5), (1, 0.5, 1.0)]
    shares = share_out({"a": 90.0, "b": 50.0}, holder, [0.0, 0.0], after, always)
    assert sorted(shares["a"]) == [(0, 0.0, pytest.approx(7 / 9)), (1, pytest.approx(7 / 9), 1.0)]


def test_shares_of_several_ranks_leave_no_gap() -> None:
    works = {"a": 1 / 3, "b": 1 / 7}
    shares = share_out(works, {"a": 0, "b": 0}, [0.0] * 7, dict.fromkeys(works, 0.0), lambda *_: True)
    for parts in shares.values():
        parts.sort(key=lambda share: share[1])
        assert parts[0][1] == 0
        assert parts[-1][2] == 1
        assert all(one[2] == other[1] for one, other in itertools.pairwise(parts))
    assert {rank for parts in shares.values() for rank, _, _ in parts} == set(range(7))


def matched(mode: Mode, units: int, seed: int) -> NodeMatching:
    """Return a random matching of two models."""
    generator = torch.Generator().manual_seed(seed)
    if mode == "align":
        return align_units({"node": torch.randn(1, units, units, generator=generator)})["node"]
    similarity = torch.randn(2 * units, 2 * units, generator=generator)
    return zip_all_units({"node": similarity + similarity.T}, 2)["node"]


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("places", [(0.0, 1.0), (0.0, 0.37, 1.0), (0.0, 0.1, 0.55, 0.9, 1.0)])
@pytest.mark.parametrize("known", [False, True])
def test_shares_of_a_node_add_up(mode: Mode, places: tuple[float, ...], known: bool) -> None:
    cases: list[tuple[PermutationSpec, list[Mapping[str, Tensor]]]] = [
        (MLP_SPEC, [make_mlp(seed=seed).state_dict() for seed in (0, 1)]),
        (CONV_SPEC, [ConvNet(seed).state_dict() for seed in (0, 1)]),
    ]
    for spec, states in cases:
        units = spec.units(states[0])
        current = {node: matched(mode, count, 3) for node, count in units.items()} if known else {}
        weights = WeightSimilarity(states, spec, BLOCKS_OF_MODE[mode], [0.5, 0.5])
        for node, slices in tensor_slices(spec, states[0]).items():
            whole = weights.sums(node, current)
            joined = CorrelationAccumulator(2, units[node], blocks=BLOCKS_OF_MODE[mode])
            for begin, end in itertools.pairwise(places):
                share = cut_all(slices, begin, end, states[0], units)
                sums = weights.sums_of(node, current, share)
                assert sums.num_samples == sum(part.samples for part in share)
                joined.merge(sums)
            assert joined.num_samples == whole.num_samples
            torch.testing.assert_close(joined.finalize(), whole.finalize(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_shares_can_be_cut_again(known: bool) -> None:
    states: list[Mapping[str, Tensor]] = [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    units = MLP_SPEC.units(states[0])
    current = {node: matched("align", count, 3) for node, count in units.items()} if known else {}
    weights = WeightSimilarity(states, MLP_SPEC, "cross", [0.5, 0.5])
    for node, slices in tensor_slices(MLP_SPEC, states[0]).items():
        half = cut_all(slices, 0.3, 1.0, states[0], units)
        pieces = [cut_all(half, *places, states[0], units) for places in itertools.pairwise((0.0, 0.45, 1.0))]
        joined = weights.sums_of(node, current, pieces[0])
        joined.merge(weights.sums_of(node, current, pieces[1]))
        whole = weights.sums_of(node, current, half)
        assert joined.num_samples == whole.num_samples
        torch.testing.assert_close(joined.finalize(), whole.finalize(), rtol=0, atol=1e-5)


def test_share_without_rows_sends_nothing() -> None:
    """A helper without rows has not computed means and variances either, so the holder must not use them."""
    states: list[Mapping[str, Tensor]] = [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    task = Task(("fc1",), 0)
    slices = tensor_slices(MLP_SPEC, states[0])
    weights = WeightSimilarity(states, MLP_SPEC, "cross", [0.5, 0.5])
    ranks = Ranks()
    rows = SharingRows(ranks, weights, states[0], MLP_SPEC.units(states[0]), [slices], torch.float32)
    plan = Plan({task: [(1, 0.0, 0.01), (0, 0.01, 1.0)]}, [task], {}, {})
    rows.begin(plan)
    sums = rows.compute(task)
    with rows.exchanging():
        rows.join(task, sums)
    whole = weights.sums_of("fc1", {}, slices["fc1"])
    assert torch.equal(sums["fc1"].finalize(), whole.finalize())
    ranks.rank = 1
    rows.begin(plan)
    with rows.exchanging():
        assert rows.compute(task) == {}


def moved(units: int, share: float, seed: int, start: NodeMatching) -> NodeMatching:
    """Return a matching in which a share of the second model's units have other partners."""
    chosen = torch.randperm(units, generator=torch.Generator().manual_seed(seed))[: round(share * units)]
    order = start.cluster_of_unit[1].clone()
    order[chosen] = order[chosen.roll(1)]
    return replace(start, cluster_of_unit=torch.stack([start.cluster_of_unit[0], order]))


@pytest.mark.parametrize("places", [(0.0, 1.0), (0.0, 0.37, 1.0), (0.0, 0.1, 0.55, 0.9, 1.0)])
def test_parts_of_an_update_add_up(places: tuple[float, ...]) -> None:
    """The holder computes the first part of an update. Helpers compute what the other parts add to its sums."""
    states: list[Mapping[str, Tensor]] = [ConvNet(seed).state_dict() for seed in (0, 1)]
    units = CONV_SPEC.units(states[0])
    before = {node: matched("align", count, 3) for node, count in units.items()}
    now = {node: moved(count, 0.4, 4, before[node]) for node, count in units.items()}
    slices = tensor_slices(CONV_SPEC, states[0])
    num_updated = 0
    for node in CONV_SPEC.nodes:
        holder = WeightSimilarity(states, CONV_SPEC, "cross", [0.5, 0.5])
        helper = WeightSimilarity(states, CONV_SPEC, "cross", [0.5, 0.5])
        update = holder.update_of(node, before, now, slices[node])
        if update is None or not update.exchanged:
            continue
        num_updated += 1
        assert update.is_divisible
        holder.sums(node, before)
        mean = holder.kept_mean(node).clone()
        assert mean.shape == helper.empty_mean(node).shape
        first, *rest = itertools.pairwise(places)
        sums = holder.updated(node, update.part([first]))
        for share in rest:
            sums._moments.comoments += helper.difference(node, update.part([share]), mean)._moments.comoments
        fresh = WeightSimilarity(states, CONV_SPEC, "cross", [0.5, 0.5], keep=False).sums(node, now)
        torch.testing.assert_close(sums.finalize(), fresh.finalize(), rtol=0, atol=1e-5)
        assert holder.sums(node, now) is sums
    assert num_updated
