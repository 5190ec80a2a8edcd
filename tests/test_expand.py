"""Zip merges that keep more units than one model has."""

from __future__ import annotations

import pathlib

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from mudsc_fast.spec.permutation_spec import PermutationSpec


class ResidualNet(nn.Module):
    """Convolutions of several kinds with BatchNorm, a residual sum, and a linear layer after flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, 1, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, 1, 1, groups=6)
        self.down = nn.Conv2d(6, 8, 2, 2)
        self.up = nn.ConvTranspose2d(8, 5, 2, 2)
        self.head = nn.Linear(5 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)))
        x = x + self.depthwise(functional.relu(self.conv(x)))
        x = functional.relu(self.up(functional.relu(self.down(x))))
        return _as_tensor(self.head(x.flatten(1)))


class Block(nn.Module):
    """A feed-forward block of a transformer, with LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return _as_tensor(self.head(x + self.narrow(functional.gelu(self.wide(self.norm(x))))))


def _as_tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def residual_nets() -> tuple[list[nn.Module], list[Tensor], PermutationSpec]:
    batches = list(torch.randn(5, 40, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = ResidualNet()
        with torch.no_grad():
            model.train()(batches[0])
        models.append(model.eval())
    return models, batches, PermutationSpec.from_model(models[0], batches[0][:2])


def blocks() -> tuple[list[nn.Module], list[Tensor], PermutationSpec]:
    batches = list(torch.randn(5, 40, 6, generator=torch.Generator().manual_seed(0)))
    models: list[nn.Module] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Block())
    return models, batches, PermutationSpec.from_model(models[0], batches[0][:2])


def outputs(model: nn.Module | None, batches: list[Tensor]) -> Tensor:
    assert model is not None
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def mean_output(models: list[nn.Module], batches: list[Tensor]) -> Tensor:
    return sum(outputs(model, batches) for model in models) / len(models)  # type: ignore[return-value]


def test_twice_the_units_give_the_mean_output(tmp_path: pathlib.Path) -> None:
    models, batches, spec = residual_nets()
    matching = mudsc_fast.match(models, batches, spec=spec, mode="zip", expand=2)
    matching.save(tmp_path / "matching.safetensors")
    loaded = mudsc_fast.Matching.load(tmp_path / "matching.safetensors")
    wanted = mean_output(models, batches)
    for result in (matching.merge(models), loaded.merge(models)):
        assert isinstance(result.model, ResidualNet)
        torch.testing.assert_close(outputs(result.model, batches), wanted, rtol=1e-4, atol=1e-5)
        refitted = mudsc_fast.refit(result, models, batches)
        torch.testing.assert_close(outputs(refitted.model, batches), wanted, rtol=1e-4, atol=1e-5)
        assert isinstance(refitted.model, ResidualNet)
        assert refitted.model.bn.num_features == refitted.model.depthwise.groups == 12
        assert (refitted.model.up.in_channels, refitted.model.up.out_channels) == (16, 10)
        assert refitted.model.head.in_features == 10 * 16
    assert isinstance(models[0], ResidualNet)
    assert models[0].bn.num_features == 6


def test_more_units_bring_outputs_closer_to_the_mean() -> None:
    models, batches, spec = residual_nets()
    wanted = mean_output(models, batches)
    errors = []
    for expand in (1, 1.5):
        result = mudsc_fast.merge(models, batches, spec=spec, mode="zip", expand=expand, refit=True)
        errors.append((outputs(result.model, batches) - wanted).square().mean())
    assert errors[1] < 0.8 * errors[0]
    assert result.state_dict["stem.weight"].shape[0] == 9


def test_partial_merge_with_twice_the_units_is_exact() -> None:
    models, batches, spec = residual_nets()
    result = mudsc_fast.merge(models, batches, spec=spec, mode="zip", expand=2, stop_at="down")
    refitted = mudsc_fast.refit(result, models, batches)
    for merged in (result, refitted):
        for model, task in zip(models, merged.task_models, strict=True):
            torch.testing.assert_close(outputs(task, batches), outputs(model, batches), rtol=1e-4, atol=1e-5)


def test_single_nodes_can_expand() -> None:
    models, batches, spec = blocks()
    node = next(node for node, units in spec.units(models[0].state_dict()).items() if units == 16)
    result = mudsc_fast.merge(models, batches, spec=spec, mode="zip", expand={node: 1.25}, refit=True)
    assert isinstance(result.model, Block)
    assert (result.model.wide.out_features, result.model.norm.normalized_shape) == (20, (8,))
    plain = mudsc_fast.merge(models, batches, spec=spec, mode="zip", expand={node: 1.25})
    wanted = mean_output(models, batches)
    errors = [(outputs(one.model, batches) - wanted).square().mean() for one in (plain, result)]
    assert errors[1] < 0.5 * errors[0]


def test_layers_that_cannot_be_resized_are_an_error() -> None:
    models, batches, spec = blocks()
    with pytest.raises(TypeError, match="expand cannot change the size of 'norm', a LayerNorm"):
        mudsc_fast.merge(models, batches, spec=spec, mode="zip", expand=1.5)


def test_state_dicts_expand() -> None:
    models, _, spec = blocks()
    states = [model.state_dict() for model in models]
    result = mudsc_fast.merge(states, spec=spec, mode="zip", expand=1.5)
    assert result.state_dict["wide.weight"].shape == (24, 12)
    assert result.state_dict["norm.weight"].shape == (12,)


def test_files_are_an_error(tmp_path: pathlib.Path) -> None:
    models, _, spec = blocks()
    paths = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for model, path in zip(models, paths, strict=True):
        save_file(model.state_dict(), path)
    with pytest.raises(TypeError, match="expand needs modules or state dicts, got files"):
        mudsc_fast.merge(paths, spec=spec, mode="zip", expand=1.5)


def test_expand_keeps_at_most_all_units() -> None:
    models, batches, spec = blocks()
    node = next(node for node, units in spec.units(models[0].state_dict()).items() if units == 16)
    result = mudsc_fast.merge(models, batches, spec=spec, mode="zip", expand={node: 5}, weights=[0.7, 0.3])
    assert result.matching[node].num_clusters == 32
    repaired = mudsc_fast.repair(result, models, batches)
    assert outputs(repaired.model, batches).isfinite().all()


@pytest.mark.parametrize(
    ("expand", "mode", "message"),
    [
        (0.5, "zip", "expand must be a finite number of at least 1, got 0.5"),
        (float("inf"), "zip", "expand must be a finite number of at least 1"),
        (2, "align", "expand=2.0 is of mode='zip', got mode='align'"),
        ({"nowhere": 2}, "zip", "expand names 'nowhere', which is not a node; there are '"),
        ({"nowhere": 0}, "zip", r"expand\['nowhere'\] must be a finite number of at least 1, got 0"),
    ],
)
def test_invalid_values(expand: float, mode: mudsc_fast.Mode, message: str) -> None:
    models, _, spec = blocks()
    with pytest.raises(ValueError, match=message):
        mudsc_fast.merge(models, spec=spec, mode=mode, expand=expand)
