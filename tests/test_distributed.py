"""Matching and merging in several processes gives the result of one process."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import mudsc_fast
from architectures import ResNet, calibrate, randomize
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.matching import sharing
from mudsc_fast.matching.weight import WeightSimilarity
from networks import CONV_SPEC, MLP_SPEC, ConvNet, make_mlp
from processes import run_processes

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")

Merge = Callable[..., mudsc_fast.MergeResult]

#: For each number of processes, the indices of the batches that each process has.
SHARES = {1: ([0, 1, 2, 3, 4],), 2: ([0, 1, 2, 3], [4]), 3: ([0, 1], [], [2, 3, 4])}


def llama_tensors(seed: int, width: int = 32, hidden: int = 40, layers: int = 3) -> dict[str, Tensor]:
    """Return random tensors with the names and shapes of a LLaMA with 4 query heads and 2 key-value heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (50, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.self_attn.k_proj.weight": (width // 2, width),
            f"{prefix}.self_attn.v_proj.weight": (width // 2, width),
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.mlp.gate_proj.weight": (hidden, width),
            f"{prefix}.mlp.up_proj.weight": (hidden, width),
            f"{prefix}.mlp.down_proj.weight": (width, hidden),
        }
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (50, width)}
    return {
        name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5 + (len(shape) == 1))
        for name, shape in shapes.items()
    }


def llama_spec(width: int = 32, layers: int = 3) -> mudsc_fast.PermutationSpec:
    return mudsc_fast.spec.llama(layers, 4, 2, width // 4)


def resnets() -> list[nn.Module]:
    models = [randomize(ResNet([1, 1], [8, 12]), seed) for seed in (0, 1)]
    for model in models:
        calibrate(model, torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(9)))
    return models


