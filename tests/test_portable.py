"""The CPU kernels compiled by clang, and for arm64 under emulation, if these tools are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = ("assignment", "correlation", "permute", "zip")

#: Compilers, emulators for their programs, and the Debian packages. The other tests of the kernels run programs that
#: gcc compiled.
TOOLCHAINS = {
    "clang": ("clang++", None),  # clang
    "arm64": ("aarch64-linux-gnu-g++", "qemu-aarch64"),  # g++-aarch64-linux-gnu, qemu-user
}


@pytest.mark.slow
@pytest.mark.parametrize("toolchain", TOOLCHAINS)
def test_baseline_kernels_match_plain_loops(toolchain: str, tmp_path: Path) -> None:
    compiler, emulator = TOOLCHAINS[toolchain]
    missing = [program for program in (compiler, emulator) if program is not None and shutil.which(program) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    # The emulator does not find shared libraries of the other processor, so link statically.
    link = [] if emulator is None else ["-static"]
    sources = [ROOT / "tests" / "portable" / "check_kernels.cpp", ROOT / "csrc" / "cpu" / "threads.cpp"]
    sources += [ROOT / "csrc" / "cpu" / f"{op}.cpp" for op in OPS]
    program = tmp_path / "check_kernels"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-DMUDSC_ISA=baseline", f"-I{ROOT / 'csrc' / 'include'}"]
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Werror"]
    objects = []
    for source in sources:
        objects.append(tmp_path / f"{source.stem}.o")
        subprocess.run([compiler, *flags, *warnings, "-c", str(source), "-o", str(objects[-1])], check=True)
    subprocess.run([compiler, *map(str, objects), "-o", str(program), "-pthread", *link], check=True)
    command = [str(program)] if emulator is None else [emulator, str(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all kernels agree" in result.stdout
