from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mudsc_fast
from conftest import load_golden
from mudsc_fast import Mode, Observation, PermutationSpec, Space
from networks import CONV_SPEC, MLP_AXES, MLP_SPEC, ConvNet, make_mlp, random_permutations

MODES: tuple[Mode, ...] = ("align", "zip")
SPACES: tuple[Space, ...] = ("weight", "activation", "dual")


def batches(count: int = 3, size: int = 40, width: int = 20, seed: int = 5) -> list[Tensor]:
    return list(torch.randn(count, size, width, generator=torch.Generator().manual_seed(seed)))


def with_state(model: nn.Module, state_dict: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    model.load_state_dict(state_dict)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["act", "weight", "mudsc"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_golden_networks(kind: str, mode: Mode, backend: str) -> None:
    golden = load_golden(f"mlp_{kind}_{mode}")
    space: Space = {"act": "activation", "weight": "weight", "mudsc": "dual"}[kind]  # type: ignore[assignment]
    models = []
    for index in range(2):
        prefix = f"model{index}/"
        state = {key.removeprefix(prefix): torch.from_numpy(golden[key]) for key in golden if key.startswith(prefix)}
        models.append(with_state(make_mlp(), state))
    data = [torch.from_numpy(golden[f"input{index}"]) for index in range(3)]
    with mudsc_fast.use_backend(backend):
        result = mudsc_fast.merge(
            models,
            data,
            spec=MLP_SPEC,
            mode=mode,
            space=space,
            balance=float(golden["balance"]),
            random_state=int(golden["random_state"]),
        )
    for index, node in enumerate(MLP_SPEC.nodes):
        clusters = torch.from_numpy(golden[f"unmerge/{index}"]).argmax(1)
        assert torch.equal(result.matching[node].cluster_of_unit.flatten(), clusters)
    for name, tensor in result.state_dict.items():
        torch.testing.assert_close(tensor, torch.from_numpy(golden[f"merged/{name}"]), rtol=1e-4, atol=1e-4)
    assert result.model is not None
    with torch.no_grad():
        output = result.model(torch.from_numpy(golden["input0"]))
    torch.testing.assert_close(output, torch.from_numpy(golden["output0"]), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 2**31), widths=st.tuples(*[st.integers(1, 12)] * 4))
def test_permuted_network_gives_same_outputs(seed: int, widths: tuple[int, int, int, int]) -> None:
    model = make_mlp(widths, seed=seed, dtype=torch.float64)
    permutations = random_permutations(MLP_SPEC, model, seed)
    permuted = with_state(model, mudsc_fast.permute_state_dict(model.state_dict(), MLP_SPEC, permutations))
    inputs = torch.randn(6, widths[0], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(permuted(inputs), model(inputs), rtol=1e-10, atol=1e-10)


def test_permuted_convolutional_network_gives_same_outputs() -> None:
    model = ConvNet().eval()
    permutations = random_permutations(CONV_SPEC, model, 3)
    permuted = with_state(model, mudsc_fast.permute_state_dict(model.state_dict(), CONV_SPEC, permutations))
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(permuted(images), model(images), rtol=1e-4, atol=1e-5)


# Zips of more models are tested below. By weights alone, the sweeps may end in another local optimum.
@pytest.mark.parametrize(("mode", "num_models"), [("align", 2), ("align", 3), ("zip", 2)])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("unequal", [False, True])
def test_merge_with_permuted_copies_recovers_network(space: Space, mode: Mode, num_models: int, unequal: bool) -> None:
    model = make_mlp(seed=2)
    permutations = [random_permutations(MLP_SPEC, model, seed) for seed in range(1, num_models)]
    weights = [0.2, 0.8 if num_models == 2 else 0.5, 0.3][:num_models] if unequal else None
    copies = [with_state(model, mudsc_fast.permute_state_dict(model.state_dict(), MLP_SPEC, p)) for p in permutations]
    result = mudsc_fast.merge([model, *copies], batches(), spec=MLP_SPEC, mode=mode, space=space, weights=weights)
    for node in MLP_SPEC.nodes:
        clusters = result.matching[node].cluster_of_unit
        for index, permutation in enumerate(permutations, start=1):
            # Unit k of the copy is unit permutation[k] of the network.
            assert torch.equal(clusters[index], clusters[0][permutation[node]])
        assert result.matching[node].similarity > 0.2
    assert result.model is not None
    inputs = batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(result.model(inputs), model(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_models", [3, 4, 5])
@pytest.mark.parametrize("space", ["activation", "dual"])
def test_zip_recovers_any_number_of_permuted_copies(space: Space, num_models: int) -> None:
    model = make_mlp((8, 24, 20, 5), seed=1)
    copies = [
        with_state(
            model,
            mudsc_fast.permute_state_dict(model.state_dict(), MLP_SPEC, random_permutations(MLP_SPEC, model, seed)),
        )
        for seed in range(1, num_models)
    ]
    data = batches(width=8)
    merged = mudsc_fast.merge([model, *copies], data, spec=MLP_SPEC, mode="zip", space=space).model
    assert merged is not None
    with torch.no_grad():
        torch.testing.assert_close(merged(data[0]), model(data[0]), rtol=1e-4, atol=1e-5)
    published = mudsc_fast.merge([model, *copies], data, spec=MLP_SPEC, mode="zip", space=space, shrink=0.5).model
    assert published is not None
    if num_models == 3 and space == "activation":  # the last copy of a unit joins another unit
        with torch.no_grad():
            assert (published(data[0]) - model(data[0])).abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_convolutional_networks(mode: Mode) -> None:
    model = ConvNet().eval()
    permutations = random_permutations(CONV_SPEC, model, 3)
    copied = with_state(model, mudsc_fast.permute_state_dict(model.state_dict(), CONV_SPEC, permutations))
    images = [torch.randn(6, 3, 8, 8) for _ in range(2)]
    result = mudsc_fast.merge([model, copied.eval()], images, spec=CONV_SPEC, mode=mode)
    assert result.model is not None
    assert result.unmatched_tensors == ("fc.bias",)
    assert "fc.bias" in str(result)
    with torch.no_grad():
        torch.testing.assert_close(result.model.eval()(images[0]), model(images[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("space", SPACES)
def test_merge_is_deterministic_and_leaves_models_unchanged(mode: Mode, space: Space) -> None:
    models = [make_mlp(seed=seed) for seed in (0, 1, 2)]
    models[1].train()
    models[2].eval()
    states = [copy.deepcopy(model.state_dict()) for model in models]
    torch.manual_seed(0)
    first = mudsc_fast.merge(models, batches(), spec=MLP_SPEC, mode=mode, space=space)
    torch.manual_seed(1)
    second = mudsc_fast.merge(models, batches(), spec=MLP_SPEC, mode=mode, space=space)
    for model, state in zip(models, states, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])
        assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert models[1].training
    assert not models[2].training
    for name, tensor in first.state_dict.items():
        assert torch.equal(tensor, second.state_dict[name])
    assert first.model is not models[0]
    assert first.matching["fc1"].cluster_of_unit.shape == (3, 32)


def test_state_dicts_give_same_result_as_modules() -> None:
    models = [make_mlp(seed=seed) for seed in (0, 1)]
    of_modules = mudsc_fast.merge(models, spec=MLP_SPEC)
    of_states = mudsc_fast.merge([model.state_dict() for model in models], spec=MLP_SPEC)
    assert of_states.model is None
    assert of_states.objectives == of_modules.objectives
    for name, tensor in of_modules.state_dict.items():
        assert torch.equal(tensor, of_states.state_dict[name])


def test_matching_increases_similarity() -> None:
    result = mudsc_fast.merge([make_mlp(seed=0), make_mlp(seed=1)], batches(), spec=MLP_SPEC, mode="align")
    for node in MLP_SPEC.nodes:
        match = result.matching[node]
        assert match.similarity > match.similarity_before + 0.1
        assert match.permutations is not None
        assert torch.equal(match.permutations.sort(1).values, torch.arange(32).expand(2, 32))


def test_report_and_timings() -> None:
    result = mudsc_fast.merge([make_mlp(seed=0), make_mlp(seed=1)], batches(), spec=MLP_SPEC, mode="zip")
    assert result.matching["fc1"].permutations is None
    report = str(result)
    assert "fc1" in report
    assert "fc2" in report
    assert f"{len(result.objectives)} sweeps" in report
    assert set(result.timings) == {"activations", "weight similarity", "matching", "merging"}
    assert all(seconds >= 0 for seconds in result.timings.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = make_mlp(dtype=dtype)
    permutations = random_permutations(MLP_SPEC, model, 4)
    copied = mudsc_fast.permute_state_dict(model.state_dict(), MLP_SPEC, permutations)
    result = mudsc_fast.merge([model.state_dict(), copied], spec=MLP_SPEC)
    for name, tensor in result.state_dict.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, model.state_dict()[name])


def test_ways_to_pass_data() -> None:
    models = [make_mlp(seed=0), make_mlp(seed=1)]
    tensors = batches()
    expected = mudsc_fast.merge(models, tensors, spec=MLP_SPEC, space="activation").state_dict
    forms: list[tuple[Any, Callable[[nn.Module, Any], object] | None]] = [
        ([(batch, torch.zeros(len(batch))) for batch in tensors], None),
        ([[batch] for batch in tensors], None),
        ([{"input": batch} for batch in tensors], None),
        (iter(tensors), None),
        ([{"pixels": batch} for batch in tensors], lambda model, batch: model(batch["pixels"])),
        (mudsc_fast.collect_statistics(models, tensors, spec=MLP_SPEC), None),
        (mudsc_fast.collect_statistics(models, tensors, spec=MLP_SPEC, blocks="cross"), None),
    ]
    for data, forward in forms:
        result = mudsc_fast.merge(models, data, spec=MLP_SPEC, space="activation", forward=forward)
        for name, tensor in expected.items():
            assert torch.equal(tensor, result.state_dict[name])


def test_observations_of_outputs_and_keyword_arguments() -> None:
    class Wrapper(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.body = make_mlp(seed=seed)

        def forward(self, x: Tensor) -> Tensor:
            value = x
            for layer in self.body.children():
                value = layer(input=value)
            return value

    axes = {f"body.{name}": entries for name, entries in MLP_AXES.items()}
    by_input = PermutationSpec(axes)
    by_output = PermutationSpec(
        axes,
        observe={
            "fc1": Observation("body.relu1", "output", position=-1),
            "fc2": Observation("body.relu2", "output", 1),
        },
    )
    models = [Wrapper(0), Wrapper(1)]
    first, second = (mudsc_fast.collect_statistics(models, batches(), spec=spec) for spec in (by_input, by_output))
    for node in MLP_SPEC.nodes:
        assert torch.equal(first.similarity(node), second.similarity(node))


def test_module_called_twice_gives_more_samples() -> None:
    class Twice(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.body = make_mlp(seed=seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.body(2 * x)  # type: ignore[no-any-return]

    spec = PermutationSpec({f"body.{name}": entries for name, entries in MLP_AXES.items()})
    twice = mudsc_fast.collect_statistics([Twice(0), Twice(1)], batches(), spec=spec)
    both = [torch.cat([batch, 2 * batch]) for batch in batches()]
    once = mudsc_fast.collect_statistics([make_mlp(seed=0), make_mlp(seed=1)], both, spec=MLP_SPEC)
    for node in MLP_SPEC.nodes:
        torch.testing.assert_close(twice.similarity(node), once.similarity(node), rtol=0, atol=1e-5)


def changed(state: dict[str, Tensor], **tensors: Tensor | None) -> dict[str, Tensor]:
    renamed = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in {**state, **renamed}.items() if tensor is not None}


STATE = make_mlp(seed=0).state_dict()
OTHER = make_mlp(seed=1).state_dict()
META = {name: tensor.to("meta") for name, tensor in STATE.items()}
NOT_A_NUMBER = torch.full((32,), float("nan"))


@pytest.mark.parametrize(
    ("models", "options", "error", "message"),
    [
        ([STATE], {}, ValueError, "models must hold at least two models, got 1"),
        (
            STATE,
            {},
            TypeError,
            "models must be one list of modules, state dicts, or paths.*got OrderedDict",
        ),
        ([STATE, make_mlp()], {}, TypeError, "models must be all of one kind"),
        ([STATE, 3], {}, TypeError, "models must be all of one kind"),
        (
            [STATE, changed(OTHER, fc1_bias=None)],
            {},
            ValueError,
            r"models\[1\] must have .*: missing \['fc1.bias'\]",
        ),
        ([STATE, changed(OTHER, new=torch.ones(1))], {}, ValueError, r"unexpected \['new'\]"),
        (
            [STATE, changed(OTHER, fc1_bias=torch.ones(31))],
            {},
            ValueError,
            r"'fc1.bias' has shape \(31,\) in models\[1\], but \(32,\) in models\[0\]",
        ),
        (
            [STATE, changed(OTHER, fc1_bias=torch.ones(32).double())],
            {},
            TypeError,
            r"'fc1.bias' has dtype torch.float64 in models\[1\], but torch.float32",
        ),
        (
            [STATE, changed(OTHER, fc1_bias=torch.ones(32, device="meta"))],
            {},
            ValueError,
            r"'fc1.bias' is on device meta in models\[1\], but on cpu in models\[0\]",
        ),
        (
            [STATE, changed(OTHER, fc1_bias=NOT_A_NUMBER)],
            {},
            ValueError,
            r"'fc1.bias' of models\[1\] must be finite",
        ),
        ([META, META], {}, ValueError, r"'fc1.weight' of models\[0\] must hold data, got a tensor on the meta device"),
        (
            [STATE, {**OTHER, "fc1.bias": 3}],
            {},
            TypeError,
            "'fc1.bias' must be a tensor in every model, got int",
        ),
        ([STATE, OTHER], {"spec": 3}, TypeError, "spec must be a PermutationSpec, the name of a family, .* got int"),
        ([STATE, OTHER], {"spec": PermutationSpec({"no": ("a",)})}, ValueError, "spec names the tensor 'no'"),
        (
            [STATE, OTHER],
            {"spec": PermutationSpec({"fc1.weight": ("a", "a")})},
            ValueError,
            "axis 1 of 'fc1.weight' has 20 units, but node 'a' has 32 units on axis 0 of 'fc1.weight'",
        ),
        ([STATE, OTHER], {"mode": "both"}, ValueError, "mode must be one of 'align', 'zip', got 'both'"),
        ([STATE, OTHER], {"space": "outer"}, ValueError, "space must be one of .* got 'outer'"),
        ([STATE, OTHER], {"balance": 1.5}, ValueError, r"balance must be in \[0, 1\], got 1.5"),
        ([STATE, OTHER], {"balance": -0.1}, ValueError, r"balance must be in \[0, 1\], got -0.1"),
        ([STATE, OTHER], {"balance": float("nan")}, ValueError, "balance must be a number, got NaN"),
        ([STATE, OTHER], {"balance": "half"}, TypeError, "balance must be a number, got str"),
        ([STATE, OTHER], {"space": "dual"}, ValueError, "data must be given to match in activation space"),
        (
            [STATE, OTHER],
            {"data": batches()},
            TypeError,
            "models must be modules, or Hugging Face directories, to match in activation space",
        ),
        (
            [STATE, OTHER],
            {"weights": [1.0]},
            ValueError,
            r"weights must have one entry per model \(2\), got 1",
        ),
        ([STATE, OTHER], {"weights": [0.5, 0.6]}, ValueError, "weights must be at least 0 and sum to 1"),
        ([STATE, OTHER], {"weights": [1.5, -0.5]}, ValueError, "weights must be at least 0 and sum to 1"),
        ([STATE, OTHER], {"mode": "zip", "budget": 1.5}, ValueError, r"budget must be in \[0, 1\], got 1.5"),
        ([STATE, OTHER], {"mode": "zip", "budget": "all"}, TypeError, "budget must be a number, got str"),
        ([STATE, OTHER], {"mode": "zip", "shrink": float("inf")}, ValueError, "shrink must be finite, got inf"),
        ([STATE, OTHER], {"mode": "zip", "shrink": float("nan")}, ValueError, "shrink must be a number, got NaN"),
        ([STATE, OTHER], {"max_sweeps": 0}, ValueError, "max_sweeps must be at least 1, got 0"),
        ([STATE, OTHER], {"patience": 1.5}, TypeError, "patience must be an int, got float"),
        ([STATE, OTHER], {"shrink": 0.5}, ValueError, "shrink=0.5 is of mode='zip', got mode='align'"),
        ([STATE, OTHER], {"budget": 0.5}, ValueError, "budget=0.5 is of mode='zip', got mode='align'"),
        (
            [make_mlp(), make_mlp(seed=1)],
            {"data": []},
            ValueError,
            "data must yield at least one batch, got none",
        ),
        (
            [make_mlp(), make_mlp(seed=1)],
            {"data": [3]},
            TypeError,
            "data must yield tensors, dicts .* got int",
        ),
        ([make_mlp(), make_mlp(seed=1)], {"data": [("x",)]}, TypeError, "got tuple of str"),
    ],
)
def test_bad_input(models: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    spec = options.pop("spec", MLP_SPEC)
    with pytest.raises(error, match=message):
        mudsc_fast.merge(models, spec=spec, **options)


@pytest.mark.parametrize(
    ("observe", "message"),
    [
        ({"fc1": "fc9"}, "observes node 'fc1' at module 'fc9', which the model does not have"),
        ({"fc1": "fc1"}, r"node 'fc1' has 32 units, but the input of 'fc1' has shape \(40, 20\)"),
        ({"fc1": "relu1"}, "at 'relu1', a ReLU: say on which axis"),
        ({"fc1": Observation("relu1", position=7)}, "32 entries expected on axis 7"),
    ],
)
def test_bad_observations(observe: dict[str, Any], message: str) -> None:
    models = [make_mlp(seed=0), make_mlp(seed=1)]
    with pytest.raises(ValueError, match=message):
        mudsc_fast.merge(models, batches(), spec=PermutationSpec(MLP_AXES, observe=observe))
    assert all(not module._forward_pre_hooks for model in models for module in model.modules())


def test_unobserved_node() -> None:
    spec = PermutationSpec({"fc1.weight": ("a", None)})
    models = [make_mlp(seed=0), make_mlp(seed=1)]
    with pytest.raises(ValueError, match="spec does not say where any node is observed"):
        mudsc_fast.merge(models, batches(), spec=spec, verify=False)


def test_observed_module_that_is_not_called() -> None:
    models = [make_mlp(seed=0), make_mlp(seed=1)]
    spec = PermutationSpec(MLP_AXES, observe={"fc1": "fc3"})
    with pytest.raises(ValueError, match="node 'fc1' is observed at 'fc3', which the model did not call"):
        mudsc_fast.merge(models, batches(), spec=spec, forward=lambda model, batch: model.get_submodule("fc1")(batch))


def test_similarities_of_other_models() -> None:
    models = [make_mlp(seed=seed) for seed in range(3)]
    similarity = mudsc_fast.collect_statistics(models, batches(), spec=MLP_SPEC, blocks="cross")
    with pytest.raises(ValueError, match=r"data was computed for 3 models .* got 2 models"):
        mudsc_fast.merge(models[:2], similarity, spec=MLP_SPEC)
    with pytest.raises(ValueError, match="blocks='full', got 'cross'"):
        mudsc_fast.merge(models, similarity, spec=MLP_SPEC, mode="zip")


@pytest.mark.parametrize(
    ("permutations", "message"),
    [
        ({"fc9": torch.arange(3)}, "permutations names the node 'fc9'"),
        ({"fc1": torch.arange(31)}, r"permutations\['fc1'\] must be a permutation of 32 units"),
        (
            {"fc1": torch.zeros(32, dtype=torch.long)},
            r"permutations\['fc1'\] must be a permutation of 32 units",
        ),
    ],
)
def test_bad_permutations(permutations: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mudsc_fast.permute_state_dict(STATE, MLP_SPEC, permutations)


def test_search_tries_every_balance() -> None:
    models = [make_mlp(seed=0), make_mlp(seed=1)]
    statistics = mudsc_fast.collect_statistics(models, batches(), spec=MLP_SPEC)
    tried = []

    def score(result: mudsc_fast.MergeResult) -> float:
        assert result.balance is not None
        tried.append(result.balance)
        return -abs(result.balance - 0.7)

    modes: tuple[mudsc_fast.Mode, ...] = ("align", "zip")
    for mode in modes:
        tried.clear()
        found = mudsc_fast.search_balance(
            models, statistics, spec=MLP_SPEC, mode=mode, score=score, balances=(0.2, 0.7, 1.0)
        )
        assert tried == [0.2, 0.7, 1.0]
        assert found.balance == 0.7
        assert list(found.scores) == tried
        assert "scores by balance: 0.2: -0.5, 0.7:" in str(found)
        alone = mudsc_fast.merge(models, statistics, spec=MLP_SPEC, mode=mode, balance=0.7)
        assert alone.scores == {}
        for node in MLP_SPEC.nodes:
            assert found.matching[node].same_clusters(alone.matching[node])
        for name, tensor in alone.state_dict.items():
            assert torch.equal(found.state_dict[name], tensor)


def test_search_takes_first_of_equal_scores_and_reads_data_once() -> None:
    models = [make_mlp(seed=0), make_mlp(seed=1)]
    result = mudsc_fast.search_balance(models, iter(batches()), spec=MLP_SPEC, score=lambda _: 1)
    assert result.balance == 0.1
    assert list(result.scores) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"score": None}, TypeError, "score must be a function of a MergeResult, got NoneType"),
        ({"score": len, "data": None}, TypeError, "data must be batches to search the balance .* got None"),
        ({"score": len, "balances": ()}, ValueError, "balances must hold at least one number"),
        ({"score": len, "balances": (0.5, 2)}, ValueError, r"balances\[1\] must be in \[0, 1\]"),
        ({"score": lambda _: "good"}, TypeError, "the score must be a number, got str"),
    ],
)
def test_bad_searches(options: dict[str, Any], error: type[Exception], message: str) -> None:
    models = [make_mlp(seed=0), make_mlp(seed=1)]
    with pytest.raises(error, match=message):
        mudsc_fast.search_balance(models, **{"data": batches(), "spec": MLP_SPEC, **options})
