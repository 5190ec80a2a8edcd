"""The CUDA kernels in the simulator under ThreadSanitizer: threads that share memory are ordered by barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "g++")


def compile_to(folder: Path, source: Path, *flags: str) -> Path:
    target = folder / f"{source.stem}.o"
    include = [f"-I{ROOT / 'csrc' / name}" for name in ("include", "cuda", "cuda_sim")]
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-g1",
        *include,
        *flags,
        "-x",
        "c++",
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    return target


def build(folder: Path) -> Path:
    """Compile the kernels and tests/cuda/races.cpp into a program, or skip the test if that is not possible."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler: {COMPILER} was not found")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    sanitized = [COMPILER, "-fsanitize=thread"]
    if subprocess.run(
        [*sanitized, str(empty), "-o", str(folder / "empty")], capture_output=True, check=False
    ).returncode:
        pytest.skip(f"{COMPILER} has no ThreadSanitizer")
    if subprocess.run([folder / "empty"], capture_output=True, check=False).returncode:
        pytest.skip("programs under ThreadSanitizer do not run here")
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))]
    objects = [
        compile_to(folder, path, "-fsanitize=thread") for path in [*sources, ROOT / "tests" / "cuda" / "races.cpp"]
    ]
    # The scheduler of the simulator is not checked, because it accesses the memory of all threads.
    objects.append(compile_to(folder, ROOT / "csrc" / "cuda_sim" / "simulator.cpp", "-DMUDSC_THREAD_SANITIZER"))
    subprocess.run([*sanitized, *map(str, objects), "-o", str(folder / "races")], check=True)
    return folder / "races"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=300
    )


@pytest.mark.slow
def test_planted_race_is_found_and_no_other(tmp_path: Path) -> None:
    """Both in one test, because compiling the program takes most of the time."""
    program = build(tmp_path)
    planted = run(program, "planted")
    assert planted.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in planted.stderr
    assert "neighbors" in planted.stderr
    done = run(program)
    assert done.returncode == 0, done.stderr[:5000]
    assert done.stdout == "done\n"
