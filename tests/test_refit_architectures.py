"""Refitting many kinds of networks: models of Hugging Face transformers, and rarely used layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from mudsc_fast.matching.apply import permute_state_dict
from mudsc_fast.spec.permutation_spec import PermutationSpec

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 40, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def llama() -> nn.Module:
    """Return a network with two query heads for each key-value head."""
    config = transformers.LlamaConfig(
        **TEXT,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return _as_module(transformers.LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    """Return a network with Conv1D modules as linear layers, and one projection for queries, keys and values."""
    config = transformers.GPT2Config(**TEXT, n_embd=16, n_layer=2, n_head=4, n_positions=8, use_cache=False)
    return _as_module(transformers.GPT2LMHeadModel(config))


def swin() -> nn.Module:
    """Return a network with shifted windows and patch merging."""
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2])
    config.window_size = 4
    return _as_module(transformers.SwinForImageClassification(config))


class RareLayers(nn.Module):
    """3-D, dilated, transposed and grouped convolutions, and nn.MultiheadAttention over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(2, 8, (1, 3, 3), padding=(0, 1, 1))
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, groups=8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.line = nn.ConvTranspose1d(8, 10, 3, 2, 1, output_padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(functional.relu(self.volume(x)).mean(2))
        x = functional.silu(self.up(functional.relu(self.grouped(x))))
        x = functional.relu(self.depthwise(x)).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = functional.relu(self.line(x.transpose(1, 2))).mean(2)
        result: Tensor = self.head(x)
        return result


def _as_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def tokens(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(40, (24, 6), generator=generator)} for _ in range(count)]


def pixels(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(6, 3, 16, 16, generator=generator)} for _ in range(count)]


def volumes(count: int) -> list[Tensor]:
    return list(torch.randn(count, 12, 2, 2, 6, 6, generator=torch.Generator().manual_seed(0)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Sequence[Any]]]] = {
    "llama": (llama, tokens),
    "gpt2": (gpt2, tokens),
    "swin": (swin, pixels),
    "rare": (RareLayers, volumes),
}


def networks(name: str, count: int) -> list[nn.Module]:
    """Return networks with random weights, larger than the default initialization."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = NETWORKS[name][0]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
        models.append(model)
    return models


def outputs(model: nn.Module | None, batches: Sequence[Any]) -> Tensor:
    assert model is not None
    with torch.no_grad():
        found = [model(**batch).logits if isinstance(batch, dict) else model(batch) for batch in batches]
    return torch.cat(found)


_SPECS: dict[str, PermutationSpec] = {}


def spec_of(name: str) -> PermutationSpec:
    if name not in _SPECS:
        _SPECS[name] = PermutationSpec.from_model(networks(name, 1)[0], NETWORKS[name][1](1)[0])
    return _SPECS[name]


def permuted(model: nn.Module, spec: PermutationSpec) -> nn.Module:
    """Return a copy of a network with its units in a random order."""
    generator = torch.Generator().manual_seed(7)
    units = spec.units(model.state_dict())
    permutations = {}
    for bundle in spec.bundles:
        count = spec.groups(bundle[0]).count
        order = torch.randperm(count, generator=generator).tolist()
        for node in bundle:
            size = units[node] // count
            permutations[node] = torch.cat([g * size + torch.randperm(size, generator=generator) for g in order])
    copied = copy.deepcopy(model)
    copied.load_state_dict(permute_state_dict(model.state_dict(), spec, permutations))
    return copied


@pytest.mark.parametrize("name", list(NETWORKS))
def test_merge_with_a_permuted_copy_stays_exact(name: str) -> None:
    spec, batches = spec_of(name), NETWORKS[name][1](4)
    model = networks(name, 1)[0]
    models = [model, permuted(model, spec)]
    result = mudsc_fast.merge(models, batches, spec=spec)
    refitted = mudsc_fast.refit(result, models, batches)
    expected = outputs(model, batches)
    torch.testing.assert_close(outputs(result.model, batches), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(refitted.model, batches), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_refit_brings_outputs_closer_to_the_ensemble(name: str) -> None:
    spec, batches = spec_of(name), NETWORKS[name][1](6)
    models = networks(name, 2)
    result = mudsc_fast.merge(models, batches, spec=spec, mode="zip", weights=[0.6, 0.4])
    refitted = mudsc_fast.refit(result, models, batches)
    wanted = 0.6 * outputs(models[0], batches) + 0.4 * outputs(models[1], batches)
    errors = [(outputs(one.model, batches) - wanted).square().mean() for one in (result, refitted)]
    assert errors[1] < 0.8 * errors[0]
    for layer in refitted.refit_layers:
        assert layer.error_after <= layer.error_before * (1 + 1e-6) + 1e-12


def test_layers_of_every_kind_are_refitted() -> None:
    wanted = {
        "llama": "model.layers.0.self_attn.k_proj",
        "gpt2": "transformer.h.1.attn.c_attn",
        "swin": "swin.encoder.layers.0.downsample.reduction",
        "rare": "up",
    }
    for name, layer in wanted.items():
        models, batches = networks(name, 2), NETWORKS[name][1](3)
        merged = mudsc_fast.merge(models, spec=spec_of(name))
        refitted = mudsc_fast.refit(merged, models, batches, ridge=0.1)
        names = {one.name for one in refitted.refit_layers} | {
            one.removesuffix(".weight") for one in refitted.not_refitted
        }
        assert layer in {one.name for one in refitted.refit_layers}
        weights = {
            key.removesuffix(".weight") for key, tensor in models[0].named_parameters() if key.endswith("weight")
        }
        missing = {one for one in weights - names if not one.endswith("attention")}
        assert not missing, f"{name}: neither refitted nor reported: {missing}"
