"""The experiments of the paper, on few packaged images and with small networks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from paper.__main__ import main
from paper.data import Batches, Images, Transform
from paper.experiments import EXPERIMENTS
from paper.report import table
from paper.train import Recipe

SIZES = {"width": 64, "epochs": 12, "batch-size": 50, "learning-rate": 0.001, "pairs": 1, "samples": 1000}
ARGUMENTS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def run(folder: Path) -> list[dict[str, str]]:
    main(["mnist", *ARGUMENTS, "--device", "cpu", "--output", str(folder), "--networks", str(folder / "networks")])
    with open(folder / "mnist_width64_epochs12.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_mnist_runs_whole_and_continues_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path)
    by_method = {row["method"]: float(row["mean"]) for row in rows}
    assert len(by_method) == len(rows) == 21
    # After so little training merges are near chance; what is tested here is that every method runs on these networks.
    assert by_method["parents"] > 70
    assert by_method["dual zip"] >= by_method["average"]
    shown = capsys.readouterr().out
    assert "**Reduced**" in shown
    assert "| parents | 1 |" in shown
    assert (tmp_path / "mnist_width64_epochs12.png").read_bytes().startswith(b"\x89PNG")

    # Without its last lines the file is completed, the networks are loaded, and the other lines stay.
    path = tmp_path / "mnist_width64_epochs12.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    again = run(tmp_path)
    assert [row["mean"] for row in again] == [row["mean"] for row in rows]


def test_pairs_split_the_classes_and_label_them_by_their_vectors() -> None:
    for pair in EXPERIMENTS["cifar10"].pairs(3):
        first, second = (set(task.classes) for task in pair.tasks)
        assert first | second == set(range(10))
        assert not first & second
    for task in EXPERIMENTS["mnist"].pairs(1)[0].tasks:
        assert len(task.classes) == 2
    assert len({pair.seeds for pair in EXPERIMENTS["mnist"].pairs(5)}) == 5


def test_cifar_network_and_specification_fit() -> None:
    for name in ("cifar10", "cifar100"):
        experiment = EXPERIMENTS[name]
        experiment.spec().validate(experiment.network(1))


def test_augmentation_moves_and_passes_are_equal() -> None:
    pixels = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    pixels[:, :, 4, 4] = 255
    batches = Batches(Images(pixels, torch.arange(40)), Transform((0.0,), (255.0,), crop_padding=2), 16, seed=3)
    first, second = list(batches), list(batches)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    places = torch.cat([inputs for inputs, _ in first]).flatten(1).argmax(1)
    assert places.unique().numel() > 5
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(40))
    other = torch.cat([labels for _, labels in batches.of_epoch(1)])
    assert not torch.equal(other, torch.cat([labels for _, labels in first]))
    rotated = Transform((0.0,), (255.0,), rotation=30.0).augmented(pixels, torch.Generator().manual_seed(0))
    assert rotated.shape == pixels.shape
    assert not torch.equal(rotated, pixels / 255)


def test_rates_follow_their_schedules() -> None:
    triangle = Recipe(epochs=10, learning_rate=1.0, batch_size=1, schedule="triangle", warm_up=2)
    assert triangle.rate(9, 5) == 1.0
    assert triangle.rate(49, 5) == pytest.approx(1 / 40)
    cosine = Recipe(epochs=10, learning_rate=1.0, batch_size=1, schedule="cosine")
    assert cosine.rate(0, 5) == 1.0
    assert cosine.rate(25, 5) == pytest.approx(0.5)


def test_tables_show_mean_and_deviation_over_pairs() -> None:
    rows = [{"pair": str(pair), "method": "average", "mean": f"{value}"} for pair, value in enumerate((50.0, 52.0))]
    assert "| average | 2 | 51.00 ± 1.41 | 83.09 |" in table("title", [], rows, {"average": 83.09})


def test_other_experiments_need_data() -> None:
    with pytest.raises(SystemExit, match="--data is required"):
        main(["cifar10"])
