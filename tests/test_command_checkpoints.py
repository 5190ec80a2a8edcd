"""Real-world checkpoints: nested, wrapped, stale, quantized, tied, or with different heads or labels."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import mudsc_fast
from architectures import randomize
from conftest import TORCH_VERSION
from mudsc_fast import cli
from mudsc_fast._tensors import same_values
from mudsc_fast.checkpoints.safetensors_file import NAME_OF_DTYPE, SafetensorsFile
from mudsc_fast.io import CheckpointError, align_checkpoints, merge_checkpoints, open_checkpoint
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.spec.join import join_specs
from networks import MLP_SPEC, make_mlp
from test_builders import SHAPE, TEXT
from test_command_files import (
    HUGGING_FACE,
    VISION,
    assert_states_equal,
    failure,
    llama_model,
    load,
    run,
    save_mlps,
    save_pair,
)

MLP = ("--spec", "mlp", "--quiet")


def network(model: nn.Module, seed: int) -> Any:
    """Return a model with random parameters, in evaluation mode."""
    return randomize(model, seed=seed).eval()


def merged_mlps() -> dict[str, Tensor]:
    states = [make_mlp(seed=index).state_dict() for index in (0, 1)]
    return mudsc_fast.merge(states, spec=MLP_SPEC).state_dict


NESTED: dict[str, Callable[[Any], Any]] = {
    "model behind an epoch": lambda state: {"epoch": 3, "model": state},
    "model before an epoch": lambda state: {"model": state, "epoch": 3},
    "numpy score": lambda state: {"state_dict": state, "best": np.float64(0.9), "losses": np.ones(3)},
    "arguments": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "two levels": lambda state: {"checkpoint": {"net": state, "step": 1}},
    "optimizer": lambda state: {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, "net": state},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "parallel and compiled": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled part": lambda state: {name.replace("fc1.", "fc1._orig_mod."): value for name, value in state.items()},
    "average": lambda state: {"n_averaged": torch.tensor(3), **{f"module.{name}": t for name, t in state.items()}},
}


@pytest.mark.parametrize("kind", NESTED)
def test_nested_and_wrapped_state_dicts(kind: str, tmp_path: Path) -> None:
    if kind in ("numpy score", "arguments") and TORCH_VERSION < (2, 6):
        pytest.skip("this version of torch cannot allow functions by name, so it loads tensors and numbers only")
    a, _ = save_mlps(tmp_path, ".pt")
    torch.save(NESTED[kind](make_mlp(seed=1).state_dict()), tmp_path / "b.pt")
    run("merge", a, tmp_path / "b.pt", "--output", tmp_path / "out.pt", *MLP)
    assert_states_equal(torch.load(tmp_path / "out.pt", weights_only=True), merged_mlps())


def test_output_uses_names_of_first_network(tmp_path: Path) -> None:
    _, b = save_mlps(tmp_path, ".pt")
    wrapped = AveragedModel(make_mlp())
    torch.save(wrapped.state_dict(), tmp_path / "a.pt")
    run("merge", tmp_path / "a.pt", b, "--output", tmp_path / "out.pt", *MLP)
    wrapped.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert_states_equal(wrapped.module.state_dict(), merged_mlps())


def test_ema_weights_are_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = save_mlps(tmp_path, ".pt")
    states = [make_mlp(seed=index).state_dict() for index in (1, 2)]
    torch.save({"ema": states[1], "model": states[0]}, tmp_path / "b.pt")
    run("merge", a, tmp_path / "b.pt", "--output", tmp_path / "out.pt", "--spec", "mlp")
    assert "warning: " in (shown := capsys.readouterr().err)
    assert "using the state dict at 'model'; the file also contains 'ema'" in shown
    assert_states_equal(torch.load(tmp_path / "out.pt", weights_only=True), merged_mlps())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pickles_are_rejected_with_explanation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = save_mlps(tmp_path, ".pt")
    torch.save(make_mlp(), tmp_path / "module.pt")
    shown = failure(capsys, tmp_path, "merge", a, tmp_path / "module.pt", "--output", tmp_path / "out.pt")
    assert "contains a Python object of the class torch.nn.modules.container.Sequential" in shown
    assert "torch.save(model.state_dict(), new_path)" in shown
    assert "\x1b" not in shown
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "traced.pt")
    shown = failure(capsys, tmp_path, "merge", a, tmp_path / "traced.pt", "--output", tmp_path / "out.pt")
    assert "is a TorchScript archive" in shown


class Versioned(nn.Linear):
    """Doubles weights of an older format when it loads them, and rejects weights without a version."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") not in (1, 2):
            raise ValueError("version must be 1 or 2")
        if local_metadata["version"] == 1:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def versioned() -> nn.Module:
    return nn.Sequential(Versioned(20, 8), nn.ReLU(), Versioned(8, 3))


