"""The samples that a layer is fitted on: its inputs, as rows of a matrix product, and its outputs at the same places.

Inputs are [outer, groups, inputs, inner] and outputs [outer, outputs, inner]; the samples are outer times inner. A
linear layer has one sample per row of its input, a convolution one per image and position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mudsc_fast.refit.graph import Layer


@dataclass(frozen=True)
class Convolution:
    """A convolution, or a transposed one seen as the convolution of an input with zeros between its entries."""

    spacing: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int
    transposed: bool

    @classmethod
    def of(cls, named: dict[str, Any], kernel: tuple[int, ...]) -> Convolution:
        """Return the convolution that an operator with these arguments computes."""
        count = len(kernel)
        stride, padding, dilation, extra = (
            tuple(named[key]) * (count if len(named[key]) == 1 else 1)
            for key in ("stride", "padding", "dilation", "output_padding")
        )
        if not named["transposed"]:
            both = tuple((p, p) for p in padding)
            return cls((1,) * count, both, stride, dilation, kernel, named["groups"], False)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        both = tuple((r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True))
        return cls(stride, both, (1,) * count, dilation, kernel, named["groups"], True)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as [groups, outputs, inputs of a sample]."""
        if not self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        return split.flip(tuple(range(3, split.ndim))).transpose(1, 2).flatten(2)

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Return a matrix of :meth:`matrix` as a weight of the given shape."""
        if not self.transposed:
            return matrix.reshape(shape)
        split = matrix.reshape(self.groups, shape[1], shape[0] // self.groups, *shape[2:])
        return split.transpose(1, 2).flip(tuple(range(3, split.ndim))).reshape(shape)

    def inputs(self, value: Tensor, places: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Return what the outputs at some places read: [batch, groups, inputs, places]."""
        count = len(self.kernel)
        value = self._spaced(value)
        # functional.pad begins with the last axis; negative amounts cut off.
        value = functional.pad(value, [amount for both in reversed(self.padding) for amount in both])
        lengths = value.shape[2:]
        index = torch.zeros(1, len(places), dtype=torch.int64, device=value.device)
        coordinates = torch.unravel_index(places.to(value.device), sizes)
        for axis in range(count):
            taps = torch.arange(self.kernel[axis], device=value.device) * self.dilation[axis]
            along = taps[:, None] + coordinates[axis] * self.stride[axis]
            index = (index[:, None] * lengths[axis] + along[None]).flatten(0, 1)
        read = value.flatten(2).index_select(2, index.flatten())
        return read.view(len(value), self.groups, -1, len(places))

    def _spaced(self, value: Tensor) -> Tensor:
        """Return the input with `spacing` - 1 zeros between its entries."""
        if all(step == 1 for step in self.spacing):
            return value
        lengths = [(n - 1) * step + 1 for n, step in zip(value.shape[2:], self.spacing, strict=True)]
        spaced = value.new_zeros(*value.shape[:2], *lengths)
        places = (slice(None), slice(None), *(slice(None, None, step) for step in self.spacing))
        spaced[places] = value
        return spaced


class Sampler:
    """Reads the samples of one layer in one batch.

    Parameters
    ----------
    layer
        The layer, as the batch's tape has it.
    weight
        Its weight.
    shape
        Shape of its output.
    statistics
        Running mean and variance, of a BatchNorm.
    """

    def __init__(
        self, layer: Layer, weight: Tensor, shape: tuple[int, ...], statistics: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self._layer, self._weight, self._shape, self._statistics = layer, weight, shape, statistics
        self._named = layer.call.named()
        self.convolution: Convolution | None = None
        if layer.kind == "convolution":
            self.convolution = Convolution.of(self._named, tuple(weight.shape[2:]))
        #: Whether units are on axis 1 with positions behind, rather than on the last axis.
        self.channels_first = layer.kind == "convolution" or (
            layer.kind == "norm" and layer.call.name != "native_layer_norm"
        )
        self.outputs = shape[1] if self.channels_first else shape[-1]

    @property
    def num_outer(self) -> int:
        """Samples of which all positions or one are taken: images of a convolution, rows of a linear layer."""
        return self._shape[0] if self.channels_first else 1

    @property
    def num_places(self) -> int:
        """Places to choose from: positions of a convolution, rows of a linear layer."""
        shape = self._shape[2:] if self.channels_first else self._shape[:-1]
        count = 1
        for length in shape:
            count *= length
        return count

    def output(self, value: Tensor, places: Tensor | None) -> Tensor:
        """Return [outer, outputs, inner]: values of the layer's output, or of its shape, at some places."""
        if self.channels_first:
            flat = value.reshape(*value.shape[:2], -1)
            return flat if places is None else flat.index_select(2, places.to(flat.device))
        rows = value.reshape(-1, value.shape[-1])
        return (rows if places is None else rows.index_select(0, places.to(rows.device)))[..., None]

    def inputs(self, value: Tensor, places: Tensor | None) -> Tensor:
        """Return [outer, groups, inputs, inner]: what the layer reads for its output at some places."""
        if self.convolution is not None:
            if places is None:
                places = torch.arange(self.num_places)
            return self.convolution.inputs(value, places, self._shape[2:])
        if self._layer.kind == "norm":
            return self.output(self._normalized(value), places)[:, :, None]
        rows = self.output(value, places)
        return rows[:, None]

    def matrix(self) -> Tensor:
        """Return the layer's weight as [groups, outputs, inputs]."""
        if self.convolution is not None:
            return self.convolution.matrix(self._weight)
        if self._layer.kind == "norm":
            return self._weight[:, None, None]
        return (self._weight if self._layer.call.name == "linear" else self._weight.t())[None]

    def set_matrix(self, matrix: Tensor) -> None:
        """Write a matrix as the layer's weight."""
        if self.convolution is not None:
            self._weight.copy_(self.convolution.weight(matrix, self._weight.shape))
        elif self._layer.kind == "norm":
            self._weight.copy_(matrix[:, 0, 0])
        else:
            self._weight.copy_(matrix[0] if self._layer.call.name == "linear" else matrix[0].t())

    def _normalized(self, value: Tensor) -> Tensor:
        """Return what a norm computes before its factor and shift."""
        named, name = self._named, self._layer.call.name
        if name == "native_layer_norm":
            return functional.layer_norm(value, named["normalized_shape"], None, None, named["eps"])
        if self._statistics is not None:
            return functional.batch_norm(value, *self._statistics, eps=named["eps"])
        return functional.group_norm(value, named["group"], None, None, named["eps"])


def product(matrix: Tensor, inputs: Tensor) -> Tensor:
    """Return the outputs [outer, outputs, inner] of a layer's matrix for inputs [outer, groups, inputs, inner]."""
    if inputs.shape[-1] == 1:
        rows = inputs[..., 0].transpose(0, 1)
        return torch.bmm(rows, matrix.transpose(1, 2)).transpose(0, 1).flatten(1)[..., None]
    return torch.matmul(matrix, inputs).flatten(1, 2)
