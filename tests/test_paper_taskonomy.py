"""Merging encoders, and scoring them through the decoders of their tasks."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from architectures import randomize
from mudsc_fast.matching.verify import keeps_outputs
from paper import made_up, methods, taskonomy
from paper.__main__ import main
from paper.resnets import PixelDecoder, TaskonomyEncoder

WIDTH, SIZE, COUNT = 4, 32, 24
SIZES = ["--width", str(WIDTH), "--size", str(SIZE), "--images", str(COUNT)]


@pytest.mark.filterwarnings("ignore:.*more inputs than there are samples:UserWarning")
def test_encoders_are_merged_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "BALANCES", (0.5,))
    made_up.main(["taskonomy", str(tmp_path), *SIZES])
    arguments = ["taskonomy", "--data", str(tmp_path), "--networks", str(tmp_path), "--output", str(tmp_path)]
    sizes = ["--width", str(WIDTH), "--batch-size", str(COUNT), "--device", "cpu"]
    chosen = ["parents", "ensemble", "average", "weight align", "dual align + refit", "activation zip", "dual zip"]
    main([*arguments, *sizes, "--pairs", "1", "--methods", *chosen])
    with open(tmp_path / "taskonomy_width4.csv", newline="", encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == chosen
    assert float(rows["parents"]["mean"]) == pytest.approx(100)
    for method, row in rows.items():
        assert float(row["mean"]) <= 100.01, method
        assert float(row["mean"]) == pytest.approx((float(row["task 1"]) + float(row["task 2"])) / 2, abs=0.02)
    text = (tmp_path / "taskonomy_width4.md").read_text()
    assert "3 tasks, 1 pairs (published: 66)" in text
    assert "class_object, depth, normal" in text


def test_encoder_has_published_shapes() -> None:
    with torch.device("meta"):
        encoder = TaskonomyEncoder()
        maps = encoder(torch.empty(1, 3, 256, 256))
        image = PixelDecoder(3)(maps)
    assert maps.shape == (1, 8, 16, 16)
    assert image.shape == (1, 3, 256, 256)
    # ResNet-50 without its last layer, the projection and its norm.
    assert sum(value.numel() for value in encoder.parameters()) == 23_508_032 + 2048 * 8 * 9 + 16


def test_specification_keeps_output_channels_in_order() -> None:
    encoder = randomize(TaskonomyEncoder(WIDTH, blocks=(1, 1, 1, 1)), 0).eval()
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    spec = taskonomy.encoder_spec(encoder, images)
    assert "compress1.weight" in spec.layouts
    assert keeps_outputs(encoder, spec, images)


def test_scaled_score_is_0_for_average_estimator_and_100_for_own_encoder() -> None:
    assert taskonomy.scaled_score(4.0, average=4.0, own=1.0) == 0
    assert taskonomy.scaled_score(1.0, average=4.0, own=1.0) == 100
    assert taskonomy.scaled_score(2.0, average=4.0, own=1.0) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("train", "targets", "loss"),
    [
        (torch.tensor([[[[0.0]]], [[[2.0]]]]), torch.tensor([[[[4.0]]]]), 3.0),
        (torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1]), -(np.log(0.75) + np.log(0.25)) / 2),
    ],
)
def test_average_estimator_predicts_mean_target(train: Tensor, targets: Tensor, loss: float) -> None:
    assert taskonomy.average_loss(train, targets) == pytest.approx(loss, rel=1e-6)


def test_networks_worse_than_average_estimator_are_rejected(tmp_path: Path) -> None:
    made_up.main(["taskonomy", str(tmp_path), *SIZES])
    with np.load(tmp_path / "test.npz") as file:
        arrays = dict(file)
    with np.load(tmp_path / "train.npz") as file:
        arrays["depth"] = np.broadcast_to(file["depth"].mean(0), arrays["depth"].shape)
    np.savez(tmp_path / "test.npz", **arrays)
    arguments = ["--data", str(tmp_path), "--networks", str(tmp_path), "--output", str(tmp_path), "--device", "cpu"]
    with pytest.raises(ValueError, match="'depth' must be better than the average estimator"):
        main(["taskonomy", "--width", str(WIDTH), "--batch-size", str(COUNT), *arguments])


def test_data_of_other_shapes_is_rejected(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", rgb=np.zeros((3, 8, 8, 3), np.uint8), a=np.zeros(3, np.int64), b=np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"must have 'b' as floats \[3, C, H, W\] or integers \[3\]"):
        taskonomy.load_part(tmp_path / "train.npz")
