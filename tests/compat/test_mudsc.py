"""The interface of the MuDSC program: recorded merges of whole networks, and each setting."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import Attention, ResNet, Swin, TransformerBlock, VisionTransformer, randomize
from conftest import load_golden
from mudsc_fast.compat import mudsc
from mudsc_fast.compat.mudsc import WeightFusion
from networks import make_mlp

MLP_PERM: dict[str, Any] = {
    "first": [[0, "fc1.weight"], [0, "fc1.bias"], [1, "fc2.weight", {"in": {"dim": -1}}]],
    "second": [[0, "fc2.weight"], [0, "fc2.bias"], [1, "fc3.weight", {"in": None}]],
}


class PooledResNet(ResNet):
    """A ResNet with pooling as a module, because the published specification observes the last stream there."""

    def __init__(self, norm_groups: int | None) -> None:
        super().__init__((1, 1, 1), (8, 16, 32), norm_groups=norm_groups)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        value = F.relu(self.bn1(self.conv1(images)))
        for stage in range(1, self.stages + 1):
            value = self.get_submodule(f"layer{stage}")(value)
        scores: Tensor = self.get_submodule(self.head_name)(self.avgpool(value).flatten(1))
        return scores


class AttentionWithNorms(Attention):
    """Attention with norms for queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.q_norm = nn.Identity()
        self.k_norm = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


def transformer() -> VisionTransformer:
    model = VisionTransformer()
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        block.attn = AttentionWithNorms(24, 3)
    return model


def network(family: str) -> tuple[nn.Module, Mapping[Any, Any]]:
    if family == "mlp":
        return make_mlp(), MLP_PERM
    if family == "vit":
        return transformer(), mudsc.get_vit_perm(num_layer=2, num_heads=3)
    if family == "resnet_gn":
        return PooledResNet(4), mudsc.get_resnet_perm_group(num_blocks=[1, 1, 1], group_num=4)
    return PooledResNet(None), mudsc.get_resnet_perm(num_blocks=[1, 1, 1])


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("kind", ["act", "weight", "mudsc"])
@pytest.mark.parametrize("family", ["mlp", "resnet_bn", "resnet_gn", "vit"])
def test_golden_networks(family: str, kind: str, mode: str) -> None:
    arrays = load_golden(f"{family}_{kind}_{mode}")
    golden = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "mode"}
    models = []
    for index in range(2):
        model, perm = network(family)
        prefix = f"model{index}/"
        model.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
        models.append(model)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    fusion = WeightFusion(
        fix_sims=kind == "mudsc", fix_rate=float(golden["balance"]), use_permute=mode == "align", verbose=False
    )
    inputs = [(golden[name], None) for name in sorted(golden) if name.startswith("input")]
    merged = fusion.transform(
        models, perm, act_loader=None if kind == "weight" else inputs, in_weight_space=kind != "act"
    )
    assert merged is fusion.fusion_model
    assert list(fusion.perm_mats) == list(perm)
    for index, (merge, unmerge) in enumerate(fusion.perm_mats.values()):
        assert torch.equal(unmerge, golden[f"unmerge/{index}"]), index
        torch.testing.assert_close(merge, golden[f"merge/{index}"], rtol=1e-6, atol=0)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, golden[f"merged/{name}"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(golden["input0"]), golden["output0"], rtol=1e-4, atol=1e-4)
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert not model._forward_hooks
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])


