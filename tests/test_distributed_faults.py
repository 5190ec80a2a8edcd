"""Failures of one of several processes, and runs that resume an interrupted one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

import mudsc_fast
from mudsc_fast.cli import main
from mudsc_fast.command.torchrun import process_group
from mudsc_fast.distributed import DistributedError
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.io import CheckpointError, merge_checkpoints, writing
from mudsc_fast.matching import sharing, sweep
from networks import MLP_SPEC, make_mlp
from processes import TIMEOUT, run_command, run_processes
from test_distributed import llama_spec, llama_tensors

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not hasattr(signal, "SIGKILL"), reason="needs torch.distributed and signals"
)

KILLED = -int(getattr(signal, "SIGKILL", 9))
PHASES = ["statistics", "sweeps", "writing"]


def batches(shares: int = 1, rank: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(samples, 20, generator=generator) for samples in (16, 7, 30, 9)][rank::shares]


def save_networks(folder: Path) -> list[Path]:
    """Write two MLPs, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.safetensors" for name in "ab"]
    for seed, path in enumerate(paths):
        save_file(make_mlp(seed=seed).state_dict(), path)
    return paths


def merge_files(folder: Path, data: Any, **options: Any) -> Any:
    paths = [folder / f"{name}.safetensors" for name in "ab"]
    return merge_checkpoints(
        paths, folder / "merged", spec=MLP_SPEC, data=data, build=make_mlp, checkpoint=folder / "checkpoint", **options
    )


def merged_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def merge_and_kill(rank: int, folder: Path, phase: str, victim: int | None) -> None:
    """Merge in two processes, kill one or both of them, and write the error that the other one reports."""
    data: Any = batches(2, rank)
    if victim in (rank, None):
        if phase == "statistics":
            data = batches_that_kill(data)
        elif phase == "sweeps":
            kill_in_third_sweep()
        else:
            kill_while_writing()
    try:
        merge_files(folder, data, group=distributed.group.WORLD)
    except DistributedError as error:
        (folder / "report.txt").write_text(f"{error.reporter} {error}", encoding="utf-8")


def batches_that_kill(data: list[Tensor]) -> Iterator[Tensor]:
    yield data[0]
    kill()


def kill_in_third_sweep() -> None:
    """Kill this process in its third sweep."""
    waves, calls = sweep.waves, itertools.count()

    def killing(*arguments: Any) -> Any:
        if next(calls) == 2:
            kill()
        return waves(*arguments)

    sweep.waves = killing  # type: ignore[assignment]


def kill_while_writing() -> None:
    """Kill this process after the first tensor of a shard."""
    contents = writing._contents

    def killing(*arguments: Any) -> Iterator[memoryview]:
        yield next(contents(*arguments))
        kill()

    writing._contents = killing  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("phase", "victim"), [("statistics", 1), ("sweeps", 0), ("writing", 1), ("writing", 0), ("writing", None)]
)
def test_killed_run_can_be_resumed(phase: str, victim: int | None, tmp_path: Path) -> None:
    save_networks(tmp_path)
    codes = run_processes(merge_and_kill, 2, tmp_path, phase, victim)
    left = {path.name for path in tmp_path.iterdir()}
    if victim is None:
        assert codes == [KILLED, KILLED]
        assert [name for name in left if name.endswith(".partial")]
    else:
        assert codes[victim] == KILLED
        report = (tmp_path / "report.txt").read_text(encoding="utf-8")
        assert report.startswith(f"{1 - victim} rank {victim} was killed")
        assert left <= {"a.safetensors", "b.safetensors", "checkpoint", "report.txt", "rendezvous"}
    kept = {path.name for path in (tmp_path / "checkpoint").iterdir() if not path.name.startswith(".")}
    assert kept == {"inputs.json"} | (set() if phase == "statistics" else {"statistics.pt", "sweeps.pt"})

    read = []

    def data() -> Iterator[Tensor]:
        for batch in batches():
            read.append(batch)
            yield batch

    resumed = merge_files(tmp_path, data())  # in one process instead of two
    assert not list(tmp_path.glob(".*.partial"))
    assert len(read) == (4 if phase == "statistics" else 0)
    whole = merge_checkpoints(
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
        tmp_path / "whole",
        spec=MLP_SPEC,
        data=batches(),
        build=make_mlp,
    )
    assert resumed.objectives == pytest.approx(whole.objectives, abs=1e-6)
    for node, matched in whole.matching.items():
        assert resumed.matching[node].same_clusters(matched)
    torch.testing.assert_close(
        merged_tensors(tmp_path / "merged"), merged_tensors(tmp_path / "whole"), rtol=0, atol=1e-6
    )


