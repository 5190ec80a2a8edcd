from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import mudsc_fast
from mudsc_fast import _core, cli
from mudsc_fast.kernels.cuda import _device


def test_info_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for fact in (mudsc_fast.__version__, torch.__version__, _core.compiler, "CUDA kernels", "threads", "devices"):
        assert fact in shown
    for op in ("assignment", "zip", "correlation", "permute"):
        assert any(line.startswith(op) and "C++" in line for line in shown.splitlines())


def test_info_explains_why_cuda_is_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for reason in ("no driver", ""):
        monkeypatch.setattr(_device, "unavailable_reason", lambda *_, reason=reason: reason)
        assert cli.main(["info"]) == 0
        shown = capsys.readouterr().out
        assert not reason or "off (no driver)" in shown
        assert (" CUDA " in shown.split("cuda tensors")[1]) == (not reason)


def test_info_follows_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUDSC_ISA", "baseline")
    monkeypatch.setenv("MUDSC_BACKEND", "reference")
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "in use: baseline" in shown
    assert "C++" not in shown


@pytest.mark.parametrize(("variable", "expected"), [("MUDSC_ISA", "baseline"), ("MUDSC_BACKEND", "cpu, reference")])
def test_unknown_environment(
    variable: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "nothing")
    assert cli.main(["info"]) == 2
    message = capsys.readouterr().err
    assert variable in message
    assert expected in message
    assert "'nothing'" in message


@pytest.mark.parametrize("command", [[sys.executable, "-m", "mudsc_fast", "info"], ["mudsc-fast", "info"]])
def test_installed_commands(command: list[str]) -> None:
    if command[0] == "mudsc-fast":
        command = [sys.executable.rpartition("/")[0] + "/mudsc-fast", "info"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert mudsc_fast.__version__ in shown


def test_closed_pipe_is_not_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mudsc_fast", "info"], stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 0


def test_missing_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
