"""Writes made-up data and networks to try an experiment with: ``python -m paper.made_up taskonomy FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import mudsc_fast
from paper.resnets import ClassDecoder, PixelDecoder, TaskonomyEncoder
from paper.taskonomy import BATCH_SIZE, FULL_SIZE, FULL_WIDTH, Part

#: Number of classes or of output channels of each task, in the order of their names.
TASKS = {"class_object": 100, "depth": 1, "normal": 3}


def taskonomy(folder: Path, width: int, size: int, count: int) -> None:
    """Write random networks for three tasks, and `count` training and test images whose targets are their outputs.

    The files are those that ``python -m paper taskonomy --data FOLDER --networks FOLDER`` reads. Each network's own
    loss is 0 up to rounding, if the BatchNorm statistics are of the same batches (of 32 images, the default).
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    # Large areas of color, so that pooled features differ from image to image.
    areas = torch.rand(2 * count, 3, 4, 4, generator=generator)
    pixels = (256 * functional.interpolate(areas, size=(size, size))).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    batches = [list(Part(part, {}).batches(None, BATCH_SIZE, torch.device("cpu"))) for part in pixels.split(count)]
    arrays: dict[str, Any] = {"rgb": pixels.numpy()}
    for seed, (task, channels) in enumerate(TASKS.items()):
        torch.manual_seed(seed)
        encoder = TaskonomyEncoder(width)
        mudsc_fast.reset_batch_norm(encoder, batches[0], progress=False)
        encoder.eval()
        decoder = ClassDecoder(channels, width) if task == "class_object" else PixelDecoder(channels, width)
        with torch.no_grad():
            maps = torch.cat([encoder(batch) for batch in chain(*batches)])
            if isinstance(decoder, ClassDecoder):
                # Logits with a mean of 0 and a deviation of 10 over the training images.
                logits = decoder(maps[:count])
                scale = 10 / logits.std(0)
                decoder.fc2.weight.mul_(scale[:, None])
                decoder.fc2.bias.sub_(logits.mean(0)).mul_(scale)
            outputs = torch.cat([decoder(part) for part in maps.split(8)])
        arrays[task] = (outputs.argmax(1) if outputs.ndim == 2 else outputs).numpy()
        save_file(nn.ModuleDict({"encoder": encoder, "decoder": decoder}).state_dict(), folder / f"{task}.safetensors")
    for name, part in (("train", slice(count)), ("test", slice(count, None))):
        np.savez(folder / f"{name}.npz", **{key: array[part] for key, array in arrays.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files of an experiment."""
    parser = argparse.ArgumentParser(prog="python -m paper.made_up", description=main.__doc__)
    parser.add_argument("experiment", choices=["taskonomy"])
    parser.add_argument("folder", type=Path, help="folder for data and networks")
    parser.add_argument("--width", type=int, default=FULL_WIDTH, help=f"width of the networks (default: {FULL_WIDTH})")
    parser.add_argument("--size", type=int, default=FULL_SIZE, help=f"size of the images (default: {FULL_SIZE})")
    parser.add_argument("--images", type=int, default=32, help="training and test images, each (default: 32)")
    options = parser.parse_args(arguments)
    taskonomy(options.folder, options.width, options.size, options.images)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
