"""With default settings, a zip of any number of permuted copies of a network returns the network."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast
from architectures import calibrate, randomize
from mudsc_fast import PermutationSpec
from mudsc_fast.matching.node import zip_all_units
from networks import random_group_permutations
from paper.networks import ResNet20


def deep_mlp() -> nn.Module:
    """Return a network with a narrow input, so that most nodes are first matched wrongly."""
    torch.manual_seed(1)
    widths = (5, 24, 24, 24, 24, 24, 24, 3)
    layers = [(nn.Linear(n, m), nn.ReLU()) for n, m in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in layer][:-1]).eval()


def resnet() -> nn.Module:
    model = randomize(ResNet20(outputs=10), 0)
    calibrate(model, torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(3)))  # few dead units
    return model.eval()


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=60,
    )
    return randomize(transformers.LlamaForCausalLM(config), 0).eval()


def batch_of(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(2)
    if isinstance(model, ResNet20):
        return torch.randn(64, 3, 16, 16, generator=generator)
    if isinstance(model, nn.Sequential):
        return torch.randn(200, 5, generator=generator)
    return {"input_ids": torch.randint(60, (16, 12), generator=generator)}


def copies(model: nn.Module, spec: PermutationSpec, count: int) -> list[nn.Module]:
    models, state = [model], model.state_dict()
    for seed in range(1, count):
        permuted = copy.deepcopy(model)
        orders = random_group_permutations(spec, spec.units(state), seed)
        permuted.load_state_dict(mudsc_fast.permute_state_dict(state, spec, orders))
        models.append(permuted)
    return models


def outputs(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits if isinstance(batch, dict) else model(batch)
    return result


@pytest.mark.parametrize("num_models", [3, 4, 5])
@pytest.mark.parametrize("space", ["weight", "activation", "dual"])
@pytest.mark.parametrize("build", [deep_mlp, resnet, llama])
def test_copies_are_recovered(build: Callable[[], nn.Module], space: Any, num_models: int) -> None:
    model = build()
    batch = batch_of(model)
    data = None if space == "weight" else [batch]
    spec = mudsc_fast.match([model, model], [batch], space="weight").spec
    models = copies(model, spec, num_models)
    merged = mudsc_fast.merge(models, data, spec=spec, mode="zip", space=space).model
    assert merged is not None
    expected = outputs(model, batch)
    torch.testing.assert_close(outputs(merged, batch), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_similarities_are_left_as_they_are() -> None:
    similarity = torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    before = similarity.clone()
    halved = zip_all_units({"node": similarity}, 3, shrink=1.0, within=0.5)["node"]
    assert torch.equal(similarity, before)
    for model in range(3):
        before[model * 4 : model * 4 + 4, model * 4 : model * 4 + 4] *= 0.5
    assert halved.same_clusters(zip_all_units({"node": before}, 3, shrink=1.0)["node"])
