"""The CUDA kernels on a device: times beside their floors, scipy and the kernels on the CPU. Writes a JSON and a table.

    python benchmarks/bench_cuda.py OUTPUT_FOLDER

Times are medians of wall time after warm-up, the device waited for, on random inputs; results are checked against the
kernels on the CPU. A floor is the bytes that must be moved over the measured rate of a large copy.
`MUDSC_BENCHMARK_SECONDS` ends the run early (by default 240); what was measured until then is written.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment as scipy_solve
from torch import Tensor

import families
import mudsc_fast
from mudsc_fast.kernels.cuda import _device, correlation

DEADLINE = time.monotonic() + float(os.environ.get("MUDSC_BENCHMARK_SECONDS", "240"))
FAMILIES = ("independent", "uniform", "low_rank", "dead_units", "planted")
SIZES = (512, 1024, 2048, 4096, 8192, 16384)
#: Beyond these sizes scipy and the CPU would take the whole time.
LARGEST_FOR_SCIPY, LARGEST_FOR_CPU = 2048, 8192

Row = dict[str, Any]


def median_milliseconds(run: Callable[[], object], repetitions: int = 5) -> float:
    run()
    times = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def copy_rate() -> float:
    """Return bytes read and written per second by a large copy on the device."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    milliseconds = median_milliseconds(lambda: target.copy_(source), 10)
    return 2 * source.numel() * 4 / (milliseconds / 1000)


def floor_milliseconds(read_and_written: int, rate: float) -> float:
    return 1000 * read_and_written / rate


