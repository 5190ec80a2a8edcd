"""The CUDA and Triton kernels on a device, compared with lower bounds, torch, scipy and the kernels on the CPU.

    python benchmarks/bench_cuda.py [--smoke] OUTPUT_FOLDER

The script writes `cuda.json` and a table, `cuda.md`, after every row. The most important rows come first; --smoke
measures the first eight, one for each kind of kernel. Times are medians of wall time after warm-up on random inputs,
including the wait for the device. Before a row is timed, its result is compared with that of the kernels on the CPU,
or with torch's: in float64 for correlations, and of `index_select` for re-indexed tensors.

A floor is a lower bound: the bytes that must be moved, divided by the measured rate of a large copy. For a correlation
it is the time of torch for the products on tensor cores, if that is longer. `copied_ms` is the time for a device tensor
that is copied to the host and computed by the kernels on the CPU.

A second process measures the rows. If it fails, hangs or loses the device, the row's `error` gives the reason, and
another process continues with the next row. The run ends after `MUDSC_BENCHMARK_SECONDS` (240 by default); rows that
were not reached are counted in `not_measured`.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment as scipy_solve
from torch import Tensor

import families
import mudsc_fast
from bench_correlation import CHECKED, error_of, features_of, tf32
from mudsc_fast.kernels.cuda import _device, _tensor_cores, correlation

FAMILIES = ("independent", "uniform", "low_rank", "dead_units", "planted")
#: Beyond these sizes scipy and the CPU would take too long.
LARGEST_FOR_SCIPY, LARGEST_FOR_CPU, LARGEST_FOR_COPY = 2048, 8192, 4096
#: Rows that --smoke measures.
SMOKE_ROWS = 8
#: Time limit of a row in seconds.
SECONDS_OF_A_ROW = 45
#: Seconds that a row may continue after the time limit of the run.
GRACE = 10
#: Number of samples of a row's features, large enough that the products dominate.
SAMPLES = 65536
#: Tolerance of a correlation, for rounding in float32 sums.
MAX_ERROR = 3e-6

Row = dict[str, Any]
#: Takes a row and the device's bytes per second, and adds its measurements to the row.
Measure = Callable[[Row, float], None]


def median_milliseconds(run: Callable[[], object], repetitions: int = 7, max_seconds: float = 3.0) -> float:
    run()
    times: list[float] = []
    while len(times) < repetitions and sum(times) < 1000 * max_seconds:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def copy_rate() -> float:
    """Return bytes read and written per second by a large copy on the device."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = median_milliseconds(lambda: target.copy_(source), 10)
    return 2 * source.numel() * 4 / (milliseconds / 1000)


def floor_milliseconds(read_and_written: int, rate: float) -> float:
    return 1000 * read_and_written / rate


def check(row: Row, is_right: bool, what: str) -> None:
    """Record a wrong result. The row is timed anyway."""
    if not is_right:
        row["error"] = f"wrong result: {what}"


def measure_assignment(n: int, family: str, row: Row, rate: float) -> None:
    values = torch.from_numpy(families.RANDOM[family](n, np.random.default_rng(n)))
    on_device = values.cuda()
    found = mudsc_fast.linear_assignment(on_device)
    objective = float(found.objective)
    row["gap"] = float(found.gap)
    check(row, len(found.columns.unique()) == n and row["gap"] <= 1e-9 * max(1.0, abs(objective)), f"gap {row['gap']}")
    if n <= LARGEST_FOR_CPU:
        begin = time.perf_counter()
        expected = float(mudsc_fast.linear_assignment(values).objective)
        row["cpu_ms"] = 1000 * (time.perf_counter() - begin)
        check(row, abs(objective - expected) <= 1e-11 * max(1.0, abs(expected)), f"{objective}, not {expected}")
    if n <= LARGEST_FOR_SCIPY:
        begin = time.perf_counter()
        scipy_solve(values.numpy(), True)
        row["scipy_ms"] = 1000 * (time.perf_counter() - begin)
    if n <= LARGEST_FOR_COPY:
        with mudsc_fast.use_backend("cpu"):
            row["copied_ms"] = median_milliseconds(lambda: mudsc_fast.linear_assignment(on_device), max_seconds=0.5)
    row["floor_ms"] = floor_milliseconds(4 * n * n, rate)
    row["ms"] = median_milliseconds(lambda: mudsc_fast.linear_assignment(on_device))


