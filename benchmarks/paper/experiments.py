"""The settings of each experiment: networks, training, tasks, pairs, and published accuracies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from paper.data import Transform
from paper.networks import MnistMlp, ResNet20
from paper.resnets import BottleneckResNet, group_norm
from paper.train import Recipe
from paper.vision_transformer import VisionTransformer

#: Mean cosine between CLIP's vectors of the ten classes of CIFAR-10.
_CLASS_COSINE = 0.85
#: Mean cosine of the random vectors that replace CLIP's vectors of "prime", "odd" and their opposites. Those are close
#: together, because their prompts differ in one word. With vectors further apart, the first gradients are so large that
#: the networks collapse to constant outputs.
_TASK_COSINE = 0.98


@dataclass(frozen=True)
class Task:
    """What one network is trained for.

    Attributes
    ----------
    name
        Name of the task in tables and files.
    class_of_label
        The row of the class vectors for each label of the data, int64 [num_labels]; -1 for labels of other tasks.
    """

    name: str
    class_of_label: Tensor

    @property
    def classes(self) -> list[int]:
        """Rows of the class vectors that belong to the task."""
        return sorted(set(self.class_of_label[self.class_of_label >= 0].tolist()))


@dataclass(frozen=True)
class Pair:
    """Two tasks and the seeds of the networks trained for them."""

    tasks: tuple[Task, Task]
    seeds: tuple[int, int]


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper with one of its architectures.

    Attributes
    ----------
    title
        Heading of the table.
    network
        Returns an untrained network for a width and an image size.
    full_width, image_size
        The width and image size of the paper.
    recipe
        Training settings.
    transform
        Returns the normalization and augmentation for an image size.
    spec
        Returns the specification of a network for a width.
    num_classes
        Number of classes of the paper's data.
    pairs
        Returns pairs of tasks, given the number of pairs and the number of classes of the data.
    vectors_key
        Returns the name of the array of class vectors in their file, given the number of classes of the data; None if
        they are not available and are drawn at random.
    num_vectors
        Number of class vectors; None for the number of classes of the data.
    joint
        Whether the tasks have different classes, so that an argmax over the classes of both makes sense.
    flatten
        Whether inputs are flattened to vectors.
    random_cosine
        Mean cosine of class vectors that are drawn at random.
    num_pairs
        Number of pairs in the paper.
    merging_batch
        Batch size for activations.
    merging_samples, search_samples
        Numbers of training images for merging and for choosing the balance; None for all.
    published
        Published accuracies in percent, by method.
    notes
        More notes for the table.
    """

    title: str
    network: Callable[[int, int], nn.Module]
    full_width: int
    image_size: int
    recipe: Recipe
    transform: Callable[[int], Transform]
    spec: Callable[[int], mudsc_fast.PermutationSpec]
    num_classes: int
    pairs: Callable[[int, int], list[Pair]]
    vectors_key: Callable[[int], str] | None
    joint: bool
    num_vectors: int | None = None
    flatten: bool = False
    random_cosine: float = _CLASS_COSINE
    num_pairs: int = 5
    merging_batch: int = 500
    merging_samples: int | None = None
    search_samples: int | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def class_vectors(self, path: Path | None, num_classes: int, cosine: float | None) -> tuple[Tensor, str]:
        """Return class vectors of norm 1, [K, 512], read or drawn at random, and a note that says which."""
        count = self.num_vectors or num_classes
        cosine = self.random_cosine if cosine is None else cosine
        if path is None or self.vectors_key is None:
            generator = torch.Generator().manual_seed(0)
            own, common = (functional.normalize(torch.randn(k, 512, generator=generator)) for k in (count, 1))
            vectors = functional.normalize((1 - cosine) ** 0.5 * own + cosine**0.5 * common)
            return vectors, f"Class vectors are random unit vectors with a mean cosine of {cosine:g}."
        key = self.vectors_key(num_classes)
        with np.load(path) as file:
            if key not in file.files:
                raise ValueError(f"{path} must have an array {key!r}, got {', '.join(file.files)}")
            vectors = torch.from_numpy(file[key]).float()
        if vectors.shape != (count, 512):
            raise ValueError(f"{path} must have {key!r} of shape {(count, 512)}, got {tuple(vectors.shape)}")
        return functional.normalize(vectors, dim=1), "Class vectors are CLIP's."


