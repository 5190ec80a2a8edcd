"""Refit with weights of the models that depend on their confidence in each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast.refitting.confidence import confident_shares

SAMPLES = 12


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, and a linear layer on their spatial mean."""

    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


class TokenNet(nn.Module):
    """Linear layers on every token of a sequence."""

    shape = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.first(x))).mean(1)


class TimeFirst(TokenNet):
    """The same network, but its layers run on tensors whose first axis is time."""

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.first(x.transpose(0, 1)))).mean(0)


def make(network: type[Any]) -> tuple[list[nn.Module], list[list[Tensor]], mudsc_fast.MergeResult]:
    """Return two networks, a list of batches for each, and their merge."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(network().eval())
    own = [list(torch.randn(5, SAMPLES, *network.shape) + 2 * (-1) ** index) for index in range(2)]
    return models, own, mudsc_fast.merge(models, own[0] + own[1], mode="zip")


def difference(first: mudsc_fast.MergeResult, second: mudsc_fast.MergeResult) -> float:
    """Return the largest relative difference between the tensors of two merges."""
    pairs = [(tensor, second.state_dict[name]) for name, tensor in first.state_dict.items()]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs if a.is_floating_point())


@pytest.mark.parametrize("network", [ConvNet, TokenNet])
def test_full_confidence_gives_the_result_of_own_data(network: type[Any]) -> None:
    """Each batch alternates samples of both networks. The confidence says which network a sample belongs to."""
    models, own, result = make(network)
    expected = mudsc_fast.refit(result, models, [iter(own[0]), iter(own[1])], ridge=0.1)
    mixed = [torch.stack(pair, 1).flatten(0, 1) for pair in zip(*own, strict=True)]
    owner = torch.arange(2 * SAMPLES) % 2
    found = mudsc_fast.refit(result, models, mixed, ridge=0.1, confidence=lambda i, _: 100.0 * (owner == i))
    assert difference(found, expected) < 1e-4
    assert difference(mudsc_fast.refit(result, models, mixed, ridge=0.1), expected) > 1e-2


def test_equal_confidence_changes_nothing() -> None:
    models, own, result = make(TokenNet)
    expected = mudsc_fast.refit(result, models, own[0])
    found = mudsc_fast.refit(result, models, own[0], confidence=lambda _, out: out.new_full((SAMPLES,), 7.0))
    assert difference(found, expected) < 1e-6


def test_shares_are_weights_times_exp_confidence() -> None:
    models, own, _ = make(TokenNet)
    scores = torch.tensor([[1.0, 4.0, 2.0], [1.0, 1.0, 1.0]])
    shares = confident_shares(lambda i, _: scores[i].log(), models, [0.2, 0.8], own[0][0][:3], None)
    assert torch.allclose(shares, torch.tensor([[0.2, 0.5, 1 / 3], [0.8, 0.5, 2 / 3]], dtype=torch.float64))


CONFIDENCES: dict[str, tuple[Any, type[Exception], str]] = {
    "not a function": (0.5, TypeError, "confidence must be a function of a model's number and its outputs, got float"),
    "not a tensor": (lambda _, __: 1.0, TypeError, "confidence of model 0 must be a torch.Tensor, got float"),
    "one for every class": (lambda _, out: out, ValueError, r"each of the 12 samples of a batch, .* \[12, 4\] for mo"),
    "not finite": (
        lambda _, out: out.new_full((SAMPLES,), float("inf")),
        ValueError,
        r"confidence of model 0 must be finite, got inf",
    ),
}


@pytest.mark.parametrize("case", CONFIDENCES)
def test_invalid_confidence_is_an_error(case: str) -> None:
    confidence, error, message = CONFIDENCES[case]
    models, own, result = make(TokenNet)
    with pytest.raises(error, match=message):
        mudsc_fast.refit(result, models, own[0], confidence=confidence)


def constant(_: int, outputs: Tensor) -> Tensor:
    return outputs.new_zeros(len(outputs))


def test_confidence_with_own_data_is_an_error() -> None:
    models, own, result = make(TokenNet)
    with pytest.raises(ValueError, match="confidence is for samples of unknown owner"):
        mudsc_fast.refit(result, models, [iter(own[0]), iter(own[1])], confidence=constant)


def test_models_with_time_first_are_an_error() -> None:
    """The rows of a layer's input then alternate between samples."""
    models, own, result = make(TimeFirst)
    with pytest.raises(
        ValueError, match=r"confidence needs layers whose first axis runs over the samples .*batch_first"
    ):
        mudsc_fast.refit(result, models, own[0], confidence=constant)


def test_batches_of_one_sample_may_have_time_first() -> None:
    models, own, result = make(TimeFirst)
    single = [sample[None] for sample in own[0][0]] * 4
    confidence: Callable[[int, Tensor], Tensor] = lambda i, out: out.new_full((1,), 50.0 * (1 - i))  # noqa: E731
    found = mudsc_fast.refit(result, models, single, confidence=confidence)
    first = mudsc_fast.refit(result, models, single)
    assert difference(found, first) > 1e-2
