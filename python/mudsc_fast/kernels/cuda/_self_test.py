"""Comparison of the CUDA kernels with exact results, at the first use of a device.

The result of an assignment is checked whenever one is solved, since its duals prove it. Zip and correlation have no
such proof, so that the first use of an op on a device solves one small case and compares it with the result on the CPU.
The cases are small: 48 units for a zip, 40 for correlations. A test that passed is recorded in a file of the user's
cache directory, for the device, the driver and the build. If a test fails, the op is served by another backend, with a
warning. The environment variable ``MUDSC_SELF_TEST=0`` skips the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mudsc_fast._files import atomic_write
from mudsc_fast.kernels.cuda import _device, correlation
from mudsc_fast.kernels.cuda import zip as cuda_zip
from mudsc_fast.kernels.reference import zip as reference_zip

_VARIABLE = "MUDSC_SELF_TEST"

#: Largest error of a correlation in the test. float32 products have errors of about 1e-7.
_TOLERANCE = 1e-5

#: Why an op failed on a device, empty if it passed, for the tests of this process.
_results: dict[tuple[str, int], str] = {}


def failure(op: str, index: int) -> str:
    """Return why the CUDA kernels of an op must not be used on the device of that index; empty if they can be.

    Raises
    ------
    RuntimeError
        If the test is to run while a CUDA graph is captured.
    """
    test = _TESTS.get(op)
    if test is None or os.environ.get(_VARIABLE) == "0":
        return ""
    name = op.partition(".")[0]
    if (name, index) not in _results:
        device = _device_of(index)
        if _device.is_capturing(device):
            raise RuntimeError(
                f"the first use of {name} on a device runs a self-test, which a CUDA graph cannot record: call it once "
                f"before the capture, or set {_VARIABLE}=0"
            )
        _results[name, index] = _recorded_or_run(name, device, test)
    return _results[name, index]


def _device_of(index: int) -> torch.device:
    return torch.device("cuda", index)


def _recorded_or_run(name: str, device: torch.device, test: Callable[[torch.device], str]) -> str:
    key = f"{name} {_identity(device)}"
    path = cache_directory() / "self_test.json"
    passed = _read(path)
    if key in passed:
        return ""
    try:
        difference = test(device)
    except RuntimeError as error:
        difference = str(error)
    if difference:
        return f"the self-test of {name} failed ({difference}). Please report this with the output of `mudsc-fast info`"
    _write(path, [*passed, key])
    return ""


def zip_difference(device: torch.device) -> str:
    """Return how a small zip on a device differs from the reference; empty if it does not."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(48, 30, generator=generator, dtype=torch.float32, device="cpu")
    similarity = torch.corrcoef(features)
    for shrink in (0.5, 0.0):
        expected = reference_zip.zip_units(similarity, 2, 24, 5, shrink)
        found = cuda_zip.zip_units(similarity.to(device), 2, 24, 5, shrink)
        for name, one, other in zip(("clusters", "values"), found, expected, strict=True):
            if not torch.equal(one.cpu(), other):
                return f"other {name} for shrink={shrink}"
    return ""


def correlation_difference(device: torch.device) -> str:
    """Return how small correlations on a device differ from float64; empty if they do not."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(90, 40, generator=generator, dtype=torch.float32, device="cpu") + 2 for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        features = [one.to(dtype) for one in plain]
        expected = _correlation(features)
        found = _correlation_on(device, features).cpu()
        error = float((found - expected).abs().max())
        if not error <= _TOLERANCE:  # also true for NaN
            return f"correlations of {dtype} features have an error of {error:.1e}"
    return ""


def _correlation(features: list[Tensor]) -> Tensor:
    first, second = (one.double() - one.double().mean(0) for one in features)
    return first.T @ second / torch.outer(first.norm(dim=0), second.norm(dim=0))


def _correlation_on(device: torch.device, features: list[Tensor]) -> Tensor:
    samples = correlation.Samples([one[:, :, None].to(device) for one in features])
    units = features[0].shape[1]
    mean, squares = torch.zeros(2, 2, units, dtype=torch.float64, device=device)
    comoment = torch.zeros(1, units, units, dtype=torch.float64, device=device)
    in_range = samples.add_to(mean, squares, comoment, [(0, 1)], 0, None)
    if not bool(in_range):
        return torch.full((units, units), torch.nan)
    deviation = (squares / samples.count).sqrt()
    out = torch.empty(units, units, dtype=torch.float64, device=device)
    correlation.correlate(comoment[0], deviation[0], deviation[1], samples.count, 1e-7, out, None, None, 1.0)
    return out


_TESTS: dict[str, Callable[[torch.device], str]] = {
    "zip": zip_difference,
    "correlation": correlation_difference,
    "correlation.finalize": correlation_difference,
}


def cache_directory() -> Path:
    """Return the folder of this package in the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mudsc_fast"


def _identity(device: torch.device) -> str:
    """Return the key of a passed test: the device, its driver and the build of the kernels."""
    file = Path(_device.extension().__file__)
    status = file.stat()
    build = f"{file} {status.st_size} {status.st_mtime_ns} {torch.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        build += f" {properties.name} {properties.major}.{properties.minor} {_device.extension().versions()}"
        build += f" {correlation.tensor_cores(device).instructions}"
    return hashlib.sha256(build.encode()).hexdigest()[:32]


def _read(path: Path) -> list[str]:
    try:
        passed = json.loads(path.read_text(encoding="utf-8"))["passed"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # missing or damaged: test again
    return [str(key) for key in passed] if isinstance(passed, list) else []


def _write(path: Path, passed: list[str]) -> None:
    latest = passed[-64:]  # drops records of old builds
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"passed": latest}) + "\n", encoding="utf-8")
    except OSError:
        pass  # a read-only home directory: the test runs again in the next process
