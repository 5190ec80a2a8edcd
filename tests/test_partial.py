"""Partial merges: layers after a stop, and heads of different sizes, stay task-specific."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast
from architectures import ResNet, VisionTransformer, randomize
from mudsc_fast import Mode, PermutationSpec, Space
from mudsc_fast.spec import Window, resnet, vit
from mudsc_fast.spec.families.layers import attention, embedding, linear, tied_head
from networks import CONV_SPEC, MLP_AXES, MLP_SPEC, ConvNet, make_mlp
from networks import random_group_permutations as group_permutations

MODES: tuple[Mode, ...] = ("align", "zip")


def inputs(count: int = 3, size: int = 40, width: int = 20) -> list[Tensor]:
    return list(torch.randn(count, size, width, generator=torch.Generator().manual_seed(5)))


def permuted_copies(model: nn.Module, spec: PermutationSpec, count: int) -> list[nn.Module]:
    """Return the model and permuted copies of it."""
    models = [model]
    units = spec.units(model.state_dict())
    for seed in range(1, count):
        permutations = group_permutations(spec, units, seed)
        copied = copy.deepcopy(model)
        copied.load_state_dict(mudsc_fast.permute_state_dict(model.state_dict(), spec, permutations))
        models.append(copied)
    return models


def with_head(model: nn.Module, head: str, classes: int, seed: int) -> nn.Module:
    """Return a copy with another output layer."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    old = model.get_submodule(head)
    assert isinstance(old, nn.Linear)
    parent, _, name = head.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Linear(old.in_features, classes, bias=old.bias is not None))
    return model


def own_names(result: mudsc_fast.MergeResult) -> list[str]:
    return [name for name in result.task_state_dicts[0] if name not in result.state_dict]


def assert_same_functions(result: mudsc_fast.MergeResult, models: list[nn.Module], data: Any) -> None:
    assert len(result.task_models) == len(models)
    with torch.no_grad():
        for merged, model in zip(result.task_models, models, strict=True):
            torch.testing.assert_close(merged.eval()(data), model.eval()(data), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["weight", "activation", "dual"])
