"""CUDA kernels built by different versions of nvcc, tested with scripts that imitate nvcc and nvidia-smi."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mudsc_fast import _core, cli
from mudsc_fast.kernels.cuda import _device

ROOT = Path(__file__).parent.parent
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="cmake was not found")

#: What `nvcc --list-gpu-arch` of each release prints.
KNOWN = {
    "11.2": (35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86),
    "11.8": (35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    "12.4": (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    "12.6": (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    "12.8": (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 120),
    "13.0": (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121),
}

#: Imitates nvcc of one release, which fails for architectures that it does not know.
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.0"; exit 0;;
--list-gpu-arch) for number in {known}; do echo "compute_$number"; done; exit 0;;
esac
for word in "$@"; do
  case "$word" in --generate-code=*)
    number=${{word##*sm_}}
    case " {accepted} " in *" $number "*) ;; *)
      echo "nvcc fatal   : Unsupported gpu architecture 'compute_$number'" >&2; exit 1;;
    esac;;
  esac
done
{compile}
"""

PLAN = """
cmake_minimum_required(VERSION 3.24...3.31)
include("{root}/cmake/cuda.cmake")
mudsc_plan_cuda("{wanted}" {only_present} nvcc architectures problem)
message("nvcc=${{nvcc}}\\narchitectures=${{architectures}}\\nproblem=${{problem}}")
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def write_nvcc(folder: Path, release: str, compile_: str = "exit 0") -> None:
    known = [str(number) for number in KNOWN[release]]
    accepted = [*known, *(["90a"] if release >= "12" else [])]
    text = NVCC.format(release=release, known=" ".join(known), accepted=" ".join(accepted), compile=compile_)
    write_program(folder / "nvcc", text)


def environment(folder: Path) -> dict[str, str]:
    """Return an environment with `folder` first in PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "MUDSC"))}
    return {**kept, "PATH": f"{folder}:{os.environ['PATH']}", "CUDACXX": str(folder / "nvcc")}


def plan(folder: Path, wanted: str = "AUTO", *, only_present: bool = True) -> tuple[dict[str, str], str]:
    """Return what would be built with the programs of `folder`, and the messages."""
    script = folder / "plan.cmake"
    script.write_text(PLAN.format(root=ROOT, wanted=wanted, only_present=only_present))
    done = subprocess.run(
        [str(CMAKE), "-P", str(script)],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=environment(folder),
    )
    return dict(line.split("=", 1) for line in done.stderr.splitlines() if "=" in line), done.stderr


def write_gpus(folder: Path, *capabilities: str) -> None:
    lines = "; ".join(f"echo {capability}" for capability in capabilities)
    write_program(folder / "nvidia-smi", f"#!/bin/sh\n{lines or 'echo No devices were found; exit 6'}\n")


@needs_cmake
@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("11.8", "80;90-real;90-virtual"),
        ("12.4", "80;90a-real;90-virtual"),
        ("12.6", "80;90a-real;90-virtual"),
        ("12.8", "80;90a-real;100-real;100-virtual"),
        ("13.0", "80;90a-real;100-real;100-virtual"),
    ],
)
def test_all_known_architectures_are_built_without_gpu(tmp_path: Path, release: str, expected: str) -> None:
    write_nvcc(tmp_path, release)
    write_gpus(tmp_path)
    found, shown = plan(tmp_path)
    assert found == {"nvcc": str(tmp_path / "nvcc"), "architectures": expected, "problem": ""}
    assert ("CMake Warning" in shown) == (release < "12.8")
    if "Warning" in shown:
        assert f"nvcc {release} cannot compile for" in " ".join(shown.split())


@needs_cmake
@pytest.mark.parametrize(
    ("release", "gpus", "expected"),
    [
        ("13.0", ["9.0"], "90a-real"),
        ("11.8", ["9.0"], "90-real"),
        ("12.4", ["8.9", "8.0", "8.9"], "80-real;89-real"),
        ("12.4", ["7.5", "8.6"], "86-real"),
        ("12.4", ["12.0"], "90-virtual"),
        ("13.0", ["12.0"], "120-real"),
    ],
)
def test_only_present_gpus_are_built_for(tmp_path: Path, release: str, gpus: list[str], expected: str) -> None:
    write_nvcc(tmp_path, release)
    write_gpus(tmp_path, *gpus)
    assert plan(tmp_path)[0]["architectures"] == expected
    assert plan(tmp_path, only_present=False)[0]["architectures"].startswith("80;90")