def batches(shape: Sequence[int]) -> list[Tensor]:
    """Return five batches of different sizes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(samples, *shape, generator=generator) for samples in (16, 7, 30, 1, 12)]


def merge_states(make: Callable[[int], Mapping[str, Tensor]], models: int = 2, **options: Any) -> Merge:
    """Return a function that merges networks with different seeds by weights."""

    def run(_: Sequence[int], **more: Any) -> mudsc_fast.MergeResult:
        return mudsc_fast.merge([make(seed) for seed in range(models)], **options, **more)

    return run


def merge_modules(models: Callable[[], Sequence[nn.Module]], shape: Sequence[int], **options: Any) -> Merge:
    """Return a function that merges modules by weights and activations."""

    def run(share: Sequence[int], **more: Any) -> mudsc_fast.MergeResult:
        data = batches(shape)
        return mudsc_fast.merge(models(), [data[index] for index in share], **options, **more)

    return run


def search_mlps(share: Sequence[int], **more: Any) -> mudsc_fast.MergeResult:
    """Search for the balance of MLPs with the best mean score over all processes."""

    def score(result: mudsc_fast.MergeResult) -> float:
        return -abs((result.matching.balance or 0) - 0.6) + len(share)

    data = batches((20,))
    return mudsc_fast.search_balance(
        mlps(), [data[index] for index in share], score=score, balances=[0.2, 0.7], spec=MLP_SPEC, **more
    )


def mlps() -> list[nn.Module]:
    return [make_mlp(seed=seed) for seed in (0, 1)]


def huge_row(seed: int) -> dict[str, Tensor]:
    """Return an MLP with a row whose sums of squares are too large for float32."""
    tensors = make_mlp((20, 33, 32, 10), seed=seed).state_dict()
    tensors["fc1.weight"][seed] *= 1e30
    return tensors


CASES: dict[str, Merge] = {
    "mlp align": merge_states(lambda seed: make_mlp(seed=seed).state_dict(), spec=MLP_SPEC),
    "mlp zip": merge_states(lambda seed: make_mlp(seed=seed).state_dict(), spec=MLP_SPEC, mode="zip"),
    "huge row align": merge_states(huge_row, spec=MLP_SPEC),
    "huge row zip": merge_states(huge_row, spec=MLP_SPEC, mode="zip"),
    "mlp dual": merge_modules(mlps, (20,), spec=MLP_SPEC, balance=0.4),
    "mlp search": search_mlps,
    "mlp partial": merge_modules(mlps, (20,), spec=MLP_SPEC, stop_at="fc1", mode="zip", budget=0.5),
    "mlp activation": merge_modules(mlps, (20,), spec=MLP_SPEC, space="activation"),
    "derived": merge_modules(lambda: [ConvNet(seed).eval() for seed in (0, 1)], (3, 8, 8)),
    "resnet align": merge_modules(resnets, (3, 8, 8), spec="resnet"),
    "resnet zip": merge_modules(resnets, (3, 8, 8), spec="resnet", mode="zip"),
    "llama align": merge_states(llama_tensors, spec=llama_spec()),
    "llama of three models": merge_states(llama_tensors, spec=llama_spec(), models=3),
    "llama zip": merge_states(llama_tensors, spec=llama_spec(), mode="zip"),
    "convolutional": merge_states(lambda seed: ConvNet(seed).state_dict(), spec=CONV_SPEC, weights=[0.3, 0.7]),
}


#: Cases that also run in a group of one process, which must behave as if there were no group.
CASES_OF_ONE_PROCESS = ("mlp zip", "mlp dual", "mlp search")

#: Alignments whose work is shared by samples, as on GPUs, instead of by rows.
CASES_BY_SAMPLES = ("resnet align", "llama of three models")


def results_to_compare(result: mudsc_fast.MergeResult) -> dict[str, Any]:
    """Return what must not depend on the number of processes."""
    return {
        "clusters": {node: matched.cluster_of_unit for node, matched in result.matching.items()},
        "tensors": dict(result.state_dict),
        "tasks": [dict(tensors) for tensors in result.task_state_dicts],
        "objectives": result.objectives,
    }


def merge_in_groups(rank: int, folder: Path) -> None:
    """Merge all cases in groups of one, two and three processes, and share the work on nodes of any size."""
    sharing._MIN_MOVED_SAMPLES["cpu"] = sharing._MIN_SAMPLES_OF_ROWS = 1
    num_shared = Counter[str]()

    def count(kind: type[sharing.Sharing]) -> None:
        compute = kind.compute

        def counted(self: Any, task: sharing.Task) -> Any:
            num_shared[f"{kind.__name__} {'updates' if task in self._plan.updates else 'sums'}"] += 1
            return compute(self, task)

        setattr(kind, "compute", counted)  # noqa: B010

    count(sharing.SharingRows)
    count(sharing.SharingSamples)
    by_rows = WeightSimilarity.divides_rows
    results: dict[str, Any] = {}
    for size in (1, 2, 3):
        group = distributed.new_group(list(range(size)))
        if rank >= size:
            continue
        for name, merge in CASES.items():
            if size == 1 and name not in CASES_OF_ONE_PROCESS:
                continue
            setattr(WeightSimilarity, "divides_rows", False if name in CASES_BY_SAMPLES else by_rows)  # noqa: B010
            gc.disable()
            result = merge(SHARES[size][rank], group=group)
            # The first import of torch.export leaves cycles with the frames of its callers.
            assert name == "derived" or Ranks.latest is None or Ranks.latest() is None, f"{name} left a cycle"
            gc.enable()
            results[f"{name} {size}"] = results_to_compare(result)
            distribution = result.matching.distribution
            assert (distribution is None) == (size == 1)
            if distribution is not None:
                assert len(distribution.sweep_bytes) == len(result.objectives)
                assert sum(distribution.work) == pytest.approx(1)
                if name == "mlp dual":
                    units = MLP_SPEC.units(make_mlp().state_dict())
                    comoments = 8 * sum(count**2 for count in units.values())
                    # Sent to the owners only. An all-reduce sends at least twice as many bytes.
                    assert comoments < distribution.statistics_bytes / (size - 1) < 1.5 * comoments
                if name == "mlp search":
                    scores = {0.2: 5 / size - 0.4, 0.7: 5 / size - 0.1}
                    assert result.scores == pytest.approx(scores)
    assert len(num_shared) == 4 or rank == 2, num_shared
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.slow
def test_all_processes_get_the_result_of_one_process(tmp_path: Path) -> None:
    """All cases are in one test, because separate tests would start the processes once per pytest-xdist worker."""
    assert run_processes(merge_in_groups, 3, tmp_path) == [0, 0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for name, merge in CASES.items():
        expected = results_to_compare(merge(range(5)))
        for size in (1, 2, 3) if name in CASES_OF_ONE_PROCESS else (2, 3):
            for rank in range(size):
                assert_equal(results[rank][f"{name} {size}"], expected, f"{name} in {size} processes, rank {rank}")


def assert_equal(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    for node, clusters in expected["clusters"].items():
        assert torch.equal(found["clusters"][node], clusters), f"{node} of {where}"
    assert found["objectives"] == pytest.approx(expected["objectives"], abs=1e-6), where
    for kind in ("tensors", "tasks"):
        torch.testing.assert_close(found[kind], expected[kind], rtol=0, atol=1e-6, msg=lambda text: f"{where}: {text}")
