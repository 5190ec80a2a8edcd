"""The Taskonomy experiment: encoders are merged in pairs, and each task is scored through its own decoder."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from paper import report
from paper.methods import METHODS, Setting, outcomes
from paper.resnets import ClassDecoder, PixelDecoder, TaskonomyEncoder

TITLE = "Taskonomy, encoders in pairs"
#: Published scaled scores, means over 66 pairs of encoders.
PUBLISHED = {"activation align": 76.6, "activation zip": 83.9, "dual align": 77.4, "dual zip": 84.8}
FULL_WIDTH, FULL_SIZE, FULL_TASKS = 64, 256, 12
BATCH_SIZE = 32


@dataclass(frozen=True)
class Part:
    """Images uint8 [N, H, W, 3] and the targets of each task: images float [N, C, H, W] or classes as integers [N]."""

    images: Tensor
    targets: Mapping[str, Tensor]

    def batches(self, count: int | None, size: int, device: torch.device) -> Iterator[Tensor]:
        """Yield the inputs of the networks, float32 [B, 3, H, W] in [-1, 1]."""
        for pixels in self.images[:count].split(size):
            yield pixels.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Inputs:
    """Batches of images without targets. They can be iterated over several times."""

    part: Part
    count: int | None
    size: int
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        return self.part.batches(self.count, self.size, self.device)


@dataclass(frozen=True)
class TaskNetwork:
    """The encoder and the decoder of a task."""

    task: str
    encoder: nn.Module
    decoder: nn.Module

    def loss(self, encoder: nn.Module, part: Part, count: int | None, size: int, device: torch.device) -> float:
        """Return the mean loss of an encoder, the task's own or another, followed by the task's decoder."""
        total, start = 0.0, 0
        targets = part.targets[self.task][:count]
        with torch.no_grad():
            for inputs in part.batches(count, size, device):
                batch = targets[start : start + len(inputs)].to(device)
                total += float(_losses(self.decoder(encoder(inputs)), batch).sum())
                start += len(inputs)
        return total / start


def run(options: argparse.Namespace) -> None:
    """Load the networks, merge the encoders in pairs by every method, and write CSV, table and picture."""
    if options.data is None:
        raise SystemExit("--data is required: a folder with train.npz and test.npz")
    device = torch.device(options.device)
    width, size = options.width or FULL_WIDTH, options.batch_size or BATCH_SIZE
    train, test = (load_part(options.data / f"{name}.npz") for name in ("train", "test"))
    merging = Inputs(train, options.samples, size, device)
    networks = [_load(task, options.networks, width, train, merging) for task in train.targets]
    name = f"taskonomy_width{width}"
    csv = options.output / f"{name}.csv"
    settings = [
        f"{', '.join(train.targets)}; {len(train.images)} training and {len(test.images)} test images",
        f"samples: {options.samples}, search samples: {options.search_samples}",
    ]
    rows = report.read(csv, settings)
    pairs = list(combinations(networks, 2))[: options.pairs]
    spec = encoder_spec(networks[0].encoder, next(iter(merging))[:1])
    scales = {network.task: _Scale.of(network, train, test, size, device) for network in networks}
    searched = {network.task: _Scale.of(network, train, train, size, device, options.search_samples)
                for network in networks}  # fmt: skip
    for index, pair in enumerate(pairs):
        setting = Setting(
            spec=spec,
            merging=merging,
            own=None,  # all networks were trained on the same images
            test=lambda models, pair=pair: _scores(pair, models, scales),  # type: ignore[misc]
            objective=lambda model, pair=pair: _scores(pair, (model, model), searched)["mean"],  # type: ignore[misc]
            cosine=False,
        )
        done = [row["method"] for row in rows if row["pair"] == str(index)]
        skipped = [method for method in METHODS if options.methods and method not in options.methods]
        for outcome in outcomes([network.encoder for network in pair], setting, done + skipped):
            rows.append(report.row_of(index, outcome))
            report.write(csv, rows, settings)
    notes = [
        f"Encoders of width {width} (published: {FULL_WIDTH}), images of {train.images.shape[1]} pixels (published: "
        f"{FULL_SIZE}); {len(networks)} tasks, {len(pairs)} pairs (published: 66): {', '.join(train.targets)}.",
        "Scores are scaled: (loss of the average estimator - loss) / (loss of the average estimator - loss of the "
        "task's own encoder), in percent.",
    ]
    if (width, train.images.shape[1], len(networks)) != (FULL_WIDTH, FULL_SIZE, FULL_TASKS):
        notes.insert(0, "**Reduced**: not the size of the paper's experiment.")
    report.write_table(options.output / f"{name}.md", TITLE, [*notes, *by_task(pairs, rows)], rows, PUBLISHED)
    report.picture(options.output / f"{name}.png", TITLE, rows, "scaled score")


def load_part(path: Path) -> Part:
    """Return the images and targets of an .npz file: ``rgb`` uint8 [N, H, W, 3], and one array per task.

    A task's array holds images if it is floating point [N, C, H, W], and classes if it is of integers [N].
    """
    with np.load(path) as file:
        if "rgb" not in file.files or len(file.files) < 3:
            raise ValueError(
                f"{path} must have 'rgb' and the targets of two tasks or more, got {', '.join(file.files)}"
            )
        images = torch.from_numpy(file["rgb"])
        targets = {name: torch.from_numpy(file[name]) for name in sorted(file.files) if name != "rgb"}
    for task, target in targets.items():
        if len(target) != len(images) or target.ndim != (4 if target.is_floating_point() else 1):
            raise ValueError(
                f"{path} must have {task!r} as floats [{len(images)}, C, H, W] or integers [{len(images)}], "
                f"got {target.dtype} {tuple(target.shape)}"
            )
    return Part(images, targets)


def encoder_spec(encoder: nn.Module, images: Tensor) -> mudsc_fast.PermutationSpec:
    """Return the specification of an encoder. Its output channels keep their order, because decoders read them."""
    return mudsc_fast.PermutationSpec.from_model(encoder, images)


def by_task(pairs: Sequence[tuple[TaskNetwork, TaskNetwork]], rows: Sequence[report.Row]) -> list[str]:
    """Return a note with the mean score of each task over its pairs, for the method that the paper proposes."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["method"] == "dual zip" and int(row["pair"]) < len(pairs):
            for index, network in enumerate(pairs[int(row["pair"])]):
                found[network.task].append(float(row[f"task {index + 1}"]))
    means = ", ".join(f"{task} {statistics.mean(scores):.2f}" for task, scores in found.items())
    return [f"Dual zip, mean over the pairs of each task: {means} (published for object classification: 89.75)."]


