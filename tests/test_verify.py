"""Specs that are given or recognized by names are only used if they keep the outputs of the model."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from architectures import randomize
from mudsc_fast import Observation, PermutationSpec
from mudsc_fast._copy import copy_module
from mudsc_fast.matching.verify import keeps_outputs
from networks import random_permutations
from paper.networks import BasicBlock, ResNet20


class Rewired(ResNet20):
    """The tensors of a ResNet, but with the inner channels of the first stage's blocks added to its stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        for block in self.layer1:
            assert isinstance(block, BasicBlock)
            hidden = functional.relu(block.bn1(block.conv1(x))) + x
            x = functional.relu(block.bn2(block.conv2(hidden)) + x)
        vectors: Tensor = self.linear(self.layer3(self.layer2(x)).mean((2, 3)))
        return vectors


IMAGES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def test_family_is_verified_by_outputs() -> None:
    family = mudsc_fast.spec.resnet([3, 3, 3], names="cifar")
    plain, rewired = (randomize(network(outputs=10), 0).eval() for network in (ResNet20, Rewired))
    assert keeps_outputs(plain, family, IMAGES[0])
    assert not keeps_outputs(rewired, family, IMAGES[0])
    assert mudsc_fast.match([plain, copy_module(plain)], IMAGES).spec == family


def test_different_wiring_with_same_names_is_derived() -> None:
    model = randomize(Rewired(outputs=10), 0).eval()
    derived = mudsc_fast.PermutationSpec.from_model(model, IMAGES[0])
    other = copy_module(model)
    orders = random_permutations(derived, model, 1)
    other.load_state_dict(mudsc_fast.permute_state_dict(model.state_dict(), derived, orders))
    merged = mudsc_fast.merge([model, other], IMAGES).model
    assert merged is not None
    with torch.no_grad():
        torch.testing.assert_close(merged(IMAGES[0]), model(IMAGES[0]), rtol=1e-3, atol=1e-3)


def test_models_that_fail_on_batch_are_not_verified() -> None:
    model = ResNet20(outputs=10)
    assert keeps_outputs(model, mudsc_fast.spec.resnet([3, 3, 3], names="cifar"), {"pixels": IMAGES[0]})


