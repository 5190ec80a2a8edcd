"""The experiments on image classification."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mudsc_fast.evaluate import cross_entropy, task_accuracies
from paper import report, surfaces
from paper.data import AnyImages, Batches, load_folder, load_images, packaged_mnist, subset
from paper.experiments import EXPERIMENTS, Experiment, Pair, Task
from paper.methods import METHODS, Setting, outcomes
from paper.train import Recipe, load_pretrained, load_trained, trained

#: Stored images are larger than the inputs of the networks by this factor, so that random crops differ.
STORED_SIZE = 8 / 7


@dataclass(frozen=True)
class Run:
    """One experiment with its data and the sizes set on the command line."""

    experiment: Experiment
    width: int
    image_size: int
    recipe: Recipe
    num_classes: int
    train: AnyImages
    test: AnyImages
    vectors: Tensor
    samples: int
    search_samples: int
    device: torch.device
    bfloat16: bool
    augment: bool

    def batches(self, images: AnyImages, size: int) -> Batches:
        """Return batches of images, in order and without augmentation."""
        transform = self.experiment.transform(self.image_size)
        return Batches(images, transform, size, None, self.device, self.experiment.flatten)


def run(options: argparse.Namespace) -> None:
    """Train or load the networks of each pair, merge them by every method, and write CSV, table and pictures."""
    experiment = _experiment(options)
    this, notes = _prepared(experiment, options)
    name = _name(options, this)
    csv = options.output / f"{name}.csv"
    rows = report.read(csv, notes)
    pairs = experiment.pairs(options.pairs or experiment.num_pairs, this.num_classes)
    if options.trained is not None and len(options.trained) != 2 * len(pairs):
        raise SystemExit(f"--trained must name two files a pair, {2 * len(pairs)}, got {len(options.trained)}")
    for index, pair in enumerate(pairs):
        given = None if options.trained is None else options.trained[2 * index : 2 * index + 2]
        networks = [_network(this, task, seed, name, options, given and given[position])
                    for position, (task, seed) in enumerate(zip(pair.tasks, pair.seeds, strict=True))]  # fmt: skip
        setting = _setting(this, pair)
        done = [row["method"] for row in rows if row["pair"] == str(index)]
        skipped = [method for method in METHODS if options.methods and method not in options.methods]
        for outcome in outcomes(networks, setting, done + skipped):
            rows.append(report.row_of(index, outcome))
            report.write(csv, rows, notes)
        if index == 0 and options.landscape_steps:
            chosen = [float(r["balance"]) for r in rows if r["pair"] == "0" and r["method"] == "dual align"]
            if not chosen:
                raise SystemExit("the landscape needs the method 'dual align': use --landscape-steps 0 for none")
            _draw_landscape(this, pair, networks, setting, chosen[0], options, name)
    report.write_table(options.output / f"{name}.md", experiment.title, notes, rows, experiment.published)
    report.picture(options.output / f"{name}.png", experiment.title, rows)


def _experiment(options: argparse.Namespace) -> Experiment:
    networks = EXPERIMENTS[options.experiment]
    network = options.network or next(iter(networks))
    if network not in networks:
        raise SystemExit(f"--network of {options.experiment} must be one of {', '.join(networks)}, got {network}")
    return networks[network]


def _name(options: argparse.Namespace, this: Run) -> str:
    """Return the prefix of this run's file names. It leaves out the default network."""
    first = next(iter(EXPERIMENTS[options.experiment]))
    network = "" if options.network in (None, first) else f"_{options.network}"
    training = f"epochs{this.recipe.epochs}" if options.trained is None else "trained"
    classes = "" if this.num_classes == this.experiment.num_classes else f"_classes{this.num_classes}"
    plain = "_plain" if options.no_augmentation else ""
    return f"{options.experiment}{network}_width{this.width}{classes}_{training}{plain}"


