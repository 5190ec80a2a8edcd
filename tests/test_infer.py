"""Derived specifications equal the handwritten ones, keep the model's outputs, and let merges recover permutations."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mudsc_fast
from architectures import FeedForward, ResNet, Vgg, VisionTransformer, calibrate, randomize
from mudsc_fast import Observation, PermutationSpec, Space
from mudsc_fast.spec import Axis, Groups, llama, mlp
from mudsc_fast.spec.infer import derive, graph
from mudsc_fast.spec.infer.export import Exported, export
from networks import assert_recovered
from test_builders import CASES, SHAPE, TEXT, Case, causal, images, outputs, permuted_copy, tokens

PAGE = Path(__file__).parent.parent / "docs" / "derivation.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
BAD: Any = 3
Place = tuple[str, int, int, int, int, str, bool]


class Sliced(nn.Module):
    """A hidden layer with two slices that are read by different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 48)
        self.second = nn.Linear(20, 12)
        self.third = nn.Linear(28, 12)
        self.last = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.gelu(self.first(images))
        joined = torch.tanh(self.second(hidden[:, :20])) + self.third(hidden[:, 20:])
        result: Tensor = self.last(joined)
        return result


class Skipped(nn.Module):
    """A small U-Net, which concatenates the first map and the last along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.middle = nn.ConvTranspose2d(8, 10, 2, stride=2)
        self.up = nn.Conv2d(16, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.head = nn.Conv2d(7, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        kept = F.gelu(self.down(images))
        risen = F.gelu(self.middle(F.gelu(self.inner(kept))))
        result: Tensor = self.head(F.gelu(self.norm(self.up(torch.cat([risen, kept], 1)))))
        return result


class Gated(nn.Module):
    """A gated linear unit with one fused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32)
        self.last = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.last(F.glu(self.first(images), -1))
        return result


class Hidden(nn.Module):
    """Two hidden layers with a function after the first."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(10, 16)
        self.second = nn.Linear(16, 12)
        self.last = nn.Linear(12, 4)
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.last(F.gelu(self.second(self.between(self.first(images)))))
        return result


class Grouped(nn.Module):
    """A ResNeXt block: a convolution with four groups of two channels between two 1 x 1 convolutions."""

    def __init__(self, depthwise: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.conv1 = nn.Conv2d(6, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8 if depthwise else 12, 3, padding=1, groups=8 if depthwise else 4)
        self.bn2 = nn.BatchNorm2d(self.conv2.out_channels)
        self.conv3 = nn.Conv2d(self.conv2.out_channels, 6, 1, bias=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        entered = F.gelu(self.stem(images))
        value = F.gelu(self.bn2(self.conv2(F.gelu(self.bn1(self.conv1(entered))))))
        result: Tensor = self.fc((entered + self.conv3(value)).mean((2, 3)))
        return result


class NormedAttention(nn.Module):
    """Attention with norms of queries and keys that are shared by all heads, as in timm with ``qk_norm``."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(10, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads)
        self.k_norm = nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)
        self.mlp = FeedForward(width, 40)
        self.head = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images)
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        tokens = tokens + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = self.head(tokens + self.mlp(tokens))
        return result


class Crossed(nn.Module):
    """Attention of a few learned tokens to those of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 16)
        self.asked = nn.Parameter(torch.zeros(1, 3, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.tanh(self.embed(images))
        asked = self.asked.repeat(len(tokens), 1, 1) + tokens[:, :3]
        result: Tensor = self.head(self.attention(asked, tokens, value=tokens, need_weights=False)[0])
        return result


class Dense(nn.Module):
    """Layers that read the outputs of all earlier layers, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10 + 6 * index, 6) for index in range(5))
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 4)

    def forward(self, images: Tensor) -> Tensor:
        written = images
        for layer in self.layers:
            written = torch.cat([written, F.gelu(layer(written))], -1)
        result: Tensor = self.head(self.norm(written))
        return result


def vectors(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def huggingface(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**options))


