from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mudsc_fast import evaluate
from mudsc_fast.evaluate import Ensemble, Interpolation, cross_entropy, interpolate, joint_accuracy, task_accuracies


class Lookup(nn.Module):
    """Returns its inputs, so that tests choose the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def batches(outputs: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(outputs.split(size), labels.split(size), strict=True))


def test_joint_accuracy_uses_largest_cosine_over_all_tasks() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(3, 8, generator=generator), torch.randn(4, 8, generator=generator)]
    outputs, labels = torch.randn(50, 8, generator=generator), torch.randint(0, 7, (50,), generator=generator)
    cosines = functional.cosine_similarity(outputs[:, None], torch.cat(vectors)[None], dim=2)
    expected = (cosines.argmax(1) == labels).double().mean().item()
    assert joint_accuracy(Lookup(), batches(outputs, labels, 16), vectors) == pytest.approx(expected)
    assert joint_accuracy(Lookup(), batches(outputs, labels, 50), torch.cat(vectors)) == pytest.approx(expected)


def test_task_accuracy_compares_within_task() -> None:
    # The best class overall is 2, but among classes 0 and 1 it is 0.
    outputs, labels = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 0, 2])
    assert joint_accuracy(Lookup(), [(outputs, labels)]) == pytest.approx(1 / 3)
    assert task_accuracies(Lookup(), [(outputs, labels)], tasks=[[0, 1], [2]]) == [0.5, 1.0]


@pytest.mark.parametrize("classes", [(0, 1), (4, 2)])
def test_class_order_within_task_does_not_matter(classes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs, labels = torch.randn(40, 5, generator=generator), torch.randint(0, 5, (40,), generator=generator)
    forwards, backwards = (
        task_accuracies(Lookup(), [(outputs, labels)], tasks=[order]) for order in (classes, classes[::-1])
    )
    assert forwards == backwards


def test_cross_entropy_matches_torch() -> None:
    generator = torch.Generator().manual_seed(2)
    outputs, labels = torch.randn(30, 5, generator=generator), torch.randint(0, 5, (30,), generator=generator)
    assert cross_entropy(Lookup(), batches(outputs, labels, 7)) == pytest.approx(
        float(functional.cross_entropy(outputs, labels)), rel=1e-6
    )
    vectors = torch.randn(6, 5, generator=generator)
    logits = 100 * functional.normalize(outputs, dim=1) @ functional.normalize(vectors, dim=1).T
    assert cross_entropy(Lookup(), batches(outputs, labels, 7), vectors) == pytest.approx(
        float(functional.cross_entropy(logits, labels)), rel=1e-5
    )


def test_models_keep_their_modes_and_gradients_are_not_recorded() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    joint_accuracy(model, [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))])
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mappings_and_outputs_with_logits() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class HuggingFace(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x)

    data = [{"x": torch.eye(3), "labels": torch.tensor([0, 1, 1])}]
    assert joint_accuracy(HuggingFace(), data) == pytest.approx(2 / 3)

    def reversed_logits(model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch["x"]).logits
        return -logits

    assert joint_accuracy(HuggingFace(), data, forward=reversed_logits) < 2 / 3


def test_ensemble_averages_outputs() -> None:
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    x = torch.randn(5, 3)
    torch.testing.assert_close(Ensemble([first, second])(x), (first(x) + second(x)) / 2)
    normalized = (functional.normalize(first(x), dim=1) + functional.normalize(second(x), dim=1)) / 2
    torch.testing.assert_close(Ensemble([first, second], normalize=True)(x), normalized)


def test_interpolation_ends_and_barrier() -> None:
    torch.manual_seed(0)
    first, second = (nn.Linear(3, 2) for _ in range(2))
    ends = [float(model.weight.detach().square().sum()) for model in (first, second)]

    def value(model: nn.Module) -> float:
        assert isinstance(model, nn.Linear)
        return -float(model.weight.detach().square().sum())

    line = interpolate(first, second, value, steps=5)
    assert line.shares == (0, 0.25, 0.5, 0.75, 1)
    assert (line.values[0], line.values[-1]) == pytest.approx([-end for end in ends])
    # The square of a mixture is less than the mixture of the squares by share * (1 - share) * |difference|^2.
    distance = float((first.weight - second.weight).detach().square().sum())
    assert line.barrier == pytest.approx(0.25 * distance, rel=1e-5)
    assert Interpolation((0, 0.5, 1), (1.0, 1.5, 2.0)).barrier == 0


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one sample, got none"),
        ([torch.eye(3)], {}, TypeError, r"must yield \(inputs, labels\)"),
        ([(torch.eye(3),)], {}, TypeError, "got tuple of length 1"),
        ([(torch.eye(3), torch.tensor([0, 1, 3]))], {}, ValueError, r"labels must be in \[0, 3\), got 0 to 3"),
        ([(torch.eye(3), torch.tensor([0.0, 1.0, 2.0]))], {}, TypeError, "labels must be integers"),
        ([(torch.eye(3), torch.tensor([0, 1]))], {}, ValueError, "one row per label"),
        ([(torch.eye(3), torch.arange(3))], {"class_vectors": torch.eye(4)}, ValueError, "length of class_vectors, 4"),
        ([(torch.eye(3), torch.arange(3))], {"class_vectors": []}, ValueError, "at least one tensor"),
        ([(torch.eye(3), torch.arange(3))], {"tasks": [[0, 5]]}, ValueError, r"tasks\[0\] must name classes"),
        ([(torch.eye(3)[:1], torch.tensor([0]))], {"tasks": [[0], [1]]}, ValueError, r"tasks\[1\]"),
    ],
)
def test_errors_name_bad_input(data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        task_accuracies(Lookup(), data, **options)


def test_interpolation_rejects_mismatched_tensors_and_few_steps() -> None:
    with pytest.raises(ValueError, match=r"'weight' has shapes \(2, 3\) and \(2, 4\)"):
        interpolate(nn.Linear(3, 2), nn.Linear(4, 2), lambda _: 0.0)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        interpolate(nn.Linear(3, 2), nn.Linear(3, 2), lambda _: 0.0, steps=1)
    with pytest.raises(ValueError, match="at least one model"):
        Ensemble([])


def test_numpy_labels_are_accepted() -> None:
    assert evaluate.joint_accuracy(Lookup(), [(torch.eye(3), np.array([0, 1, 0]))]) == pytest.approx(2 / 3)
