"""Run an experiment: ``python -m paper mnist --data mnist.npz`` from the folder ``benchmarks``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mudsc_fast._files import atomic_write
from paper import report
from paper.data import Batches, Images, load_images, packaged_mnist
from paper.experiments import CLIP_COSINE, EXPERIMENTS, Experiment, Pair, Task
from paper.methods import Setting, outcomes
from paper.train import trained


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or load the networks, merge them by every method, and write CSV, table and picture."""
    options = _parser().parse_args(arguments)
    experiment = EXPERIMENTS[options.experiment]
    width, epochs = options.width or experiment.full_width, options.epochs or experiment.published_epochs
    if options.data is None and options.experiment != "mnist":
        raise SystemExit("--data is required: the .npz file of the images (only MNIST has packaged ones)")
    train, test = packaged_mnist() if options.data is None else load_images(options.data)
    vectors, real = experiment.class_vectors(options.class_vectors)
    device = torch.device(options.device)
    recipe = replace(
        experiment.recipe, epochs=epochs, warm_up=min(experiment.recipe.warm_up, epochs // 4),
        batch_size=options.batch_size or experiment.recipe.batch_size,
        learning_rate=options.learning_rate or experiment.recipe.learning_rate,
    )  # fmt: skip
    notes = [
        f"Width {width} (published: {experiment.full_width}), {epochs} epochs (published: "
        f"{experiment.published_epochs}), batches of {recipe.batch_size}, learning rate {recipe.learning_rate:g}.",
        f"{len(train)} training and {len(test)} test images; {options.samples} training images for merging.",
        "Class vectors are those of the paper."
        if real
        else f"Class vectors are random unit vectors with a mean cosine of {CLIP_COSINE}, as CLIP's have.",
    ]
    if (width, epochs) != (experiment.full_width, experiment.published_epochs) or options.data is None:
        notes.insert(0, "**Reduced**: not the size of the paper's experiment.")
    name = f"{options.experiment}_width{width}_epochs{epochs}"
    csv = options.output / f"{name}.csv"
    rows = report.read(csv)
    for index, pair in enumerate(experiment.pairs(options.pairs)):
        networks = []
        for task, seed in zip(pair.tasks, pair.seeds, strict=True):
            torch.manual_seed(seed)
            own_train, own_test = (
                _batches(_of_task(images, task, own=True), experiment, recipe.batch_size, device)
                for images in (train, test)
            )
            own_train = replace(own_train, seed=seed)
            path = options.networks / f"{name}_{task.name}_{seed}.safetensors"
            own_vectors = vectors[task.classes]
            network = trained(experiment.network(width), recipe, own_train, own_test, own_vectors, path)
            networks.append(network.to(device))
        done = [row["method"] for row in rows if row["pair"] == str(index)]
        setting = _setting(experiment, pair, train, test, vectors, options, device)
        for outcome in outcomes(networks, setting, done):
            rows.append(report.row_of(index, outcome))
            report.write(csv, rows)
    with atomic_write(options.output / f"{name}.md") as temporary:
        temporary.write_text(report.table(experiment.title, notes, rows, experiment.published), encoding="utf-8")
    report.picture(options.output / f"{name}.png", experiment.title, rows)
    print(report.table(experiment.title, notes, rows, experiment.published))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paper", description="Reproduce an experiment of the MuDSC paper.")
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, help="the .npz file of the images; without it, MNIST uses packaged ones")
    parser.add_argument("--class-vectors", type=Path, help="an .npz file of CLIP's class vectors")
    parser.add_argument("--width", type=int, help="width of the networks (default: the paper's)")
    parser.add_argument("--epochs", type=int, help="training epochs (default: the paper's)")
    parser.add_argument("--batch-size", type=int, help="batch size of the training (default: the paper's)")
    parser.add_argument("--learning-rate", type=float, help="learning rate of the training (default: the paper's)")
    parser.add_argument("--pairs", type=int, default=5, help="number of pairs of networks (default: 5)")
    parser.add_argument("--samples", type=int, default=5000, help="training images for merging (default: 5000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("results/paper"), help="folder of tables and pictures")
    parser.add_argument("--networks", type=Path, default=Path("networks"), help="folder of the trained networks")
    return parser


def _of_task(images: Images, task: Task, own: bool = False) -> Images:
    """Return the images of a task, with labels that index all class vectors, or those of the task alone."""
    labels = task.class_of_label[images.labels]
    pixels, labels = images.pixels[labels >= 0], labels[labels >= 0]
    return Images(pixels, torch.searchsorted(torch.tensor(task.classes), labels) if own else labels)


def _batches(images: Images, experiment: Experiment, size: int, device: torch.device) -> Batches:
    return Batches(images, experiment.transform, size, None, device, experiment.flatten)


def _setting(
    experiment: Experiment,
    pair: Pair,
    train: Images,
    test: Images,
    vectors: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> Setting:
    def batches(images: Images) -> Batches:
        return _batches(images, experiment, 500, device)

    sample = train.subset(options.samples, seed=0)
    return Setting(
        spec=experiment.spec(),
        class_vectors=vectors.to(device),
        merging=replace(batches(sample), seed=1),
        own=[replace(batches(_of_task(sample, task)), seed=1) for task in pair.tasks],
        choosing=[batches(_of_task(sample.subset(1000, seed=2), task)) for task in pair.tasks],
        test=[batches(_of_task(test, task)) for task in pair.tasks],
        tasks=[task.classes for task in pair.tasks],
        joint=experiment.joint,
        balances=[share / 10 for share in range(9, 0, -1)],
    )


if __name__ == "__main__":
    raise SystemExit(main())
