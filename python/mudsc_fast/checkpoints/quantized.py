"""Quantized weights in files: recognized by name, refused, or dequantized on request.

8-bit weights are stored without their scale. Averaging them would be meaningless, and permuting them would separate
blocks from their scales. Simple schemes (a weight times a scale per tensor, row or block) are converted to floating
point tensors of the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mudsc_fast.checkpoints.checkpoint import Checkpoint
from mudsc_fast.checkpoints.errors import CheckpointError

FLOAT8_DTYPES = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)

#: Dtypes of quantized weights. Tensors of other integer dtypes are indices, counters or masks.
_QUANTIZED_DTYPES = (*FLOAT8_DTYPES, torch.int8, torch.uint8)

#: Names that replace `weight` in the name of a scale, and the divisor of the scale. bitsandbytes stores the largest
#: absolute value of a row, which corresponds to 127.
_SCALES = {"weight_scale": 1.0, "weight_scale_inv": 1.0, "SCB": 127.0}

#: Names of tensors that only quantized layers have.
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight\.absmax|weight\.quant_map|weight\.quant_state\.\w+"
    r"|\w+_(blocks|scales)|_packed_params\.\w+)$"
)

#: Rows and columns of a block with one scale, in the files of DeepSeek, Qwen and others.
_USUAL_BLOCK = 128

#: Tensors of a quantized layer that are not needed once its weight is dequantized.
_LEFT_OVER = ("input_scale", "weight_format", "weight_zero_point", "weight_shape")


@dataclass(frozen=True)
class _QuantizedWeight:
    name: str
    scale: str | None
    divisor: float


class DequantizedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint. Quantized weights are multiplied by their scales on access."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, _QuantizedWeight],
        dtype: torch.dtype,
        block_size: Sequence[int] | None,
    ) -> None:
        self._tensors = tensors
        self._weights = weights
        dropped = {weight.scale for weight in weights.values()}
        dropped |= {_sibling(name, part) for name in weights for part in _LEFT_OVER}
        self._names = dict.fromkeys(name for name in tensors if name not in dropped)
        self._dtype = dtype
        self._block_size = block_size

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._tensors[name]
        weight = self._weights.get(name)
        if weight is None:
            return tensor
        wide = tensor.to(torch.float32)
        if weight.scale is not None:
            scale = self._tensors[weight.scale].to(torch.float32) / weight.divisor
            wide = wide * _spread(scale, wide, self._block_size, name)
        return wide.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def quantized_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the quantized weights of a checkpoint."""
    packed = [name for name in checkpoint.tensors if _PACKED.search(name)]
    return packed + list(_quantized_weights(checkpoint.tensors))


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Raise a CheckpointError that names a quantized weight, if there is one.

    8-bit integers without a scale may be masks. ``check_integers`` compares them between the networks.
    """
    packed = next((name for name in checkpoint.tensors if _PACKED.search(name)), None)
    if packed is not None:
        raise CheckpointError(f"{checkpoint.path}: {packed!r} is a packed quantized weight: {_way_out(checkpoint)}")
    weights = _quantized_weights(checkpoint.tensors)
    if not weights:
        return
    name, weight = next(iter(weights.items()))
    dtype = str(checkpoint.tensors[name].dtype).removeprefix("torch.")
    scaled = "without a scale" if weight.scale is None else f"with the scale {weight.scale!r}"
    raise CheckpointError(
        f"{checkpoint.path}: {name!r} is quantized ({dtype}, {scaled}) and cannot be averaged: pass "
        "dequantize=True to mudsc_fast.io.merge_checkpoints, or use the original network"
    )


def dequantized(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """Return a checkpoint with floating point weights. If no weight is quantized, return it as is.

    Parameters
    ----------
    checkpoint
        The network. Weights may be float8 or int8, with scales per tensor, row or block that are named
        ``weight_scale``, ``weight_scale_inv`` or ``SCB``. float8 weights may have no scale.
    dtype
        Dtype of the weights, by default that of most other floating point tensors of the checkpoint.

    Raises
    ------
    CheckpointError
        If weights are packed in another scheme.
    """
    packed = next((name for name in checkpoint.tensors if _PACKED.search(name)), None)
    if packed is not None:
        raise CheckpointError(f"{checkpoint.path}: {packed!r} cannot be dequantized here: {_way_out(checkpoint)}")
    weights = _quantized_weights(checkpoint.tensors)
    if not weights:
        return checkpoint
    config, scheme = checkpoint.config, _scheme(checkpoint)
    if config is not None:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    tensors = DequantizedTensors(
        checkpoint.tensors,
        weights,
        dtype or _usual_dtype(checkpoint.tensors, weights),
        scheme.get("weight_block_size"),
    )
    pieces = {stored: piece for stored, piece in checkpoint.pieces.items() if piece.name in tensors}
    return replace(checkpoint, tensors=tensors, config=config, pieces=pieces)


def _quantized_weights(tensors: Mapping[str, Tensor]) -> dict[str, _QuantizedWeight]:
    """Return the 8-bit weights that have a scale or a floating point dtype."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _QUANTIZED_DTYPES:
            continue
        scale = next((part for part in _SCALES if _sibling(name, part) in tensors), None)
        if scale is not None and tensor.ndim:
            found[name] = _QuantizedWeight(name, _sibling(name, scale), _SCALES[scale])
        elif tensor.dtype in FLOAT8_DTYPES:
            found[name] = _QuantizedWeight(name, None, 1.0)
    return found