def by_matrices(
    tensor: str, uses: list[tuple[int, Tensor]], states: Sequence[Mapping[str, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean and the terms of a tensor multiplied by dense matrices along its axes."""
    parts = []
    for i, state in enumerate(states):
        part = state[tensor]
        for axis, matrix in uses:
            own = matrix.chunk(len(states))[i]
            part = torch.tensordot(part, own, ([axis], [0])).movedim(-1, axis)
        parts.append(part)
    return torch.stack(parts).mean(0), parts


@pytest.mark.parametrize("permute", [False, True])
def test_apply_permute_multiplies_by_the_matrices(permute: bool) -> None:
    models = [make_mlp(seed=seed) for seed in range(2)]
    fusion = WeightFusion(use_permute=permute, iter=2, verbose=False)
    parts = fusion.transform(models, MLP_PERM, return_state_dict=True)
    matrices = fusion.perm_mats
    uses = {
        "fc1.weight": [(0, matrices["first"][0])],
        "fc2.weight": [(0, matrices["second"][0]), (1, matrices["first"][1])],
        "fc3.weight": [(1, matrices["second"][1])],
    }
    others = [make_mlp(seed=seed).state_dict() for seed in range(5, 7)]
    for states, averaged, apart in (
        ([model.state_dict() for model in models], fusion.fusion_model.state_dict(), parts),
        (others, fusion.apply_permute(others), fusion.apply_permute(others, no_avg=True)),
    ):
        for tensor, where in uses.items():
            mean, single = by_matrices(tensor, where, states)
            torch.testing.assert_close(averaged[tensor], mean)
            torch.testing.assert_close(apart[tensor], single)
        torch.testing.assert_close(averaged["fc3.bias"], (states[0]["fc3.bias"] + states[1]["fc3.bias"]) / 2)
        torch.testing.assert_close(apart["fc3.bias"], averaged["fc3.bias"])


def test_no_fusion_averages() -> None:
    models = [make_mlp(seed=seed) for seed in range(3)]
    merged = WeightFusion(no_fusion=True, verbose=False).transform(models, MLP_PERM)
    for name, tensor in merged.state_dict().items():
        mean = torch.stack([model.state_dict()[name] for model in models]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-5)


def test_smaller_merge_share_makes_larger_network() -> None:
    models = [make_mlp((20, 32, 24, 10), seed=seed) for seed in range(3)]
    merged = WeightFusion(reduce=0.5, iter=2, verbose=False).transform(models, MLP_PERM)
    assert [merged.fc1.out_features, merged.fc2.in_features, merged.fc2.out_features] == [48, 48, 36]
    assert merged(torch.randn(5, 20)).shape == (5, 10)


def test_larger_network_has_larger_convolutions_and_norms() -> None:
    models = [randomize(PooledResNet(None), seed) for seed in range(3)]
    merged = WeightFusion(iter=1, verbose=False).transform(models, mudsc.get_resnet_perm(num_blocks=[1, 1, 1]))
    assert (merged.conv1.out_channels, merged.bn1.num_features, merged.bn1.running_mean.shape) == (12, 12, (12,))
    with torch.no_grad():
        assert merged.eval()(torch.randn(2, 3, 12, 12)).isfinite().all()


@pytest.mark.parametrize(("a", "b"), [(0.5, 1.0), (0.5, 0.0), (0.5, 0.4), (0.0, 1.0)])
def test_groups_stay_together_under_every_setting(a: float, b: float) -> None:
    models = [randomize(transformer(), seed) for seed in range(2)]
    fusion = WeightFusion(a=a, b=b, iter=2, verbose=False)
    fusion.transform(models, mudsc.get_vit_perm(num_layer=2, num_heads=3))
    for node in (1, 2):
        clusters = fusion.perm_mats[node][1].argmax(1).view(2, 3, 8) // 8
        assert torch.equal(clusters, clusters[..., :1].expand(clusters.shape))
        assert (fusion.perm_mats[node][1].sum(0) >= 1).all()


def test_cosine_similarity_compares_directions() -> None:
    first = make_mlp(seed=0)
    other = copy.deepcopy(first)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            if name.startswith("fc1"):
                tensor.copy_(first.state_dict()[name][order])
        other.state_dict()["fc2.weight"].copy_(first.state_dict()["fc2.weight"][:, order])
    fusion = WeightFusion(use_cos=True, use_permute=True, verbose=False)
    fusion.transform([first, other], MLP_PERM)
    assert torch.equal(fusion.perm_mats["first"][1][32:].argmax(1), order)
    assert torch.equal(fusion.perm_mats["second"][1][32:].argmax(1), torch.arange(32))


def test_weights_are_divided_by_batch_norm_deviation() -> None:
    models = [randomize(PooledResNet(None), seed) for seed in range(2)]
    perm = mudsc.get_resnet_perm(num_blocks=[1, 1, 1])
    scaled = {node: [list(entry) for entry in entries] for node, entries in perm.items()}
    scaled[0] = [[*entry, {"scaled_bn": None}] if entry[1] == "bn1.weight" else entry for entry in scaled[0]]
    by_hand = copy.deepcopy(models)
    with torch.no_grad():
        for model in by_hand:
            model.state_dict()["bn1.weight"].div_((model.state_dict()["bn1.running_var"] + 1e-7).sqrt())
    fusions = [WeightFusion(use_permute=True, verbose=False) for _ in range(2)]
    fusions[0].transform(models, scaled)
    fusions[1].transform(by_hand, perm)
    for node, (_, unmerge) in fusions[0].perm_mats.items():
        assert torch.equal(unmerge, fusions[1].perm_mats[node][1])


def test_swin_outputs_are_unchanged_by_found_permutations() -> None:
    models = [randomize(Swin((1, 1), (2, 4), 16), seed) for seed in range(2)]
    states = [renamed(model.state_dict()) for model in models]
    perm = mudsc.get_swin_perm((1, 1), (2, 4))
    fusion = WeightFusion(use_permute=True, iter=1, verbose=False)
    fusion.transform([Holder(state) for state in states], perm)
    assert set(perm) == set(range(7))
    assert len([entry for entry in perm[3] if entry[1] == "layers.1.blocks.0.norm1.bias"]) == 2
    # The bias that is listed twice is permuted only once, like its weight.
    order = fusion.perm_mats[3][1][32:].argmax(0)
    parts = fusion.apply_permute(states, no_avg=True)
    scale = fusion.perm_mats[3][0].max()
    for name in ("weight", "bias"):
        norm = f"layers.1.blocks.0.norm1.{name}"
        torch.testing.assert_close(parts[norm][1], states[1][norm][order] * scale)


class Holder(nn.Module):
    """A module that only holds tensors."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(last, tensor)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the names that timm used when the program was written."""
    names = {name: name.replace("layers.1.downsample", "layers.0.downsample") for name in state}
    return {names[name].replace("head.fc", "head"): tensor for name, tensor in state.items()}


def test_clip_spec_starts_with_norm() -> None:
    perm = mudsc.get_vit_clip_perm(num_layer=1, num_heads=2, ignore_head=True)
    names = [entry[1] for entry in perm[0]]
    assert names[2:5] == ["patch_embed.proj.weight", "norm_pre.weight", "norm_pre.bias"]
    assert perm[0][-1] == [1, "head.weight", {"in": None, "ignore": None}]
    assert [len(entries) for entries in perm.values()] == [20, 4, 3, 3]


def test_bottlenecks_have_two_inner_nodes() -> None:
    perm = mudsc.get_resnet_perm(3, [1, 2], "downsample", "fc", "global_pool", 0, ignore_running_val=False)
    assert len(perm) == 1 + (2 + 1) + (2 + 1) + 2
    assert perm[0][-1] == [1, "layer1.0.downsample.0.weight", {"in": None}]
    assert perm[6][-1] == [1, "fc.weight", {"in": "global_pool"}]
    assert [0, "bn1.running_var"] in perm[0]


def test_grouped_convolutions_share_their_units() -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1, groups=1)
            self.second = nn.Conv2d(8, 4, 1, groups=2)

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.second(self.first(images))
            return result

    models = [randomize(Depthwise(), seed) for seed in range(2)]
    place = {"act_module": {"reshape_func": ("group_conv", {"group": 2})}}
    fusion = WeightFusion(use_permute=True, verbose=False)
    fusion.transform(models, {0: [[1, "second.weight", {"in": None, **place}]]}, act_loader=[torch.randn(4, 3, 5, 5)])
    assert fusion.perm_mats[0][1].shape == (8, 4)


def test_sweeps_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        WeightFusion(iter=2).transform([make_mlp(seed=seed) for seed in range(2)], MLP_PERM)
    assert "sweep 1: 0 without progress" in caplog.text


BAD_PERMS: list[tuple[dict[Any, Any], str]] = [
    ({0: []}, r"perm\[0\] must list at least one axis"),
    ({0: [[0]]}, r"entries of perm\[0\] must be \[axis, tensor\]"),
    ({0: [[0, "fc1.weight"]], 1: [[0, "fc1.weight"]]}, "axis 0 of 'fc1.weight' is used by nodes 0 and 1"),
    (
        {0: [[0, "fc1.weight", {"group": {"num": 2}}], [0, "fc1.bias", {"group": {"num": 4}}]]},
        r"perm\[0\] must name one number of groups, got \[2, 4\]",
    ),
    ({0: [[0, "fc1.weight", {"group": {"num": 5}}]]}, r"perm\[0\] has 32 units, which 5 groups do not divide"),
    ({0: [[0, "fc9.weight"]]}, "perm names tensors that the networks do not have: fc9.weight"),
    ({0: [[0, "fc1.weight", {"act_module": {"hook": "mid"}}]]}, "hook of 'fc1.weight' must be 'pre' or 'post'"),
    (
        {0: [[0, "fc1.weight", {"act_module": {"reshape_func": ("flat", {})}}]]},
        "reshape_func of 'fc1.weight' must be one of norm_qk, group_conv, got 'flat'",
    ),
    (
        {0: [[0, "fc1.weight", {"split_dim": [0, "fc1.weight", ["a", "b", "c"]]}]]},
        "axis 0 of 'fc1.weight' must be a multiple of 3, got 32",
    ),
]


@pytest.mark.parametrize(("perm", "message"), BAD_PERMS)
def test_errors_name_the_entry(perm: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightFusion(verbose=False).transform([make_mlp(seed=seed) for seed in range(2)], perm)


def test_errors_name_other_arguments() -> None:
    models = [make_mlp(seed=seed) for seed in range(2)]
    fusion = WeightFusion(verbose=False)
    with pytest.raises(ValueError, match="nets must hold at least two networks, got 1"):
        fusion.transform(models[:1], MLP_PERM)
    with pytest.raises(ValueError, match="act_loader must yield at least one batch"):
        fusion.transform(models, MLP_PERM, act_loader=[])
    with pytest.raises(ValueError, match=r"perm\[0\] must say where its activations are seen"):
        fusion.transform(models, {0: [[0, "fc1.weight"]]}, act_loader=[torch.randn(2, 20)])
    with pytest.raises(ValueError, match=r"perm\[0\] is observed at 'fc7', which the networks do not have"):
        fusion.transform(models, {0: [[0, "fc1.weight", {"in": "fc7"}]]}, act_loader=[torch.randn(2, 20)])
    with pytest.raises(ValueError, match="depths and num_heads must name two or more stages"):
        mudsc.get_swin_perm((2,), (3,))
    with pytest.raises(ValueError, match=r"reduce changes the size of 'weight', a Holder, which is not supported"):
        fusion.transform([Holder({"weight": torch.randn(4, 3)}) for _ in range(3)], {0: [[0, "weight"]]})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("permute", [False, True])
def test_networks_stay_on_their_device(permute: bool) -> None:
    matrices = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        models = [make_mlp(seed=seed).to(device) for seed in range(2)]
        fusion = WeightFusion(use_permute=permute, fix_sims=True, verbose=False)
        loader = [torch.randn(200, 20)]
        merged = fusion.transform(models, MLP_PERM, act_loader=loader, in_weight_space=True)
        assert {tensor.device.type for tensor in merged.state_dict().values()} == {device}
        matrices.append({node: unmerge.cpu() for node, (_, unmerge) in fusion.perm_mats.items()})
    for node, unmerge in matrices[0].items():
        assert torch.equal(unmerge, matrices[1][node])
