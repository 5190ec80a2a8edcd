"""Output of the command: help, plans, inspections, model cards, completion and colors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import mudsc_fast
from architectures import randomize
from mudsc_fast import cli
from mudsc_fast.command.arguments import build_parser
from mudsc_fast.command.completion import SHELLS, script
from mudsc_fast.io.inspection import inspect_checkpoint
from networks import make_mlp
from test_builders import SHAPE, TEXT
from test_command_files import failure, gpt2_model, run, save_mlps, save_pair

COMMANDS = ("merge", "align", "inspect", "info", "completion")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"] if command else ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    if command in ("", "merge"):
        assert "mudsc-fast merge bert-a bert-b --output merged" in shown
    if command == "merge":
        for group in ("output:", "matching:", "tensors that differ between the networks:", "messages:"):
            assert f"\n{group}\n" in shown


def test_every_option_is_described_in_a_sentence() -> None:
    parser = build_parser()
    subparsers = next(action for action in parser._actions if action.dest == "command").choices
    assert isinstance(subparsers, dict)
    for subparser in subparsers.values():
        for action in subparser._actions:
            if "--help" not in action.option_strings:
                assert action.help[0].isupper(), action.option_strings
                assert action.help.endswith("."), action.option_strings


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_mlps(tmp_path)
    before = sorted(tmp_path.iterdir())
    run("merge", a, b, "--output", tmp_path / "out", "--dry-run", "--ignore", "fc3.bias")
    shown = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    assert "2 nodes would be matched in 2 networks" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("fc")] == [
        ["fc1", "32", "1", "3"],
        ["fc2", "32", "1", "3"],
    ]
    for text in ("not merged: fc3.bias", "memory: about ", "time: about ", "nothing was written"):
        assert text in shown
    b_state = safetensors.torch.load_file(b)
    safetensors.torch.save_file({**b_state, "fc1.bias": torch.ones(7)}, b)
    assert "'fc1.bias' has shape" in failure(capsys, tmp_path, "merge", a, b, "--output", tmp_path / "o", "--dry-run")


def test_inspection_of_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = save_pair(tmp_path, gpt2_model)
    capsys.readouterr()
    run("inspect", a, "--tensors")
    shown = capsys.readouterr().out
    assert "family   gpt2" in shown
    assert "model    gpt2 (GPT2LMHeadModel)" in shown
    nodes = {line.split()[0]: line.split()[1:3] for line in shown.splitlines() if line.startswith("h.0")}
    assert nodes["h.0.mlp"] == ["128", "1"]
    assert "transformer.h.0.mlp.c_fc.bias" in shown
    assert "[128 (h.0.mlp)]" in shown
    assert "all floating point tensors are in the spec" in shown


def test_inspection_explains_frozen_units(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**SHAPE, **TEXT, num_key_value_heads=2, head_dim=8)
    model: Any = randomize(transformers.Qwen3ForCausalLM(config), seed=0)
    model.save_pretrained(tmp_path / "a")
    found = inspect_checkpoint(tmp_path / "a")
    assert found.family is None
    name = "model.layers.0.self_attn.q_norm.weight"
    assert f"  {name} [8]\n    axis 0: {found.frozen_axes[name][0]}\n" in found.report()


def test_inspection_without_a_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(2, 3), "q": torch.ones(2, 2).to(torch.float8_e5m2)}, tmp_path / "a.pt")
    run("inspect", tmp_path / "a.pt")
    shown = capsys.readouterr().out
    assert "no spec: no family is recognized by the tensor names" in shown
    assert "1 tensors, 'q' is one: merge with --dequantize" in shown
    assert "no such file or directory" in failure(capsys, tmp_path, "inspect", tmp_path / "nowhere.pt")


def test_model_card(tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, gpt2_model)
    run("merge", a, b, "--output", tmp_path / "out", "--weights", "0.6,0.4", "--quiet")
    card = (tmp_path / "out" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert header == ('base_model:\n- "a"\n- "b"\nlibrary_name: transformers\ntags:\n- merge\n- mudsc-fast\n')
    assert f"mudsc-fast merge {a} {b} --output {tmp_path / 'out'} --weights 0.6,0.4 --quiet" in body
    assert mudsc_fast.__version__ in body
    assert "| a | 0.6 |" in body
    rows = {line.split(" | ")[0]: line.split(" | ") for line in body.splitlines() if line.startswith("| h.0")}
    _, units, before, after, gap = rows["| h.0.mlp"]
    assert units == "128"
    assert float(before) < float(after) <= 1
    assert 0 <= float(gap.removesuffix(" |")) < 1e-6


def test_model_card_of_clusters_has_no_gap(tmp_path: Path) -> None:
    a, b = save_mlps(tmp_path)
    run("merge", a, b, "--output", tmp_path / "out", "--mode", "zip", "--quiet")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name" not in card
    row = next(line for line in card.splitlines() if line.startswith("| fc1 |"))
    assert row.endswith("|  |")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_valid(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("completion", shell)
    text = capsys.readouterr().out
    assert text.strip() == script(build_parser(), shell)
    for name in (*COMMANDS, "task-heads", "safetensors"):
        assert name in text
    program = shutil.which(shell)
    if program is not None:
        (tmp_path / "script").write_text(text)
        subprocess.run([program, "-n", tmp_path / "script"], check=True)


def test_bash_completes(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    (tmp_path / "script").write_text(script(build_parser(), "bash"))

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = f"source ./script; COMP_WORDS=(mudsc-fast {line}); COMP_CWORD={len(words)}; _mudsc_fast"
        code += "; echo ${COMPREPLY[*]}"
        done = subprocess.run([bash, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("mer") == ["merge"]
    assert completed("merge", "--task") == ["--task-heads"]
    assert completed("merge", "--mode", "") == ["align", "zip"]
    assert completed("completion", "f") == ["fish"]
    assert completed("merge", "file") == []


def test_colors_only_in_terminals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal, no_color, colored in ((False, "", False), (True, "", True), (True, "1", False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", "xterm")
        assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 2
        assert ("\x1b[1;31merror:\x1b[0m" in capsys.readouterr().err) == colored


def test_quiet_hides_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = save_mlps(tmp_path, ".pt")
    torch.save({"model": make_mlp(seed=1).state_dict(), "ema": make_mlp(seed=2).state_dict()}, tmp_path / "b.pt")
    run("merge", a, tmp_path / "b.pt", "--output", tmp_path / "out.pt", "--quiet")
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