def _sibling(weight: str, part: str) -> str:
    return f"{weight.removesuffix('weight')}{part}"


def _usual_dtype(tensors: Mapping[str, Tensor], weights: Mapping[str, Any]) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    scales = {weight.scale for weight in weights.values()}
    for name, tensor in tensors.items():
        if name not in weights and name not in scales and tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__) if counts else torch.bfloat16


def _spread(scale: Tensor, weight: Tensor, block_size: Sequence[int] | None, name: str) -> Tensor:
    """Return the scale in a shape that can be multiplied by the weight.

    The scale has one number, one per row, or one per block. The last block of an axis may be incomplete.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() == scale.shape[0] == weight.shape[0]:
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    if scale.ndim != weight.ndim:
        raise CheckpointError(
            f"{name!r} of shape {list(weight.shape)} cannot be dequantized: its scale has shape {list(scale.shape)}"
        )
    for axis, (blocks, length) in enumerate(zip(scale.shape, weight.shape, strict=True)):
        if blocks > 1:
            width = _block_width(blocks, length, None if block_size is None else block_size[axis - weight.ndim], name)
            scale = scale.repeat_interleave(width, axis).narrow(axis, 0, length)
    return scale


def _block_width(blocks: int, length: int, configured: int | None, name: str) -> int:
    """Return the width of the blocks of an axis. The last block may be incomplete.

    If the configuration does not give it, blocks have the usual width or divide the axis into equal parts. If both are
    possible and differ, the width is unknown.
    """
    widths = {configured} if configured is not None else {_USUAL_BLOCK, length // blocks}
    possible = {width for width in widths if width and -(-length // width) == blocks}
    if configured is None and length % blocks:
        possible.discard(length // blocks)
    if len(possible) != 1:
        why = "do not fit" if not possible else "fit in several ways to"
        raise CheckpointError(
            f"{name!r} cannot be dequantized: {blocks} scales {why} {length} entries: set weight_block_size in the "
            "quantization_config of config.json to the size of a block"
        )
    return possible.pop()


def _way_out(checkpoint: Checkpoint) -> str:
    method = _scheme(checkpoint).get("quant_method")
    named = f" ({method})" if method else ""
    return (
        f"use the network from before quantization{named}, or load it with transformers, call model.dequantize() and "
        "save it again"
    )


def _scheme(checkpoint: Checkpoint) -> Mapping[str, Any]:
    scheme = (checkpoint.config or {}).get("quantization_config")
    return scheme if isinstance(scheme, Mapping) else {}