def test_output_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".merged.other.partial").mkdir()  # has no lock file, so it is not an unfinished output

    def write_at_once() -> None:
        with writing.atomic_path(tmp_path / "merged") as first:
            first.mkdir()
            with writing.atomic_path(tmp_path / "merged") as second:
                assert first.is_dir()
                second.mkdir()

    with pytest.raises(CheckpointError, match="already exists"):
        write_at_once()
    assert {path.name for path in tmp_path.iterdir()} == {"merged", ".merged.other.partial"}


def several_failures(rank: int, folder: Path) -> None:
    """Cause failures after which the group still works, and write what each rank reports."""
    group = distributed.group.WORLD
    states = [make_mlp(seed=seed).state_dict() for seed in (0, 1)]
    found: dict[str, list[str]] = {}

    def attempt(name: str, models: Any, data: Any = None, **options: Any) -> None:
        try:
            mudsc_fast.merge(models, data, group=group, **{"spec": MLP_SPEC, **options})
            found[name] = ["none"]
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]

    attempt("different seeds", states, random_state=rank)
    attempt("different specs", states, spec=MLP_SPEC.without(["fc2.bias"]) if rank else MLP_SPEC)
    models = [states[0], make_mlp(seed=5).state_dict()] if rank else states
    attempt("different weights", models)
    attempt("invalid balance on one rank", states, **({"balance": 2.0} if rank else {}))
    attempt("same error on all ranks", states, balance=2.0)
    attempt("different numbers of models", [*states, states[0]] if rank else states)
    infinite = [dict(state) for state in states]
    infinite[1] = {name: tensor.clone() for name, tensor in states[1].items()}
    infinite[1]["fc2.weight"][0, 0] = float("inf")
    attempt("infinite weight", infinite)
    modules: Any = [make_mlp(seed=seed) for seed in (0, 1)]
    attempt("no data", modules, [])
    attempt("batch of the wrong shape", modules, [torch.randn(4, 20), torch.randn(4, 19 if rank else 20)])
    attempt("data on one rank", modules, None if rank else [torch.randn(4, 20)])
    attempt("checkpoint on one rank", states, checkpoint=None if rank else folder / "checkpoint")
    attempt("no error", modules, [torch.randn(4, 20)] if rank else [])
    compute, sharing._MIN_SAMPLES_OF_ROWS = sharing.SharingRows.compute, 1
    for role in ("helper", "holder"):

        def fail(self: Any, task: sharing.Task, role: str = role) -> Any:
            if rank == 1 and (task.holder == 1) == (role == "holder"):
                raise MemoryError("nothing left")
            return compute(self, task)

        sharing.SharingRows.compute = fail  # type: ignore[method-assign]
        attempt(f"failure of a {role}", [llama_tensors(0), llama_tensors(1)], spec=llama_spec())
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def test_all_ranks_report_the_failure_of_one(tmp_path: Path) -> None:
    assert run_processes(several_failures, 2, tmp_path) == [0, 0]
    reports = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    out_of_memory = "rank 1 failed while matching units: MemoryError: nothing left"
    both = "ValueError", "all ranks must be given the same "
    expected = {
        "different seeds": (both[0], both[1] + "random_state: got 0 on rank 0, but 1 on rank 1"),
        "different specs": (both[0], both[1] + "spec: got with checksum "),
        "different weights": (both[0], both[1] + "models[1]: got tensors with checksum "),
        "invalid balance on one rank": (
            "DistributedError",
            "rank 1 failed while checking the arguments: ValueError: balance must be in [0, 1], got 2.0",
        ),
        "same error on all ranks": ("ValueError", "balance must be in [0, 1], got 2.0"),
        "different numbers of models": (both[0], both[1] + "number of models: got 2 on rank 0, but 3 on rank 1"),
        "no data": ("ValueError", "data must yield at least one batch, got none on any rank"),
        "data on one rank": (both[0], both[1] + "kind of data: got batches on rank 0, but None on rank 1"),
        "checkpoint on one rank": (both[0], both[1] + "checkpoint: got "),
        "no error": ("none",),
        "failure of a helper": ("DistributedError", out_of_memory),
        "failure of a holder": ("DistributedError", out_of_memory),
    }
    for name, (kind, *text) in expected.items():
        for report in reports:
            assert report[name][0] == kind, (name, report[name])
            assert report[name][1:] == text or report[name][1].startswith(text[0]), (name, report[name])
    for report in reports:
        kind, text = report["infinite weight"]
        assert kind == "DistributedError"
        assert "failed while checking the tensors: ValueError: 'fc2.weight' of models[1]" in text
        kind, text = report["batch of the wrong shape"]
        assert kind == "DistributedError"
        assert text.startswith("rank 1 failed while running the models on the data: ")