@pytest.mark.parametrize(("mode", "num_models"), [("align", 2), ("align", 4), ("zip", 2)])
@pytest.mark.parametrize("stop", ["fc1", "fc2", "fc3"])
def test_permuted_copies_keep_their_function(stop: str, mode: Mode, num_models: int, space: Space) -> None:
    models = permuted_copies(make_mlp(seed=2), MLP_SPEC, num_models)
    result = mudsc_fast.merge(models, inputs(), spec=MLP_SPEC, mode=mode, space=space, stop_at=stop)
    assert_same_functions(result, models, inputs()[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_models", [2, 3, 4])
def test_shared_tensors(mode: Mode, num_models: int) -> None:
    models = [make_mlp(seed=seed) for seed in range(num_models)]
    whole = mudsc_fast.merge(models, inputs(), spec=MLP_SPEC, mode=mode)
    assert whole.model is not None
    assert whole.task_models == (whole.model,) * num_models
    assert own_names(whole) == []
    for stop, layers in (("fc1", 1), ("fc2", 2), ("fc2.weight", 2), ("fc3", 3)):
        result = mudsc_fast.merge(models, inputs(), spec=MLP_SPEC, mode=mode, stop_at=stop)
        own = [f"fc{number}.{kind}" for number in range(layers + 1, 4) for kind in ("weight", "bias")]
        if stop == "fc2.weight":
            own.insert(0, "fc2.bias")
        assert own_names(result) == own
        assert list(result.state_dict) == [name for name in MLP_AXES if name not in own]
        for name, tensor in result.state_dict.items():
            assert torch.equal(tensor, whole.state_dict[name])
            assert all(tensors[name] is tensor for tensors in result.task_state_dicts)
        sizes = {name: tensor.numel() for name, tensor in models[0].state_dict().items()}
        assert result.num_per_task == (sum(sizes[name] for name in own),) * num_models
        assert result.num_shared + result.num_per_task[0] == sum(sizes.values())
        assert (result.model is None) == bool(own)
        assert (f"entries shared: {result.num_shared}; per task: " in str(result)) == bool(own)


def test_tails_read_their_members_of_clusters() -> None:
    models = [make_mlp(seed=seed, dtype=torch.float64) for seed in range(3)]
    result = mudsc_fast.merge(models, [batch.double() for batch in inputs()], spec=MLP_SPEC, mode="zip", stop_at="fc1")
    clusters = result.matching["fc1"].cluster_of_unit
    data = inputs()[0].double()
    with torch.no_grad():
        hidden = torch.relu(nn.functional.linear(data, result.state_dict["fc1.weight"], result.state_dict["fc1.bias"]))
        for index, (model, task) in enumerate(zip(models, result.task_models, strict=True)):
            tail = nn.Sequential(*list(model.children())[2:])
            torch.testing.assert_close(task(data), tail(hidden[:, clusters[index]]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_models", [2, 3])
def test_heads_of_different_sizes(mode: Mode, num_models: int) -> None:
    body = make_mlp(seed=3)
    same = permuted_copies(body, MLP_SPEC, num_models) if (mode, num_models) != ("zip", 3) else [body] * 3
    models = [with_head(model, "fc3", 4 + index, index) for index, model in enumerate(same)]
    result = mudsc_fast.merge(models, inputs(), spec=MLP_SPEC, mode=mode)
    assert own_names(result) == ["fc3.weight", "fc3.bias"]
    assert result.num_per_task == tuple(33 * (4 + index) for index in range(num_models))
    if (mode, num_models) != ("zip", 3):
        assert_same_functions(result, models, inputs()[0])
    states = [model.state_dict() for model in models]
    of_states = mudsc_fast.merge(
        states, mudsc_fast.collect_statistics(models, inputs(), spec=MLP_SPEC), spec=MLP_SPEC, mode=mode
    )
    assert of_states.task_models == ()
    for left, right in zip(of_states.task_state_dicts, result.task_state_dicts, strict=True):
        assert all(torch.equal(left[name], tensor) for name, tensor in right.items())


def test_heads_do_not_count_in_the_similarity() -> None:
    models = [make_mlp(seed=seed) for seed in (0, 1)]
    first = mudsc_fast.merge(models, spec=MLP_SPEC, task_heads="fc3")
    others = [with_head(model, "fc3", 10, seed) for seed, model in enumerate(models)]
    second = mudsc_fast.merge(others, spec=MLP_SPEC, task_heads=["fc3.weight", "fc3.bias"])
    assert own_names(first) == own_names(second) == ["fc3.weight", "fc3.bias"]
    for name, tensor in first.state_dict.items():
        assert torch.equal(tensor, second.state_dict[name])


def test_heads_of_two_layers() -> None:
    models = permuted_copies(make_mlp((20, 32, 24, 10), seed=1), MLP_SPEC, 2)
    other = make_mlp((20, 32, 16, 7), seed=2)
    models[1].fc2, models[1].fc3 = other.fc2, other.fc3
    result = mudsc_fast.merge(models, inputs(), spec=MLP_SPEC, task_heads=["fc2", "fc3"])
    assert list(result.matching) == ["fc1"]
    assert own_names(result) == ["fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"]
    # The new layers of the second model read the units of the first layer in the order of the copy.
    assert_same_functions(result, models, inputs()[0])


@pytest.mark.parametrize("mode", MODES)
def test_tensors_without_node_follow_preceding_tensors(mode: Mode) -> None:
    images = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    models = permuted_copies(ConvNet().eval(), CONV_SPEC, 2)
    for stop, own in (
        ("first", ["conv2.weight", "conv2.bias", "fc.weight", "fc.bias"]),
        ("second", ["fc.weight", "fc.bias"]),
    ):
        result = mudsc_fast.merge(models, images, spec=CONV_SPEC, mode=mode, stop_at=stop)
        assert own_names(result) == own
        assert result.unmatched_tensors == ()
        assert_same_functions(result, models, images[0])


RESNET_SPEC = resnet((1, 1, 1), names="cifar")
GROUPED_SPEC = resnet((1, 1, 1), names="cifar", norm_groups=4)
VIT_SPEC = vit(2, 3, 24)
STOPS = {
    "resnet": ["stem", "layer1.0.conv1", "layer2.0.conv1", "layer2", "layer2.0.conv1.weight", "layer3", "linear"],
    "resnet_gn": ["stem", "layer2.0.conv1", "layer3.0.shortcut"],
    "vit": [
        "patch_embed",
        "blocks.0.attn.qk",
        "blocks.0.attn.v",
        "blocks.0.attn",
        "blocks.0.mlp",
        "blocks.0",
        "stream",
    ],
}


def network(family: str) -> tuple[nn.Module, PermutationSpec]:
    if family == "vit":
        return VisionTransformer(), VIT_SPEC
    grouped = family == "resnet_gn"
    return ResNet((1, 1, 1), (8, 16, 32), norm_groups=4 if grouped else None), GROUPED_SPEC if grouped else RESNET_SPEC


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "stop"), [(family, stop) for family, stops in STOPS.items() for stop in stops])
def test_stops_inside_residual_networks(family: str, stop: str, mode: Mode) -> None:
    model, spec = network(family)
    models = permuted_copies(randomize(model, 0).eval(), spec, 2)
    images = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    result = mudsc_fast.merge(models, images, spec=spec, mode=mode, stop_at=stop)
    assert_same_functions(result, models, images[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_models", [3, 4])
@pytest.mark.parametrize("family", ["resnet", "resnet_gn", "vit"])
def test_several_distinct_networks(family: str, num_models: int, mode: Mode) -> None:
    networks = [network(family) for _ in range(num_models)]
    spec, head = networks[0][1], "head" if family == "vit" else "linear"
    models = [
        with_head(randomize(model, seed), head, 3 + seed, seed).eval() for seed, (model, _) in enumerate(networks)
    ]
    images = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    stop = "blocks.0.mlp" if family == "vit" else "layer2.0.conv1"
    for chosen in ((), stop):
        result = mudsc_fast.merge(models, images, spec=spec, mode=mode, stop_at=chosen)
        repaired = mudsc_fast.repair(result, models, images, missing_bias="add")
        assert result.model is None
        assert {f"{head}.weight", f"{head}.bias"} <= set(own_names(result))
        assert len(set(result.num_per_task)) == num_models
        assert repaired.repaired_layers
        with torch.no_grad():
            for task in (result, repaired):
                for seed, model in enumerate(task.task_models):
                    scores = model.eval()(images[0])
                    assert scores.shape == (6, 3 + seed)
                    assert scores.isfinite().all()


class SeparateAttention(nn.Module):
    """Attention with three separate layers and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.output = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.query, self.key, self.value = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.enter(tokens)
        split = [layer(stream).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        result: Tensor = self.leave(stream + self.output(mixed))
        return result


@pytest.mark.parametrize("mode", MODES)
def test_attention_heads_keep_order_across_stop(mode: Mode) -> None:
    spec = (
        linear("enter", "stream", None)
        + attention("attn", "query", "key", "value", "output", "stream", 3)
        + linear("leave", None, "stream")
    ).spec()
    torch.manual_seed(1)
    models = permuted_copies(SeparateAttention(), spec, 2)
    data = [torch.randn(5, 7, 12)]
    result = mudsc_fast.merge(models, data, spec=spec, mode=mode, stop_at="attn.qk")
    assert own_names(result) == [
        f"{layer}.{kind}" for layer in ("leave", "output", "value") for kind in ("weight", "bias")
    ]
    assert_same_functions(result, models, data[0])


def test_stop_in_each_of_two_towers() -> None:
    class Towers(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.left, self.right = make_mlp(seed=seed), make_mlp(seed=seed + 1)

        def forward(self, data: Tensor) -> Tensor:
            result: Tensor = self.left(data) * self.right(data)
            return result

    axes = {
        f"{tower}.{name}": tuple(node and f"{tower}.{node}" for node in entries)
        for tower in ("left", "right")
        for name, entries in MLP_AXES.items()
    }
    spec = PermutationSpec(axes)
    models = permuted_copies(Towers(4), spec, 2)
    for stop, layers in ((("left.fc1", "right.fc2"), {"left": 1, "right": 2}), ("left.fc2", {"left": 2, "right": 3})):
        result = mudsc_fast.merge(models, inputs(), spec=spec, stop_at=stop)
        shared = [
            f"{tower}.fc{i}.{kind}"
            for tower, n in layers.items()
            for i in range(1, n + 1)
            for kind in ("weight", "bias")
        ]
        assert list(result.state_dict) == shared
        assert_same_functions(result, models, inputs()[0])


class TiedNetwork(nn.Module):
    """An embedding table tied to the output layer, and two layers on a residual stream."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.first, self.second = nn.Embedding(30, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.output = nn.Linear(12, 30, bias=False)
        self.output.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.table(tokens)
        scores: Tensor = self.output(stream + self.second(torch.relu(self.first(stream))))
        return scores


@pytest.mark.parametrize("mode", MODES)
def test_shared_tensor_stays_shared(mode: Mode) -> None:
    layers = (
        embedding("table", "stream")
        + linear("first", "inner", "stream")
        + linear("second", "stream", "inner")
        + tied_head("output", "stream")
    )
    spec = PermutationSpec(layers.axes)
    tokens = torch.arange(30).view(5, 6)
    models = permuted_copies(TiedNetwork(0), spec, 2)
    result = mudsc_fast.merge(models, spec=spec, mode=mode, stop_at="inner")
    assert own_names(result) == ["second.weight", "second.bias"]
    assert_same_functions(result, models, tokens)
    distinct = mudsc_fast.merge([TiedNetwork(0), TiedNetwork(1)], spec=spec, mode=mode, stop_at="inner")
    for index, model in enumerate(distinct.task_models):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, distinct.task_state_dicts[index][name])
    with pytest.raises(ValueError, match=r"heads must name all of 'table\.weight', 'output\.weight' or none"):
        mudsc_fast.merge(models, spec=spec, task_heads="output")


def test_tail_keeps_integers_of_each_model() -> None:
    states = [dict(make_mlp(seed=seed).state_dict(), steps=torch.tensor(seed)) for seed in (0, 1)]
    result = mudsc_fast.merge(states, spec=MLP_SPEC, stop_at="fc1")
    assert [int(tensors["steps"]) for tensors in result.task_state_dicts] == [0, 1]
    result = mudsc_fast.merge(states, spec=MLP_SPEC)
    assert [int(tensors["steps"]) for tensors in result.task_state_dicts] == [0, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"stop_at": "fc9"},
            ValueError,
            "stop_at must name a node, or begin the name of a tensor that has one, got 'fc9'; nodes: fc1, fc2",
        ),
        ({"stop_at": "fc"}, ValueError, "got 'fc'; nodes"),
        ({"stop_at": "fc3.bias"}, ValueError, "got 'fc3.bias'; nodes"),
        ({"stop_at": ["fc1", 3]}, TypeError, "stop_at must be a name or a sequence of names, got int"),
        ({"task_heads": "fc9"}, ValueError, "task_heads names 'fc9', but no tensor name begins with it"),
        ({"task_heads": ["fc1", "fc2", "fc3"]}, ValueError, "axes must name at least one node, got none"),
    ],
)
def test_bad_names(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mudsc_fast.merge([make_mlp(seed=0), make_mlp(seed=1)], spec=MLP_SPEC, **options)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (
            (20, 32, 30, 10),
            r"'fc2.weight' has shape \(30, 32\) in models\[1\], but \(32, 32\) in models\[0\]: only networks of",
        ),
        ((21, 32, 32, 10), r"'fc1.weight' has shape \(32, 21\) in models\[1\]"),
    ],
)
def test_shapes_differ_outside_heads(widths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mudsc_fast.merge([make_mlp(), make_mlp(widths)], spec=MLP_SPEC)


def test_spec_without_some_tensors() -> None:
    spec = PermutationSpec(
        {
            "a.weight": ([Window("one", 4), Window(None, 2), Window("two", 6)], None),
            "b.weight": (None, [Window("two", 6)]),
            "c.weight": ("three", "one"),
        },
        groups={"two": 3},
    )
    rest = spec.without(["c.weight"])
    assert rest.nodes == ("one", "two")
    assert rest.layouts == {name: spec.layouts[name] for name in ("a.weight", "b.weight")}
    assert rest.observations("one") == spec.observations("one")
    assert rest.groups("two").count == 3
    assert spec.without([]) == spec