def on_cpu(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def assignment_rows(rate: float) -> list[Row]:
    rows: list[Row] = []
    for n in SIZES:
        for family in FAMILIES:
            if time.monotonic() > DEADLINE:
                return rows
            values = torch.from_numpy(families.RANDOM[family](n, np.random.default_rng(n)))
            on_device = values.cuda()
            result = mudsc_fast.linear_assignment(on_device)
            row: Row = {"op": "assignment", "size": f"{n} x {n}", "family": family}
            row["ms"] = median_milliseconds(lambda on_device=on_device: mudsc_fast.linear_assignment(on_device))  # type: ignore[misc]
            row["floor_ms"] = floor_milliseconds(4 * n * n, rate)
            row["gap"] = float(result.gap)
            if n <= LARGEST_FOR_CPU:
                row["cpu_ms"] = on_cpu(lambda values=values: mudsc_fast.linear_assignment(values))  # type: ignore[misc]
                expected = mudsc_fast.linear_assignment(values)
                assert abs(float(result.objective - expected.objective)) <= 1e-11 * max(1.0, float(expected.objective))
            if n <= LARGEST_FOR_SCIPY:
                row["scipy_ms"] = on_cpu(lambda values=values: scipy_solve(values.numpy(), True))  # type: ignore[misc]
            rows.append(row)
    return rows


def batch_rows(rate: float) -> list[Row]:
    values = torch.randn(1024, 128, 128, generator=torch.Generator().manual_seed(0))
    on_device = values.cuda()
    found, expected = mudsc_fast.linear_assignment(on_device), mudsc_fast.linear_assignment(values)
    assert torch.equal(found.columns.cpu(), expected.columns)
    return [
        {
            "op": "assignment",
            "size": "1024 of 128 x 128",
            "family": "gaussian",
            "ms": median_milliseconds(lambda: mudsc_fast.linear_assignment(on_device)),
            "floor_ms": floor_milliseconds(values.numel() * 4, rate),
            "cpu_ms": on_cpu(lambda: mudsc_fast.linear_assignment(values)),
            "scipy_ms": on_cpu(lambda: [scipy_solve(matrix.numpy(), True) for matrix in values]),
        }
    ]


def zip_rows(rate: float) -> list[Row]:
    rows: list[Row] = []
    for units in (512, 2048, 8192):
        if time.monotonic() > DEADLINE:
            return rows
        similarity = torch.corrcoef(torch.randn(units, 1000, generator=torch.Generator().manual_seed(0)))
        on_device = similarity.cuda()
        found, expected = mudsc_fast.zip_units(on_device, 2), mudsc_fast.zip_units(similarity, 2)
        assert torch.equal(found.cluster_of_unit.cpu(), expected.cluster_of_unit)
        rows.append(
            {
                "op": "zip",
                "size": f"{units} units",
                "family": "correlations",
                "ms": median_milliseconds(lambda on_device=on_device: mudsc_fast.zip_units(on_device, 2)),  # type: ignore[misc]
                "floor_ms": floor_milliseconds(2 * 4 * units * units, rate),
                "cpu_ms": on_cpu(lambda similarity=similarity: mudsc_fast.zip_units(similarity, 2)),  # type: ignore[misc]
            }
        )
    return rows


def permute_rows(rate: float) -> list[Row]:
    n = 4096
    tensors = [torch.randn(n, n, device="cuda") for _ in range(2)]
    order = torch.stack([torch.randperm(n, device="cuda") for _ in range(2)])
    maps = {axis: mudsc_fast.UnitMap.permutation(order) for axis in (0, 1)}
    run = lambda: mudsc_fast.permute_merge(tensors, maps)  # noqa: E731
    return [
        {
            "op": "permute",
            "size": f"2 of {n} x {n}",
            "family": "permutations",
            "ms": median_milliseconds(run),
            "floor_ms": floor_milliseconds(3 * 4 * n * n, rate),
        }
    ]


def instructions_to_measure() -> list[str]:
    """Return what the device can multiply with, if it is seen to do it rightly."""
    chosen = correlation.tensor_cores(torch.device("cuda", torch.cuda.current_device())).instructions
    return list(dict.fromkeys([chosen, "mma.sync"]))


def correlation_rows(rate: float) -> list[Row]:
    rows: list[Row] = []
    for units in (768, 2048, 4096):
        if time.monotonic() > DEADLINE:
            return rows
        samples = 65536
        features = [torch.randn(samples, units, device="cuda") for _ in range(2)]

        def run(features: list[Tensor] = features, units: int = units) -> object:
            accumulator = mudsc_fast.CorrelationAccumulator(2, units, device=torch.device("cuda"))
            accumulator.update(*features)
            return accumulator.finalize()

        product_ms = median_milliseconds(lambda features=features: features[0].T @ features[1])  # type: ignore[misc]
        for instructions in instructions_to_measure():
            os.environ["MUDSC_TENSOR_CORES"] = instructions
            rows.append(
                {
                    "op": "correlation",
                    "size": f"{units} units, {samples} samples",
                    "family": f"gaussian, {instructions}",
                    "ms": median_milliseconds(run),
                    "float32_product_ms": product_ms,
                    "floor_ms": floor_milliseconds(2 * 4 * samples * units, rate),
                }
            )
        del os.environ["MUDSC_TENSOR_CORES"]
    return rows


def table(rows: list[Row], gpu: str) -> str:
    names = ("op", "size", "family", "ms", "floor_ms", "cpu_ms", "scipy_ms", "float32_product_ms")
    cells = [
        " | ".join(f"{row[name]:.3f}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in names)
        for row in rows
    ]
    lines = [f"| {line} |" for line in (" | ".join(names), " | ".join("---" for _ in names), *cells)]
    return f"{gpu}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    if _device.unavailable_reason():
        sys.exit(f"no CUDA device to measure on: {_device.unavailable_reason()}")
    folder = Path(sys.argv[1])
    gpu = torch.cuda.get_device_name()
    rate = copy_rate()
    chosen = correlation.tensor_cores(torch.device("cuda", torch.cuda.current_device()))
    facts = {
        "gpu": gpu,
        "torch": torch.__version__,
        "mudsc_fast": mudsc_fast.__version__,
        "copy_bytes_per_s": rate,
        "tensor_cores": f"{chosen.instructions}: {chosen.reason}",
    }
    rows: list[Row] = []
    failures: dict[str, str] = {}
    for part in (batch_rows, zip_rows, permute_rows, correlation_rows, assignment_rows):
        try:
            rows += part(rate)
        except (RuntimeError, AssertionError, TypeError, AttributeError, ValueError) as error:
            failures[part.__name__] = f"{type(error).__name__}: {error}"
        (folder / "cuda.json").write_text(json.dumps({**facts, "rows": rows, "failures": failures}, indent=1))
        (folder / "cuda.md").write_text(table(rows, gpu))
    print(table(rows, gpu))
    if failures:
        sys.exit(f"failed: {failures}")


if __name__ == "__main__":
    main()
