"""Merging encoders, and scoring them through the decoders of their tasks."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mudsc_fast
from architectures import randomize
from mudsc_fast.matching.verify import keeps_outputs
from paper import methods, taskonomy
from paper.__main__ import main
from paper.resnets import ClassDecoder, PixelDecoder, TaskonomyEncoder

WIDTH, SIZE, COUNT = 4, 32, 24
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "class_object": lambda: ClassDecoder(2, WIDTH),
    "depth": lambda: PixelDecoder(1, WIDTH),
    "normal": lambda: PixelDecoder(3, WIDTH),
}


def write_experiment(folder: Path) -> None:
    """Write random networks for three tasks, and data with the outputs of the networks as targets."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2 * COUNT, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    batches = list(taskonomy.Part(pixels, {}).batches(None, COUNT, torch.device("cpu")))
    arrays: dict[str, Any] = {"rgb": pixels.numpy()}
    for seed, (task, make) in enumerate(DECODERS.items()):
        torch.manual_seed(seed)
        encoder, decoder = TaskonomyEncoder(WIDTH), randomize(make(), seed).eval()
        mudsc_fast.reset_batch_norm(encoder, batches[:1])
        encoder.eval()
        with torch.no_grad():
            if isinstance(decoder, ClassDecoder):
                # so that both classes occur and the logits are far apart
                decoder.fc2.weight.mul_(1000)
                decoder.fc2.bias.sub_(decoder(encoder(batches[0])).mean(0))
            outputs = torch.cat([decoder(encoder(batch)) for batch in batches])
        arrays[task] = (outputs.argmax(1) if outputs.ndim == 2 else outputs).numpy()
        save_file(nn.ModuleDict({"encoder": encoder, "decoder": decoder}).state_dict(), folder / f"{task}.safetensors")
    np.savez(folder / "train.npz", **{name: array[:COUNT] for name, array in arrays.items()})
    np.savez(folder / "test.npz", **{name: array[COUNT:] for name, array in arrays.items()})


@pytest.mark.filterwarnings("ignore:.*more inputs than there are samples:UserWarning")
def test_encoders_are_merged_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "BALANCES", (0.5,))
    write_experiment(tmp_path)
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
    write_experiment(tmp_path)
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