def measure_batch(count: int, n: int, row: Row, rate: float) -> None:
    values = torch.randn(count, n, n, generator=torch.Generator().manual_seed(0))
    on_device = values.cuda()
    begin = time.perf_counter()
    expected = mudsc_fast.linear_assignment(values)
    row["cpu_ms"] = 1000 * (time.perf_counter() - begin)
    found = mudsc_fast.linear_assignment(on_device)
    difference = float((found.objective.cpu() - expected.objective).abs().max())
    check(row, difference <= 1e-9 * n, f"objectives differ by {difference}")
    check(row, n > 128 or torch.equal(found.columns.cpu(), expected.columns), "other columns than on the CPU")
    begin = time.perf_counter()
    for matrix in values:
        scipy_solve(matrix.numpy(), True)
    row["scipy_ms"] = 1000 * (time.perf_counter() - begin)
    with suppress(ImportError):  # an optional peer; its solver on the device maximizes nothing, so that signs change
        solve = import_module("torch_linear_assignment").batch_linear_assignment
        row["torch_linear_assignment_ms"] = median_milliseconds(lambda: solve(-on_device))
    row["floor_ms"] = floor_milliseconds(values.numel() * 4, rate)
    row["ms"] = median_milliseconds(lambda: mudsc_fast.linear_assignment(on_device))


def measure_zip(units: int, row: Row, rate: float) -> None:
    similarity = torch.corrcoef(torch.randn(units, 1000, generator=torch.Generator().manual_seed(0)))
    on_device = similarity.cuda()
    begin = time.perf_counter()
    expected = mudsc_fast.zip_units(similarity, 2)
    row["cpu_ms"] = 1000 * (time.perf_counter() - begin)
    found = mudsc_fast.zip_units(on_device, 2)
    check(row, torch.equal(found.cluster_of_unit.cpu(), expected.cluster_of_unit), "other clusters than on the CPU")
    row["floor_ms"] = floor_milliseconds(2 * 4 * units * units, rate)
    row["ms"] = median_milliseconds(lambda: mudsc_fast.zip_units(on_device, 2))


def measure_permute(
    num_models: int, shape: tuple[int, int], axes: tuple[int, ...], dtype: torch.dtype, row: Row, rate: float
) -> None:
    tensors = [torch.randn(shape, device="cuda").to(dtype) for _ in range(num_models)]
    orders = [torch.stack([torch.randperm(shape[axis], device="cuda") for _ in tensors]) for axis in axes]
    maps = {axis: mudsc_fast.UnitMap.permutation(order) for axis, order in zip(axes, orders, strict=True)}

    def chain() -> Tensor:
        total: Tensor | None = None
        for model, tensor in enumerate(tensors):
            for axis, order in zip(axes, orders, strict=True):
                tensor = tensor.index_select(axis, order[model])
            total = tensor if total is None else total + tensor
        assert total is not None
        return total if num_models == 1 else total.mul_(1 / num_models)

    found = mudsc_fast.permute_merge(tensors, maps)
    difference = float((found.float() - chain().float()).abs().max())
    check(row, difference <= 8 * torch.finfo(dtype).eps * (num_models > 1), f"{difference} from index_select's")
    row["floor_ms"] = floor_milliseconds((num_models + 1) * tensors[0].nbytes, rate)
    row["ms"] = median_milliseconds(lambda: mudsc_fast.permute_merge(tensors, maps))
    row["torch_ms"] = median_milliseconds(chain)