class Residual(nn.Module):
    """Two branches that are added, a norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.branch = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = x + functional.relu(self.branch(x))
        logits: Tensor = self.out(functional.relu(self.head(self.norm(x))))
        return logits


NORM = {f"norm.{name}": ("stream",) for name in ("weight", "bias", "running_mean", "running_var")}
RIGHT: dict[str, tuple[str | None, ...]] = {
    "stem.weight": ("stream", None),
    "stem.bias": ("stream",),
    "branch.weight": ("stream", "stream"),
    "branch.bias": ("stream",),
    **NORM,
    "head.weight": ("hidden", "stream"),
    "head.bias": ("hidden",),
    "out.weight": (None, "hidden"),
    "out.bias": (None,),
}
MISTAKES: dict[str, tuple[dict[str, tuple[str | None, ...] | None], list[str]]] = {
    "a tie is forgotten": (
        {"branch.weight": ("other", "stream"), "branch.bias": ("other",)},
        ["stream", "other"],
    ),
    "an axis is wrong": ({"head.weight": ("stream", "hidden"), "head.bias": ("stream",)}, ["stream", "hidden"]),
    "axes of one tensor are exchanged": ({"branch.weight": (None, "stream")}, ["stream"]),
    "a bias is missing": ({"head.bias": None}, ["hidden"]),
    "a norm is missing": (dict.fromkeys(NORM), ["stream"]),
    "running statistics are missing": ({"norm.running_mean": None}, ["stream"]),
    "a consumer is missing": ({"out.weight": None}, ["hidden"]),
    "the outputs are permuted": ({"out.weight": ("classes", "hidden"), "out.bias": ("classes",)}, ["classes"]),
}
INPUTS = [torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def residuals() -> list[nn.Module]:
    return [randomize(Residual(), seed).eval() for seed in range(2)]


def spec_with(changes: dict[str, tuple[str | None, ...] | None]) -> PermutationSpec:
    axes = {name: axes for name, axes in {**RIGHT, **changes}.items() if axes is not None}
    nodes = {node for named in axes.values() for node in named if node is not None}
    places = {"stream": "norm", "hidden": "head", "other": "branch", "classes": "out"}
    return PermutationSpec(axes, {node: Observation(places[node], "output") for node in nodes})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_error_names_nodes_of_wrong_spec(mistake: str, tmp_path: Path) -> None:
    changes, nodes = MISTAKES[mistake]
    spec = spec_with(changes)
    with pytest.raises(ValueError, match="spec does not describe this model") as raised:
        mudsc_fast.merge(residuals(), INPUTS, spec=spec)
    named = re.search(r"of the units of (.*?) \(", str(raised.value))
    assert named is not None
    assert {name.strip("'") for name in named[1].split(", ")} == set(nodes)
    assert "verify=False" in str(raised.value)
    spec.save(tmp_path / "spec.json")
    for call in (mudsc_fast.match, mudsc_fast.collect_statistics):
        with pytest.raises(ValueError, match="spec does not describe this model"):
            call(residuals(), INPUTS, spec=tmp_path / "spec.json")
    assert mudsc_fast.match(residuals(), INPUTS, spec=spec, verify=False).spec == spec


def test_correct_spec_is_used() -> None:
    assert mudsc_fast.merge(residuals(), INPUTS, spec=spec_with({})).spec == spec_with({})


def test_named_family_is_verified() -> None:
    models = [randomize(Rewired(outputs=10), seed).eval() for seed in range(2)]
    with pytest.raises(ValueError, match="spec does not describe this model"):
        mudsc_fast.merge(models, IMAGES, spec="resnet")


def test_forward_is_used_for_verification() -> None:
    batches = [{"x": batch} for batch in INPUTS]
    wrong = spec_with(MISTAKES["a bias is missing"][0])

    def whole(model: nn.Module, batch: Any) -> object:
        return model(batch["x"])

    def part(model: Any, batch: Any) -> object:
        return model.out(functional.relu(model.head(model.norm(model.stem(batch["x"])))))

    def features(model: Any, batch: Any) -> object:
        return model.head(model.norm(model.stem(batch["x"])))

    for forward in (whole, part, features):
        assert mudsc_fast.match(residuals(), batches, spec=spec_with({}), forward=forward).num_models == 2
        with pytest.raises(ValueError, match="a random order of the units of 'hidden'"):
            mudsc_fast.match(residuals(), batches, spec=wrong, forward=forward)


class Noisy(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(3)


def test_unverifiable_spec_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    models = [randomize(Noisy(), seed).eval() for seed in range(2)]
    wrong = spec_with(MISTAKES["a bias is missing"][0])
    with caplog.at_level(logging.INFO, "mudsc_fast"):
        mudsc_fast.match(models, INPUTS, spec=wrong)
    assert "outputs of the model differ from run to run" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_verified(dtype: torch.dtype) -> None:
    models = [model.to(dtype) for model in residuals()]
    batches = [batch.to(dtype) for batch in INPUTS]
    mudsc_fast.match(models, batches, spec=spec_with({}))
    with pytest.raises(ValueError, match="spec does not describe this model"):
        mudsc_fast.match(models, batches, spec=spec_with(MISTAKES["a tie is forgotten"][0]))


def test_warning_names_biases_and_norms_missing_from_spec(caplog: pytest.LogCaptureFixture) -> None:
    states = [model.state_dict() for model in residuals()]
    missing = {"a bias is missing": "head.bias", "running statistics are missing": "norm.running_mean"}
    for mistake, name in {**missing, "a norm is missing": "norm.weight"}.items():
        caplog.clear()
        mudsc_fast.match(states, spec=spec_with(MISTAKES[mistake][0]))
        assert f"{name!r}" in caplog.text, mistake
    caplog.clear()
    mudsc_fast.match(states, spec=spec_with({}))
    assert not caplog.text
