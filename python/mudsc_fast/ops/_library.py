"""Registration of ops with torch as ``torch.ops.mudsc_fast.<op>``.

Registration makes an op visible to FakeTensor, torch.compile and torch.export. A public function that is being traced
calls the registered op instead of a kernel, with tensors and plain numbers only. When the registered op runs, it calls
the public function on real tensors, which checks their values and chooses the kernel. Calls that are not traced skip
the registered op, so registration costs them nothing. No op has a gradient: each raises an error when one is requested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

_library = torch.library.Library("mudsc_fast", "DEF")

# Most of these ops make the host wait for the device or copy to it, which a CUDA graph cannot record. Older versions of
# torch do not have the tag.
_TAGS = [torch.Tag.pt2_compliant_tag, *filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)])]


def traced(tensor: object) -> bool:
    """Return whether an op on this tensor is being recorded or simulated instead of computed."""
    is_fake = type(tensor) is not Tensor and isinstance(tensor, FakeTensor)
    return is_fake or is_compiling() or _len_torch_dispatch_stack() > 0


def define(schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op for all devices.

    Parameters
    ----------
    schema
        Name, arguments and results, in torch's schema language.
    compute
        Computes the op on real tensors.
    fake
        Returns empty tensors with the shapes and dtypes of the results.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)

    def refuse_gradients(*arguments: Any) -> Any:
        tensors = [part for value in arguments for part in (value if isinstance(value, (list, tuple)) else [value])]
        if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in tensors):
            raise ValueError(
                f"mudsc_fast::{name} has no gradient: call under torch.no_grad() or pass tensors that require none"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.mudsc_fast, name)(*arguments)

    for device in ("CPU", "CUDA"):
        _library.impl(name, compute, device)
    _library.impl(name, refuse_gradients, "Autograd")
    torch.library.register_fake(f"mudsc_fast::{name}", fake, lib=_library)
