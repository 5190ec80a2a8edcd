"""Checkpoints of interrupted runs: changed inputs, and files that cannot be used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mudsc_fast
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.matching.checkpoint import Checkpoint
from networks import MLP_SPEC, make_mlp


def models() -> list[dict[str, Tensor]]:
    return [make_mlp((20, 200, 32, 10), seed=seed).state_dict() for seed in (0, 1)]


def match(folder: Path, state_dicts: Any, data: Any = None, **options: Any) -> mudsc_fast.Matching:
    return mudsc_fast.match(state_dicts, data, spec=MLP_SPEC, checkpoint=folder / "state", **options)


@pytest.mark.parametrize("place", [(0, 0), (57, 11), (199, 19)])
def test_any_changed_entry_is_refused(place: tuple[int, int], tmp_path: Path) -> None:
    match(tmp_path, models())
    changed = models()
    changed[1]["fc1.weight"][place] += 1e-6
    with pytest.raises(ValueError, match=r"belongs to a run with another models\[1\].* another directory to start"):
        match(tmp_path, changed)
    match(tmp_path, models())


def test_kept_statistics_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    modules = [make_mlp(seed=seed) for seed in (0, 1)]
    batches = [torch.randn(50, 20, generator=torch.Generator().manual_seed(1))]
    first = match(tmp_path, modules, batches)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        again = match(tmp_path, modules, [torch.zeros(1, 20)])
    assert f"checkpoint {tmp_path / 'state'} has the statistics of all batches of an earlier run" in caplog.text
    assert all(again[node].same_clusters(first[node]) for node in first)


def test_other_statistics_are_refused(tmp_path: Path) -> None:
    modules = [make_mlp(seed=seed) for seed in (0, 1)]
    one, other = (
        mudsc_fast.collect_statistics(modules, [torch.randn(50, 20)], spec=MLP_SPEC, blocks="cross") for _ in range(2)
    )
    match(tmp_path, modules, one)
    with pytest.raises(ValueError, match="belongs to a run with another statistics as data"):
        match(tmp_path, modules, other)


def test_paths_that_are_no_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match=r"state must be a directory, got a file: give another path"):
        match(tmp_path, models())
    with pytest.raises(TypeError, match="checkpoint must be the path of a directory, got int"):
        mudsc_fast.match(models(), spec=MLP_SPEC, checkpoint=3)  # type: ignore[arg-type]


def test_directory_that_only_other_ranks_see_is_refused(tmp_path: Path) -> None:
    ranks = Ranks()
    ranks.rank = 1  # which writes nothing
    with pytest.raises(ValueError, match="state must be on a file system that all processes share"):
        Checkpoint(tmp_path / "state", {}, ranks)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sweeps.pt", r"sweeps\.pt is damaged: .*Remove it to sweep from the start"),
        ("statistics.pt", r"statistics\.pt must be a file of MatchingStatistics\.save"),
        ("inputs.json", r"state is not one of mudsc_fast: inputs\.json"),
    ],
)
def test_damaged_files_are_named(name: str, message: str, tmp_path: Path) -> None:
    modules = [make_mlp(seed=seed) for seed in (0, 1)]
    batches = [torch.randn(50, 20)]
    match(tmp_path, modules, batches)
    file = tmp_path / "state" / name
    content = file.read_bytes()
    for size in (len(content) // 2, len(content) // 10, 0):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=message):
            match(tmp_path, modules, batches)


def test_full_disk_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unexpected pos 16 vs 0\nbacktrace")  # what torch raises if a write fails

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot write .*sweeps\.pt: is the disk full\? \(unexpected pos 16 vs 0\)"):
        match(tmp_path, models())
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"inputs.json"}