def llama_layer(hidden: int = 4096, inner: int = 11008) -> list[tuple[int, ...]]:
    """Return the shapes of one layer of a LLaMA of 7 billion parameters."""
    attention, up, down = (hidden, hidden), (inner, hidden), (hidden, inner)
    return [attention, attention, attention, attention, up, up, down, (hidden,), (hidden,)]


def measure_permute_group(row: Row, rate: float) -> None:
    shapes = llama_layer()
    groups = [[torch.randn(shape, device="cuda").bfloat16() for _ in range(2)] for shape in shapes]
    order = {size: torch.stack([torch.randperm(size, device="cuda") for _ in range(2)]) for size in (4096, 11008)}
    maps = [{0: mudsc_fast.UnitMap.permutation(order[shape[0]])} for shape in shapes]

    def chain() -> list[Tensor]:
        return [
            sum(one.index_select(0, order[len(one)][model]) for model, one in enumerate(tensors)) / 2  # type: ignore[misc]
            for tensors in groups
        ]

    found = mudsc_fast.permute_merge_group(groups, maps)
    difference = max(
        float((one.float() - other.float()).abs().max()) for one, other in zip(found, chain(), strict=True)
    )
    check(row, difference <= 8 * torch.finfo(torch.bfloat16).eps, f"{difference} from index_select's")
    row["floor_ms"] = floor_milliseconds(3 * sum(tensors[0].nbytes for tensors in groups), rate)
    row["ms"] = median_milliseconds(lambda: mudsc_fast.permute_merge_group(groups, maps))
    row["torch_ms"] = median_milliseconds(chain)


def measure_correlation(units: int, samples: int, dtype: torch.dtype, instructions: str, row: Row, rate: float) -> None:
    os.environ["MUDSC_TENSOR_CORES"] = instructions
    features = features_of("cuda", units, samples, dtype)
    sums = mudsc_fast.CorrelationAccumulator(2, units, device=torch.device("cuda"))
    sums.update(*features)
    row["greatest_error"] = error_of(sums.finalize()[0], features)
    what = f"correlations of the first {CHECKED} units are off by {row['greatest_error']}"
    check(row, row["greatest_error"] <= MAX_ERROR, what)
    row["ms"] = median_milliseconds(lambda: sums.update(*features))
    row["teraflops"] = 2 * samples * units**2 / row["ms"] / 1e9
    first, second = (one.float() for one in features)
    halves = [one.bfloat16() for one in features]
    row["torch_ms"] = median_milliseconds(lambda: first.T @ second)
    row["bfloat16_product_ms"] = median_milliseconds(lambda: halves[0].T @ halves[1])
    with tf32():
        row["tf32_product_ms"] = median_milliseconds(lambda: first.T @ second)
    products = row["bfloat16_product_ms"] if dtype == torch.bfloat16 else 3 * row["tf32_product_ms"]
    row["floor_ms"] = max(products, floor_milliseconds(2 * features[0].nbytes, rate))


