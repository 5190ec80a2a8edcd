"""Networks sharded over processes: FSDP2 modules and state dicts of DTensors, on gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import mudsc_fast
from networks import MLP_SPEC, make_mlp
from processes import run_processes
from test_distributed import SHARES, batches, llama_spec, llama_tensors

try:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
except ImportError:
    pytest.skip("this torch has no FSDP2", allow_module_level=True)

try:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
except ImportError:
    storage: Any = None  # older versions of torch lack it
else:
    storage = HuggingFaceStorageWriter, HuggingFaceStorageReader

OPTIONS: dict[str, dict[str, Any]] = {
    "dual": {"spec": MLP_SPEC, "balance": 0.4},
    "partial": {"spec": MLP_SPEC, "mode": "zip", "stop_at": "fc1", "space": "weight"},
}


def sharded_mlp(seed: int, mesh: Any) -> nn.Module:
    """Return an MLP under FSDP2. The width of its first layer is odd, so the shards of two processes differ in size."""
    model = make_mlp((20, 33, 32, 10), seed=seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tied_llama(seed: int) -> dict[str, Tensor]:
    tensors = llama_tensors(seed)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def tied_spec() -> mudsc_fast.PermutationSpec:
    return mudsc_fast.spec.llama(3, 4, 2, 8, head="tied")


def gathered(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def merge_sharded(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    group = distributed.group.WORLD
    results: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        models = [sharded_mlp(seed, mesh) for seed in (0, 1)]
        own = [batches((20,))[index] for index in SHARES[2][rank]]
        merged = mudsc_fast.merge(models, own, group=group, **options)
        assert merged.model is None
        for key, tensor in models[0].state_dict().items():
            found = merged.task_state_dicts[0][key]
            assert isinstance(found, DTensor)
            assert found.placements == tensor.placements
            assert found.to_local().shape == tensor.to_local().shape
        models[0].load_state_dict(merged.task_state_dicts[0])
        results[name] = [gathered(tensors) for tensors in merged.task_state_dicts]
        assert len(merged.state_dict) == (6 if name == "dual" else 2)
    states = []
    for seed in (0, 1):
        sharded = {
            key: distribute_tensor(tensor, mesh, [Shard(tensor.ndim - 1)])
            for key, tensor in llama_tensors(seed).items()
        }
        states.append(sharded)
    merged = mudsc_fast.merge(states, spec=llama_spec(), group=group)
    results["llama"] = [gathered(merged.state_dict)]
    if storage is not None:
        # As in docs/distributed.md.
        shards = str(folder / "shards")
        save(dict(merged.state_dict), storage_writer=storage[0](shards, save_distributed=True))
        loaded = {key: torch.zeros_like(tensor) for key, tensor in merged.state_dict.items()}
        load(loaded, storage_reader=storage[1](shards))
        results["llama from shards"] = [gathered(loaded)]
    for sharded in states:
        sharded["lm_head.weight"] = sharded["model.embed_tokens.weight"]
    merged = mudsc_fast.merge(states, spec=tied_spec(), group=group)
    assert merged.state_dict["lm_head.weight"] is merged.state_dict["model.embed_tokens.weight"]
    results["tied"] = [gathered(merged.state_dict)]
    with pytest.raises(TypeError, match=r"models hold DTensors, .* that takes group="):
        mudsc_fast.merge(states, spec=tied_spec())
    order: list[Any] = [tied_llama(0), states[1]]
    with pytest.raises(ValueError, match=r"of models\[1\] is a DTensor, but that of models\[0\] is not"):
        mudsc_fast.merge(order, spec=tied_spec(), group=group)
    kept: dict[str, Any] = {"spec": tied_spec(), "group": group, "checkpoint": folder / "state"}
    results["resumed whole"] = [gathered(mudsc_fast.merge(states, **kept).state_dict)]
    mudsc_fast.merge([tied_llama(0), tied_llama(1)], **kept)  # the same tensors, whole
    with pytest.raises(ValueError, match=r"belongs to a run with another models\[1\]"):
        mudsc_fast.merge([states[0], states[0]], **kept)
    mixed = [states[0] if rank else tied_llama(0), tied_llama(1)]
    with pytest.raises(
        ValueError, match=r"same kind of models\[0\]: got whole tensors on rank 0, but DTensors on rank 1"
    ):
        mudsc_fast.merge(mixed, spec=tied_spec(), group=group)
    torch.save(results, folder / f"{rank}.pt")


def test_sharded_networks_merge_like_unsharded_ones(tmp_path: Path) -> None:
    assert run_processes(merge_sharded, 2, tmp_path) == [0, 0]
    expected: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        models = [make_mlp((20, 33, 32, 10), seed=seed) for seed in (0, 1)]
        expected[name] = mudsc_fast.merge(models, batches((20,)), **options).task_state_dicts
    states = [llama_tensors(seed) for seed in (0, 1)]
    expected["llama"] = [mudsc_fast.merge(states, spec=llama_spec()).state_dict]
    states = [tied_llama(seed) for seed in (0, 1)]
    expected["tied"] = expected["resumed whole"] = [mudsc_fast.merge(states, spec=tied_spec()).state_dict]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        if storage is not None:
            expected["llama from shards"] = expected["llama"]
        for name, tasks in expected.items():
            for one, other in zip(found[name], tasks, strict=True):
                torch.testing.assert_close(one, dict(other), rtol=0, atol=1e-6)
