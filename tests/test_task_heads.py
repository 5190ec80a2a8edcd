"""Merges of networks that share a backbone and have heads of different structure."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast import PermutationSpec

HEADS = ["classifier", "decoder"]


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.deep(torch.relu(self.norm(self.stem(images)))))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.classifier = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.backbone(images).mean((2, 3)))
        return logits


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.decoder = nn.Sequential(nn.Conv2d(12, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1))

    def forward(self, images: Tensor) -> Tensor:
        masks: Tensor = self.decoder(self.backbone(images))
        return masks


def batches() -> list[Tensor]:
    return list(torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def permuted_pair() -> tuple[Classifier, Segmenter]:
    """Return a classifier, and a segmenter with a permuted copy of its backbone."""
    torch.manual_seed(0)
    classifier, segmenter = Classifier().eval(), Segmenter().eval()
    for norm_entry in ("weight", "bias", "running_mean", "running_var"):
        with torch.no_grad():
            getattr(classifier.backbone.norm, norm_entry).uniform_(0.5, 1.5)
    segmenter.backbone.load_state_dict(classifier.backbone.state_dict())
    spec = PermutationSpec.from_model(segmenter, batches()[0])
    state = segmenter.state_dict()
    orders = {node: torch.randperm(count) for node, count in spec.units(state).items()}
    permuted = copy.deepcopy(segmenter)
    permuted.load_state_dict(mudsc_fast.permute_state_dict(state, spec, orders))
    return classifier, permuted


def assert_exact(result: mudsc_fast.MergeResult, models: tuple[nn.Module, ...]) -> None:
    trunk = {name: value for name, value in models[0].state_dict().items() if name.startswith("backbone.")}
    assert set(result.state_dict) == set(trunk)
    for name, value in trunk.items():
        torch.testing.assert_close(result.state_dict[name], value, rtol=1e-5, atol=1e-5)
    assert result.model is None
    assert_same_outputs(result, models)


def assert_same_outputs(result: mudsc_fast.MergeResult, models: tuple[nn.Module, ...]) -> None:
    images = torch.randn(2, 3, 8, 8)
    for model, merged, tensors in zip(models, result.task_models, result.task_state_dicts, strict=True):
        assert type(merged) is type(model)
        assert set(tensors) == set(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(merged.eval()(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ["weight", "activation", "dual"])
def test_classifier_and_segmenter_share_a_merged_backbone(space: Any) -> None:
    models = permuted_pair()
    assert_exact(mudsc_fast.merge(models, batches(), space=space, task_heads=HEADS), models)
    assert_exact(mudsc_fast.merge(models[::-1], batches(), space=space, task_heads=HEADS), models[::-1])


def test_state_dicts_need_spec_of_all_heads() -> None:
    models = permuted_pair()
    matching = mudsc_fast.match(models, batches(), task_heads=HEADS)
    result = mudsc_fast.merge([model.state_dict() for model in models], spec=matching.spec, task_heads=HEADS)
    for model, tensors in zip(models, result.task_state_dicts, strict=True):
        merged = copy.deepcopy(model)
        merged.load_state_dict(tensors)
        with torch.no_grad():
            torch.testing.assert_close(merged(batches()[0]), model(batches()[0]), rtol=1e-4, atol=1e-5)


def test_matching_merges_and_permutes_each_model() -> None:
    models = permuted_pair()
    matching = mudsc_fast.match(models, batches(), task_heads=HEADS)
    assert_exact(matching.merge(models), models)
    aligned = matching.permute(models[1], 1)
    torch.testing.assert_close(aligned.backbone.state_dict(), models[0].backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(aligned(batches()[0]), models[1](batches()[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "named"), [([], "classifier.weight"), (["classifier"], "decoder.0.weight")])
def test_unmatched_tensors_must_be_task_heads(heads: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=rf"models\[1\] must have the tensors of models\[0\].*{named}.*task_heads"):
        mudsc_fast.merge(permuted_pair(), batches(), task_heads=heads)


def test_spec_without_heads_is_rejected() -> None:
    models = permuted_pair()
    spec = PermutationSpec.from_model(models[0], batches()[0])
    with pytest.raises(ValueError, match=r"spec must name the tensors of task heads.*decoder\.0\.weight"):
        mudsc_fast.merge(models, spec=spec, task_heads=HEADS)


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_models_keep_their_heads(mode: Any, count: int) -> None:
    classifier, segmenter = permuted_pair()
    other = copy.deepcopy(segmenter)
    with torch.no_grad():
        for parameter in other.decoder.parameters():
            parameter.mul_(1.5)
    models = (classifier, segmenter, other)[:count]
    assert_exact(mudsc_fast.merge(models, batches(), mode=mode, task_heads=HEADS), models)


def test_merged_backbones_are_repaired() -> None:
    models = permuted_pair()
    result = mudsc_fast.merge(models, batches(), task_heads=HEADS)
    assert_exact(mudsc_fast.repair(result, models, batches()), models)


def test_refit_error_explains_how_to_refit_backbone() -> None:
    models = permuted_pair()
    result = mudsc_fast.merge(models, batches(), task_heads=HEADS)
    with pytest.raises(ValueError, match=r"models\[1\].*'classifier\.bias'.*lacks.*that runs only the backbone"):
        mudsc_fast.refit(result, models, batches())


@pytest.mark.parametrize("mode", ["align", "zip"])
def test_merged_backbones_are_refitted(mode: Any) -> None:
    def features(model: Any, images: Tensor) -> Any:
        return model.backbone(images)

    models = permuted_pair()
    result = mudsc_fast.merge(models, batches(), mode=mode, task_heads=HEADS)
    # Scales move between convolutions and BatchNorm, so only outputs stay the same.
    assert_same_outputs(mudsc_fast.refit(result, models, batches(), forward=features), models)
    with torch.no_grad():
        models[1].backbone.deep.weight.add_(0.1 * torch.randn_like(models[1].backbone.deep.weight))
        models[1].backbone.stem.weight.add_(0.1 * torch.randn_like(models[1].backbone.stem.weight))
    result = mudsc_fast.merge(models, batches(), mode=mode, task_heads=HEADS)
    refitted = mudsc_fast.refit(result, models, batches(), forward=features)
    assert {layer.name for layer in refitted.refit_layers} == {"backbone.stem", "backbone.deep"}
    for layer in refitted.refit_layers:
        assert layer.error_after <= layer.error_before * (1 + 1e-6)
    assert any(layer.error_after < 0.9 * layer.error_before for layer in refitted.refit_layers)
    for before, after in zip(result.task_state_dicts, refitted.task_state_dicts, strict=True):
        for name in set(after) - set(refitted.state_dict):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_directories_with_different_heads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**shape, vocab_size=20, max_position_embeddings=8)
    torch.manual_seed(0)
    models = {
        "sequence": transformers.BertForSequenceClassification(config).eval(),
        "tokens": transformers.BertForTokenClassification(config).eval(),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    paths = [tmp_path / name for name in models]
    with pytest.raises(ValueError, match=r"architectures is .*task_heads='auto'"):
        mudsc_fast.merge(paths)
    result = mudsc_fast.merge(paths, task_heads="auto")
    for model, tensors in zip(models.values(), result.task_state_dicts, strict=True):
        assert set(tensors) == set(model.state_dict())
        merged = copy.deepcopy(model)
        merged.load_state_dict(tensors)
    shared = result.task_state_dicts[0]["bert.encoder.layer.0.output.dense.weight"]
    assert shared is result.task_state_dicts[1]["bert.encoder.layer.0.output.dense.weight"]
    assert torch.equal(result.task_state_dicts[1]["classifier.bias"], models["tokens"].classifier.bias)