def _prepared(experiment: Experiment, options: argparse.Namespace) -> tuple[Run, list[str]]:
    """Return the run and the notes for its table."""
    width, epochs = options.width or experiment.full_width, options.epochs or experiment.recipe.epochs
    image_size = options.image_size or experiment.image_size
    train, whole_test = _load(options, image_size)
    test = whole_test if options.test_samples is None else subset(whole_test, options.test_samples, seed=5)
    num_classes = int(train.labels.max()) + 1
    vectors, origin = experiment.class_vectors(options.class_vectors, num_classes, options.class_cosine)
    recipe = replace(
        experiment.recipe, epochs=epochs, warm_up=min(experiment.recipe.warm_up, epochs // 4),
        batch_size=options.batch_size or experiment.recipe.batch_size,
        learning_rate=options.learning_rate or experiment.recipe.learning_rate,
    )  # fmt: skip
    full_samples = min(experiment.merging_samples or len(train), len(train))
    full_search = min(experiment.search_samples or len(train), len(train))
    this = Run(
        experiment, width, image_size, recipe, num_classes, train, test, vectors,
        min(options.samples or full_samples, full_samples), min(options.search_samples or full_search, full_search),
        torch.device(options.device), options.bfloat16, not options.no_augmentation,
    )  # fmt: skip
    training = (
        f"{epochs} epochs (published: {experiment.recipe.epochs}), batches of {recipe.batch_size}, learning rate "
        f"{recipe.learning_rate:g}."
        if options.trained is None
        else f"networks trained beforehand ({_training_of(options.trained)}; published: {experiment.recipe.epochs} "
        "epochs)."
    )
    other_classes = num_classes != experiment.num_classes
    notes = [
        f"Width {width} (published: {experiment.full_width}), images of {image_size} pixels (published: "
        f"{experiment.image_size}), {training}",
        f"{len(train)} training and {len(test)} test images; {this.samples} training images for merging, "
        f"{this.search_samples} for the search of the balance.",
        *([f"Data of {num_classes} classes (published: {experiment.num_classes})."] if other_classes else []),
        origin,
        *(["No augmentation."] if options.no_augmentation else []),
        *(["Networks are evaluated in bfloat16."] if options.bfloat16 else []),
        *experiment.notes,
    ]
    sizes = (width, image_size, epochs, this.samples, this.search_samples, len(test))
    full = (
        experiment.full_width, experiment.image_size, experiment.recipe.epochs, full_samples, full_search,
        len(whole_test),
    )  # fmt: skip
    if sizes != full or other_classes or options.data is None or options.trained is not None:
        notes.insert(0, "**Reduced**: not the size of the paper's experiment.")
    return this, notes


def _training_of(paths: list[Path]) -> str:
    """Return the epochs and accuracies recorded in the files of the networks."""
    found: dict[str, list[str]] = {"epochs": [], "accuracy": []}
    for path in paths:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        for key, values in found.items():
            values.append(metadata.get(key, "unknown"))
    return "; ".join(f"{key}: {', '.join(values)}" for key, values in found.items())


def _load(options: argparse.Namespace, image_size: int) -> tuple[AnyImages, AnyImages]:
    if options.data is None:
        if options.experiment != "mnist":
            raise SystemExit("--data is required: an .npz file or a folder of images (only MNIST has packaged ones)")
        return packaged_mnist()
    if options.data.is_dir():
        crops = options.experiment == "imagenet"
        return load_folder(options.data, round(STORED_SIZE * image_size) if crops else image_size)
    return load_images(options.data)


def _network(this: Run, task: Task, seed: int, name: str, options: argparse.Namespace, given: Path | None) -> nn.Module:
    """Return a trained network: loaded from `given`, or trained and cached."""
    torch.manual_seed(seed)
    network = this.experiment.network(this.width, this.image_size)
    if given is not None:
        _check_classes(given, task)
        return load_trained(network, given).to(this.device)
    if options.pretrained is not None:
        load_pretrained(network, options.pretrained)
    train, test = (
        this.batches(_of_task(images, task, own=True), this.recipe.batch_size) for images in (this.train, this.test)
    )
    path = options.networks / f"{name}_{task.name}_{seed}.safetensors"
    train = replace(train, seed=seed, augment=this.augment)
    return trained(network, this.recipe, train, test, this.vectors[task.classes], path).to(this.device)


def _check_classes(path: Path, task: Task) -> None:
    """Raise an error if the file says that its network was trained for other classes."""
    with safe_open(path, "pt") as file:
        classes = json.loads((file.metadata() or {}).get("classes", "null"))
    if classes is not None and sorted(classes) != task.classes:
        raise SystemExit(f"{path} must be trained for the classes {task.classes} of {task.name}, got {classes}")


def _of_task(images: AnyImages, task: Task, own: bool = False) -> AnyImages:
    """Return the images of a task. Labels index all class vectors or, with `own`, those of the task."""
    labels = task.class_of_label[images.labels]
    chosen = (labels >= 0).nonzero()[:, 0]
    labels = labels[chosen]
    return images.select(chosen, torch.searchsorted(torch.tensor(task.classes), labels) if own else labels)


def _setting(this: Run, pair: Pair) -> Setting:
    def batches(images: AnyImages) -> list[Batches]:
        return [this.batches(_of_task(images, task), 500) for task in pair.tasks]

    test = batches(this.test)
    search = batches(subset(this.train, this.search_samples, seed=2))
    images = subset(this.train, this.samples, seed=0)
    merging = this.batches(images, this.experiment.merging_batch)
    key = "joint" if this.experiment.joint else "mean"
    return Setting(
        spec=this.experiment.spec(this.width),
        merging=replace(merging, seed=1, augment=this.augment),
        own=[replace(part, seed=1, augment=this.augment) for part in batches(images)]
        if this.experiment.joint
        else None,
        test=lambda models: _accuracies(this, pair, models, test),
        objective=lambda model: _accuracies(this, pair, (model, model), search)[key],
        cosine=True,
        bfloat16=this.bfloat16,
    )


def _accuracies(this: Run, pair: Pair, models: Sequence[nn.Module], data: Sequence[Batches]) -> dict[str, float]:
    """Return each task's accuracy on its own images and their mean; for a single model also the joint accuracy."""
    both = sorted({c for task in pair.tasks for c in task.classes})
    vectors = this.vectors.to(this.device)
    found, joint = {}, 0.0
    for index, (model, batches, task) in enumerate(zip(models, data, pair.tasks, strict=True)):
        with torch.autocast(this.device.type, torch.bfloat16, enabled=this.bfloat16):
            own, among_both = task_accuracies(model, batches, vectors, [task.classes, both], progress=False)
        # All images of the task count for both accuracies, because `both` includes its classes.
        found[f"task {index + 1}"] = 100 * own
        joint += 100 * among_both * len(batches.images) / sum(len(part.images) for part in data)
    found["mean"] = sum(found.values()) / len(found)
    if this.experiment.joint and all(model is models[0] for model in models):
        found["joint"] = joint
    return found


def _draw_landscape(
    this: Run,
    pair: Pair,
    networks: list[nn.Module],
    setting: Setting,
    balance: float,
    options: argparse.Namespace,
    name: str,
) -> None:
    """Draw the loss of both tasks around merges of the pair."""
    count = options.landscape_samples
    test = subset(this.test, 2 * count, seed=3)
    data = [this.batches(_of_task(test, task, own=True), 500) for task in pair.tasks]
    normalization = this.batches(subset(this.train, count, seed=4), 500)
    vectors = [this.vectors[task.classes].to(this.device) for task in pair.tasks]

    def losses(model: nn.Module) -> dict[str, float]:
        with torch.autocast(this.device.type, torch.bfloat16, enabled=this.bfloat16):
            return {
                f"loss of task {index + 1}": cross_entropy(model, batches, own, progress=False)
                for index, (batches, own) in enumerate(zip(data, vectors, strict=True))
            }

    surfaces.draw(
        networks, setting, losses, balance, normalization,
        steps=options.landscape_steps,
        cache=options.networks / f"{name}_landscape.npz",
        path=options.output / f"{name}_landscape.png",
    )  # fmt: skip