def failure_that_others_wait_for(rank: int, folder: Path) -> None:
    """Fail in a step in which the other process waits for this one, as with FSDP2, and write what both report."""
    ranks = Ranks(distributed.new_group([0, 1], timeout=timedelta(seconds=3)))
    try:
        with ranks.step("running the models"):
            if rank == 1:
                raise ValueError("batch 2 has the wrong shape")
            ranks.receive([torch.empty(1)], 1, "running the models")
    except DistributedError as error:
        (folder / f"{rank}.txt").write_text(str(error), encoding="utf-8")


def test_failure_that_others_wait_for_is_named(tmp_path: Path) -> None:
    run_processes(failure_that_others_wait_for, 2, tmp_path)
    for rank in (0, 1):
        report = (tmp_path / f"{rank}.txt").read_text(encoding="utf-8")
        assert report.startswith("rank 1 failed while running the models: ValueError: batch 2 has the wrong shape")


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process look like the second of two that torchrun started."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
def test_processes_that_cannot_start_together_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("connection refused\nbacktrace")

    monkeypatch.setattr(distributed, "init_process_group", fail)
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(DistributedError, match=r"rank 1 cannot reach the other processes: connection refused\. Check"),
        process_group(None, torch.device("cpu")),
    ):
        raise AssertionError("there is no group")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(KeyboardInterrupt(), 130, ""), (PermissionError("no access"), 2, "mudsc-fast merge: error: rank 1: no access\n")],
)
def test_errors_before_there_is_a_group_name_their_rank(
    error: BaseException,
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("mudsc_fast.command.torchrun.device", fail)
    assert main(["merge", "a", "b", "--output", str(tmp_path / "merged")]) == code
    assert capsys.readouterr().err == text


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    return subprocess.run(
        [sys.executable, *start, "--rdzv-endpoint", "localhost:0", "-m", "mudsc_fast", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


def save_directories(folder: Path) -> None:
    for seed, name in enumerate("ab"):
        (folder / name).mkdir()
        save_file(make_mlp(seed=seed).state_dict(), folder / name / "model.safetensors")
        (folder / name / "notes.txt").write_text("copied to the output", encoding="utf-8")
    MLP_SPEC.save(folder / "spec.json")


@pytest.mark.slow
def test_torchrun_writes_the_same_directory_as_one_process(tmp_path: Path) -> None:
    save_directories(tmp_path)
    ran = torchrun(tmp_path, "merge", "a", "b", "--spec", "spec.json", "--output", "merged", "--report", "report.json")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("2 nodes matched") == 1
    assert "2 ranks, with" in ran.stdout
    single = merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "single", spec=MLP_SPEC)
    found = merged_tensors(tmp_path / "merged")
    expected = merged_tensors(tmp_path / "single")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == single.num_bytes
    assert (tmp_path / "merged" / "notes.txt").exists()
    assert (tmp_path / "merged" / "README.md").exists()
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(report["distribution"]["sweep_bytes"]) == len(report["objectives"])
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]

    again = run_command(["merge", "a", "b", "--spec", "spec.json", "--output", "merged"], 2, tmp_path)
    assert again.returncode != 0
    assert again.stderr.count("already exists") == 1
    tensors = make_mlp(seed=1).state_dict()
    tensors["fc2.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    failed = run_command(["merge", "a", "b", "--spec", "spec.json", "--output", "other"], 2, tmp_path)
    assert failed.returncode != 0
    assert failed.stderr.count("'fc2.weight' of models[1] must be finite") == 1
    assert "reference cycle" not in failed.stderr


DATA = """
import os, signal, torch

def model():
    from networks import make_mlp
    return make_mlp()

def batches():
    yield torch.randn(4, 20)
    yield torch.randn(4, 20)
    yield torch.randn(4, 20)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_torchrun_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    save_directories(tmp_path)
    (tmp_path / "my_data.py").write_text(DATA, encoding="utf-8")
    options = ("--spec", "spec.json", "--model", "my_data:model", "--data", "my_data:batches")
    ran = run_command(["merge", "a", "b", *options, "--output", "merged", "--timeout", "100"], 2, tmp_path)
    assert ran.returncode != 0
    assert ran.stderr.count("mudsc-fast merge: error: rank 1 was killed") == 1
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
