"""Tensor-core instructions that multiply features on a CUDA device, and the dtypes that use them.

``mma.sync`` is available on all devices that the kernels support. Devices of compute capability 9.0 also have
``wgmma``, whose kernel (csrc/cuda/correlation_wgmma.cu) depends on layouts of shared memory that only such a device can
confirm. It is not used by default before a run of benchmarks/run_on_gpu.sh has passed on such a device
(`WGMMA_CONFIRMED`). Even then, the first use of a device compares small products of both instructions, and uses
``mma.sync`` if they differ; the host waits for the device once. The environment variable ``MUDSC_TENSOR_CORES`` selects
an instruction without a comparison.

A float32 product takes three TF32 products. That is faster than torch.mm in float32 only where TF32 is several times as
fast as the plain cores, which it is not on devices for workstations and games. There float32 features are centered by a
Triton kernel and multiplied by torch.mm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mudsc_fast.kernels.cuda import _device

MMA_SYNC, WGMMA = "mma.sync", "wgmma"
_VARIABLE = "MUDSC_TENSOR_CORES"

#: Compute capabilities on whose tensor cores three TF32 products are faster than one float32 product. Each number is
#: the peak TF32 rate for dense matrices over the peak float32 rate, as NVIDIA publishes them in its architecture
#: whitepapers and data sheets, not measured: 156 / 19.5 TFLOP/s on an A100, 495 / 67 on an H100, 1100 / 75 on a B200;
#: 35 / 35 on an RTX 3090, 83 / 83 on an RTX 4090, 105 / 105 on an RTX 5090.
TF32_RATIO = {
    (8, 0): 8.0,
    (8, 6): 1.0,
    (8, 7): 1.0,
    (8, 9): 1.0,
    (9, 0): 7.4,
    (10, 0): 14.0,
    (10, 3): 14.0,
    (12, 0): 1.0,
    (12, 1): 1.0,
}
#: TF32 products for one float32 product.
_TF32_PRODUCTS = 3

#: Compute capabilities on which a run of benchmarks/run_on_gpu.sh has passed with wgmma.
WGMMA_CONFIRMED: frozenset[tuple[int, int]] = frozenset()

#: Size of the comparison: more units than a tile has, and enough samples to use all buffers several times.
_UNITS, _SAMPLES = 136, 520
#: Largest difference, relative to the norms of the two units. Rounding leaves about 1e-7.
_LARGEST_DIFFERENCE = 1e-5

#: Returns the products of two [T, C] features (for axis 0 [C, T]) by the named instructions, then other sums.
Multiply = Callable[[list[Tensor], int, str], list[Tensor]]


class Choice(NamedTuple):
    """The instructions in use on a device, and why."""

    instructions: str
    reason: str


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether features of a dtype are multiplied on the tensor cores of a device."""
    if dtype != torch.float32 or os.environ.get(_VARIABLE):
        return True
    # Devices that are missing from the table are newer than it; only those for data centers have fast TF32.
    return TF32_RATIO.get(_capability(device), 1.0) > _TF32_PRODUCTS


def choose(device: torch.device, multiply: Multiply) -> Choice:
    """Return the instructions for `device`; the first call for a device may compare products of `multiply`.

    Raises
    ------
    ValueError
        If ``MUDSC_TENSOR_CORES`` is set to another value than the two.
    RuntimeError
        If the device fails during the comparison.
    """
    asked = os.environ.get(_VARIABLE)
    if asked:
        if asked not in (MMA_SYNC, WGMMA):
            raise ValueError(f"the environment variable {_VARIABLE} must be {MMA_SYNC!r} or {WGMMA!r}, got {asked!r}")
        return Choice(asked, f"named by {_VARIABLE}")
    capability = _capability(device)
    if capability != (9, 0):
        return Choice(MMA_SYNC, "compute capability is not 9.0")
    if capability not in WGMMA_CONFIRMED:
        return Choice(MMA_SYNC, f"wgmma is not confirmed on a device yet; {_VARIABLE}={WGMMA} selects it")
    if (device, multiply) not in _compared:
        if _device.is_capturing(device):
            return Choice(MMA_SYNC, "nothing can be compared while a graph is captured")
        _compared[device, multiply] = _compare(device, multiply)
    return _compared[device, multiply]


#: Results of comparisons.
_compared: dict[tuple[torch.device, Multiply], Choice] = {}


def _compare(device: torch.device, multiply: Multiply) -> Choice:
    try:
        for features, axis, name in _examples(device):
            expected, found = (multiply(features, axis, instructions) for instructions in (MMA_SYNC, WGMMA))
            if bool(found[0].isnan().all()):
                return Choice(MMA_SYNC, "wgmma was not compiled: this build has no code for 9.0a")
            difference = max(_difference(one, other) for one, other in zip(found, expected, strict=True))
            # Also true if the difference is NaN.
            if not difference <= _LARGEST_DIFFERENCE:
                return Choice(MMA_SYNC, f"wgmma gives other products of {name}, by {difference:.1e} of their size")
    except RuntimeError as error:
        raise RuntimeError(
            f"comparing products by wgmma and mma.sync failed; setting {_VARIABLE}={MMA_SYNC} avoids both: {error}"
        ) from error
    return Choice(WGMMA, "gives the products of mma.sync")


def _capability(device: torch.device) -> tuple[int, int]:
    # The simulator has both instructions.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _examples(device: torch.device) -> Iterator[tuple[list[Tensor], int, str]]:
    """Yield features for every kernel: types, units or samples adjacent, and means at and far from zero."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(_SAMPLES, _UNITS, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for offset in (0.0, 8.0):
            features = [(one + offset).to(device, dtype) for one in plain]
            for one in features:
                one[3, 5] = torch.nan
            yield features, 1, f"{dtype} features of mean {offset}, units adjacent"
            yield [one.T.contiguous() for one in features], 0, f"{dtype} features of mean {offset}, samples adjacent"


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
