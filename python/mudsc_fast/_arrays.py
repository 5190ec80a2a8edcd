"""Arrays of other libraries as input of the ops: the one place where they become tensors."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mudsc_fast import _checks


class HasArray(Protocol):
    """An object that NumPy reads."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray[Any, Any]:
        """Return the entries as a NumPy array."""
        ...


class HasDlpack(Protocol):
    """An object that shares its memory by DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the capsule."""
        ...


#: Types that the ops accept for tensors that they read.
Array: TypeAlias = Tensor | HasArray | HasDlpack


def as_tensor(argument: str, value: object) -> Tensor:
    """Return a tensor, a NumPy array or anything with ``__dlpack__`` or ``__array__`` as a tensor.

    Memory is shared where the other library lets it be: a JAX or CuPy array on a GPU stays there. Copied are arrays
    that torch cannot view: read-only ones, those of foreign byte order and those with negative strides.

    Raises
    ------
    TypeError
        If `value` is none of these, or of a dtype that torch does not have.
    ValueError
        If it is a tensor without data.
    """
    if isinstance(value, Tensor):
        # A view may store negated entries and set a flag, which kernels that read its memory do not see.
        return _checks.check_tensor(argument, value).resolve_neg()
    if isinstance(value, np.ndarray):
        return _from_numpy(argument, value)
    if hasattr(value, "__dlpack__"):
        return _checks.check_tensor(argument, _from_dlpack(argument, value))
    if hasattr(value, "__array__"):
        return _from_numpy(argument, np.asarray(value))
    raise TypeError(
        f"{argument} must be a torch.Tensor, got {type(value).__name__}, which has neither __dlpack__ nor __array__"
    )


def _from_dlpack(argument: str, value: Any) -> Tensor:
    try:
        tensor: Tensor = torch.utils.dlpack.from_dlpack(value)
    except (AttributeError, BufferError, RuntimeError, TypeError) as error:
        if hasattr(value, "__array__"):
            return _from_numpy(argument, np.asarray(value))
        raise TypeError(f"{argument} must be an array that torch can read by __dlpack__: {error}") from error
    return tensor


def _from_numpy(argument: str, array: np.ndarray[Any, Any]) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not native.flags.writeable or any(stride < 0 for stride in native.strides):
        native = native.copy()
    try:
        return torch.from_numpy(native)
    except TypeError:
        raise TypeError(f"{argument} must be of a dtype that torch has, got {array.dtype}") from None
