"""The inputs of a matching as short texts, which are compared between processes and with an interrupted run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast._tensors import as_integers
from mudsc_fast.options import MatchOptions
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Number of entries at the beginning, middle and end of each tensor by which different weights are detected.
_ENTRIES = 64

#: Options that change the display but not the result.
_NOT_COMPARED = ("progress", "forward")


def input_parts(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    options: MatchOptions,
    weights: Sequence[float],
    task_heads: Sequence[str],
) -> dict[str, str]:
    """Return the inputs of a matching as texts by name; equal inputs have equal texts.

    Of each tensor the name, shape, dtype and some entries count, so that large files need not be read.
    """
    parts = {name: repr(value) for name, value in vars(options).items() if name not in _NOT_COMPARED}
    parts["spec"] = "with checksum " + _checksum(spec.to_json().encode())
    parts["weights"] = repr(list(weights))
    parts["task_heads"] = repr(list(task_heads))
    for index, state_dict in enumerate(state_dicts):
        contents = (_content(name, tensor) for name, tensor in state_dict.items())
        parts[f"models[{index}]"] = "tensors with checksum " + _checksum(b"".join(contents))
    return parts


def _content(name: str, tensor: Tensor) -> bytes:
    described = f"{name} {list(tensor.shape)} {tensor.dtype} ".encode()
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return described  # each process has another part of a sharded tensor
    flat = tensor.detach().reshape(-1)
    middle = len(flat) // 2
    chosen = torch.cat([flat[:_ENTRIES], flat[middle : middle + _ENTRIES], flat[-_ENTRIES:]])
    return described + as_integers(chosen).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
