from __future__ import annotations

import pytest
import torch

from conftest import load_golden
from mudsc_fast.matching.node import align_units, zip_all_units


@pytest.mark.parametrize("number", range(4))
def test_golden_alignments(number: int) -> None:
    golden = load_golden(f"align_{number}")
    similarity, num_models = torch.from_numpy(golden["similarity"]), int(golden["num_models"])
    units = similarity.shape[0] // num_models
    blocks = torch.stack([similarity[:units, i * units : (i + 1) * units] for i in range(1, num_models)])
    match = align_units(blocks)
    assert torch.equal(match.cluster_of_unit.flatten(), torch.from_numpy(golden["unmerge"]).argmax(1))
    assert match.similarity == pytest.approx(float(golden["value"]), abs=1e-6)


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_golden_zips(number: int) -> None:
    golden = load_golden(f"zip_{number}")
    match = zip_all_units(
        torch.from_numpy(golden["similarity"]),
        int(golden["num_models"]),
        shrink=float(golden["a"]),
        budget=float(golden["b"]),
    )
    assert torch.equal(match.cluster_of_unit.flatten(), torch.from_numpy(golden["unmerge"]).argmax(1))
    assert match.similarity == pytest.approx(float(golden["value"]), abs=1e-6)


def test_similarity_before() -> None:
    similarity = torch.rand(12, 12)
    blocks = torch.stack([similarity[:4, 4:8], similarity[:4, 8:]])
    expected = float(torch.cat([blocks[0].diagonal(), blocks[1].diagonal()]).double().mean())
    assert align_units(blocks).similarity_before == pytest.approx(expected)
    assert zip_all_units(similarity, 3).similarity_before == pytest.approx(expected)
