"""Compiles Triton kernels for GPUs that need not be present and checks registers, spills and access widths."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mudsc_fast.kernels.triton import center, correlation, permute, permute_group

assert os.environ.get("TRITON_INTERPRET") != "1", "to be run by tests/test_triton.py"

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
#: The oldest and the newest that the kernels are tuned for.
ARCHITECTURES = (80, 100)
#: Registers per thread with which 4 programs of 128 threads fit into the 65536 registers of a multiprocessor.
MAX_REGISTERS = 128
#: Compilers before Triton 3.9 need a few more registers for the same kernels.
IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
ALIGNED = [["tt.divisibility", 16]]
KINDS = {"rows": (1, 0), "columns": (0, 1), "both": (1, 1), "clusters": (2, 2)}


class Compiled:
    """The code of a kernel and the resources that it needs."""

    def __init__(self, kernel: Any, architecture: int, arguments: dict[str, Any], directory: Path) -> None:
        names = kernel.arg_names
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for at, name in enumerate(names):
            value = arguments[name]
            constant = isinstance(value, (bool, int, float))
            signature[name] = "constexpr" if constant else value
            if constant:
                constants[(at,)] = value
            elif isinstance(value, tuple):
                attributes |= {(at, part): ALIGNED for part, kind in enumerate(value) if kind[0] == "*"}
            else:
                attributes[(at,)] = ALIGNED
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": 4, "enable_fp_fusion": False}
        code = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        self.ptx = str(code.asm["ptx"])
        cubin = directory / "kernel.cubin"
        cubin.write_bytes(code.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        self.registers, self.stack, self.local = map(int, found.groups())

    def accesses(self, instruction: str) -> list[int]:
        """Return the number of bits of each access to global memory in the PTX."""
        found = re.findall(instruction + r"\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return [int(vector or 1) * int(bits) for vector, bits in found]

    def assert_fits(self, most_registers: int) -> None:
        assert self.local == 0
        assert self.stack <= (8 if IS_OLD else 0), "registers spill"
        assert self.registers <= most_registers * (1.2 if IS_OLD else 1)


def merge_arguments(kinds: tuple[int, int], dtype: str, num_models: int, inner: int, copy: bool) -> dict[str, Any]:
    rows, columns = kinds
    launch = permute.launch_of(4096, 2 if dtype in ("bf16", "i16") else 4, 2 in kinds)
    pointers = dict.fromkeys(("row_index", "row_offsets", "column_index", "column_offsets"), "*i32")
    return {
        **pointers, "row_scale": "*fp32", "column_scale": "*fp32", "out": f"*{dtype}",
        "tensors": (f"*{dtype}",) * num_models, "weights": ("fp32",) * num_models,
        **dict.fromkeys(("lines", "rows_in", "rows_out", "columns_in", "columns_out"), "i32"), "middle": 1,
        "INNER": inner, "ROW_KIND": rows, "COLUMN_KIND": columns,
        "ROW_SCALED": rows == 2, "COLUMN_SCALED": columns == 2, "COPY": copy, "NUM_MODELS": num_models,
        "BLOCK_LINES": launch.block_lines, "BLOCK_ITEMS": launch.block_items,
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kinds", KINDS)
def test_merge(architecture: int, dtype: str, kinds: str, tmp_path: Path) -> None:
    compiled = Compiled(permute.merge_kernel, architecture, merge_arguments(KINDS[kinds], dtype, 2, 1, False), tmp_path)
    compiled.assert_fits(MAX_REGISTERS)
    stores = compiled.accesses("st")
    assert stores
    assert set(stores) == {128}
    if kinds == "rows":
        # For both models, the row numbers of four lines and four vectors per thread.
        assert compiled.accesses("ld") == [128] * 2 * (1 + 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copy_and_convolution(architecture: int, tmp_path: Path) -> None:
    copied = Compiled(permute.merge_kernel, architecture, merge_arguments((1, 0), "i16", 1, 1, True), tmp_path)
    copied.assert_fits(MAX_REGISTERS)
    assert copied.accesses("ld") == [128] * (1 + 4)
    assert set(copied.accesses("st")) == {128}
    kernels = Compiled(permute.merge_kernel, architecture, merge_arguments((1, 1), "fp32", 2, 9, False), tmp_path)
    kernels.assert_fits(MAX_REGISTERS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("copies", [False, True])
def test_group(architecture: int, copies: bool, tmp_path: Path) -> None:
    """Whole rows are read and written in vectors, no matter what else the launch does."""
    dtype, num_models = ("i16", 1) if copies else ("bf16", 2)
    arguments = {
        "table": "*i64", "like": f"*{dtype}", "weights": ("fp32",) * num_models,
        "NUM_MODELS": num_models, "FIELDS": permute_group.GROUP_FIELDS.value + num_models, "PROBLEMS": 16,
        "COPY": copies, "VECTOR": 8, "BLOCK_LINES": 4, "BLOCK_ITEMS": 1024, "MOVED_ITEMS": 2048,
    }  # fmt: skip
    compiled = Compiled(permute_group.merge_group_kernel, architecture, arguments, tmp_path)
    compiled.assert_fits(168)  # 3 programs
    assert compiled.accesses("ld").count(128) >= 4 * num_models
    assert compiled.accesses("st").count(128) >= 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "by_unit", "kinds"),
    [
        *(("fp32", True, kinds) for kinds in ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2))),
        *(("fp32", False, kinds) for kinds in ((0, 0), (1, 0), (2, 0))),
        ("bf16", True, (0, 1)),
        ("bf16", False, (1, 0)),
        ("bf16", False, (2, 0)),
    ],
    ids=str,
)
def test_center(architecture: int, dtype: str, by_unit: bool, kinds: tuple[int, int], tmp_path: Path) -> None:
    """Covers convolutions and weights [units, samples], read unit by unit, and weights [samples, units]."""
    arguments = center_arguments(dtype, by_unit, kinds)
    compiled = Compiled(center.center_kernel, architecture, arguments, tmp_path)
    compiled.assert_fits(MAX_REGISTERS)
    assert set(compiled.accesses("st")) == {128, 64}  # 64 bits are sums
    if kinds[1] == 0 and not (by_unit and 2 in kinds):
        numbers = arguments["BLOCK_UNITS"] * arguments["BLOCK_SAMPLES"]
        assert compiled.accesses("ld").count(128) >= numbers * (4 if dtype == "fp32" else 2) // (128 * 16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("by_unit", [True, False])
def test_shift(architecture: int, by_unit: bool, tmp_path: Path) -> None:
    arguments = center_arguments("fp32", by_unit, (0, 2) if by_unit else (2, 0)) | {"step": "i32", "total": "*fp64"}
    Compiled(center.shift_kernel, architecture, arguments, tmp_path).assert_fits(MAX_REGISTERS)


def center_arguments(dtype: str, by_unit: bool, kinds: tuple[int, int]) -> dict[str, Any]:
    block_units, block_samples, _, _ = center.launch_of(4096, 4096, by_unit, 2 in kinds)
    return {
        "features": f"*{dtype}", "outer_members": "*i32", "inner_members": "*i32", "starts": "*i32", "scale": "*fp32",
        "shift": "*fp32", "centered": "*fp32", "sums": "*fp64", "units": "i32", "samples": "i32",
        "samples_per_part": "i32", "inner": "i32" if by_unit else 1,
        "outer_stride": "i32", "unit_stride": "i32" if by_unit else 1, "inner_stride": 1,
        "to_unit_stride": "i32" if by_unit else 1, "to_sample_stride": 1 if by_unit else "i32",
        "OUTER_KIND": kinds[0], "INNER_KIND": kinds[1], "SCALED": 2 in kinds,
        "BLOCK_UNITS": block_units, "BLOCK_SAMPLES": block_samples,
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_correlate(architecture: int, dtype: str, tmp_path: Path) -> None:
    arguments = {
        "comoment": "*fp64", "row_deviation": "*fp64", "column_deviation": "*fp64",
        "out": f"*{dtype}", "mirror": f"*{dtype}", "other": f"*{dtype}",
        "units": "i32", "count": "i32", "row_stride": "i32", "other_stride": "i32", "balance": "fp32",
        "EPS": 1e-7, "MIRRORED": True, "SYMMETRIC": False, "BLENDED": True, "BLOCK": 32,
    }  # fmt: skip
    compiled = Compiled(correlation.correlate_kernel, architecture, arguments, tmp_path)
    compiled.assert_fits(MAX_REGISTERS)
    assert 128 in compiled.accesses("ld")
