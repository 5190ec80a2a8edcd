"""All builders: a permuted network gives the same outputs, and a merge with a permuted copy recovers the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import mudsc_fast
from architectures import Clip, ResNet, Swin, Vgg, VisionTransformer, calibrate, randomize
from mudsc_fast import Observation, PermutationSpec, Space
from mudsc_fast.spec import (
    Groups,
    Tower,
    Window,
    bert,
    clip_huggingface,
    clip_openai,
    gpt2,
    llama,
    resnet,
    swin,
    vgg,
    vit,
    vit_huggingface,
)
from networks import assert_recovered, make_mlp, random_group_permutations

transformers.utils.logging.set_verbosity_error()

BAD: Any = "timm"
SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
TEXT: dict[str, Any] = {
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A network, its specification and how to make its input from a seed."""

    build: Callable[[], nn.Module]
    spec: PermutationSpec
    inputs: Callable[[int], Any]


def images(size: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pixels(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": images(8)(seed)}


def tokens(seed: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(60, (16, 12), generator=torch.Generator().manual_seed(seed))}


def causal(kind: str, kv_heads: int, **options: Any) -> Callable[[], nn.Module]:
    """Return a maker of a causal language model of a LLaMA-like family, its norms computing in the model's dtype."""

    def build() -> nn.Module:
        shape = {**SHAPE, "num_attention_heads": 8, "num_key_value_heads": kv_heads}
        config = getattr(transformers, f"{kind}Config")(**shape, **TEXT, **options)
        model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, nn.RMSNorm(module.weight.shape, eps=1e-6))
        return model

    return build


def gpt2_model(**options: Any) -> Callable[[], nn.Module]:
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 12, "vocab_size": 60}
    return lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None, **options)
    )


CASES = {
    "resnet cifar": Case(lambda: ResNet((2, 1), (8, 16)), resnet((2, 1), names="cifar"), images(8)),
    "resnet group norm": Case(
        lambda: ResNet((1, 2), (8, 16), norm_groups=4), resnet((1, 2), names="cifar", norm_groups=4), images(8)
    ),
    "resnet torchvision": Case(
        lambda: ResNet((1, 2), (8, 16), shortcut="downsample", head="fc"), resnet((1, 2)), images(8)
    ),
    "resnet bottleneck": Case(
        lambda: ResNet((2, 1), (8, 10), shortcut="downsample", head="fc", bottleneck=True),
        resnet((2, 1), bottleneck=True),
        images(8),
    ),
    "vit": Case(VisionTransformer, vit(2, 3, 24), images(8)),
    "gpt2": Case(gpt2_model(), gpt2(2, 4, 32), tokens),
    "gpt2 separate head": Case(gpt2_model(tie_word_embeddings=False), gpt2(2, 4, 32, head="separate"), tokens),
    "llama": Case(causal("Llama", 8), llama(2, 8, 8, 4), tokens),
    "llama grouped": Case(causal("Llama", 4), llama(2, 8, 4, 4), tokens),
    "mistral": Case(causal("Mistral", 2, head_dim=6), llama(2, 8, 2, 6), tokens),
    "qwen2": Case(causal("Qwen2", 4, tie_word_embeddings=True), llama(2, 8, 4, 4, qkv_bias=True, head="tied"), tokens),
    "bert classifier": Case(
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, **TEXT, num_labels=4)),
        bert(2, 4),
        tokens,
    ),
    "bert masked": Case(
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE, **TEXT)),
        bert(2, 4, head="masked_lm"),
        tokens,
    ),
    "vit huggingface": Case(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**SHAPE, image_size=8, patch_size=4, num_labels=4)
        ),
        vit_huggingface(2, 4),
        pixels,
    ),
    "clip openai": Case(
        lambda: Clip((2, 3, 24), (2, 4, 32)),
        clip_openai(Tower(2, 3, 24), Tower(2, 4, 32)),
        lambda seed: {"images": images(8)(seed), "texts": tokens(seed)["input_ids"]},
    ),
    "clip huggingface": Case(
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**SHAPE, **TEXT, "eos_token_id": 2},  # texts are read at their largest token
                vision_config={**SHAPE, "image_size": 8, "patch_size": 4},
                projection_dim=10,
            )
        ),
        clip_huggingface(Tower(2, 4, 32), Tower(2, 4, 32)),
        lambda seed: pixels(seed) | tokens(seed),
    ),
    "vgg": Case(
        lambda: Vgg([(8,), (12, 10)], 8, (24,), batch_norms=False),
        vgg((1, 2), positions=4, classifier=("classifier.0", "classifier.3")),
        images(8),
    ),
    "vgg batch norm": Case(
        lambda: Vgg([(8, 8), (12,)], 12, (24, 20), batch_norms=True),
        vgg((2, 1), batch_norms=True, positions=9),
        images(12),
    ),
    "swin": Case(lambda: Swin((1, 2), (2, 4), 16), swin((1, 2), (2, 4), 16), images(16)),
}


