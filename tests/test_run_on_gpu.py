"""Runs benchmarks/run_on_gpu.sh with scripts in place of Python, pytest and compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: A python3 that records its calls, builds an empty package and passes all tests; named steps fail.
PYTHON = r"""#!/bin/bash
line="$*"; printf '%s \n' "${{line//$'\n'/ }}" >>{calls}
case "$*" in
*sys.version_info*) echo '(3, 12)';;
*cuda.is_available*) {device};;
*'pip install'*) {build}
  while [[ $1 != --target ]]; do shift; done
  mkdir -p "$2/mudsc_fast"; echo code >"$2/mudsc_fast/_cuda.so"; touch "$2/mudsc_fast/cli.py";;
*cli.info*) [[ -f $PYTHONPATH/mudsc_fast/_cuda.so && -f $PYTHONPATH/mudsc_fast/cli.py ]] && echo 'CUDA kernels on';;
*bench_cuda.py*) {benchmark}; echo '| a table |' >"${{@: -1}}/cuda.md";;
*--collect-only*) for test in 'a[1]' 'a[2]' b; do echo "tests/test_gpu.py::test_$test"; done;;
*pytest*) {tests}; echo '=== 3 passed, 1 skipped in 0.10s ===';;
*) exit 9;;
esac
"""
SANITIZER = r"""#!/bin/bash
tool=$2
while [[ $1 == --* ]]; do [[ $1 == *=* ]] && shift 1 || shift 2; done
"$@" || exit $?
echo "========= ERROR SUMMARY: 0 errors"
{found}
"""


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run(
    folder: Path,
    *options: str,
    seconds: int = 100,
    device: str = "echo a device",
    build: str = "",
    benchmark: str = "true",
    tests: str = "true",
    found: str = "true",
) -> tuple[int, list[str], list[str]]:
    """Return the exit status, the lines of the summary, and the recorded calls of Python."""
    programs, calls = folder / "programs", folder / "calls"
    programs.mkdir(exist_ok=True)
    calls.write_text("")
    write(
        programs / "python3",
        PYTHON.format(calls=calls, device=device, build=build, benchmark=benchmark, tests=tests),
    )
    write(programs / "compute-sanitizer", SANITIZER.format(found=found))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MUDSC", "PYTHON"))}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "MUDSC_GPU_SECONDS": str(seconds)}
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "run_on_gpu.sh"), *options, str(folder / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=60,
    )
    return done.returncode, (folder / "out/summary.txt").read_text().splitlines(), calls.read_text().splitlines()


pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("flock") is None, reason="bash and flock are needed"
)


def test_run_measures_before_testing_and_saves_build(tmp_path: Path) -> None:
    status, summary, calls = run(tmp_path)
    assert status == 0, summary
    assert summary[-1].startswith("all steps passed")
    order = [next(at for at, call in enumerate(calls) if word in call) for word in ("cli.info", "bench_cuda", "pytest")]
    assert order == sorted(order)
    steps = [line.split(":")[0].split(maxsplit=1)[1] for line in summary if line.startswith("passed")]
    assert {"device", "build", "kernels", "benchmarks", "collect", "tests/test_gpu.py"} <= set(steps)
    for tool in ("memcheck", "racecheck", "synccheck"):
        for kernels in ("assignment", "zip", "triton", "correlation (mma.sync)", "correlation (wgmma)"):
            assert f"{tool} of {kernels}" in steps
    assert sum("-m gpu -v" in call and call.endswith("::test_a ") for call in calls) == 1
    assert not [call for call in calls if "not gpu" in call]
    with tarfile.open(tmp_path / "out/site.tar.gz") as archive:
        assert "./mudsc_fast/_cuda.so" in archive.getnames()
    assert any("90a-real" in call for call in calls if "pip install" in call)

    status, summary, calls = run(tmp_path)
    assert status == 0
    assert not [call for call in calls if "pip install" in call]
    assert "passed     build: the one that was saved" in summary


def test_smoke_run_is_short(tmp_path: Path) -> None:
    status, summary, calls = run(tmp_path, "--smoke")
    assert status == 0, summary
    assert sum("bench_cuda.py --smoke" in call for call in calls) == 1
    assert sum("-m pytest" in call for call in calls) == 8
    assert [line for line in summary if "memcheck of zip" in line]
    assert not [line for line in summary if "racecheck" in line]


def test_wgmma_racecheck_findings_do_not_fail_run(tmp_path: Path) -> None:
    status, summary, _ = run(tmp_path, found="[[ $tool != racecheck || $MUDSC_TENSOR_CORES != wgmma ]] || exit 99")
    assert status == 0, summary
    assert [line for line in summary if line.startswith("REPORTED   racecheck of correlation (wgmma)")]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ({"device": "exit 1"}, "NOT RUN    the rest: there is no device"),
        ({"build": "exit 1"}, "NOT RUN    the rest: there is nothing to test"),
        ({"benchmark": "exit 1"}, "FAILED     benchmarks"),
        ({"tests": "exit 1"}, "FAILED     tests/test_gpu.py::test_b"),
        ({"tests": "exit 5"}, "FAILED     memcheck of zip"),
    ],
)
def test_failures_are_reported_and_fail_run(tmp_path: Path, what: dict[str, str], expected: str) -> None:
    status, summary, _ = run(tmp_path, **what)  # type: ignore[arg-type]
    assert status == 1
    assert [line for line in summary if line.startswith(expected)], summary
    assert summary[-1].startswith("NOT ALL WELL")


def test_run_stops_at_time_limit(tmp_path: Path) -> None:
    """If all steps hang, each is stopped at its time limit, and later steps do not start."""
    begin = time.monotonic()
    status, summary, _ = run(tmp_path, seconds=12, benchmark="sleep 100", tests="sleep 100")
    assert status == 1
    assert time.monotonic() - begin < 40
    assert [line for line in summary if line.startswith("TIMED OUT  benchmarks")]
    assert [line for line in summary if line.startswith("NOT RUN    memcheck of zip")]