def batches() -> list[Tensor]:
    return [torch.randn(30, 20, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_module_versions_are_kept(suffix: str, tmp_path: Path) -> None:
    models = [network(versioned(), seed) for seed in (0, 1)]
    paths = [tmp_path / f"{index}{suffix}" for index in (0, 1)]
    for model, path in zip(models, paths, strict=True):
        if suffix == ".pt":
            torch.save(model.state_dict(), path)
        else:
            safetensors.torch.save_file(model.state_dict(), path)
    given = ("--model", f"{__name__}:versioned", "--data", f"{__name__}:batches", "--spec", "mlp")
    run("merge", *paths, "--output", tmp_path / "out.pt", *given)
    merged = versioned()
    expected = mudsc_fast.merge(models, batches(), spec=mudsc_fast.spec.mlp(["0", "2"])).state_dict
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_states_equal(state, expected)
    if suffix == ".pt":
        merged.load_state_dict(state)
        assert_states_equal(merged.state_dict(), expected)


def test_different_module_versions_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = versioned().state_dict()
    old = versioned().state_dict()
    old._metadata["0"]["version"] = 1  # type: ignore[attr-defined]
    torch.save(new, tmp_path / "a.pt")
    torch.save(old, tmp_path / "b.pt")
    inputs = (tmp_path / "a.pt", tmp_path / "b.pt")
    shown = failure(capsys, tmp_path, "merge", *inputs, "--output", tmp_path / "out.pt", "--spec", "mlp")
    assert "the module '0' was saved in version 2 of its format in one and 1 in the other" in shown


def test_extra_state_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("a", {"amax": 2}), ("b", None)):
        torch.save({**make_mlp(seed=ord(name) - 97).state_dict(), "fc1._extra_state": value}, tmp_path / f"{name}.pt")
    inputs = (tmp_path / "a.pt", tmp_path / "b.pt")
    run("merge", *inputs, "--output", tmp_path / "out.pt", *MLP)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found.pop("fc1._extra_state") == {"amax": 2}
    assert_states_equal(found, merged_mlps())
    shown = failure(capsys, tmp_path, "merge", *inputs, "--output", tmp_path / "out.safetensors", *MLP)
    assert "'fc1._extra_state' is not a tensor, and safetensors files hold only tensors" in shown


def save_mlp(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    state = make_mlp(seed=seed).state_dict()
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize(
    ("read", "other"),
    [
        ("model.safetensors", "model.safetensors.index.json"),
        ("model.safetensors", "pytorch_model.bin"),
        ("pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("model.safetensors", "consolidated.safetensors"),
    ],
)
def test_reads_same_weights_as_transformers(
    read: str, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "network"
    save_mlp(folder / read, 0)
    if other.endswith(".json"):
        save_mlp(folder / "model-00001-of-00001.safetensors", 1)
        shard_of = dict.fromkeys(make_mlp().state_dict(), "model-00001-of-00001.safetensors")
        (folder / other).write_text(json.dumps({"weight_map": shard_of}))
    else:
        save_mlp(folder / other, 1)
    with caplog.at_level(logging.WARNING, "mudsc_fast.io"):
        assert_states_equal(open_checkpoint(folder).tensors, make_mlp(seed=0).state_dict())
    assert f"reading {read}, as transformers does; {other} in the same directory holds different weights" in caplog.text
    caplog.clear()
    if not other.endswith(".json"):
        save_mlp(folder / other, 0)
        open_checkpoint(folder)
        assert not caplog.text


def test_index_without_shards_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_mlp(tmp_path / "model.safetensors", 0)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    assert set(open_checkpoint(tmp_path).tensors) == set(make_mlp().state_dict())
    assert "model.safetensors.index.json in the same directory cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("model.fp16.safetensors", "model.safetensors"),
        ("consolidated.safetensors", "consolidated.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"),
        ("my_weights.pth", "my_weights.pth"),
    ],
)
def test_other_weight_file_names(name: str, written: str, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 1)):
        save_mlp(tmp_path / folder / name, seed)
        (tmp_path / folder / "training_args.bin").write_bytes(b"")
    run("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out", *MLP)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {written, "README.md"}
    assert_states_equal(open_checkpoint(tmp_path / "out").tensors, merged_mlps())


def test_ambiguous_weight_files_are_rejected(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_mlp(tmp_path / "several" / name, 0)
    save_mlp(tmp_path / "shards" / "model-00001-of-00002.safetensors", 0)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for folder, message in {
        "several": "contains several weights files, one.safetensors, two.safetensors: give one of them",
        "shards": "contains shards of weights, but not their index",
        "pipeline": "is a pipeline of several networks",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / folder)


def test_folders_of_the_hub_cache(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--name"
    (cached / "snapshots" / "old").mkdir(parents=True)
    save_mlp(cached / "snapshots" / "new" / "model.safetensors", 0)
    with pytest.raises(CheckpointError, match=r"give one of its snapshots .* found: new, old"):
        open_checkpoint(cached)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("new")
    assert open_checkpoint(cached).path == cached / "snapshots" / "new"
    with pytest.raises(CheckpointError, match="download it first: hf download owner/name"):
        open_checkpoint("owner/name")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "uint16", "uint32", "int32"])
def test_quantized_weights_are_rejected(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        state = make_mlp(seed=seed).state_dict()
        state["fc2.weight"] = (state["fc2.weight"] * 20).abs().to(getattr(torch, dtype))
        safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    inputs = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    shown = failure(capsys, tmp_path, "merge", *inputs, "--output", tmp_path / "out.pt", "--spec", "mlp")
    assert "'fc2.weight'" in shown
    assert f"{dtype}" in shown
    assert "dequantize" in shown


def quantized(state: dict[str, Tensor], scheme: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a state dict with a quantized weight and its scale, and the dequantized values."""
    weight = state["fc2.weight"]
    rows, columns = weight.shape
    if scheme == "int8 rows":
        scale = weight.abs().amax(1, keepdim=True) / 127
        stored, name, whole = (weight / scale).round().to(torch.int8), "weight_scale", scale
    elif scheme == "bitsandbytes":
        largest = weight.abs().amax(1)
        stored, name, whole = (weight / largest[:, None] * 127).round().to(torch.int8), "SCB", largest[:, None] / 127
        scale = largest
    elif scheme == "tensor":
        scale = torch.tensor(0.02)
        stored, name, whole = (weight / scale).to(torch.float8_e4m3fn), "weight_scale", scale
    else:
        scale = 0.01 + torch.rand(-(-rows // 12), -(-columns // 8), generator=torch.Generator().manual_seed(2))
        whole = scale.repeat_interleave(12, 0)[:rows].repeat_interleave(8, 1)[:, :columns]
        stored, name = (weight / whole).to(torch.float8_e4m3fn), "weight_scale_inv"
    real = {**state, "fc2.weight": stored.float() * whole}
    return {**state, "fc2.weight": stored, f"fc2.{name}": scale}, real


@pytest.mark.parametrize("scheme", ["int8 rows", "bitsandbytes", "tensor", "blocks"])
def test_quantized_weights_are_dequantized_on_request(scheme: str, tmp_path: Path) -> None:
    real = []
    for name, seed in (("a", 0), ("b", 1)):
        stored, numbers = quantized(make_mlp(seed=seed).state_dict(), scheme)
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(stored, tmp_path / name / "model.safetensors")
        config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [12, 8]}}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        real.append(numbers)
    given = ("--spec", "mlp", "--dequantize")
    run("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out", *given)
    expected = mudsc_fast.merge(real, spec=MLP_SPEC).state_dict
    found = open_checkpoint(tmp_path / "out").tensors
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_ambiguous_block_sizes_are_rejected(tmp_path: Path) -> None:
    # Two scales for 192 rows may be blocks of 128, the last one incomplete, or of 96.
    state = {"0.weight": torch.ones(192, 8).to(torch.float8_e4m3fn), "0.weight_scale_inv": torch.ones(2, 1)}
    for name in ("a", "b"):
        safetensors.torch.save_file({**state, "1.weight": torch.ones(4, 192)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 scales fit in several ways to 192 entries"):
        merge_checkpoints(
            [tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
            tmp_path / "out.safetensors",
            spec=mudsc_fast.spec.mlp(["0", "1"], bias=False),
            dequantize=True,
        )


def test_packed_weights_cannot_be_dequantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors.torch.save_file({"fc.qweight": torch.ones(4, 4, dtype=torch.int32)}, tmp_path / "a.safetensors")
    path = tmp_path / "a.safetensors"
    for option in ((), ("--dequantize",)):
        shown = failure(capsys, tmp_path, "merge", path, path, "--output", tmp_path / "out", *option)
        assert "'fc.qweight'" in shown
        assert "call model.dequantize()" in shown


def test_equal_masks_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (dict(make_mlp(seed=seed).state_dict()) for seed in (0, 1))
    for state in (a, b):
        state["mask"] = torch.ones(3, 3, dtype=torch.uint8)
    save = safetensors.torch.save_file
    save(a, tmp_path / "a.safetensors")
    save(b, tmp_path / "b.safetensors")
    inputs = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    MLP_SPEC.save(tmp_path / "spec.json")
    arguments = ("--output", tmp_path / "out.safetensors", "--spec", tmp_path / "spec.json")
    run("merge", *inputs, *arguments)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["mask"], a["mask"])
    (tmp_path / "out.safetensors").unlink()
    save({**b, "mask": b["mask"] * 0}, tmp_path / "b.safetensors")
    assert "its dtype uint8 cannot be averaged" in failure(capsys, tmp_path, "merge", *inputs, *arguments)
    run("merge", *inputs, *arguments, "--ignore", "mask")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["mask"], a["mask"])


def test_complex_tensors_are_averaged(tmp_path: Path) -> None:
    waves = [torch.randn(5, 4, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    for name, seed in (("a", 0), ("b", 1)):
        torch.save({**make_mlp(seed=seed).state_dict(), "waves": waves[seed]}, tmp_path / f"{name}.pt")
    MLP_SPEC.save(tmp_path / "spec.json")
    for output in ("out.pt", "out.safetensors"):
        inputs = (tmp_path / "a.pt", tmp_path / "b.pt")
        run("merge", *inputs, "--output", tmp_path / output, "--spec", tmp_path / "spec.json")
        found = open_checkpoint(tmp_path / output).tensors["waves"]
        torch.testing.assert_close(found, (waves[0] + waves[1]) / 2)


def test_metadata_of_safetensors_is_kept(tmp_path: Path) -> None:
    metadata = {"format": "pt", "title": "x", "modelspec.hash_sha256": "0x12"}
    for name, seed in (("a", 0), ("b", 1)):
        safetensors.torch.save_file(make_mlp(seed=seed).state_dict(), tmp_path / f"{name}.safetensors", metadata)
    inputs = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    run("merge", *inputs, "--output", tmp_path / "out.safetensors", *MLP)
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "x"}


def test_tensors_of_safetensors_are_mapped_in_any_dtype_and_place(tmp_path: Path) -> None:
    expected = {f"{dtype}"[6:]: torch.arange(-3, 3).to(dtype).view(2, 3) for dtype in NAME_OF_DTYPE}
    expected |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(7, dtype=torch.int64)}
    safetensors.torch.save_file(expected, tmp_path / "all.safetensors")
    file = SafetensorsFile(tmp_path / "all.safetensors")
    assert set(file) == set(expected)
    for name, tensor in expected.items():
        found = file[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert same_values(found, tensor)
        assert file[name] is found
        # copy.deepcopy and torch.save copy the storage of a tensor, so it must not be that of the whole file.
        assert found.untyped_storage().nbytes() == tensor.nbytes
    # The entries of `odd` begin at an odd position, where torch cannot view them.
    text = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "odd": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        }
    ).encode()
    values = torch.tensor([1.5, -2.0])
    content = len(text).to_bytes(8, "little") + text + b"\0" + values.numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(content)
    assert torch.equal(SafetensorsFile(tmp_path / "odd.safetensors")["odd"], values)


def store_head(path: Path, head: Tensor | None) -> None:
    """Write an output layer into a file: the given one, or a copy of the embedding table."""
    state = safetensors.torch.load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone() if head is None else head
    safetensors.torch.save_file(state, path / "model.safetensors", {"format": "pt"})


def test_output_layer_tied_in_one_network_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models: dict[str, Any] = {}
    for name, tied in (("tied", True), ("free", False)):
        models[name] = network(llama_model(tie_word_embeddings=tied), len(models))
        models[name].save_pretrained(tmp_path / name)
    for first, second in (("tied", "free"), ("free", "tied")):
        output = tmp_path / f"{first} first"
        capsys.readouterr()
        run("merge", tmp_path / first, tmp_path / second, "--output", output)
        told = "'lm_head.weight' is tied to another tensor in" in capsys.readouterr().err
        assert told == (first == "tied")
        states = [models[name].state_dict() for name in (first, second)]
        expected = mudsc_fast.merge(states, spec=mudsc_fast.spec.llama(2, 4, 2, 8)).state_dict
        merged = load(output)
        assert merged.config.tie_word_embeddings is False
        assert_states_equal(merged.state_dict(), expected)


def test_table_stored_under_both_names(tmp_path: Path) -> None:
    for index, name in enumerate(("a", "b")):
        network(llama_model(tie_word_embeddings=True), index).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "b", tmp_path / "both")
    store_head(tmp_path / "both", None)
    outputs = [tmp_path / name for name in ("once", "twice", "first")]
    for output, inputs in zip(outputs, (("a", "b"), ("a", "both"), ("both", "a")), strict=True):
        run("merge", *(tmp_path / name for name in inputs), "--output", output, "--quiet")
        merged = load(output)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_states_equal(load(outputs[1]).state_dict(), load(outputs[0]).state_dict())
    assert "lm_head.weight" not in open_checkpoint(outputs[1]).tensors
    assert "lm_head.weight" in open_checkpoint(outputs[2]).tensors


def test_config_ties_what_file_does_not(tmp_path: Path) -> None:
    for index, name in enumerate(("a", "b")):
        network(llama_model(tie_word_embeddings=True), index).save_pretrained(tmp_path / name)
    head = torch.randn(60, 32, generator=torch.Generator().manual_seed(5))
    store_head(tmp_path / "a", head)
    run("merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "out", "--quiet")
    merged = load(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    table = load(tmp_path / "b").model.embed_tokens.weight
    moved = (2 * merged.lm_head.weight - head).sort(1).values
    torch.testing.assert_close(moved, table.sort(1).values, rtol=1e-4, atol=1e-5)


def bert_classifier(labels: list[str]) -> Any:
    config = transformers.BertConfig(
        **SHAPE, **TEXT, id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
    )
    return transformers.BertForSequenceClassification(config)


def test_classifiers_with_other_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models: dict[str, Any] = {}
    for name, labels in {"animals": ["cat", "dog", "cow"], "plants": ["oak", "ash", "elm"], "two": ["a", "b"]}.items():
        models[name] = network(bert_classifier(labels), len(models))
        models[name].save_pretrained(tmp_path / name)
    animals, plants, two = (tmp_path / name for name in models)
    shown = failure(capsys, tmp_path, "merge", animals, plants, "--output", tmp_path / "out")
    assert "label 0 is 'cat' in one config and 'oak' in the other" in shown
    assert "--task-heads classifier" in shown
    shown = failure(capsys, tmp_path, "merge", animals, two, "--output", tmp_path / "out")
    assert "'classifier.weight' has shape [3, 32]" in shown
    assert "--task-heads auto" in shown
    # `align` finds the heads by itself, and a merge with a permuted copy returns the network.
    run("align", animals, plants, "--output", tmp_path / "aligned", "--quiet")
    run("merge", plants, tmp_path / "aligned", "--output", tmp_path / "own", "--task-heads", "classifier", "--quiet")
    tokens = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
    for name in ("plants", "aligned"):
        found = load(tmp_path / "own" / name).eval()(tokens).logits
        torch.testing.assert_close(found, models["plants"](tokens).logits, rtol=1e-4, atol=1e-5)
    report = tmp_path / "report.json"
    run("merge", animals, two, "--output", tmp_path / "out", "--task-heads", "auto", "--report", report)
    tasks = [load(tmp_path / "out" / name) for name in ("animals", "two")]
    assert [model.classifier.out_features for model in tasks] == [3, 2]
    assert tasks[0].config.id2label[2] == "cow"
    for (name, first), second in zip(tasks[0].bert.named_parameters(), tasks[1].bert.parameters(), strict=True):
        assert torch.equal(first, second), name
    assert json.loads(report.read_text())["task_tensors"] == ["classifier.bias", "classifier.weight"]
    assert (tmp_path / "out" / "two" / "README.md").exists()


def test_language_models_with_other_vocabularies(tmp_path: Path) -> None:
    sizes = {"small": 60, "large": 70}
    for index, (name, size) in enumerate(sizes.items()):
        config = transformers.LlamaConfig(**SHAPE, **{**TEXT, "vocab_size": size}, num_key_value_heads=2)
        network(transformers.LlamaForCausalLM(config), index).save_pretrained(tmp_path / name)
        vocabulary = {f"{name} {number}": number for number in range(size)}
        (tmp_path / name / "vocab.json").write_text(json.dumps(vocabulary))
    run("merge", tmp_path / "small", tmp_path / "large", "--output", tmp_path / "out", "--task-heads", "auto")
    for name, size in sizes.items():
        model = load(tmp_path / "out" / name)
        assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (size, 32)
        assert (tmp_path / "out" / name / "vocab.json").exists()
    run("align", tmp_path / "small", tmp_path / "large", "--output", tmp_path / "aligned")
    tokens = torch.randint(70, (2, 9), generator=torch.Generator().manual_seed(1))
    before, after = (load(tmp_path / name)(tokens).logits for name in ("large", "aligned"))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_heads_of_another_structure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape: dict[str, Any] = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8,
    }
    config = transformers.SegformerConfig(**shape, num_labels=4)
    classifier, segmenter = (
        network(build(config), seed)
        for seed, build in enumerate(
            (transformers.SegformerForImageClassification, transformers.SegformerForSemanticSegmentation)
        )
    )
    classifier.save_pretrained(tmp_path / "classifier")
    segmenter.save_pretrained(tmp_path / "segmenter")
    inputs = (tmp_path / "classifier", tmp_path / "segmenter")
    shown = failure(capsys, tmp_path, "merge", *inputs, "--output", tmp_path / "out")
    assert "architectures is" in shown
    assert "--task-heads auto" in shown
    run("align", *inputs, "--output", tmp_path / "aligned", "--task-heads", "auto")
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    after = load(tmp_path / "aligned").eval()(pixels).logits
    torch.testing.assert_close(after, segmenter(pixels).logits, rtol=1e-4, atol=1e-5)
    run("merge", *inputs, "--output", tmp_path / "out", "--task-heads", "auto")
    tasks = [load(tmp_path / "out" / path.name) for path in inputs]
    assert [type(task) for task in tasks] == [type(classifier), type(segmenter)]
    for (name, first), second in zip(
        tasks[0].segformer.named_parameters(), tasks[1].segformer.parameters(), strict=True
    ):
        assert torch.equal(first, second), name


def test_task_heads_need_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_mlps(tmp_path)
    arguments = ("merge", a, b, "--output", tmp_path / "out.pt", "--spec", "mlp", "--task-heads", "fc3")
    assert "--task-heads needs a directory as the output" in failure(capsys, tmp_path, *arguments)
    arguments = ("merge", a, b, "--output", tmp_path / "out", "--spec", "mlp", "--task-heads", "fc9")
    assert "--task-heads fc9 matches no tensor" in failure(capsys, tmp_path, *arguments)
    run("merge", a, b, "--output", tmp_path / "out", "--spec", "mlp", "--task-heads", "fc3", "--quiet")
    expected = mudsc_fast.merge(
        [make_mlp(seed=index).state_dict() for index in (0, 1)], spec=MLP_SPEC, task_heads="fc3"
    )
    for name, tensors in zip(("a", "b"), expected.task_state_dicts, strict=True):
        assert_states_equal(open_checkpoint(tmp_path / "out" / name).tensors, tensors)


def test_ignored_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_pooler = network(transformers.BertModel(transformers.BertConfig(**SHAPE, **TEXT)), 0)
    with_pooler.save_pretrained(tmp_path / "with")
    without: Any = transformers.BertModel(transformers.BertConfig(**SHAPE, **TEXT), add_pooling_layer=False)
    network(without, 1).save_pretrained(tmp_path / "without")
    both = (tmp_path / "with", tmp_path / "without")
    shown = failure(capsys, tmp_path, "merge", *both, "--output", tmp_path / "out")
    assert "'pooler.dense.weight' is not in" in shown
    assert "--ignore PATTERN" in shown
    run("merge", *both, "--output", tmp_path / "kept", "--ignore", "pooler.*")
    run("merge", *reversed(both), "--output", tmp_path / "dropped", "--ignore", "pooler")
    kept, dropped = (open_checkpoint(tmp_path / name).tensors for name in ("kept", "dropped"))
    assert torch.equal(kept["pooler.dense.weight"], with_pooler.pooler.dense.weight)
    assert set(kept) - set(dropped) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_tables_in_one_file_only_do_not_matter(tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, HUGGING_FACE["bert"])
    run("merge", a, b, "--output", tmp_path / "expected", "--quiet")
    path = Path(b) / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["bert.embeddings.position_ids"] = torch.arange(12)[None]
    safetensors.torch.save_file(state, path, {"format": "pt"})
    run("merge", a, b, "--output", tmp_path / "out", "--quiet")
    found, expected = (open_checkpoint(tmp_path / name).tensors for name in ("out", "expected"))
    assert_states_equal(found, expected)


def test_folders_of_sentence_transformers_are_copied(tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, lambda: transformers.BertModel(transformers.BertConfig(**SHAPE, **TEXT)))
    for folder in (a, b):
        (Path(folder) / "modules.json").write_text("[]")
        (Path(folder) / "1_Pooling").mkdir()
        (Path(folder) / "1_Pooling" / "config.json").write_text("{}")
        save_mlp(Path(folder) / "2_Dense" / "model.safetensors", 0)
        (Path(folder) / "checkpoint-500").mkdir()
    run("align", a, b, "--output", tmp_path / "out", "--quiet")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"1_Pooling", "2_Dense"}
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").exists()


def mixtral_model() -> Any:
    config = transformers.MixtralConfig(**SHAPE, **TEXT, num_key_value_heads=2, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


RENAMED: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral_model,
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**VISION, num_labels=4)),
}


@pytest.mark.parametrize("name", RENAMED)
def test_names_changed_by_transformers(name: str, tmp_path: Path) -> None:
    base, other = save_pair(tmp_path, RENAMED[name])
    report = tmp_path / "report.json"
    run("align", base, other, "--output", tmp_path / "aligned", "--quiet", "--report", report)
    difference = json.loads(report.read_text())["difference"]
    assert difference["largest"] < 1e-4 * difference["output"]
    stored = open_checkpoint(other).tensors
    assert set(open_checkpoint(tmp_path / "aligned").tensors) == set(stored) != set(load(other).state_dict())
    # A merge with a permuted copy returns the network.
    run("merge", other, tmp_path / "aligned", "--output", tmp_path / "merged", "--quiet")
    for key, tensor in open_checkpoint(tmp_path / "merged").tensors.items():
        torch.testing.assert_close(tensor, stored[key])


def test_files_of_several_versions_of_transformers(tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, RENAMED["dinov2"])
    run("merge", a, b, "--output", tmp_path / "expected", "--quiet")
    in_memory = {name: tensor.contiguous() for name, tensor in load(b).state_dict().items()}
    safetensors.torch.save_file(in_memory, Path(b) / "model.safetensors", {"format": "pt"})
    run("merge", a, b, "--output", tmp_path / "out", "--quiet")
    found, expected = (open_checkpoint(tmp_path / name).tensors for name in ("out", "expected"))
    assert_states_equal(found, expected)


def t5_config() -> Any:
    return transformers.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=60)


def t5_model() -> Any:
    return transformers.T5ForConditionalGeneration(t5_config())


def t5_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = {name: torch.randint(60, (4, 6), generator=generator) for name in ("input_ids", "decoder_input_ids")}
    return [tokens]


def test_tied_tensors_missing_from_files(tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, t5_model)
    given = ("--model", f"{__name__}:t5_model", "--data", f"{__name__}:t5_batches")
    report = tmp_path / "report.json"
    run("align", a, b, "--output", tmp_path / "out", "--quiet", "--report", report, *given)
    difference = json.loads(report.read_text())["difference"]
    assert difference["largest"] < 1e-4 * difference["output"]


RESNET: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}


def test_directories_of_convolutional_networks(tmp_path: Path) -> None:
    base, other = save_pair(
        tmp_path, lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET, num_labels=3))
    )
    result = align_checkpoints(base, other, tmp_path / "out")
    assert result.difference is not None
    assert result.difference[0] < 1e-4 * result.difference[1]


def test_joined_specs() -> None:
    first = PermutationSpec({"a.weight": ("x", None), "head.weight": (None, "x")})
    second = PermutationSpec({"a.weight": ("y", None), "b.weight": ("z", "y"), "c.weight": (None, "z")})
    joined = join_specs([first, second])
    assert joined.nodes == ("x", "z")
    assert {use.tensor for use in joined.uses("x")} == {"a.weight", "head.weight", "b.weight"}
    assert join_specs([first, first]) is first
    # Units that keep their order in one of the specs keep it in both, and groups stay together.
    third = PermutationSpec({"a.weight": (None, None), "c.weight": ("w", None), "d.weight": (None, "w")})
    assert join_specs([second.without({"c.weight"}), third]).nodes == ("z", "w")
    grouped = PermutationSpec({"a.weight": ("y", None), "b.weight": (None, "y")}, groups={"y": 4})
    assert join_specs([first, grouped]).groups("x").count == 4
    other = PermutationSpec({"a.weight": ("y", None), "b.weight": (None, "y")}, groups={"y": 2})
    with pytest.raises(ValueError, match=r"different numbers of groups .* at node 'y': 4 and 2"):
        join_specs([grouped, other])


def test_output_folders_are_named_after_inputs(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save_mlp(tmp_path / folder / "net.safetensors", 0)
    inputs = [tmp_path / folder / "net.safetensors" for folder in ("one", "two")]
    merge_checkpoints(inputs, tmp_path / "out", spec=MLP_SPEC, task_heads=["fc3"])
    assert sorted(os.listdir(tmp_path / "out")) == ["net-1", "net-2"]


def test_unexpected_errors_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("mudsc_fast.io.merge_checkpoints", fail)
    assert cli.main(["merge", "a", "b", "--output", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("mudsc-fast merge: error: ZeroDivisionError: by zero\n")
    assert "--debug" in shown