def outputs(model: nn.Module, inputs: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = inputs if isinstance(inputs, dict) else {"images": inputs}
    with torch.no_grad():
        result = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    if isinstance(result, Tensor):
        return result
    scores: Tensor = result["logits_per_image" if "logits_per_image" in result else "logits"]
    return scores


def make_model(case: Case) -> nn.Module:
    model = randomize(case.build(), seed=1)
    case.spec.validate(model)
    if isinstance(model, (ResNet, Vgg)):
        calibrate(model, case.inputs(0))
    return model


def permuted_copy(case: Case, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    state = model.state_dict()
    permutations = random_group_permutations(case.spec, case.spec.units(state), seed)
    copied = copy.deepcopy(model)
    copied.load_state_dict(mudsc_fast.permute_state_dict(state, case.spec, permutations))
    return copied, permutations


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_permuted_network_gives_same_outputs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]
    model = make_model(case).to(dtype)
    copied, permutations = permuted_copy(case, model, seed=2)
    assert all(not torch.equal(order, order.sort().values) for order in permutations.values())
    inputs = case.inputs(3)
    expected = outputs(model, inputs, dtype)
    assert expected.std() > 0.05
    torch.testing.assert_close(outputs(copied, inputs, dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("space", ["weight", "activation", "dual"])
def test_merge_with_permuted_copy_recovers_network(name: str, space: Space) -> None:
    case = CASES[name]
    model = make_model(case)
    copied, permutations = permuted_copy(case, model, seed=2)
    result = mudsc_fast.merge([model, copied], [case.inputs(seed) for seed in (3, 4)], spec=case.spec, space=space)
    assert_recovered(result.matching, permutations)
    assert result.model is not None
    inputs = case.inputs(5)
    torch.testing.assert_close(outputs(result.model, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)
    # Tensors outside the specification have one entry per class or one in all.
    assert all(name.endswith(("bias", "logit_scale")) for name in result.unmatched_tensors)


@pytest.mark.parametrize("name", CASES)
def test_zip_with_permuted_copy_recovers_network(name: str) -> None:
    case = CASES[name]
    model = make_model(case)
    copied, permutations = permuted_copy(case, model, seed=2)
    result = mudsc_fast.merge([model, copied], [case.inputs(seed) for seed in (3, 4)], spec=case.spec, mode="zip")
    assert_recovered(result.matching, permutations)
    assert result.model is not None
    inputs = case.inputs(5)
    torch.testing.assert_close(outputs(result.model, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: resnet(()), "blocks must name the blocks of at least one stage, got none"),
        (lambda: resnet((2, 0)), r"blocks\[1\] must be at least 1, got 0"),
        (lambda: resnet((2,), norm_groups=0), "norm_groups must be at least 1, got 0"),
        (lambda: resnet((2,), names=BAD), "names must be one of 'torchvision', 'cifar', got 'timm'"),
        (lambda: vit(0, 3, 24), "num_blocks must be at least 1, got 0"),
        (lambda: vit(2, 5, 24), "width must be a multiple of num_heads, got 24 and 5"),
        (lambda: vit_huggingface(2, 0), "num_heads must be at least 1, got 0"),
        (lambda: gpt2(2, 0, 24), "width must be a multiple of num_heads, got 24 and 0"),
        (lambda: gpt2(2, 3, 24, head=BAD), "head must be one of 'separate', 'tied', 'absent', got 'timm'"),
        (lambda: llama(2, 4, 3, 8), "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        (lambda: llama(2, 4, 2, 0), "head_width must be at least 1, got 0"),
        (lambda: bert(0, 4), "num_layers must be at least 1, got 0"),
        (lambda: bert(2, 4, head=BAD), "head must be one of 'classifier', 'masked_lm', got 'timm'"),
        (lambda: Tower(2, 5, 24), "width must be a multiple of num_heads, got 24 and 5"),
        (lambda: clip_openai(), "vision or text must be given, got None for both"),
        (lambda: clip_huggingface(), "vision or text must be given, got None for both"),
        (lambda: vgg(()), r"convolutions and classifier must not be empty, got \[\]"),
        (lambda: vgg((1,), positions=0), "positions must be at least 1, got 0"),
        (lambda: swin((2, 2), (4,), 16), r"blocks and heads must have one entry per stage, got \[2, 2\] and \[4\]"),
        (lambda: swin((2, 2), (4, 6), 16), r"the width of stage 1 must be a multiple of heads\[1\], got 32 and 6"),
    ],
)
def test_inconsistent_numbers(build: Callable[[], PermutationSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("resnet cifar", resnet((2, 1)), "the tensor 'layer2.0.downsample.0.weight', which the models do not have"),
        (
            "resnet cifar",
            resnet((1, 1), names="cifar", norm_groups=3),
            "node 'stem' has 8 units, which 3 groups do not",
        ),
        ("vit", vit(2, 4, 32), "axis 0 of 'blocks.0.attn.qkv.weight' has length 72, but its windows cover 96"),
        ("bert classifier", bert(2, 5), "node 'layer.0.attention.qk' has 32 units, which 5 groups do not divide"),
        ("llama grouped", llama(2, 8, 8, 4), "axis 0 of 'model.layers.0.self_attn.k_proj.weight' has 4 units"),
        ("vgg", vgg((1, 2), classifier=("classifier.0", "classifier.3")), "not a multiple of inner"),
    ],
)
def test_spec_of_another_network_is_rejected(name: str, spec: PermutationSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec.units(CASES[name].build().state_dict())


def test_files_without_tied_head() -> None:
    state = gpt2_model()().state_dict()
    del state["lm_head.weight"]
    spec = gpt2(2, 4, 32, head="absent")
    permuted = mudsc_fast.permute_state_dict(state, spec, random_group_permutations(spec, spec.units(state), seed=1))
    result = mudsc_fast.merge([state, permuted], spec=spec)
    assert result.unmatched_tensors == ()
    for name, tensor in result.state_dict.items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)


def test_names_of_published_files(tmp_path: Path) -> None:
    model = CASES["vit huggingface"].build()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    named = vit_huggingface(2, 4, checkpoint_names=True)
    assert named.units(state) == vit_huggingface(2, 4).units(model.state_dict())
    assert set(state) == set(named.layouts)


def test_options_of_vision_transformers() -> None:
    plain = vit(2, 3, 24, class_token=False, qkv_bias=False)
    assert set(vit(2, 3, 24).layouts) - set(plain.layouts) == {
        "cls_token",
        "blocks.0.attn.qkv.bias",
        "blocks.1.attn.qkv.bias",
    }
    heads = Groups(3, tie="blocks.0.attn")
    assert [vit(2, 3, 24).groups(f"blocks.0.attn.{node}") for node in ("qk", "v")] == [heads, heads]
    published = vit(2, 3, 24, published=True)
    assert published.groups("blocks.0.attn.qk") == published.groups("blocks.0.attn.v") == Groups(3)
    assert len(published.bundles) == len(published.nodes) == 7
    assert published.observations("blocks.0.attn.qk") == (Observation("blocks.0.attn.qkv", "output", -1, 24, 24),)


def test_published_spec_separates_heads() -> None:
    case = CASES["vit"]
    published = Case(case.build, vit(2, 3, 24, published=True), case.inputs)
    model = make_model(case)
    copied, _ = permuted_copy(published, model, seed=2)
    assert (outputs(copied, case.inputs(3)) - outputs(model, case.inputs(3))).abs().max() > 0.1


def test_single_clip_tower() -> None:
    case = CASES["clip openai"]
    vision, text = clip_openai(vision=Tower(2, 3, 24)), clip_openai(text=Tower(2, 4, 32))
    assert vision.nodes + text.nodes == case.spec.nodes
    assert set(vision.layouts) | set(text.layouts) == set(case.spec.layouts)


def test_projections_match_packed_attention() -> None:
    spec = PermutationSpec({"fc1.weight": ("a", None)}, observe={"a": Observation("fc1", "projection", -1)})
    models = [make_mlp(seed=0), make_mlp(seed=1)]
    with pytest.raises(
        ValueError, match=r"projection of 'fc1', which must be a torch.nn.MultiheadAttention, got Linear"
    ):
        mudsc_fast.merge(models, [torch.randn(4, 20)], spec=spec, verify=False)


def test_projections_of_attention_called_with_keywords() -> None:
    class Layer(nn.Module):
        def __init__(self, keywords: bool) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.keywords = keywords

        def forward(self, x: Tensor) -> Tensor:
            output, _ = self.attn(query=x, key=x, value=x) if self.keywords else self.attn(x, x, x)
            return output  # type: ignore[no-any-return]

    windows = [Window("qk", 8), Window("qk", 8), Window("v", 8)]
    places = [Observation("attn", "projection", -1, start, 8) for start in (0, 8, 16)]
    spec = PermutationSpec({"attn.in_proj_weight": (windows, None)}, {"qk": places[:2], "v": places[2]})
    models = [[randomize(Layer(keywords), seed) for seed in (0, 1)] for keywords in (False, True)]
    data = [torch.randn(4, 5, 8)]
    positional, named = (mudsc_fast.collect_statistics(pair, data, spec=spec, verify=False) for pair in models)
    for node in spec.nodes:
        assert torch.equal(positional.similarity(node), named.similarity(node))


def test_tied_head_stays_tied() -> None:
    models = [randomize(gpt2_model()(), seed) for seed in (1, 2)]
    state = mudsc_fast.merge(models, [tokens(3)], spec=gpt2(2, 4, 32), mode="zip").state_dict
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


@pytest.mark.parametrize(
    ("kind", "config", "spec"),
    [
        ("GPT2LMHeadModel", transformers.GPT2Config(), gpt2(12, 12, 768)),
        ("BertForMaskedLM", transformers.BertConfig(), bert(12, 12, head="masked_lm")),
        ("ViTForImageClassification", transformers.ViTConfig(), vit_huggingface(12, 12)),
        ("CLIPModel", transformers.CLIPConfig(), clip_huggingface(Tower(12, 12, 768), Tower(12, 8, 512))),
        ("LlamaForCausalLM", transformers.LlamaConfig(), llama(32, 32, 32, 128)),
        ("MistralForCausalLM", transformers.MistralConfig(), llama(32, 32, 8, 128)),
    ],
)
def test_published_sizes(kind: str, config: Any, spec: PermutationSpec) -> None:
    with torch.device("meta"):
        state = getattr(transformers, kind)(config).state_dict()
    assert spec.problems(state) == []
    assert all(name.endswith(("bias", "logit_scale")) for name in set(state) - set(spec.layouts))
