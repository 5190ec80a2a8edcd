"""Error messages of the command for bad input. It leaves no files behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import mudsc_fast
from mudsc_fast import cli
from mudsc_fast._forward import FORWARD_HINT
from mudsc_fast.command.terminal import as_options
from mudsc_fast.io import CheckpointError, atomic_path, merge_checkpoints, open_checkpoint, writing
from mudsc_fast.io.writing import parse_size
from networks import MLP_SPEC, make_mlp
from test_command_files import HUGGING_FACE, failure, gpt2_model, llama_model, run, save_mlps, save_pair, vit_model


def damaged_file(folder: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    source = folder / f"a{Path(name).suffix}"
    path = folder / name
    path.write_bytes(change(source.read_bytes()))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "change", [lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b[:6], lambda b: b[:0], lambda b: b"x" * len(b)]
)
def test_damaged_files(
    suffix: str, change: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, _ = save_mlps(tmp_path, suffix)
    bad = damaged_file(tmp_path, f"bad{suffix}", change)
    for inputs in ((a, bad), (bad, a)):
        shown = failure(capsys, tmp_path, "merge", *inputs, "--output", tmp_path / "out")
        assert f"{bad}: not a complete " in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict (tensors by name), got list"),
        ({"w": torch.ones(2), "epoch": 3}, "expected a state dict (tensors by name), got int at 'epoch'"),
        ({3: torch.ones(2)}, "expected a state dict (tensors by name), got a dict with the key 3"),
        (
            {"actor": {"w": torch.ones(2)}, "critic": {"w": torch.ones(2)}},
            "contains several state dicts, at 'actor', 'critic': save the one to use in",
        ),
        ({}, "contains no tensors"),
        (make_mlp(), "contains a Python object of the class torch.nn.modules.container.Sequential. Files are read"),
    ],
)
def test_other_files_are_rejected(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, _ = save_mlps(tmp_path, ".pt")
    torch.save(content, tmp_path / "bad.pt")
    assert message in failure(capsys, tmp_path, "merge", a, tmp_path / "bad.pt", "--output", tmp_path / "out")


def test_paths_without_checkpoint_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = save_mlps(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, message in {
        "nowhere.pt": "no such file or directory",
        "text.txt": "not a checkpoint: expected a .safetensors file, a file of torch.save",
        "empty": "not a checkpoint: expected model.safetensors, pytorch_model.bin, an index of shards",
        "adapter": "contains an adapter, not a whole network",
    }.items():
        shown = failure(capsys, tmp_path, "merge", a, tmp_path / name, "--output", tmp_path / "out")
        assert f"{tmp_path / name}: {message}" in shown


def test_missing_or_damaged_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_pair(tmp_path, gpt2_model, max_shard_size="20KB")
    shards = sorted((tmp_path / "b").glob("model-*.safetensors"))
    arguments = ("merge", a, b, "--output", tmp_path / "out")
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    assert f"{shards[1]}: not a complete safetensors file" in failure(capsys, tmp_path, *arguments)
    shards[1].unlink()
    message = f"{b}: 1 of {len(shards)} shards are missing: {shards[1].name}"
    assert message in failure(capsys, tmp_path, *arguments)
    shutil.copy(shards[0], shards[1])
    assert "is missing, but" in failure(capsys, tmp_path, *arguments)
    index = tmp_path / "b" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../a/x.safetensors"}}')
    assert "shards must be in the same directory" in failure(capsys, tmp_path, *arguments)
    index.write_text('{"weight_map": [1]}')
    assert "weight_map must map" in failure(capsys, tmp_path, *arguments)
    index.write_text("{")
    assert "cannot be read as JSON" in failure(capsys, tmp_path, *arguments)


def change_tensors(path: str, change: Callable[[dict[str, Any]], object]) -> None:
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            lambda state: state.update(extra=state.pop("fc2.bias")),
            ["'fc2.bias' is not in {b}", "'extra' is not in {a}"],
        ),
        (
            lambda state: state.update({"fc3.weight": torch.ones(7, 32)}),
            ["'fc3.weight' has shape [10, 32] in {a}, but [7, 32] in {b}"],
        ),
        (
            lambda state: state.update({"fc1.bias": state["fc1.bias"].half()}),
            ["'fc1.bias' has dtype torch.float32 in {a}, but torch.float16 in {b}"],
        ),
        (lambda state: state["fc1.bias"].fill_(float("nan")), ["'fc1.bias'", "must be finite, got nan at (0,)"]),
        (
            lambda state: state.update({f"extra.{index}": torch.ones(1) for index in range(40)}),
            ["'extra.0' is not in {a}", "... and 20 more"],
        ),
    ],
)
def test_networks_that_differ(
    change: Callable[[dict[str, Any]], object],
    messages: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a, b = save_mlps(tmp_path)
    change_tensors(b, change)
    shown = failure(capsys, tmp_path, "merge", a, b, "--output", tmp_path / "out")
    for message in messages:
        assert message.format(a=a, b=b) in shown


def test_architectures_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = save_pair(tmp_path, vit_model)
    llama_model().save_pretrained(tmp_path / "llama")
    arguments = ("merge", a, tmp_path / "llama", "--output", tmp_path / "out")
    assert "model_type is 'vit' in one config.json and 'llama' in the other" in failure(capsys, tmp_path, *arguments)
    # The same number of entries, but other heads.
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    arguments = ("merge", a, tmp_path / "b", "--output", tmp_path / "out")
    assert "their configurations describe different architectures" in failure(capsys, tmp_path, *arguments)


@pytest.mark.parametrize("kind", ["tokenizer.json", "unigram", "vocab.json", "vocab.txt"])
def test_tokenizers_that_differ(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_pair(tmp_path, gpt2_model)

    def write(folder: str, words: list[str]) -> None:
        numbers = {word: number for number, word in enumerate(words)}
        content = {
            "tokenizer.json": json.dumps({"model": {"vocab": numbers}, "added_tokens": []}),
            "unigram": json.dumps({"model": {"vocab": [[word, -1.0] for word in words]}}),
            "vocab.json": json.dumps(numbers),
            "vocab.txt": "\n".join(words),
        }[kind]
        (tmp_path / folder / ("tokenizer.json" if kind == "unigram" else kind)).write_text(content)

    write("a", ["one", "two", "three"])
    write("b", ["one", "three", "two"])
    shown = failure(capsys, tmp_path, "merge", a, b, "--output", tmp_path / "out")
    assert "their tokenizers differ: token 1 is 'two' in one and 'three' in the other" in shown
    write("b", ["one", "two", "three", "more"])
    run("merge", a, b, "--output", tmp_path / "out", "--quiet")


def test_specifications_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_mlps(tmp_path)
    spec, output = tmp_path / "spec.json", tmp_path / "out.safetensors"
    arguments = ("merge", a, b, "--output", output, "--spec", spec)
    assert f"{spec}: cannot be read: No such file" in failure(capsys, tmp_path, *arguments)
    spec.write_text("{")
    assert f"{spec}: " in failure(capsys, tmp_path, *arguments)
    mudsc_fast.spec.vit(1, 1, 4).save(spec)
    assert f"{spec} does not fit the tensors:" in failure(capsys, tmp_path, *arguments)
    spec.unlink()
    MLP_SPEC.save(spec)
    run(*arguments, "--quiet")
    assert output.exists()


def no_batches() -> list[Any]:
    return []


def nothing() -> None:
    return None


def broken() -> Iterator[torch.Tensor]:
    yield torch.ones(3, 20)
    raise RuntimeError("the disk of the data is gone")


def narrow() -> list[torch.Tensor]:
    return [torch.ones(3, 19)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "activation"], "the activation space needs batches to run the models on: pass --data"),
        (["--data", "nothing"], "--data must be MODULE:FUNCTION, got 'nothing'"),
        (["--data", "no_such_module:f"], "import of 'no_such_module' for --data failed: ModuleNotFoundError"),
        (["--data", "networks:f"], "--data: the module 'networks' has no function 'f'"),
        (["--data", f"{__name__}:nothing"], "must return batches to iterate over, got NoneType"),
        (["--data", f"{__name__}:no_batches"], "has no config.json: pass --model, a function that builds the model"),
        (["--data", f"{__name__}:no_batches", "--model", "networks:make_mlp"], "must yield at least one batch"),
        (["--data", f"{__name__}:broken", "--model", "networks:make_mlp"], "the disk of the data is gone"),
        (["--data", f"{__name__}:narrow", "--model", "networks:make_mlp"], "Sequential cannot run on batch 0"),
        (
            ["--data", f"{__name__}:narrow", "--model", "networks:make_mlp", "--spec", "mlp"],
            "running the networks on the data failed",
        ),
        (["--data", f"{__name__}:narrow", "--model", f"{__name__}:nothing"], "must return a torch.nn.Module, got None"),
        (["--data", f"{__name__}:narrow", "--model", "networks:ConvNet", "--spec", "mlp"], "does not fit the model"),
        (["--weights", "1,x"], "--weights must be numbers with commas between, got '1,x'"),
        (["--weights", "0.5,0.6"], "weights must be at least 0 and sum to 1"),
        (["--balance", "2"], "balance must be in [0, 1], got 2.0"),
        (["--format", "torch"], "this suffix means a safetensors file, but the format is torch"),
        (["--shard-size", "1GB"], "a single file has no shards"),
        (["--report", "no/such/directory/report.json"], "must be a file in a directory that exists"),
    ],
)
def test_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_mlps(tmp_path)
    command = ["merge", a, b, "--output", str(tmp_path / "out.safetensors")]
    assert message in failure(capsys, tmp_path, *command, *arguments)


def test_debug_shows_traceback(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        cli.main(["merge", "nowhere.pt", "nowhere.pt", "--output", str(tmp_path / "out"), "--debug"])


def test_existing_output_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_mlps(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("empty", "link", "b.safetensors"):
        shown = failure(capsys, tmp_path, "merge", a, b, "--output", tmp_path / name)
        assert f"{tmp_path / name}: already exists: give another output" in shown
    shown = failure(capsys, tmp_path, "merge", a, b, "--output", tmp_path / "no" / "out")
    assert f"{tmp_path / 'no'}: no such directory: create it to write out in it" in shown


def test_without_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = save_pair(tmp_path, vit_model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = ("merge", a, b, "--output", tmp_path / "out", "--data", f"{__name__}:narrow")
    assert "needs transformers: pip install transformers" in failure(capsys, tmp_path, *arguments)
    run("align", a, b, "--output", tmp_path / "out")
    assert "were not compared: transformers is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["out", "out.safetensors", "out.pt"])
def test_file_size_limit(output: str, tmp_path: Path) -> None:
    """Writing more than 20 kB to a file fails, as on a full disk."""
    a, b = save_mlps(tmp_path, widths=(20, 64, 64, 10))
    before = sorted(tmp_path.iterdir())
    script = textwrap.dedent(
        """
        import resource, sys
        from mudsc_fast import cli
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        sys.exit(cli.main(sys.argv[1:]))
        """
    )
    command = [sys.executable, "-c", script, "merge", a, b, "--output", str(tmp_path / output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"cannot write {tmp_path / output}: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("has_call", [True, False])
def test_all_is_flushed_before_the_output_appears(
    has_call: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = save_pair(tmp_path, HUGGING_FACE["bert"])
    flushed: list[str] = []

    def flush(descriptor: int, fsync: Any = os.fsync) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert (path == tmp_path) == (tmp_path / "out").exists()
        flushed.append(path.name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(writing, "_FLUSHED_BYTES", 1000)
    if not has_call:
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    merge_checkpoints([a, b], tmp_path / "out")
    assert sorted(flushed) == sorted([*os.listdir(tmp_path / "out"), "out", tmp_path.name])


@pytest.mark.parametrize("when", ["copying", "flushing"])
def test_full_disk(
    when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = save_pair(tmp_path, HUGGING_FACE["bert"])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if when == "flushing":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(shutil, "copyfile", full)
    shown = failure(capsys, tmp_path, "merge", a, b, "--output", tmp_path / "out")
    assert f"cannot write {tmp_path / 'out'}: No space left on device" in shown


def test_interrupt_leaves_no_output(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_path(tmp_path / "out") as temporary:
            temporary.mkdir()
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_output_created_meanwhile_is_kept(tmp_path: Path) -> None:
    def overtaken() -> None:
        with atomic_path(tmp_path / "out") as temporary:
            temporary.write_text("new")
            (tmp_path / "out").write_text("old")

    with pytest.raises(CheckpointError, match="exists"):
        overtaken()
    assert (tmp_path / "out").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_files_of_old_versions_of_torch(tmp_path: Path) -> None:
    state = make_mlp().state_dict()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert all(torch.equal(open_checkpoint(tmp_path / "old.pt").tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("output", ["out.safetensors", "out.pt"])
def test_tensors_of_every_kind(output: str, tmp_path: Path) -> None:
    state = {
        **make_mlp().state_dict(),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scale": torch.tensor(2.0, dtype=torch.float64),
    }
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    merge_checkpoints([tmp_path / "a.safetensors"] * 2, tmp_path / output, spec=MLP_SPEC)
    merged = open_checkpoint(tmp_path / output).tensors
    assert set(merged) == set(state)
    for name, tensor in state.items():
        assert merged[name].dtype == tensor.dtype
        assert merged[name].shape == tensor.shape
        torch.testing.assert_close(merged[name], tensor)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("10", 10), ("2mb", 2 * 10**6), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", "1e3"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 200MB, a positive number with B, KB"):
        parse_size(text)


@pytest.mark.slow
def test_memory_does_not_grow_with_model_size(tmp_path: Path) -> None:
    """Merges two networks of 151 MB; neither they nor the result are ever in memory as a whole.

    Pages of mapped files count as resident memory until the system reclaims them, so the test measures only
    memory that is not backed by a file, every few milliseconds.
    """
    width, layers = 1024, 36
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        state = {
            f"{index}.weight": torch.randn(width, width, generator=generator) / width**0.5 for index in range(layers)
        }
        safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    del state
    script = textwrap.dedent(
        """
        import sys, threading, time
        import mudsc_fast.io, torch
        from mudsc_fast import cli

        torch.set_num_threads(1)

        def held():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

        most = begin = held()
        done = threading.Event()

        def watch():
            global most
            while not done.wait(0.003):
                most = max(most, held())

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = cli.main(sys.argv[1:])
        done.set()
        watcher.join()
        print((most - begin) // 1024)
        sys.exit(status)
        """
    )
    for output in ("out.safetensors", "out.pt"):
        inputs = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
        command = [sys.executable, "-c", script, "merge", *inputs, "--output", str(tmp_path / output)]
        done = subprocess.run([*command, "--quiet", "--max-sweeps", "1"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / output).stat().st_size > 150 * 10**6
        # Layers and their similarity take 4 to 8 MB; sums of a few nodes are kept between visits: 80 to 130 MB by the
        # heap's holes. The models take 302 MB.
        assert int(done.stdout) < 160
        (tmp_path / output).unlink()


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("pass spec='mlp', else pass data", "pass --spec mlp, else pass --data"),
        ("weights must sum to 1", "--weights must sum to 1"),
        ("a.pt: task_heads needs a directory", "a.pt: --task-heads needs a directory"),
        ("pass dequantize=True to mudsc_fast.io.merge_checkpoints, or", "pass --dequantize, or"),
        ("has no config.json: pass build=, a function", "has no config.json: pass --model, a function"),
        ("add ignore='a b*'", "add --ignore 'a b*'"),
        ("3 weights differ: weights are averaged", "3 weights differ: weights are averaged"),
        ("Pass data and the models as modules: the", "Pass --data and --model: the"),
        ("pass spec: a PermutationSpec, the path of", "pass --spec: the path of"),
        (f"Pass batches that the model takes{FORWARD_HINT}", "Pass batches that the model takes"),
    ],
)
def test_messages_name_options(message: str, shown: str) -> None:
    assert as_options(message) == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--json", "a"], "unrecognized arguments: --json"),
        (["merge", "a", "--output", "o"], "expected two or more networks to merge, got 1: a"),
        (["merge", "a", "b"], "the following arguments are required: --output"),
        (["merge", "a", "b", "--output", "o", "--mode", "x"], "argument --mode: invalid choice: 'x'"),
    ],
)
def test_wrong_arguments_are_an_error_of_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"mudsc-fast {arguments[0]}: error: {message}")
    assert shown.endswith(f"(mudsc-fast {arguments[0]} --help shows the options)\n")
    assert shown.count("\n") == 1
