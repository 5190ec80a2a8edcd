"""Argument checks. Each error names the argument, what was expected, and what was given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: Dtypes that every op reads.
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(argument: str, value: object) -> Tensor:
    """Return `value` if it is a tensor in memory, else raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{argument} must be a dense tensor, got layout {value.layout}")
    if value.is_meta:
        raise ValueError(f"{argument} must hold data, got a tensor on the meta device")
    return value


def check_float(argument: str, value: Tensor) -> None:
    """Raise TypeError unless the tensor is float16, bfloat16, float32 or float64."""
    if value.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{argument} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def _extremes(value: Tensor) -> list[float]:
    """Return the least and the greatest number of a real tensor, NaN if any is; nothing if it is empty."""
    # Both go to the host together, so that it waits for a device only once.
    return torch.stack(value.aminmax()).tolist() if value.numel() else []


def is_finite(value: Tensor) -> bool:
    """Return whether all numbers of a real tensor are finite."""
    # NaN and inf show in the extremes: one read, without a mask or a copy of the tensor's size.
    return all(map(math.isfinite, _extremes(value)))


def check_finite(argument: str, value: Tensor) -> float:
    """Return the largest magnitude, or raise ValueError naming the first entry that is NaN or infinite.

    Integers and booleans are not read, and 0 is returned.
    """
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point():
        return 0.0
    extremes = _extremes(value)
    if all(map(math.isfinite, extremes)):
        return max(map(abs, extremes), default=0.0)
    bad = (~torch.isfinite(value)).nonzero()
    index = tuple(bad[0].tolist())
    raise ValueError(f"{argument} must be finite, got {value[index].item()} at {index}")


def check_int(argument: str, value: object, minimum: int) -> int:
    """Return `value` as an int if it is an integer (of Python, NumPy or a 0-d tensor) of at least `minimum`."""
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise TypeError(f"{argument} must be an int, got {type(value).__name__}")
    if number < minimum:
        raise ValueError(f"{argument} must be at least {minimum}, got {number}")
    return int(number)


def check_number(argument: str, value: object) -> float:
    """Return `value` as a float if it is a real number (of Python, NumPy or a 0-d tensor) that is not NaN."""
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    if number != number:
        raise ValueError(f"{argument} must be a number, got NaN")
    return float(number)


def check_finite_number(argument: str, value: object) -> float:
    """Return a finite number as a float, or raise an error that names the argument."""
    number = check_number(argument, value)
    if math.isinf(number):
        raise ValueError(f"{argument} must be finite, got {number}")
    return number


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_share(argument: str, value: object) -> float:
    """Return a number in [0, 1], or raise an error that names the argument."""
    share = check_number(argument, value)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{argument} must be in [0, 1], got {share}")
    return share


def _scalar(value: object) -> object:
    """Return the number in a tensor or array without axes; other values unchanged."""
    return value.item() if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0 else value
