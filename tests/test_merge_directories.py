"""Merges of paths in Python give the tensors that the command writes, after the same checks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import mudsc_fast
from mudsc_fast.io import CheckpointError, merge_checkpoints, open_checkpoint
from networks import MLP_SPEC, make_mlp

transformers = pytest.importorskip("transformers")

from test_command_checkpoints import RENAMED, bert_classifier, network, quantized, store_head  # noqa: E402
from test_command_files import HUGGING_FACE, assert_states_equal, bert_batches, llama_model, load, save_pair  # noqa: E402

DIRECTORIES = {name: HUGGING_FACE[name] for name in ("bert", "qwen2", "vit")} | RENAMED


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_merge_like_command(name: str, tmp_path: Path) -> None:
    paths = save_pair(tmp_path, DIRECTORIES[name])
    merge_checkpoints(paths, tmp_path / "out")
    matching = mudsc_fast.match(paths)
    result = matching.merge(paths)
    assert_states_equal(result.state_dict, dict(open_checkpoint(tmp_path / "out").tensors))
    for task in result.task_state_dicts:
        assert all(task[key] is tensor for key, tensor in result.state_dict.items())


@pytest.mark.parametrize("name", ["mixtral", "vit"])
def test_aligned_directory_gives_same_outputs(name: str, tmp_path: Path) -> None:
    _, b = paths = save_pair(tmp_path, DIRECTORIES[name])
    before = load(b)
    aligned = mudsc_fast.match(paths).permute(b, 1)
    stored = open_checkpoint(b).tensors
    assert set(aligned) == set(stored)
    assert any(not torch.equal(aligned[key], tensor) for key, tensor in stored.items())
    safetensors.torch.save_file(aligned, Path(b) / "model.safetensors", {"format": "pt"})
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8)} if name == "vit" else {"input_ids": torch.arange(8)[None]}
    with torch.no_grad():
        torch.testing.assert_close(load(b)(**inputs).logits, before(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_directories_with_data_use_names_in_memory(tmp_path: Path) -> None:
    paths = save_pair(tmp_path, RENAMED["dinov2"])
    images = [{"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}]
    result = mudsc_fast.merge(paths, images)
    expected = mudsc_fast.merge([load(path) for path in paths], images)
    assert isinstance(result.model, transformers.Dinov2Model)
    assert_states_equal(result.state_dict, expected.state_dict)


def test_output_layer_stored_in_one_file_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = (Path(path) for path in save_pair(tmp_path, lambda: llama_model(tie_word_embeddings=True)))
    store_head(b, torch.randn(60, 32, generator=torch.Generator().manual_seed(0)))
    merge_checkpoints([a, b], tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        result = mudsc_fast.merge([a, b])
    assert "'lm_head.weight' is tied to another tensor" in caplog.text
    assert_states_equal(result.state_dict, dict(open_checkpoint(tmp_path / "out").tensors))


@pytest.mark.parametrize("data", [None, bert_batches()])
def test_classifiers_with_other_labels(data: Any, tmp_path: Path) -> None:
    models = [network(bert_classifier(labels), seed) for seed, labels in enumerate((["cat", "dog"], ["oak", "ash"]))]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    paths = [tmp_path / name for name in "ab"]
    for given, first in ((paths, str(paths[0])), (models, "models[0]")):
        with pytest.raises(ValueError, match=r"label 0 is 'cat' in one config and 'oak'.*task_heads='class") as raised:
            mudsc_fast.merge(given, data)
        assert str(raised.value).startswith(first)
    result = mudsc_fast.merge(paths, data, task_heads="classifier")
    for model, tensors in zip(models, result.task_state_dicts, strict=True):
        assert torch.equal(tensors["classifier.bias"], model.classifier.bias)
    assert "classifier.bias" not in result.state_dict


def test_output_layers_of_other_sizes_are_kept(tmp_path: Path) -> None:
    models = [network(bert_classifier(["a", "b", "c"][:count]), count) for count in (2, 3)]
    for model in models:
        model.save_pretrained(tmp_path / str(model.num_labels))
    paths = [tmp_path / "2", tmp_path / "3"]
    merge_checkpoints(paths, tmp_path / "out", task_heads="auto")
    result = mudsc_fast.merge(paths)
    for path, tensors in zip(paths, result.task_state_dicts, strict=True):
        assert_states_equal(tensors, dict(open_checkpoint(tmp_path / "out" / path.name).tensors))


def test_different_tokenizers_are_rejected(tmp_path: Path) -> None:
    paths = save_pair(tmp_path, HUGGING_FACE["bert"])
    for path, words in zip(paths, (["the", "cat"], ["cat", "the"]), strict=True):
        (Path(path) / "vocab.txt").write_text("\n".join(words))
    for data in (None, bert_batches()):
        with pytest.raises(CheckpointError, match="their tokenizers differ: token 0 is 'the' in one"):
            mudsc_fast.merge(paths, data)


def test_quantized_weights_are_rejected(tmp_path: Path) -> None:
    state, _ = quantized(make_mlp().state_dict(), "int8 rows")
    for name in "ab":
        safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"is quantized \(int8, with the scale .* pass dequantize=True to mudsc"):
        mudsc_fast.merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], spec=MLP_SPEC)


def test_tables_in_one_file_only_do_not_matter(tmp_path: Path) -> None:
    paths = save_pair(tmp_path, HUGGING_FACE["bert"])
    file = Path(paths[0]) / "model.safetensors"
    tensors = {**safetensors.torch.load_file(file), "bert.embeddings.position_ids": torch.arange(12)[None]}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    merge_checkpoints(paths, tmp_path / "out")
    for order, given in ((1, paths), (-1, paths[::-1])):
        result = mudsc_fast.merge(given)
        assert ("bert.embeddings.position_ids" in result.state_dict) == (order == 1)
    result = mudsc_fast.merge(paths)
    assert result.model is None
    assert_states_equal(result.state_dict, dict(open_checkpoint(tmp_path / "out").tensors))


class Scaled(nn.Linear):
    """A module with a number in its extra state."""

    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]


def test_non_tensor_entries_of_files(tmp_path: Path) -> None:
    models = [nn.Sequential(Scaled(4, 6), nn.ReLU(), Scaled(6, 2)) for _ in "ab"]
    for name, model in zip("ab", models, strict=True):
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    result = mudsc_fast.merge([tmp_path / "a.pt", tmp_path / "b.pt"], spec="mlp")
    models[0].load_state_dict(result.state_dict)
    assert models[0][0].steps == 3


def test_saved_spec_with_names_in_memory_fits_files(tmp_path: Path) -> None:
    paths = save_pair(tmp_path, RENAMED["dinov2"])
    spec = mudsc_fast.match(paths).spec
    assert spec.problems(dict(open_checkpoint(paths[0]).tensors))
    spec.save(tmp_path / "spec.json")
    expected = mudsc_fast.merge(paths)
    for given in (spec, tmp_path / "spec.json"):
        assert_states_equal(mudsc_fast.merge(paths, spec=given).state_dict, expected.state_dict)


def test_error_names_weights_missing_from_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed, name in enumerate("ab"):
        model = network(transformers.BertModel(HUGGING_FACE["bert"]().config), seed)
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        kept = {key: value for key, value in safetensors.torch.load_file(file).items() if "pooler" not in key}
        safetensors.torch.save_file(kept, file, {"format": "pt"})
        assert json.loads((tmp_path / name / "config.json").read_text())["architectures"] == ["BertModel"]
    with caplog.at_level(logging.WARNING):
        mudsc_fast.merge([tmp_path / "a", tmp_path / "b"], bert_batches())
    assert "pooler.dense.weight" in caplog.text
    assert "random" in caplog.text