def _prime_and_odd(count: int, _: int) -> list[Pair]:
    """Pair network i of one task with network i + 1 of the other, because equal seeds would give similar weights."""
    digits = torch.arange(10)
    prime = Task("prime", torch.isin(digits, torch.tensor([2, 3, 5, 7])).long())
    odd = Task("odd", 2 + digits % 2)
    return [Pair((prime, odd), (index, 100 + (index + 1) % 5)) for index in range(count)]


def _halves(first_seed: int) -> Callable[[int, int], list[Pair]]:
    """Return a function that makes pairs of tasks, each with a random half of the classes."""

    def pairs(count: int, num_classes: int) -> list[Pair]:
        found = []
        for index in range(count):
            order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(first_seed + index))
            tasks = [
                _choice(f"pair{index}{name}", half, num_classes)
                for name, half in zip("ab", order.chunk(2), strict=True)
            ]
            found.append(Pair((tasks[0], tasks[1]), (10 * index, 10 * index + 1)))
        return found

    return pairs


def _pairs_of_five_sets(count: int, num_classes: int) -> list[Pair]:
    """Split the classes into five sets and return all ten pairs of sets; there is one network per set."""
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(0))
    size = num_classes // 5
    if not size:
        raise ValueError(f"the data must have at least 5 classes, got {num_classes}")
    sets = [_choice(f"set{index}", order[index * size : (index + 1) * size], num_classes) for index in range(5)]
    return [Pair((sets[a], sets[b]), (a, b)) for a, b in combinations(range(5), 2)][:count]


def _choice(name: str, classes: Tensor, num_classes: int) -> Task:
    class_of_label = torch.full((num_classes,), -1)
    class_of_label[classes] = classes
    return Task(name, class_of_label)


CIFAR_MEAN, CIFAR_DEVIATION = (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255)
IMAGENET_MEAN, IMAGENET_DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def _cifar_transform(image_size: int) -> Transform:
    resize = None if image_size == 32 else image_size
    return Transform(CIFAR_MEAN, CIFAR_DEVIATION, crop_padding=4, flip=True, resize=resize)


_MNIST = Experiment(
    title="MNIST, prime and odd",
    network=lambda width, _: MnistMlp(width),
    full_width=1024,
    image_size=28,
    recipe=Recipe(epochs=50, learning_rate=0.01, batch_size=500, schedule="cosine", keep_best=True),
    transform=lambda _: Transform(mean=(127.5,), deviation=(127.5,), crop_padding=4, rotation=30.0),
    spec=lambda _: mudsc_fast.spec.mlp(["fc1", "fc2", "fc3", "fc4"], bias=False),
    num_classes=10,
    pairs=_prime_and_odd,
    vectors_key=None,
    num_vectors=4,
    random_cosine=_TASK_COSINE,
    joint=False,
    flatten=True,
    published={"dual zip": 94.62},
)

_CIFAR10 = Experiment(
    title="CIFAR-10, 5 + 5 classes, ResNet20",
    network=lambda width, _: ResNet20(width),
    full_width=8,
    image_size=32,
    recipe=Recipe(epochs=200, learning_rate=0.4, batch_size=500, schedule="triangle", warm_up=5),
    transform=_cifar_transform,
    spec=lambda _: mudsc_fast.spec.resnet([3, 3, 3], names="cifar"),
    num_classes=10,
    pairs=_halves(0),
    vectors_key=lambda num_classes: f"cifar{num_classes}",
    joint=True,
    merging_batch=50,
    published={"dual zip": 83.09},
)

