"""The samples that a layer is fitted on: its inputs, and its outputs at the same places.

Inputs are [groups, samples, inputs] and outputs [samples, outputs]. A linear layer has one sample for each row of its
input, a convolution one for each image and position. Inputs of a convolution are ordered by tap, then by channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mudsc_fast.refitting.graph import Layer
from mudsc_fast.refitting.network import norm_epsilon

#: Number of rows of a fit: per input, and the minimum in total.
_ROWS_PER_INPUT = 16
_MIN_ROWS = 8192


@dataclass(frozen=True)
class Convolution:
    """A convolution. A transposed one is a convolution of the input with zeros inserted between its entries."""

    spacing: tuple[int, ...]
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int
    transposed: bool

    @classmethod
    def of(cls, named: Mapping[str, Any], kernel: tuple[int, ...]) -> Convolution:
        """Return the convolution of an operator with these arguments."""
        count = len(kernel)
        stride, padding, dilation = (
            tuple(named[key]) * (count if len(named[key]) == 1 else 1) for key in ("stride", "padding", "dilation")
        )
        if not named["transposed"]:
            return cls((1,) * count, padding, stride, dilation, kernel, named["groups"], False)
        before = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True))
        return cls(stride, before, (1,) * count, dilation, kernel, named["groups"], True)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix [groups, outputs, inputs]."""
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        if self.transposed:
            split = split.transpose(1, 2).flip(tuple(range(3, split.ndim)))
        return split.movedim(2, -1).flatten(2)

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return a matrix as a weight of the given shape, the inverse of :meth:`matrix`."""
        outputs = matrix.shape[1]
        split = matrix.reshape(self.groups, outputs, *shape[2:], -1).movedim(-1, 2)
        if self.transposed:
            split = split.flip(tuple(range(3, split.ndim))).transpose(1, 2)
        return split.reshape(shape)

    def inputs(self, value: Tensor, places: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Return the inputs of the outputs at some places, [groups, images * places, inputs]."""
        index, inside = self._index(value.shape[2:], places.to(value.device), sizes)
        images, channels, taps = value.shape[0], value.shape[1], index.shape[1]
        pixels = value.movedim(1, -1)
        if pixels.is_contiguous():
            first = torch.arange(images, device=value.device) * pixels[0, ..., 0].numel()
            rows = (first[:, None, None] + index).flatten()
            read = pixels.reshape(-1, channels).index_select(0, rows).view(images, -1, taps, channels)
        else:
            read = value.flatten(2)[:, :, index].permute(0, 2, 3, 1)
        if not bool(inside.all()):
            read = read.mul_(inside[..., None].to(read.dtype))  # `read` is a copy
        split = read.reshape(-1, taps, self.groups, channels // self.groups)
        return split.permute(2, 0, 1, 3).flatten(2)

    def _index(self, lengths: torch.Size, places: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return [places, taps]: the position in the flattened input that each tap reads, and whether it is inside."""
        coordinates = torch.unravel_index(places, sizes)
        index, inside = self._along(0, lengths[0], sizes[0], coordinates[0])
        for axis in range(1, len(lengths)):
            along, valid = self._along(axis, lengths[axis], sizes[axis], coordinates[axis])
            index = (index[:, :, None] * lengths[axis] + along[:, None]).flatten(1)
            inside = (inside[:, :, None] & valid[:, None]).flatten(1)
        return index, inside

    def _along(self, axis: int, length: int, size: int, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Return [places, taps]: what :meth:`_index` returns, for one axis."""
        along, valid = _taps(
            (length, size),
            (self.kernel[axis], self.dilation[axis], self.stride[axis], self.padding[axis], self.spacing[axis]),
            coordinates.device,
        )
        return along[coordinates], valid[coordinates]


@lru_cache(maxsize=32)
def _taps(
    lengths: tuple[int, int], axis: tuple[int, int, int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return [size, taps]: the positions along an axis that each output reads, and whether they exist."""
    length, size = lengths
    kernel, dilation, stride, padding, spacing = axis
    taps = torch.arange(kernel, device=device) * dilation - padding
    along = torch.arange(size, device=device)[:, None] * stride + taps
    valid = (along >= 0) & (along <= (length - 1) * spacing) & (along % spacing == 0)
    return torch.where(valid, along // spacing, 0), valid


class Sampler:
    """Reads a layer's samples in a batch.

    Parameters
    ----------
    layer
        The layer, as recorded in the batch's tape.
    fixed
        The network's tensors by value number.
    shapes
        Shape of each value.
    """

    def __init__(self, layer: Layer, fixed: Mapping[int, Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
        self._layer, self._fixed, self._shape = layer, fixed, shapes[layer.output]
        self._weight = fixed[layer.weight]
        self._named = layer.call.named
        self._convolution: Convolution | None = None
        if layer.kind == "convolution":
            self._convolution = Convolution.of(self._named, tuple(self._weight.shape[2:]))
        #: Whether the units are on axis 1, followed by positions, rather than on the last axis.
        self._channels_first = layer.kind == "convolution" or (
            layer.kind == "norm" and layer.call.name != "native_layer_norm"
        )

    @property
    def num_samples(self) -> int:
        """Number of samples if all places are used."""
        count = 1
        for axis, length in enumerate(self._shape):
            count *= 1 if axis == self._axis else length
        return count

    @property
    def num_places(self) -> int:
        """Number of places to choose from: positions of a convolution, or rows of a linear layer."""
        return self.num_samples // self._shape[0] if self._channels_first else self.num_samples

    @property
    def _axis(self) -> int:
        return 1 if self._channels_first else len(self._shape) - 1

    def output(self, value: Tensor, places: Tensor | None) -> Tensor:
        """Return [samples, outputs]: values of the layer's output, or of its shape, at some places."""
        if not self._channels_first:
            rows = value.reshape(-1, value.shape[-1])
            return rows if places is None else rows.index_select(0, places.to(rows.device))
        pixels = value.movedim(1, -1)
        if places is None:
            return pixels.flatten(0, -2)
        if pixels.is_contiguous():
            first = torch.arange(len(value), device=value.device) * pixels[0, ..., 0].numel()
            rows = (first[:, None] + places.to(value.device)).flatten()
            return pixels.reshape(-1, value.shape[1]).index_select(0, rows)
        return value.flatten(2).index_select(2, places.to(value.device)).transpose(1, 2).flatten(0, 1)

    def inputs(self, value: Tensor, places: Tensor | None) -> Tensor:
        """Return [groups, samples, inputs]: the layer's inputs for its outputs at some places."""
        if self._convolution is not None:
            chosen = torch.arange(self.num_places) if places is None else places
            return self._convolution.inputs(value, chosen, self._shape[2:])
        if self._layer.kind == "norm":
            return self.output(self._normalized(value), places).t()[..., None]
        return self.output(value, places)[None]

    def matrix(self) -> Tensor:
        """Return the layer's weight as [groups, outputs, inputs]."""
        if self._convolution is not None:
            return self._convolution.matrix(self._weight)
        if self._layer.kind == "norm":
            return self._weight[:, None, None]
        return (self._weight if self._layer.call.name == "linear" else self._weight.t())[None]

    def set_matrix(self, matrix: Tensor) -> None:
        """Write a matrix as the layer's weight."""
        if self._convolution is not None:
            self._weight.copy_(self._convolution.weight(matrix, self._weight.shape))
        elif self._layer.kind == "norm":
            self._weight.copy_(matrix[:, 0, 0])
        else:
            self._weight.copy_(matrix[0] if self._layer.call.name == "linear" else matrix[0].t())

    def _normalized(self, value: Tensor) -> Tensor:
        """Return a norm's result before its factor and shift."""
        named, name = self._named, self._layer.call.name
        if name == "native_layer_norm":
            return functional.layer_norm(value, named["normalized_shape"], None, None, named["eps"])
        if name == "native_group_norm":
            return functional.group_norm(value, named["group"], None, None, named["eps"])
        mean, variance = (self._fixed[named[key].value] for key in ("running_mean", "running_var"))
        return functional.batch_norm(value, mean, variance, eps=norm_epsilon(self._layer.call))


def layer_outputs(matrix: Tensor, inputs: Tensor) -> Tensor:
    """Return the outputs [samples, outputs] of a layer's matrix for inputs [groups, samples, inputs]."""
    if len(matrix) == 1:
        return inputs[0] @ matrix[0].T
    return torch.bmm(inputs, matrix.transpose(1, 2)).transpose(0, 1).flatten(1)


class Places:
    """Chooses the places of each layer's samples at random, the same positions in all images of a batch.

    Parameters
    ----------
    samplers
        Returns, for a layer, the samplers of all batches.
    max_rows
        Maximum number of samples of a layer. None for 16 for each input, but at least 8192.
    random_state
        Random seed.
    """

    def __init__(self, samplers: Callable[[int], Sequence[Sampler]], max_rows: int | None, random_state: int) -> None:
        self._samplers, self._max_rows, self._random_state = samplers, max_rows, random_state
        self._chosen: dict[int, list[Tensor | None]] = {}

    def of(self, layer: int, batch: int) -> Tensor | None:
        """Return the places of a layer in a batch. None for all."""
        if layer not in self._chosen:
            self._chosen[layer] = self._choose(layer)
        return self._chosen[layer][batch]

    def _choose(self, layer: int) -> list[Tensor | None]:
        samplers = self._samplers(layer)
        total = sum(sampler.num_samples for sampler in samplers)
        rows = max(_ROWS_PER_INPUT * samplers[0].matrix().shape[2], _MIN_ROWS)
        if self._max_rows is not None:
            rows = min(rows, self._max_rows)
        chosen: list[Tensor | None] = []
        for batch, sampler in enumerate(samplers):
            count = min(sampler.num_places, -(-rows * sampler.num_places // total))
            seed = (self._random_state * 1_000_003 + layer) * 1_000_003 + batch
            generator = torch.Generator().manual_seed(seed % 2**63)
            places = torch.randperm(sampler.num_places, generator=generator)[:count].sort().values
            chosen.append(None if count == sampler.num_places else places)
        return chosen