@dataclass(frozen=True)
class _Scale:
    """The data that a task is scored on, and the losses that correspond to scores of 0 and 100."""

    part: Part
    count: int | None
    size: int
    device: torch.device
    average: float
    own: float

    @classmethod
    def of(
        cls, network: TaskNetwork, train: Part, part: Part, size: int, device: torch.device, count: int | None = None
    ) -> _Scale:
        average = average_loss(train.targets[network.task], part.targets[network.task][:count])
        own = network.loss(network.encoder, part, count, size, device)
        if own >= average:
            raise ValueError(
                f"the network of {network.task!r} must be better than the average estimator, whose loss is "
                f"{average:.4g}, got {own:.4g}: scores cannot be scaled otherwise. Train it, or check its weights"
            )
        return cls(part, count, size, device, average, own)

    def score(self, network: TaskNetwork, encoder: nn.Module) -> float:
        loss = network.loss(encoder, self.part, self.count, self.size, self.device)
        return scaled_score(loss, self.average, self.own)


def scaled_score(loss: float, average: float, own: float) -> float:
    """Return the score in percent: 0 at the loss of the average estimator, 100 at that of the task's own encoder."""
    return 100 * (average - loss) / (average - own)


def average_loss(train: Tensor, targets: Tensor) -> float:
    """Return the loss of the estimator that predicts the mean of the training targets for every image."""
    if train.is_floating_point():
        estimate = train.mean(0, keepdim=True).expand_as(targets)
    else:
        shares = torch.bincount(train.long(), minlength=int(targets.max()) + 1).double() / len(train)
        estimate = shares.clamp_min(1e-12).log().expand(len(targets), -1)
    return float(_losses(estimate, targets).mean())


def _losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each image: the mean absolute error, or the cross entropy for classes."""
    if targets.is_floating_point():
        return (outputs - targets).abs().flatten(1).mean(1)
    return functional.cross_entropy(outputs, targets.long(), reduction="none")


def _scores(
    pair: Sequence[TaskNetwork], encoders: Sequence[nn.Module], scales: Mapping[str, _Scale]
) -> dict[str, float]:
    found = {}
    for index, (network, encoder) in enumerate(zip(pair, encoders, strict=True)):
        found[f"task {index + 1}"] = scales[network.task].score(network, encoder)
    return {**found, "mean": sum(found.values()) / len(found)}


def _load(task: str, folder: Path, width: int, train: Part, merging: Inputs) -> TaskNetwork:
    """Load a task's network from TASK.safetensors, whose tensors are named ``encoder.*`` and ``decoder.*``."""
    path = folder / f"{task}.safetensors"
    if not path.exists():
        raise SystemExit(f"--networks must have one file per task of the data, got no {path.name} in {folder}")
    state, target = load_file(path), train.targets[task]
    if target.is_floating_point():
        decoder: nn.Module = PixelDecoder(target.shape[1], width)
    else:
        decoder = ClassDecoder(len(state["decoder.fc2.bias"]), width)
    network = nn.ModuleDict({"encoder": TaskonomyEncoder(width), "decoder": decoder})
    network.load_state_dict(state)
    network.to(merging.device).eval()
    # All encoders get BatchNorm statistics of the same images.
    mudsc_fast.reset_batch_norm(network["encoder"], merging)
    return TaskNetwork(task, network["encoder"], network["decoder"])
