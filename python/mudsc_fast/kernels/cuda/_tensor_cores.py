"""Which tensor-core instructions multiply correlations on a device, and how it is known that they do it rightly.

Every device has mma.sync; devices of compute capability 9.0 have wgmma too. Its kernel (csrc/cuda/correlation_wgmma.cu)
depends on layouts of shared memory that only such a device can confirm. At its first use on a device, small products by
wgmma are compared with those by mma.sync; where they differ, the device takes mma.sync from then on. The host waits for
the device once for this. The environment variable ``MUDSC_TENSOR_CORES`` names the one to use without a comparison.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MMA_SYNC, WGMMA = "mma.sync", "wgmma"
_VARIABLE = "MUDSC_TENSOR_CORES"

#: Of the comparison: more units than a tile has, and so many samples that all buffers are used several times.
_UNITS, _SAMPLES = 136, 520
#: Largest difference, relative to the norms of the two units. Rounding leaves some 1e-7.
_LARGEST_DIFFERENCE = 1e-5

#: Returns the products of two [T, C] or, for axis 0, [C, T] features by the instructions named, then other sums.
Multiply = Callable[[list[Tensor], int, str], list[Tensor]]


class Choice(NamedTuple):
    """The instructions in use on a device, and why."""

    instructions: str
    reason: str


def choose(device: torch.device, multiply: Multiply) -> Choice:
    """Return what to multiply with on `device`; the first call on one may compare products made by `multiply`.

    Raises
    ------
    ValueError
        If ``MUDSC_TENSOR_CORES`` is set to anything but the two.
    RuntimeError
        If the device fails during the comparison.
    """
    asked = os.environ.get(_VARIABLE)
    if asked:
        if asked not in (MMA_SYNC, WGMMA):
            raise ValueError(f"the environment variable {_VARIABLE} must be {MMA_SYNC!r} or {WGMMA!r}, got {asked!r}")
        return Choice(asked, f"named by {_VARIABLE}")
    if _capability(device) != (9, 0):
        return Choice(MMA_SYNC, "compute capability is not 9.0")
    if (device, multiply) not in _compared:
        if _is_capturing(device):
            return Choice(MMA_SYNC, "nothing can be compared while a graph is captured")
        _compared[device, multiply] = _compare(device, multiply)
    return _compared[device, multiply]


#: What comparisons have shown.
_compared: dict[tuple[torch.device, Multiply], Choice] = {}


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _compare(device: torch.device, multiply: Multiply) -> Choice:
    try:
        for features, axis, name in _examples(device):
            expected, found = (multiply(features, axis, instructions) for instructions in (MMA_SYNC, WGMMA))
            if bool(found[0].isnan().all()):
                return Choice(MMA_SYNC, "wgmma was not compiled: this build has no code for 9.0a")
            difference = max(_difference(one, other) for one, other in zip(found, expected, strict=True))
            # Also where the difference is NaN.
            if not difference <= _LARGEST_DIFFERENCE:
                return Choice(MMA_SYNC, f"wgmma gives other products of {name}, by {difference:.1e} of their size")
    except RuntimeError as error:
        raise RuntimeError(
            f"comparing products by wgmma and mma.sync failed; setting {_VARIABLE}={MMA_SYNC} avoids both: {error}"
        ) from error
    return Choice(WGMMA, "gives the products of mma.sync")


def _capability(device: torch.device) -> tuple[int, int]:
    # The simulator has both.
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