_CIFAR100 = replace(
    _CIFAR10,
    title="CIFAR-100, 50 + 50 classes, ResNet20",
    num_classes=100,
    pairs=_halves(100),  # not the halves of _CIFAR10, if the data is CIFAR-10
    merging_batch=500,
    published={},
    notes=(
        "Published joint accuracies of dual zip, by network: 74.71, 75.76 (tasks 87.78 and 85.56) and 56.01. Which "
        "network each belongs to is in the paper's tables, not here.",
    ),
)

_FINE_TUNING = Recipe(epochs=100, learning_rate=1e-3, batch_size=500, schedule="cosine")


def _on_large_images(
    title: str,
    network: Callable[[int, int], nn.Module],
    full_width: int,
    image_size: int,
    spec: Callable[[int], mudsc_fast.PermutationSpec],
    recipe: Recipe,
) -> Experiment:
    """Return the CIFAR-100 experiment with a network for larger images."""
    return replace(
        _CIFAR100,
        title=f"CIFAR-100, 50 + 50 classes, {title}",
        network=network,
        full_width=full_width,
        image_size=image_size,
        recipe=recipe,
        spec=spec,
    )


RESNET26, RESNET50 = (2, 2, 2, 2), (3, 4, 6, 3)

#: The experiments by name and network; the first network is the default.
EXPERIMENTS: dict[str, dict[str, Experiment]] = {
    "mnist": {"mlp": _MNIST},
    "cifar10": {"resnet20": _CIFAR10},
    "cifar100": {
        "resnet20": _CIFAR100,
        "resnet20_gn": replace(
            _CIFAR100,
            title="CIFAR-100, 50 + 50 classes, ResNet20 with GroupNorm",
            network=lambda width, _: ResNet20(width, norm=group_norm(8)),
            full_width=16,
            recipe=replace(_CIFAR100.recipe, epochs=250, learning_rate=0.1),
            spec=lambda _: mudsc_fast.spec.resnet([3, 3, 3], names="cifar", norm_groups=8),
        ),
        "resnet26": _on_large_images(
            "ResNet26",
            lambda width, _: BottleneckResNet(RESNET26, width),
            64,
            224,
            lambda _: mudsc_fast.spec.resnet(RESNET26, bottleneck=True),
            _FINE_TUNING,
        ),
        "resnet50_gn": _on_large_images(
            "ResNet50 with GroupNorm",
            lambda width, _: BottleneckResNet(RESNET50, width, norm=group_norm(32)),
            64,
            224,
            lambda _: mudsc_fast.spec.resnet(RESNET50, bottleneck=True, norm_groups=32),
            replace(_FINE_TUNING, batch_size=100),
        ),
        "vit_s": _on_large_images(
            "ViT-S/16",
            lambda width, size: VisionTransformer(size, width),
            384,
            384,
            lambda width: mudsc_fast.spec.vit(12, 6, width),
            replace(_FINE_TUNING, learning_rate=1e-4, batch_size=100),
        ),
    },
    "imagenet": {
        "resnet50": Experiment(
            title="ImageNet, 200 + 200 classes, ResNet50",
            network=lambda width, _: BottleneckResNet(RESNET50, width),
            full_width=64,
            image_size=224,
            recipe=replace(_FINE_TUNING, epochs=50, learning_rate=1e-2, batch_size=200),
            transform=lambda size: Transform(IMAGENET_MEAN, IMAGENET_DEVIATION, flip=True, crop=size),
            spec=lambda _: mudsc_fast.spec.resnet(RESNET50, bottleneck=True),
            num_classes=1000,
            pairs=_pairs_of_five_sets,
            vectors_key=lambda _: "imagenet",
            joint=True,
            num_pairs=10,
            merging_samples=60_000,
            search_samples=120_000,
            published={"dual zip": 44.87},
        )
    },
}
