"""The CUDA kernels as nvcc compiles them: registers, spills, and the module on a machine without a driver.

What was compiled is kept in build/cuda_compiled, by a hash of its sources and the compiler, so that only the first run
takes a minute. `make compiled` runs this file alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import machine_code

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "cuda_compiled"
ARCHITECTURES = ("80", "90a", "100")
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))

#: Registers that leave room for as many blocks on a multiprocessor as planned, of 65,536 by kernel.
MAX_REGISTERS = {
    "correlation_shift_kernel": 40,
    "correlation_product_kernel": 255,  # 1 block of 256: two accumulators of 64 numbers in each thread
    "correlation_wgmma_kernel": 255,  # the same
    "correlation_moments_kernel": 64,
    "correlation_join_kernel": 80,  # 3 blocks of 256
    "correlation_blend_kernel": 64,
    "zip_load": 40,  # 6 blocks of 256 threads
    "zip_symmetry": 40,
    "zip_merge": 64,  # 1 block of 1024
    "assignment_batch_kernel": 128,  # 2 blocks of 256; those of one warp are bounded by shared memory
    "inspect_rows": 40,
    "check_classes": 40,
    "certify_rows": 40,
    "bid_in_rounds": 64,  # 4 blocks of 256, which wait for each other
    "list_rows": 64,
    "do_nothing": 16,
}

#: Tensor-core instructions that kernels must have, by source and mangled name: on every architecture, and (below) on
#: 9.0a; f is float, S3_ the type before it.
TENSOR_INSTRUCTIONS = {
    ("correlation_product", r"correlation_product_kernelI\w*fLb"): "HMMA.1688.F32.TF32",
    ("correlation_product", r"correlation_product_kernelI\w*8BFloat16ES\w*_Lb"): "HMMA.16816.F32.BF16",
    ("correlation_product", r"correlation_product_kernelI\w*4HalfES\w*_Lb"): "HMMA.16816.F32 ",
}
WARPGROUP_INSTRUCTIONS = {
    ("correlation_wgmma", r"correlation_wgmma_kernelI\w*fLb"): "HGMMA.64x128x8.F32.TF32",
    ("correlation_wgmma", r"correlation_wgmma_kernelI\w*8BFloat16ES\w*_Lb0"): r"HGMMA.64x128x16.F32.BF16 ",
    ("correlation_wgmma", r"correlation_wgmma_kernelI\w*8BFloat16ES\w*_Lb1"): r".tnspA.tnspB",
    ("correlation_wgmma", r"correlation_wgmma_kernelI\w*4HalfES\w*_Lb"): "HGMMA.64x128x16.F32 ",
}

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found: the CUDA kernels are not compiled")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@cache
def key() -> str:
    """Return a hash of everything that the kernels are compiled from."""
    files = sorted(path for folder in ("cuda", "include", "bindings") for path in (ROOT / "csrc" / folder).rglob("*.*"))
    content = hashlib.sha256(run(str(NVCC), "--version").encode() + (ROOT / "CMakeLists.txt").read_bytes())
    for path in files:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def resources(source: str, architecture: str) -> str:
    """Compile a source and return the assembler's report on its kernels."""
    report = KEPT / key() / f"{source}.{architecture}.txt"
    if not report.exists():
        report.parent.mkdir(parents=True, exist_ok=True)
        said = run(
            str(NVCC),
            "-std=c++17",
            "--fmad=false",
            "-Icsrc/include",
            "-Xptxas=-v",
            "-Xcompiler=-Wall,-Wextra",
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
            "-cubin",
            f"csrc/cuda/{source}.cu",
            "-o",
            report.with_suffix(".cubin"),
        )
        report.write_text(said)
    return report.read_text()


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_registers_and_spills(source: str, architecture: str) -> None:
    report = resources(source, architecture)
    assert "warning" not in report
    # The assembler's warning that it serializes asynchronous products.
    assert "serialized" not in report
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert kernels
    for mangled, stack, spilled, registers in kernels:
        named = [name for name in MAX_REGISTERS if re.search(rf"\d{name}I?", mangled)]
        assert len(named) == 1, f"no plan for {mangled}"
        assert int(stack) == int(spilled) == 0, mangled
        assert int(registers) <= MAX_REGISTERS[named[0]], mangled


