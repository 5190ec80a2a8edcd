"""The inputs of a matching as short texts, which are compared between processes and with an interrupted run."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast._tensors import as_integers
from mudsc_fast.options import MatchOptions
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Number of entries at the beginning, middle and end of each tensor by which processes with other weights are detected.
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


def tensor_checksums(state_dicts: Sequence[Mapping[str, Tensor]], names: Collection[str]) -> list[dict[str, str]]:
    """Return for each network the checksums of all entries of the tensors with some names."""
    return [
        {name: _tensor_checksum(name, tensors[name]) for name in tensors if name in names} for tensors in state_dicts
    ]


def whole_models(checksums: Sequence[Sequence[Mapping[str, str]]]) -> dict[str, str]:
    """Return the text of each network, given the results of :func:`tensor_checksums` of all processes."""
    parts = {}
    for index, of_ranks in enumerate(zip(*checksums, strict=True)):
        of_model = sorted(item for of_rank in of_ranks for item in of_rank.items())
        parts[f"models[{index}]"] = "tensors with checksum " + _checksum(repr(of_model).encode())
    return parts


def _tensor_checksum(name: str, tensor: Tensor) -> str:
    return _checksum(_described(name, tensor), _bytes_of(tensor))


def _described(name: str, tensor: Tensor) -> bytes:
    return f"{name} {list(tensor.shape)} {tensor.dtype} ".encode()


def _bytes_of(tensor: Tensor) -> memoryview:
    return as_integers(tensor).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _content(name: str, tensor: Tensor) -> bytes:
    """Return what is compared of a tensor before work begins."""
    described = _described(name, tensor)
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
        return described  # each process has another part of a sharded tensor
    flat = tensor.detach().reshape(-1)
    middle = len(flat) // 2
    chosen = torch.cat([flat[:_ENTRIES], flat[middle : middle + _ENTRIES], flat[-_ENTRIES:]])
    return described + _bytes_of(chosen)


def _checksum(*contents: bytes | memoryview) -> str:
    checksum = hashlib.sha256()
    for content in contents:
        checksum.update(content)
    return checksum.hexdigest()[:16]