def features(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": images(32)(seed)[:8]}


#: Networks without a builder: a function that makes them, their input, and whether they compute only in float64.
OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], bool]] = {
    "sliced": (Sliced, vectors(64, 10), True),
    "skipped": (Skipped, images(8), True),
    "gated": (Gated, vectors(64, 10), True),
    "grouped convolution": (Grouped, images(8), True),
    "depthwise convolution": (lambda: Grouped(depthwise=True), images(8), True),
    "dense": (Dense, vectors(64, 10), True),
    "cross attention": (Crossed, vectors(32, 6, 10), True),
    "normed heads": (NormedAttention, vectors(16, 6, 10), True),
    "cumsum": (lambda: Hidden(lambda x: x.cumsum(1)), vectors(64, 10), True),
    "fft": (lambda: Hidden(lambda x: torch.fft.fft(x).real), vectors(64, 10), True),
    "renorm": (lambda: Hidden(lambda x: torch.renorm(x, 2, 0, 2.0)), vectors(64, 10), True),
    "sort": (lambda: Hidden(lambda x: x.sort(1).values), vectors(64, 10), True),
    "argsort": (lambda: Hidden(lambda x: x.argsort(1).to(x.dtype) / 9), vectors(64, 10), True),
    "qwen3": (causal("Qwen3", 4, head_dim=6), tokens, False),
    "phi3": (huggingface("Phi3ForCausalLM", "Phi3", **SHAPE, **TEXT, num_key_value_heads=2), tokens, False),
    "mixtral": (
        huggingface("MixtralForCausalLM", "Mixtral", **SHAPE, **TEXT, num_key_value_heads=2, num_local_experts=3),
        tokens,
        False,
    ),
    "gpt neox": (huggingface("GPTNeoXForCausalLM", "GPTNeoX", **SHAPE, **TEXT), tokens, True),
    "albert": (
        huggingface("AlbertForSequenceClassification", "Albert", **SHAPE, **TEXT, embedding_size=16),
        tokens,
        True,
    ),
    "mamba": (
        huggingface(
            "MambaForCausalLM", "Mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=60,
            pad_token_id=None,
        ),
        tokens,
        False,
    ),
    "convnext": (
        huggingface("ConvNextForImageClassification", "ConvNext", hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1]),
        features,
        True,
    ),
}  # fmt: skip


@cache
def derived(name: str) -> tuple[Case, bool]:
    """Return a network, its derived specification, and whether it computes only in float64."""
    if name in CASES:
        build, inputs, exact = CASES[name].build, CASES[name].inputs, True
    else:
        build, inputs, exact = OTHERS[name]
    return Case(build, PermutationSpec.from_model(build(), inputs(0)), inputs), exact


def make(case: Case) -> nn.Module:
    model = randomize(case.build(), seed=1)
    case.spec.validate(model)
    if isinstance(model, (ResNet, Vgg, Skipped, Grouped)):
        calibrate(model, case.inputs(0))
    return model


def places(spec: PermutationSpec, node: str) -> frozenset[Place]:
    return frozenset(
        (use.tensor, use.position, use.segment.start, use.axis.inner, use.axis.outer, use.axis.role, use.axis.compared)
        for use in spec.uses(node)
    )


def content(spec: PermutationSpec) -> set[frozenset[tuple[frozenset[Place], int]]]:
    """Return a specification without names and observations: the bundles of nodes and their groups."""
    return {frozenset((places(spec, node), spec.groups(node).count) for node in bundle) for bundle in spec.bundles}


def node_at(spec: PermutationSpec, tensor: str, position: int, segment: int = 0) -> Axis | None:
    return spec.layouts[tensor][position][segment].axis


