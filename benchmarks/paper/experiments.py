"""The settings of each experiment: networks, training, tasks, pairs, and the published figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from paper.data import Transform
from paper.networks import MnistMlp, ResNet20
from paper.train import Recipe

#: Mean cosine between CLIP's vectors of the ten classes of CIFAR-10. Random vectors are drawn with it: further apart,
#: they make the first gradients so large that the MNIST networks collapse to constant outputs.
CLIP_COSINE = 0.85


@dataclass(frozen=True)
class Task:
    """What one network is trained for.

    Attributes
    ----------
    name
        Names the task in tables and files.
    class_of_label
        For each label of the data the row of the class vectors, [num_labels]; -1 for images that are not of the task.
    """

    name: str
    class_of_label: Tensor

    @property
    def classes(self) -> list[int]:
        """Rows of the class vectors that the task chooses from."""
        return sorted(set(self.class_of_label[self.class_of_label >= 0].tolist()))


@dataclass(frozen=True)
class Pair:
    """Two tasks and the seeds of the networks trained for them."""

    tasks: tuple[Task, Task]
    seeds: tuple[int, int]


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Attributes
    ----------
    title
        Heading of its table.
    network
        Builds an untrained network of a width.
    full_width, published_epochs
        The paper's.
    recipe
        Its training.
    transform
        Its normalization and augmentation.
    spec
        Which axes belong together.
    pairs
        Returns the given number of pairs.
    vectors_key
        Which array of the class vectors' file is read; None for vectors that cannot be had, drawn at random instead.
    num_vectors
        Number of class vectors.
    joint
        Whether the classes of both tasks differ, so that one argmax over all of them makes sense.
    flatten
        Whether inputs are vectors.
    published
        The paper's accuracies in percent, by method.
    """

    title: str
    network: Callable[[int], nn.Module]
    full_width: int
    published_epochs: int
    recipe: Recipe
    transform: Transform
    spec: Callable[[], mudsc_fast.PermutationSpec]
    pairs: Callable[[int], list[Pair]]
    vectors_key: str | None
    num_vectors: int
    joint: bool
    flatten: bool = False
    published: Mapping[str, float] = field(default_factory=dict)

    def class_vectors(self, path: Path | None) -> tuple[Tensor, bool]:
        """Return unit vectors [K, 512], and whether they are those of the paper; else drawn at random, but as close."""
        if path is None or self.vectors_key is None:
            generator = torch.Generator().manual_seed(0)
            own, common = (
                functional.normalize(torch.randn(k, 512, generator=generator)) for k in (self.num_vectors, 1)
            )
            return functional.normalize((1 - CLIP_COSINE) ** 0.5 * own + CLIP_COSINE**0.5 * common), False
        with np.load(path) as file:
            vectors = torch.from_numpy(file[self.vectors_key]).float()
        if vectors.shape != (self.num_vectors, 512):
            raise ValueError(
                f"{path} must have {self.vectors_key!r} of shape {(self.num_vectors, 512)}, got {tuple(vectors.shape)}"
            )
        return functional.normalize(vectors, dim=1), True


def _prime_and_odd(count: int) -> list[Pair]:
    """Pair network i of one task with network i + 1 of the other: equal seeds would make similar weights."""
    digits = torch.arange(10)
    prime = Task("prime", torch.isin(digits, torch.tensor([2, 3, 5, 7])).long())
    odd = Task("odd", 2 + digits % 2)
    return [Pair((prime, odd), (index, 100 + (index + 1) % 5)) for index in range(count)]


def _halves(num_classes: int) -> Callable[[int], list[Pair]]:
    """Return pairs of tasks, each a random half of the classes."""

    def pairs(count: int) -> list[Pair]:
        found = []
        for index in range(count):
            order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(index))
            tasks = []
            for name, half in zip("ab", order.chunk(2), strict=True):
                class_of_label = torch.full((num_classes,), -1)
                class_of_label[half] = half
                tasks.append(Task(f"pair{index}{name}", class_of_label))
            found.append(Pair((tasks[0], tasks[1]), (10 * index, 10 * index + 1)))
        return found

    return pairs


def _cifar(title: str, vectors_key: str, num_classes: int, published_dual_zip: float) -> Experiment:
    return Experiment(
        title=title,
        network=ResNet20,
        full_width=8,
        published_epochs=200,
        recipe=Recipe(epochs=200, learning_rate=0.4, batch_size=500, schedule="triangle", warm_up=5),
        transform=Transform(
            mean=(125.307, 122.961, 113.8575), deviation=(51.5865, 50.847, 51.255), crop_padding=4, flip=True
        ),
        spec=lambda: mudsc_fast.spec.resnet([3, 3, 3], names="cifar"),
        pairs=_halves(num_classes),
        vectors_key=vectors_key,
        num_vectors=num_classes,
        joint=True,
        published={"dual zip": published_dual_zip},
    )


EXPERIMENTS: dict[str, Experiment] = {
    "mnist": Experiment(
        title="MNIST, prime and odd",
        network=MnistMlp,
        full_width=1024,
        published_epochs=50,
        recipe=Recipe(epochs=50, learning_rate=0.01, batch_size=500, schedule="cosine", keep_best=True),
        transform=Transform(mean=(127.5,), deviation=(127.5,), crop_padding=4, rotation=30.0),
        spec=lambda: mudsc_fast.spec.mlp(["fc1", "fc2", "fc3", "fc4"], bias=False),
        pairs=_prime_and_odd,
        vectors_key=None,
        num_vectors=4,
        joint=False,
        flatten=True,
        published={"dual zip": 94.62},
    ),
    "cifar10": _cifar("CIFAR-10, 5 + 5 classes, ResNet20", "cifar10", 10, 83.09),
    "cifar100": _cifar("CIFAR-100, 50 + 50 classes, ResNet20", "cifar100", 100, 74.71),
}