@needs_cmake
@pytest.mark.parametrize(
    ("release", "gpus", "wanted", "compile_", "problem"),
    [
        ("11.2", [], "AUTO", "exit 0", "nvcc 11.2 is too old; the kernels need 11.8 or newer"),
        ("12.4", ["7.0", "7.5"], "AUTO", "exit 0", "compute capability 70, 75) are older than the kernels support"),
        ("12.4", [], "100-real;120-real", "exit 0", "nvcc 12.4 can compile for none of 100-real;120-real"),
        (
            "11.8",
            [],
            "AUTO",
            "echo 'crt/host_config.h:132:2: error: #error -- unsupported GNU version!' >&2; exit 1",
            "nvcc cannot compile a small program: crt/host_config.h:132:2: error: #error -- unsupported GNU version!",
        ),
    ],
)
def test_unbuildable_configuration_is_reported(
    tmp_path: Path, release: str, gpus: list[str], wanted: str, compile_: str, problem: str
) -> None:
    write_nvcc(tmp_path, release, compile_)
    write_gpus(tmp_path, *gpus)
    assert problem in plan(tmp_path, wanted)[0]["problem"]


@needs_cmake
def test_program_that_is_not_nvcc_is_reported(tmp_path: Path) -> None:
    write_program(tmp_path / "nvcc", "#!/bin/sh\nexit 3\n")
    assert "does not answer --version" in plan(tmp_path)[0]["problem"]


@needs_cmake
@pytest.mark.parametrize("setting", ["AUTO", "ON"])
def test_auto_continues_without_cuda_and_on_fails(tmp_path: Path, setting: str) -> None:
    """Configures the whole project with an nvcc that rejects the host compiler."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to configure the extension")
    write_nvcc(tmp_path, "12.4", "echo 'error: unsupported GNU version' >&2; exit 1")
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DMUDSC_CUDA={setting}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(tmp_path))
    shown = " ".join(done.stderr.split())
    assert "nvcc cannot compile a small program: error: unsupported GNU version" in shown
    if setting == "ON":
        assert done.returncode != 0
        assert "MUDSC_CUDA is ON, but the CUDA kernels cannot be built" in shown
        return
    assert done.returncode == 0, done.stderr
    assert "The CUDA kernels are not built" in shown
    assert "unsupported GNU version" in (tmp_path / "build/build_info/mudsc/build_info.hpp").read_text()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), ""),
        ((7, 5), ""),
        ((8, 0), "machine code"),
        ((8, 9), "machine code"),
        ((9, 0), "machine code"),
        ((10, 0), "machine code"),
        ((10, 3), "machine code"),
        ((12, 0), "PTX"),
    ],
)
def test_default_build_covers_devices(capability: tuple[int, int], expected: str) -> None:
    assert _device.code_for(capability, "80;90a-real;100-real;100-virtual") == expected


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [((9, 0), "80-real", ""), ((9, 0), "80", "PTX"), ((8, 0), "86-real", ""), ((12, 1), "90a-real", "")],
)
def test_other_builds_cover_devices(capability: tuple[int, int], architectures: str, expected: str) -> None:
    assert _device.code_for(capability, architectures) == expected


class _Module:
    """Imitates the module of the CUDA kernels on a machine with a T4 and an RTX 5090."""

    architectures = "80;100-virtual"

    def versions(self) -> tuple[int, int]:
        return 12080, 12090

    def unavailable_reason(self, index: int) -> str:
        return "the device has compute capability 7.5; the kernels need 8.0 or newer" if index == 0 else ""


def test_info_lists_support_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "extension", _Module)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: ((7, 5), (12, 0))[index])
    _device.unavailable_reason.cache_clear()
    try:
        assert _device.build_description() == "on; built with CUDA 12.8 for 80, 100-virtual, driver for CUDA 12.9"
        assert (
            _device.device_description(0)
            == "off (the device has compute capability 7.5; the kernels need 8.0 or newer)"
        )
        assert _device.device_description(1).startswith("on (compiled from PTX by the driver")
    finally:
        _device.unavailable_reason.cache_clear()


@pytest.mark.skipif(not _core.cuda_problem, reason="this build has CUDA kernels")
def test_info_explains_why_kernels_were_not_built() -> None:
    assert f"not built: {_core.cuda_problem}" in cli.info()
