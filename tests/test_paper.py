"""The experiments of the paper with few images and small networks."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from architectures import randomize
from mudsc_fast.matching.verify import keeps_outputs
from paper import methods
from paper.__main__ import main
from paper.data import Batches, Images, Transform, load_folder
from paper.experiments import EXPERIMENTS
from paper.report import table
from paper.train import Recipe, load_pretrained

SIZES = {
    "width": 64,
    "epochs": 12,
    "batch-size": 50,
    "learning-rate": 0.001,
    "pairs": 1,
    "samples": 800,
    "search-samples": 300,
    "landscape-steps": 3,
    "landscape-samples": 50,
}
ARGUMENTS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def run(folder: Path, *more: str) -> list[dict[str, str]]:
    folders = ["--output", str(folder), "--networks", str(folder / "networks")]
    main(["mnist", *ARGUMENTS, "--device", "cpu", *folders, *more])
    with open(folder / "mnist_width64_epochs12.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "arguments",
    [
        ["cifar10", "--data", "missing.npz"],
        ["mnist", "--class-vectors", "missing.npz"],
        ["mnist", "--trained", str(Path(__file__)), "missing.npz"],
        ["taskonomy", "--data", str(Path(__file__).parent), "--networks", "missing.npz"],
    ],
)
def test_missing_inputs_are_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "missing.npz does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_mnist_runs_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "BALANCES", (0.9, 0.5, 0.1))
    rows = run(tmp_path)
    by_method = {row["method"]: float(row["mean"]) for row in rows}
    assert len(by_method) == len(rows) == 21
    # After so little training, merges are near chance level. This tests only that every method runs.
    assert by_method["parents"] > 70
    assert by_method["dual zip"] >= by_method["average"]
    shown = capsys.readouterr().out
    assert "**Reduced**" in shown
    assert "| parents | 1 |" in shown
    for suffix in ("", "_landscape"):
        assert (tmp_path / f"mnist_width64_epochs12{suffix}.png").read_bytes().startswith(b"\x89PNG")

    # If the last row is missing, a new run loads the networks, adds that row and keeps the others.
    path = tmp_path / "mnist_width64_epochs12.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    again = run(tmp_path)
    assert [row["mean"] for row in again] == [row["mean"] for row in rows]

    # Results and networks of other settings are errors.
    with pytest.raises(SystemExit, match=r"mnist_width64_epochs12\.csv holds results of other settings"):
        run(tmp_path, "--class-cosine", "0.9")
    path.unlink()
    with pytest.raises(SystemExit, match="was trained with other settings: class_vectors must be"):
        run(tmp_path, "--class-cosine", "0.9")


def test_pairs_split_classes_and_use_class_vectors() -> None:
    for pair in EXPERIMENTS["cifar10"]["resnet20"].pairs(3, 10):
        first, second = (set(task.classes) for task in pair.tasks)
        assert first | second == set(range(10))
        assert not first & second
    for task in EXPERIMENTS["mnist"]["mlp"].pairs(1, 10)[0].tasks:
        assert len(task.classes) == 2
    assert len({pair.seeds for pair in EXPERIMENTS["mnist"]["mlp"].pairs(5, 10)}) == 5


def test_imagenet_has_ten_pairs_of_five_sets() -> None:
    pairs = EXPERIMENTS["imagenet"]["resnet50"].pairs(10, 1000)
    assert len({pair.seeds for pair in pairs}) == 10
    for pair in pairs:
        first, second = (set(task.classes) for task in pair.tasks)
        assert len(first) == len(second) == 200
        assert not first & second


@pytest.mark.parametrize(
    ("name", "network", "width", "image_size"),
    [
        ("mnist", "mlp", 16, 28),
        ("cifar10", "resnet20", 1, 16),
        ("cifar100", "resnet20_gn", 1, 16),
        ("cifar100", "resnet26", 8, 32),
        ("cifar100", "resnet50_gn", 32, 32),
        ("cifar100", "vit_s", 24, 32),
        ("imagenet", "resnet50", 8, 32),
    ],
)
def test_specifications_keep_outputs_of_networks(name: str, network: str, width: int, image_size: int) -> None:
    experiment = EXPERIMENTS[name][network]
    model = randomize(experiment.network(width, image_size), 0).eval()
    experiment.spec(width).validate(model)
    shape = (2, 784) if experiment.flatten else (2, 3, image_size, image_size)
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(images).shape == (2, 512)
    assert keeps_outputs(model, experiment.spec(width), images)


@pytest.mark.parametrize(
    ("name", "network", "without_last_layer"),
    [
        # timm's resnet26, torchvision's resnet50, timm's resnet50_gn and timm's vit_small_patch16_384.
        ("cifar100", "resnet26", 13_946_176),
        ("imagenet", "resnet50", 23_508_032),
        ("cifar100", "resnet50_gn", 23_508_032),
        ("cifar100", "vit_s", 21_811_584),
    ],
)
def test_networks_have_the_published_sizes(name: str, network: str, without_last_layer: int) -> None:
    experiment = EXPERIMENTS[name][network]
    with torch.device("meta"):
        model = experiment.network(experiment.full_width, experiment.image_size)
    *others, weight, bias = model.parameters()
    assert weight.shape[0] == bias.shape[0] == 512
    assert sum(value.numel() for value in others) == without_last_layer


def made_up_images(num_classes: int, per_class: int, size: int, seed: int) -> Images:
    """Return noisy images with one random pattern per class."""
    patterns = torch.randint(0, 256, (num_classes, 3, size, size), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(num_classes).repeat(per_class)
    noise = torch.randint(-40, 41, (len(labels), 3, size, size), generator=torch.Generator().manual_seed(seed))
    return Images((patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels)


TINY = ["--epochs", "1", "--pairs", "1", "--batch-size", "20", "--landscape-steps", "0", "--device", "cpu"]


@pytest.fixture
def one_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "BALANCES", (0.5,))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:.*more inputs than there are samples:UserWarning")
@pytest.mark.usefixtures("one_balance")
def test_cifar100_runs_with_another_network_from_pretrained_weights(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    for part, seed in (("train", 1), ("test", 2)):
        images = made_up_images(100, 1, 32, seed)
        arrays |= {f"x_{part}": images.pixels.permute(0, 2, 3, 1).numpy(), f"y_{part}": images.labels.numpy()}
    np.savez(tmp_path / "data.npz", **arrays)
    experiment = EXPERIMENTS["cifar100"]["resnet26"]
    start = randomize(experiment.network(4, 32), 0)
    torch.save(start.state_dict(), tmp_path / "start.pth")
    arguments = ["cifar100", "--network", "resnet26", "--width", "4", "--image-size", "40", *TINY]
    folders = ["--output", str(tmp_path), "--networks", str(tmp_path), "--data", str(tmp_path / "data.npz")]
    main([*arguments, *folders, "--pretrained", str(tmp_path / "start.pth"), "--learning-rate", "1e-9"])
    rows = rows_of(tmp_path / "cifar100_resnet26_width4_epochs1.csv")
    assert len(rows) == 3 + 6 * 3
    assert all(row["joint"] for row in rows if row["method"] != "parents")
    assert "images of 40 pixels (published: 224)" in (tmp_path / "cifar100_resnet26_width4_epochs1.md").read_text()
    # With a learning rate of almost 0 the networks keep the pretrained weights.
    found = load_file(tmp_path / "cifar100_resnet26_width4_epochs1_pair0a_0.safetensors")
    torch.testing.assert_close(found["layer1.0.conv1.weight"], start.state_dict()["layer1.0.conv1.weight"])

    # --trained merges the same networks without training; a network for other classes is an error.
    files = [str(tmp_path / f"cifar100_resnet26_width4_epochs1_pair0{name}.safetensors") for name in ("a_0", "b_1")]
    chosen = ["parents", "average", "dual align", "weight zip + refit", "weight zip + refit, own data"]
    main([*arguments, *folders, "--methods", *chosen, "--trained", *files])
    again = rows_of(tmp_path / "cifar100_resnet26_width4_trained.csv")
    joint = {row["method"]: row["joint"] for row in rows}
    assert {row["method"]: row["joint"] for row in again} == {method: joint[method] for method in chosen}
    other = tmp_path / "other.safetensors"
    save_file(found, other, {"classes": "[1, 2, 3]"})
    with pytest.raises(SystemExit, match=r"must be trained for the classes .* got \[1, 2, 3\]"):
        main([*arguments, "--output", str(tmp_path / "o"), *folders[2:], "--trained", files[0], str(other)])


@pytest.mark.usefixtures("one_balance")
def test_cifar100_runs_on_data_of_ten_classes(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"cifar10": torch.randn(10, 512).numpy()}
    for part, seed in (("train", 1), ("test", 2)):
        images = made_up_images(10, 4, 16, seed)
        arrays |= {f"x_{part}": images.pixels.permute(0, 2, 3, 1).numpy(), f"y_{part}": images.labels.numpy()}
    np.savez(tmp_path / "data.npz", **arrays)
    files = ["--data", str(tmp_path / "data.npz"), "--class-vectors", str(tmp_path / "data.npz")]
    folders = ["--output", str(tmp_path), "--networks", str(tmp_path)]
    chosen = ["parents", "weight align", "weight align + repair"]
    main(["cifar100", "--network", "resnet20_gn", "--width", "1", *TINY, *files, *folders, "--methods", *chosen])
    rows = rows_of(tmp_path / "cifar100_resnet20_gn_width1_classes10_epochs1.csv")
    assert [row["method"] for row in rows] == chosen
    text = (tmp_path / "cifar100_resnet20_gn_width1_classes10_epochs1.md").read_text()
    assert "Data of 10 classes (published: 100)" in text
    assert "Class vectors are CLIP's" in text


@pytest.mark.filterwarnings("ignore:.*more inputs than there are samples:UserWarning")
@pytest.mark.usefixtures("one_balance")
def test_imagenet_runs_on_a_folder_of_images(tmp_path: Path) -> None:
    for part, seed in (("train", 1), ("val", 2)):
        images = made_up_images(10, 3, 40, seed)
        for index, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
            path = tmp_path / "images" / part / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((44, 40)).save(path)
    sizes = ["--width", "2", "--image-size", "32", *TINY]
    folders = ["--output", str(tmp_path), "--networks", str(tmp_path)]
    chosen = ["parents", "ensemble", "activation align", "dual zip + refit"]
    main(["imagenet", "--data", str(tmp_path / "images"), *sizes, *folders, "--methods", *chosen])
    rows = rows_of(tmp_path / "imagenet_width2_classes10_epochs1.csv")
    assert [row["method"] for row in rows] == chosen
    # Each task has 2 classes, and both have 4 images in 10 classes: 12 test images.
    assert all(float(row["joint"]) * 12 / 100 == pytest.approx(round(float(row["joint"]) * 12 / 100), abs=1e-3)
               for row in rows if row["joint"])  # fmt: skip
    assert (
        "30 training and 30 test images; 30 training images"
        in (tmp_path / "imagenet_width2_classes10_epochs1.md").read_text()
    )


def test_chosen_methods_run_alone(tmp_path: Path) -> None:
    folders = ["--output", str(tmp_path), "--networks", str(tmp_path)]
    arguments = ["mnist", "--width", "8", *TINY, "--samples", "100", "--class-cosine", "0", *folders, "--methods"]
    main([*arguments, "average", "weight align + repair"])
    assert [row["method"] for row in rows_of(tmp_path / "mnist_width8_epochs1.csv")] == [
        "average",
        "weight align + repair",
    ]
    assert "mean cosine of 0." in (tmp_path / "mnist_width8_epochs1.md").read_text()
    with pytest.raises(SystemExit, match="the landscape needs the method 'dual align'"):
        main([*arguments, "average", "--landscape-steps", "3"])


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train" / "a" / "image.png").touch()
    with pytest.raises(ValueError, match=r"val must have the classes of .*train: 2, got 1"):
        load_folder(tmp_path, 8)


def test_pretrained_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(4, 3, 7, 7)}, tmp_path / "start.safetensors")
    with pytest.raises(ValueError, match=r"'bn1.weight' of shape \(4,\), got nothing"):
        load_pretrained(EXPERIMENTS["cifar100"]["resnet26"].network(4, 32), tmp_path / "start.safetensors")


def test_augmentation_moves_images_and_repeats() -> None:
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
    plain = torch.cat([inputs for inputs, _ in replace(batches, augment=False)]).flatten(1).argmax(1)
    assert plain.unique().tolist() == [4 * 8 + 4]
    rotated = Transform((0.0,), (255.0,), rotation=30.0).augmented(pixels, torch.Generator().manual_seed(0))
    assert rotated.shape == pixels.shape
    assert not torch.equal(rotated, pixels / 255)


def test_learning_rates_follow_schedules() -> None:
    triangle = Recipe(epochs=10, learning_rate=1.0, batch_size=1, schedule="triangle", warm_up=2)
    assert triangle.rate(9, 5) == 1.0
    assert triangle.rate(49, 5) == pytest.approx(1 / 40)
    cosine = Recipe(epochs=10, learning_rate=1.0, batch_size=1, schedule="cosine")
    assert cosine.rate(0, 5) == 1.0
    assert cosine.rate(25, 5) == pytest.approx(0.5)


def test_tables_show_mean_and_deviation_over_pairs() -> None:
    rows = [{"pair": str(pair), "method": "average", "mean": f"{value}"} for pair, value in enumerate((50.0, 52.0))]
    assert "| average | 2 | 51.00 ± 1.41 | 83.09 |" in table("title", [], rows, {"average": 83.09})


def test_other_experiments_need_data(tmp_path: Path) -> None:
    for name in ("cifar10", "taskonomy"):
        with pytest.raises(SystemExit, match="--data is required"):
            main([name, "--output", str(tmp_path)])


def test_images_are_center_cropped_and_resized_without_augmentation() -> None:
    pixels = torch.zeros(1, 1, 8, 8)
    pixels[:, :, 2:6, 2:6] = 255
    transform = Transform((0.0,), (255.0,), crop=4, resize=8)
    torch.testing.assert_close(transform.plain(pixels), torch.ones(1, 1, 8, 8))
    crops = Transform((0.0,), (255.0,), crop=4).augmented(pixels.expand(40, 1, 8, 8), torch.Generator().manual_seed(0))
    assert crops.shape == (40, 1, 4, 4)
    assert crops.flatten(1).sum(1).unique().numel() > 3