@pytest.mark.parametrize("name", CASES)
def test_derived_spec_matches_handwritten_spec(name: str) -> None:
    written, found = content(CASES[name].spec), content(derived(name)[0].spec)
    if name == "clip openai":
        # The joint embedding space of images and texts is not visible in the outputs, so its order is free. The
        # builder keeps the order, because users read the embeddings too.
        space = {("text_projection", 1, 0, 1, 1, "produce", True), ("visual.proj", 1, 0, 1, 1, "produce", True)}
        assert found - written == {frozenset({(frozenset(space), 1)})}
        assert written <= found
    else:
        assert found == written


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_permuted_network_gives_same_outputs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case, exact = derived(name)
    if dtype == torch.float64 and not exact:
        pytest.skip("computes in float32 at places")
    model = make(case).to(dtype)
    copied, permutations = permuted_copy(case, model, seed=2)
    assert all(not torch.equal(order, order.sort().values) for order in permutations.values())
    inputs = case.inputs(3)
    expected = outputs(model, inputs, dtype)
    assert expected.std() > 0.05
    torch.testing.assert_close(outputs(copied, inputs, dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
@pytest.mark.parametrize("space", ["weight", "activation", "dual"])
def test_merge_with_permuted_copy_recovers_network(name: str, space: Space) -> None:
    case, _ = derived(name)
    model = make(case)
    copied, permutations = permuted_copy(case, model, seed=2)
    result = mudsc_fast.merge([model, copied], [case.inputs(seed) for seed in (3, 4)], spec=case.spec, space=space)
    assert_recovered(result.matching, permutations)
    assert result.model is not None
    inputs = case.inputs(5)
    torch.testing.assert_close(outputs(result.model, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_zip_with_permuted_copy_recovers_network(name: str) -> None:
    case, _ = derived(name)
    model = make(case)
    copied, permutations = permuted_copy(case, model, seed=2)
    result = mudsc_fast.merge([model, copied], [case.inputs(seed) for seed in (3, 4)], spec=case.spec, mode="zip")
    assert_recovered(result.matching, permutations)
    assert result.model is not None
    inputs = case.inputs(5)
    torch.testing.assert_close(outputs(result.model, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("name", ["resnet cifar", "resnet group norm", "vit", "swin", "llama grouped"])
def test_decomposed_graphs_give_same_spec(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def decomposed(*arguments: Any, **options: Any) -> Exported:
        exported = export(*arguments, **options)
        return replace(exported, program=exported.program.run_decompositions())

    monkeypatch.setattr(graph, "export", decomposed)
    case = CASES[name]
    assert content(PermutationSpec.from_model(case.build(), case.inputs(0))) == content(case.spec)


#: Hugging Face architectures for which the tests only check that the derived specification keeps the outputs.
FURTHER: dict[str, tuple[str, dict[str, Any], Callable[[int], Any]]] = {
    "Bart": (
        "BartForConditionalGeneration",
        {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "vocab_size": 60,
            "max_position_embeddings": 20,
        },
        lambda seed: {**tokens(seed), "decoder_input_ids": tokens(seed + 1)["input_ids"]},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60},
        lambda seed: {**tokens(seed), "decoder_input_ids": tokens(seed + 1)["input_ids"]},
    ),
    "DebertaV2": (
        "DebertaV2ForSequenceClassification",
        {**SHAPE, **TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        tokens,
    ),
    "GPTJ": (
        "GPTJForCausalLM",
        {
            "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 60, "n_positions": 12,
            "bos_token_id": None, "eos_token_id": None,
        },
        tokens,
    ),
    "Bloom": (
        "BloomForCausalLM",
        {
            "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "bos_token_id": None,
            "eos_token_id": None, "pad_token_id": None,
        },
        tokens,
    ),
    "Swin": (
        "SwinForImageClassification",
        {
            "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 4,
            "window_size": 4,
        },
        features,
    ),
    "Segformer": (
        "SegformerForImageClassification",
        {
            "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2],
            "decoder_hidden_size": 16,
        },
        features,
    ),
    "MobileNetV2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, features),
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        {
            **SHAPE, "vocab_size": 20, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        },
        lambda seed: {"input_values": vectors(2, 2000)(seed)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
def test_further_architectures_keep_their_function(name: str) -> None:
    kind, options, inputs = FURTHER[name]
    model = randomize(huggingface(kind, name, **options)(), seed=1)
    spec = PermutationSpec.from_model(model, inputs(0))
    spec.validate(model)
    copied, _ = permuted_copy(Case(lambda: model, spec, inputs), model, seed=2)
    expected = outputs(model, inputs(3))
    assert expected.std() > 0.01
    assert len(spec.nodes) >= 3
    torch.testing.assert_close(outputs(copied, inputs(3)), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_per_head_norms_keep_family_spec() -> None:
    assert content(derived("qwen3")[0].spec) == content(llama(2, 8, 4, 6))


@pytest.mark.parametrize("block", BLOCKS)
def test_code_of_derivation_page_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {})


def test_slice_of_hidden_layer_is_separate_node() -> None:
    spec = derived("sliced")[0].spec
    before, behind = spec.layouts["first.weight"][0]
    assert (before.width, behind.start, behind.width) == (20, 20, 28)
    assert before.axis is not None
    assert behind.axis is not None
    assert node_at(spec, "second.weight", 1) == Axis(before.axis.node, "consume")
    assert node_at(spec, "third.weight", 1) == Axis(behind.axis.node, "consume")


def test_concatenated_streams_are_windows_of_consumers() -> None:
    spec = derived("skipped")[0].spec
    risen, kept = spec.layouts["up.weight"][1]
    assert (risen.axis, risen.width) == (Axis("middle", "consume"), 10)
    assert (kept.axis, kept.start, kept.width) == (Axis("down", "consume"), 10, 6)
    assert node_at(spec, "middle.weight", 0) == Axis("inner", "consume")
    assert node_at(spec, "middle.weight", 1) == Axis("middle", "produce")
    assert node_at(spec, "norm.running_mean", 0) == Axis("up", "produce", compared=False)


def test_halves_of_gated_layer_share_order() -> None:
    spec = derived("gated")[0].spec
    assert [(segment.axis, segment.width) for segment in spec.layouts["first.weight"][0]] == [
        (Axis("first", "produce"), 16)
    ] * 2


def test_grouped_convolution() -> None:
    spec = derived("grouped convolution")[0].spec
    # A specification cannot express that the second axis of the weight depends on the group of the first.
    assert node_at(spec, "conv1.weight", 0) == Axis("conv1", "produce", inner=2)
    assert spec.groups("conv1") == Groups(4, tie="conv1")
    assert spec.groups("conv2") == Groups(4, tie="conv1")
    assert spec.units(Grouped().state_dict()) == {"stem": 6, "conv1": 4, "conv2": 12}


def test_depthwise_convolution_ties_channels() -> None:
    spec = derived("depthwise convolution")[0].spec
    assert {use.tensor for use in spec.uses("conv1")} >= {"conv1.weight", "conv2.weight", "conv2.bias", "conv3.weight"}
    assert spec.groups("conv1") == Groups(1)


def test_heads_with_shared_norm_keep_unit_order() -> None:
    spec = derived("normed heads")[0].spec
    scores, values = (spec.layouts["qkv.weight"][0][place].axis for place in (0, 2))
    assert scores == spec.layouts["qkv.weight"][0][1].axis == Axis("qkv.0", "produce", inner=8)
    assert values == Axis("qkv.1", "produce")
    assert spec.groups("qkv.0") == spec.groups("qkv.1") == Groups(3, tie="qkv.0")
    assert "q_norm.weight" not in spec.layouts
    assert not any("_norm.weight" in name and "self_attn" in name for name in derived("qwen3")[0].spec.layouts)


def test_shared_layers_share_their_nodes() -> None:
    spec = derived("albert")[0].spec
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    stream = node_at(spec, "albert.encoder.embedding_hidden_mapping_in.weight", 0)
    assert stream is not None
    for name in (f"{layer}.ffn_output.weight", f"{layer}.attention.dense.weight"):
        assert node_at(spec, name, 0) == stream
    assert node_at(spec, f"{layer}.ffn.weight", 1) == Axis(stream.node, "consume")


@pytest.mark.parametrize(
    ("name", "operator", "known"),
    [
        ("cumsum", "aten.cumsum", True),
        ("fft", "aten.fft_fft", True),
        ("renorm", "aten.renorm", False),
        ("argsort", "aten.argsort", True),
    ],
)
def test_order_dependent_operator_freezes_units_and_is_reported(
    name: str, operator: str, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    build, inputs, _ = OTHERS[name]
    with caplog.at_level(logging.INFO, "mudsc_fast.spec.infer"):
        found = derive(build(), inputs(0))
    assert list(found.observe) == ["second"]
    (obstacle,) = found.obstacles
    assert (obstacle.operator, obstacle.shape, obstacle.axes, obstacle.known) == (operator, (64, 16), (1,), known)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO" if known else "WARNING", str(obstacle))
    ]
    assert str(obstacle).startswith(f"{operator} ({obstacle.node}) ")
    assert str(obstacle).endswith("axes 1 of a tensor (64, 16)")


def test_report_names_modules() -> None:
    class Reversed(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value.flip(1)

    model = nn.Sequential(nn.Linear(5, 6), Reversed(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2))
    assert [str(obstacle) for obstacle in derive(model, torch.randn(3, 5)).obstacles] == [
        "aten.flip (flip in '1') depends on the order of axes 1 of a tensor (3, 6)"
    ]


def test_meta_device_models() -> None:
    with torch.device("meta"):
        config = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=8, vocab_size=50000)
        model = transformers.LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 7e8
    spec = PermutationSpec.from_model(model, tokens(0))
    assert spec.units(model.state_dict())["model.layers.1.self_attn.k_proj"] == 8
    assert content(spec) == content(llama(2, 32, 8, 128))


def test_input_forms() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            result: Tensor = self.last(torch.tanh(self.first(left)) * self.second(right))
            return result

    left, right = torch.randn(3, 5), torch.randn(3, 4)
    spec = PermutationSpec.from_model(Pair(), (left, right))
    assert spec == PermutationSpec.from_model(Pair(), {"left": left, "right": right})
    assert spec.nodes == ("first",)
    assert len(spec.uses("first")) == 5
    chain = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    assert content(PermutationSpec.from_model(chain, left)) == content(mlp(["0", "2"]))


def test_selected_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.relu(self.first(value))
            return hidden, self.last(hidden)

    with pytest.raises(ValueError, match=r"units that can be permuted, .* \(it is an output of the model\)"):
        PermutationSpec.from_model(Two(), torch.randn(3, 5))
    spec = PermutationSpec.from_model(Two(), torch.randn(3, 5), outputs=lambda result: result[1])
    assert spec.nodes == ("first",)


def test_observed_places() -> None:
    spec = derived("vit")[0].spec
    assert spec.observations("blocks.0.attn.qkv.0") == (
        Observation("blocks.0.attn.qkv", "output", -1, 0, 24),
        Observation("blocks.0.attn.qkv", "output", -1, 24, 24),
    )
    assert spec.observations("blocks.0.attn.qkv.1") == (Observation("blocks.0.attn.proj", "input", -1),)
    assert spec.observations("blocks.0.mlp.fc1") == (Observation("blocks.0.mlp.fc2", "input", -1),)
    # The last of the layers that read the stream for all tokens.
    assert spec.observations("patch_embed.proj") == (Observation("blocks.1.mlp.fc1", "input", -1),)
    packed = derived("clip openai")[0].spec
    assert packed.observations("visual.transformer.resblocks.0.attn.0") == (
        Observation("visual.transformer.resblocks.0.attn", "projection", -1, 0, 24),
        Observation("visual.transformer.resblocks.0.attn", "projection", -1, 24, 24),
    )
    convolutional = derived("skipped")[0].spec
    assert convolutional.observations("down") == (Observation("up", "input", 1, 10, 6),)


def test_model_is_left_unchanged() -> None:
    model = VisionTransformer().train()
    model.blocks.eval()
    state = copy.deepcopy(model.state_dict())
    PermutationSpec.from_model(model, images(8)(0))
    assert model.training
    assert not model.blocks.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("constant", [True, False])
def test_repeat_then_in_place_write(constant: bool) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, value: Tensor) -> Tensor:
            scale = torch.ones(len(value), 6) if constant else value[:, :1].expand(-1, 6).clone()
            scale[:, :3] = 2.0
            result: Tensor = self.last(torch.relu(self.second(torch.relu(self.first(value)) * scale)))
            return result

    model = Written()
    spec = PermutationSpec.from_model(model, torch.randn(3, 5))
    assert [segment.width for segment in spec.layouts["first.weight"][0]] == [3, 3]
    copied, permutations = permuted_copy(Case(Written, spec, vectors(3, 5)), model, seed=1)
    assert len(permutations) == 3
    value = torch.randn(3, 5)
    torch.testing.assert_close(copied(value), model(value))


def test_norm_groups_that_split_repeated_channels() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(10, 2)
            self.norm = nn.GroupNorm(2, 10)

        def forward(self, value: Tensor) -> Tensor:
            twice = self.second(torch.relu(self.first(value))).repeat_interleave(2, 1)
            result: Tensor = self.last(self.norm(twice))
            return result

    spec = PermutationSpec.from_model(Repeated(), torch.randn(3, 5))
    assert spec.nodes == ("first",)  # the copies of the third channel are in different groups


def test_integer_tensors_keep_their_order() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(7, 2)
            self.codes = nn.Parameter(torch.randint(-9, 9, (7, 6), dtype=torch.int8), requires_grad=False)

        def forward(self, value: Tensor) -> Tensor:
            hidden = torch.relu(self.first(value))
            result: Tensor = self.last(torch.relu(F.linear(hidden, self.codes.to(hidden.dtype))))
            return result

    with pytest.raises(ValueError, match="every axis keeps its order"):
        PermutationSpec.from_model(Quantized(), torch.randn(3, 5))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        PermutationSpec.from_model(BAD, torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"example_inputs must be a tensor, a dict .* got int"):
        PermutationSpec.from_model(nn.Linear(5, 2), BAD)
    with pytest.raises(ValueError, match=r"model must be one that torch.export can export .* got RuntimeError"):
        PermutationSpec.from_model(nn.Linear(5, 2), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"model must have units that can be permuted, but every axis keeps its order"):
        PermutationSpec.from_model(nn.Linear(5, 2), torch.randn(3, 5))