def disassembler() -> str | None:
    """Return the path of cuobjdump, from the CUDA toolkit or from Triton."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(brought) if brought.exists() else None
    return found


needs_disassembler = pytest.mark.skipif(
    disassembler() is None, reason="cuobjdump was not found: machine code is not inspected"
)


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_use_tensor_cores(architecture: str) -> None:
    expected = {**TENSOR_INSTRUCTIONS, **(WARPGROUP_INSTRUCTIONS if architecture == "90a" else {})}
    for (source, pattern), instruction in expected.items():
        kernels = [code for name, code in machine_code_of(source, architecture) if re.search(pattern, name)]
        assert kernels, f"no kernel is called {pattern}"
        for kernel in kernels:
            assert instruction in kernel, pattern


@cache
def machine_code_of(source: str, architecture: str) -> list[tuple[str, str]]:
    """Return the name and the machine code of each kernel of a source."""
    resources(source, architecture)
    code = run(str(disassembler()), "-sass", KEPT / key() / f"{source}.{architecture}.cubin")
    _, *functions = re.split(r"Function : (?=\w)", code)
    return [(function.split()[0], function) for function in functions]


#: Kernels that copy features 16 bytes at a time, by mangled name: float32, and half types without conversion.
COPIED_UNCONVERTED = r"kernelI(ff|\w*(8BFloat16|4Half)ES\w*_)Lb"


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copied_features_are_fixed_16_bytes_at_a_time(architecture: str) -> None:
    """Scalar accesses 16 bytes apart use only 8 of 32 banks of shared memory and take four times the cycles."""
    wide = r"LDGSTS\S*\.128|LDS\.128|STS\.128"
    kernels = [
        one for one in machine_code_of("correlation_product", architecture) if re.search(COPIED_UNCONVERTED, one[0])
    ]
    assert len(kernels) == 6
    for name, code in kernels:
        loop = [one.name for one in machine_code.main_loop(machine_code.parse(code), "HMMA", wide)]
        copied = sum(bool(re.match(r"LDGSTS\S*\.128", one)) for one in loop)
        assert copied == 8, name  # of two tiles of 16 kB by 256 threads
        assert loop.count("LDS.128") >= copied, name
        assert loop.count("STS.128") >= copied, name


@needs_nvcc
@needs_disassembler
def test_warpgroup_issue_slots_fit_tensor_cycles() -> None:
    """Each of the four schedulers issues the instructions of two of the block's eight warps.

    Nominal tensor cycles of a slab: 128 x 128 x 32 products three times in TF32, at 1024 a cycle, or 128 x 128 x 64 of
    halves at 2048. Halves whose units are adjacent are copied along walking samples, which takes more instructions.
    """
    kernels = [one for one in machine_code_of("correlation_wgmma", "90a") if re.search(COPIED_UNCONVERTED, one[0])]
    assert len(kernels) == 6
    for name, code in kernels:
        loop = machine_code.main_loop(machine_code.parse(code), "HGMMA")
        assert sum(bool(re.match(r"LDGSTS\S*\.128", one.name)) for one in loop) == 8, name
        slots = 2 * len(loop)
        assert slots <= (1536 if "Iff" in name else 1.5 * 512), (name, slots)


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zip_kernel_has_no_64_bit_division(architecture: str) -> None:
    """A 64-bit division would be a call of a function, which the machine code names."""
    resources("zip", architecture)
    cubin = (KEPT / key() / f"zip.{architecture}.cubin").read_bytes()
    assert b"zip_merge" in cubin
    assert not re.search(rb"__cuda_sm20_(div|rem)_[su]64", cubin)


@needs_nvcc
@needs_disassembler
def test_wgmma_accumulators_are_not_touched_before_wait() -> None:
    """The products of a slab follow each other, and nothing else uses their registers before the wait.

    After the last product the machine code continues with preparing the next slab, which ends with the wait.
    """
    kernels = machine_code_of("correlation_wgmma", "90a")
    for name, code in kernels:
        products = 12 if re.search("fLb", name) else 4
        steps = re.findall(r"WARPGROUP\.ARRIVE|HGMMA|WARPGROUP\.DEPBAR", code)
        assert steps == ["WARPGROUP.DEPBAR", "WARPGROUP.ARRIVE", *["HGMMA"] * products, "WARPGROUP.DEPBAR"], name
        (first,) = set(re.findall(r"HGMMA\S+ R(\d+),", code))
        registers = {f"R{int(first) + k}" for k in range(64)}
        instructions = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
        last = max(at for at, what in instructions if "HGMMA" in what)
        back = next(re.search(r"BRA 0x([0-9a-f]+)", what) for at, what in instructions if at > last)
        assert back is not None, name
        wait = next(at for at, what in instructions if "WARPGROUP.DEPBAR" in what)
        between = [what for at, what in instructions if int(back[1], 16) <= at < wait]
        assert len(between) > 100
        assert not [what for what in between if registers & set(re.findall(r"\bR\d+\b", what))], name


@pytest.fixture(scope="module")
def module_folder() -> Path:
    """Build the module of the CUDA kernels for one architecture, without optimization, and return its folder."""
    folder = KEPT / key() / f"module-{sys.version_info.major}.{sys.version_info.minor}"
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to build the module of the CUDA kernels")
    if not list(folder.glob("_cuda.*")):
        run(
            "cmake",
            "-S",
            ROOT,
            "-B",
            folder,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DMUDSC_CUDA=ON",
            "-DMUDSC_CUDA_ARCHITECTURES=80-real",
            "-DCMAKE_CUDA_FLAGS=-Xcicc=-O0 -Xptxas=-O0",
            "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",
            "-DCMAKE_UNITY_BUILD=ON",
            "-DMUDSC_WARNINGS_AS_ERRORS=ON",
        )
        run("cmake", "--build", folder, "--target", "_cuda", "--parallel", "2")
    return folder


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import _cuda
reason = _cuda.unavailable_reason()
print(reason)
if reason:
    try:
        _cuda.assignment_batch_fits(rows=64, columns=64, device=0, stream=0)
    except RuntimeError as error:
        assert "CUDA kernel assignment_batch could not be launched: " in str(error), error
        assert str(error).partition(" could not be launched: ")[2] in reason, error
    else:
        raise AssertionError("a launch without a device went unnoticed")
"""


@needs_nvcc
def test_module_imports_without_driver_and_explains(module_folder: Path) -> None:
    run(sys.executable, "-c", PROGRAM, module_folder)


@needs_nvcc
@pytest.mark.parametrize("modules", [("_cuda", "_cuda_simulator"), ("_cuda_simulator", "_cuda")], ids=str)
def test_simulator_can_be_imported_too(module_folder: Path, modules: tuple[str, str]) -> None:
    import mudsc_fast

    if not list(Path(mudsc_fast.__file__).parent.glob("_cuda_simulator.*")):
        pytest.skip("the simulator is not installed")
    program = "import sys, importlib; sys.path[:0] = sys.argv[1:3]; [importlib.import_module(m) for m in sys.argv[3:]]"
    run(sys.executable, "-c", program, module_folder, Path(mudsc_fast.__file__).parent, *modules)