def measure_finalize(units: int, blended: bool, row: Row, rate: float) -> None:
    features = features_of("cuda", units, SAMPLES // 8, torch.float32)
    sums = mudsc_fast.CorrelationAccumulator(2, units, device=torch.device("cuda"))
    sums.update(*features)
    other = torch.rand(1, units, units, device="cuda") if blended else None
    plain, found = sums.finalize(), sums.finalize(other=other, balance=0.3 if blended else 1.0)
    error = error_of(plain[0], features)
    check(row, error <= MAX_ERROR, f"correlations are off by {error}")
    if other is not None:
        difference = float((found - torch.lerp(other, plain, 0.3)).abs().max())
        check(row, difference <= 1e-6, f"the blend is {difference} from torch.lerp's")
    # Eight bytes of a co-moment are read, and four of the other similarity; four are written.
    row["floor_ms"] = floor_milliseconds(units**2 * (16 if blended else 12), rate)
    row["ms"] = median_milliseconds(lambda: sums.finalize(other=other, balance=0.3 if blended else 1.0))


def instructions_in_use() -> str:
    try:
        return ": ".join(correlation.tensor_cores(torch.device("cuda", torch.cuda.current_device())))
    except RuntimeError as error:
        return f"none: {error}"


def instructions_to_measure() -> list[str]:
    """Return the tensor-core instructions to measure: both on a device that has wgmma, whatever the self-test found."""
    both = torch.cuda.get_device_capability() == (9, 0)
    return [_tensor_cores.WGMMA, _tensor_cores.MMA_SYNC] if both else [_tensor_cores.MMA_SYNC]


def assignment_rows(n: int, names: tuple[str, ...] = FAMILIES) -> Iterator[tuple[Row, Measure]]:
    for family in names:
        row = {"op": "assignment", "size": f"{n} x {n}", "family": family}
        yield row, functools.partial(measure_assignment, n, family)


def correlation_rows(
    units: int, samples: int = SAMPLES, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> Iterator[tuple[Row, Measure]]:
    for dtype in dtypes:
        for instructions in instructions_to_measure():
            family = f"{str(dtype).removeprefix('torch.')}, {instructions}"
            row = {"op": "correlation", "size": f"{units} units, {samples} samples", "family": family}
            yield row, functools.partial(measure_correlation, units, samples, dtype, instructions)


def batch_row(count: int, n: int) -> tuple[Row, Measure]:
    row = {"op": "assignment", "size": f"{count} of {n} x {n}", "family": "gaussian"}
    return row, functools.partial(measure_batch, count, n)


def finalize_row(units: int, blended: bool) -> tuple[Row, Measure]:
    row = {"op": "finalize", "size": f"{units} units", "family": "blended" if blended else "alone"}
    return row, functools.partial(measure_finalize, units, blended)


def zip_row(units: int) -> tuple[Row, Measure]:
    row = {"op": "zip", "size": f"{units} units", "family": "correlations"}
    return row, functools.partial(measure_zip, units)


def permute_rows(num_models: int, shape: tuple[int, int]) -> Iterator[tuple[Row, Measure]]:
    for dtype in (torch.bfloat16, torch.float32):
        for name, axes in (("rows", (0,)), ("columns", (1,)), ("both", (0, 1))):
            family = f"{str(dtype).removeprefix('torch.')}, {name}"
            row = {"op": "permute", "size": f"{num_models} of {shape[0]} x {shape[1]}", "family": family}
            yield row, functools.partial(measure_permute, num_models, shape, axes, dtype)


def rows_to_measure() -> list[tuple[Row, Measure]]:
    """Return all rows: first one of each kind, then the most important, and last those that take long."""
    group = {"op": "permute group", "size": "2 LLaMA layers", "family": "bfloat16, rows"}
    rows = [
        *assignment_rows(4096, ("independent",)),
        batch_row(1024, 128),
        next(correlation_rows(4096, dtypes=(torch.float32,))),
        next(correlation_rows(4096, dtypes=(torch.bfloat16,))),
        finalize_row(4096, True),
        zip_row(2048),
        (group, measure_permute_group),
        *assignment_rows(512, ("independent",)),
        # The end of what --smoke measures.
        *correlation_rows(4096),
        *correlation_rows(768, 512),
        *(row for n in (128, 256) for row in assignment_rows(n, ("independent",))),
        batch_row(208, 300),
        *permute_rows(2, (4096, 4096)),
        *assignment_rows(4096),
        *assignment_rows(8192, FAMILIES[:2]),
        *correlation_rows(768),
        *(finalize_row(units, blended) for units in (4096, 768) for blended in (False, True)),
        zip_row(512),
        *permute_rows(2, (11008, 4096)),
        *(row for n in (512, 256, 128, 1024, 2048) for row in assignment_rows(n)),
        *permute_rows(1, (4096, 4096)),
        zip_row(8192),
        *assignment_rows(8192, FAMILIES[2:]),
        *correlation_rows(2048),
        *correlation_rows(8192),
        *assignment_rows(16384),
    ]
    # A row that was moved to the front is not measured again.
    return list({tuple(row.values()): (row, measure) for row, measure in rows}.values())


def table(found: Row) -> str:
    names = ("op", "size", "family", "ms", "floor_ms", "torch_ms", "copied_ms", "cpu_ms", "scipy_ms", "error")
    cells = [
        " | ".join(f"{row[name]:.3f}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in names)
        for row in found["rows"]
    ]
    lines = [f"| {line} |" for line in (" | ".join(names), " | ".join("---" for _ in names), *cells)]
    return f"{found['gpu']}\n\n" + "\n".join(lines) + f"\n\nrows not measured: {found['not_measured']}\n"


def write(folder: Path, found: Row) -> None:
    """Write a temporary file, then rename it, so that the file is always complete."""
    for name, text in (("cuda.json", json.dumps(found, indent=1)), ("cuda.md", table(found))):
        aside = folder / f".{name}"
        aside.write_text(text)
        aside.replace(folder / name)


def read(folder: Path) -> Row:
    found: Row = json.loads((folder / "cuda.json").read_text())
    return found


def measure_rows(folder: Path, deadline: float) -> None:
    """Measure the rows that the folder does not have yet, until the first that loses the device."""
    found = read(folder)
    found["copy_bytes_per_s"] = copy_rate()
    for row, measure in rows_to_measure()[len(found["rows"]) : len(found["rows"]) + found["not_measured"]]:
        left = deadline - time.monotonic()
        if left < 0:
            break
        faulthandler.dump_traceback_later(min(SECONDS_OF_A_ROW, left + GRACE), exit=True)
        found["not_measured"] -= 1
        found["rows"].append({**row, "error": "the process ended or hung"})
        write(folder, found)
        begin = time.monotonic()
        try:
            measure(row, found["copy_bytes_per_s"])
            torch.cuda.synchronize()
        except Exception as error:  # continue with the other rows after any error
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        os.environ.pop("MUDSC_TENSOR_CORES", None)
        found["rows"][-1] = {**row, "seconds_in_all": time.monotonic() - begin}
        write(folder, found)
        if "error" in row:
            torch.cuda.synchronize()  # raises if the device is lost to this process
        torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help=f"measure {SMOKE_ROWS} rows, one for each kind of kernel")
    parser.add_argument("folder", type=Path)
    parser.add_argument("deadline", nargs="?", type=float, help=argparse.SUPPRESS)  # of the process that measures
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.deadline is not None:
        measure_rows(folder, arguments.deadline)
        return
    if _device.unavailable_reason(0):
        sys.exit(f"no CUDA device to measure on: {_device.unavailable_reason(0)}")
    deadline = time.monotonic() + float(os.environ.get("MUDSC_BENCHMARK_SECONDS", "240"))
    in_all = SMOKE_ROWS if arguments.smoke else len(rows_to_measure())
    found: Row = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "mudsc_fast": mudsc_fast.__version__,
        "tensor_cores": instructions_in_use(),
        "not_measured": in_all,
        "rows": [],
    }
    write(folder, found)
    measured = -1
    while measured < len(read(folder)["rows"]) < in_all and time.monotonic() < deadline:
        measured = len(read(folder)["rows"])
        with suppress(subprocess.TimeoutExpired):
            command = [sys.executable, __file__, str(folder), str(deadline)]
            subprocess.run(command, check=False, timeout=deadline - time.monotonic() + GRACE)
    found = read(folder)
    print(table(found))
    errors = [
        f"ERROR {row['op']}, {row['size']}, {row['family']}: {row['error']}" for row in found["rows"] if "error" in row
    ]
    if errors or not found["rows"]:
        sys.exit("\n".join(errors) or "ERROR no row was measured")


if __name__ == "__main__":
    main()
