"""Sums of products of a layer's inputs and residuals over a stream of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.ops._centered_products import chunk_samples
from mudsc_fast.ops.correlation import CorrelationAccumulator, Workspace


@dataclass(frozen=True)
class Moments:
    """Second central moments of inputs and residuals, in float64.

    Attributes
    ----------
    count
        Number of samples.
    inputs
        Number of inputs. They come first on the axes below, followed by the outputs.
    mean
        [groups, inputs + outputs].
    products
        [groups, inputs + outputs, inputs + outputs], sums of products of deviations from the mean.
    """

    count: int
    inputs: int
    mean: Tensor
    products: Tensor

    def about_zero(self) -> Moments:
        """Return the moments about zero."""
        raw = self.products + self.count * self.mean[:, :, None] * self.mean[:, None, :]
        return Moments(self.count, self.inputs, torch.zeros_like(self.mean), raw)

    def output_statistics(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance, [groups * outputs], of a matrix [groups, outputs, inputs] times the inputs."""
        gram = self.products[:, : self.inputs, : self.inputs] / self.count
        variance = ((matrix @ gram) * matrix).sum(2).flatten().clamp(min=0)
        return (matrix @ self.mean[:, : self.inputs, None]).flatten(), variance

    def joined(self, other: Moments) -> Moments:
        """Return the moments of the union of two sets of samples (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        products = self.products + other.products
        products = products + (self.count * (other.count / count)) * shift[:, :, None] * shift[:, None, :]
        return Moments(count, self.inputs, self.mean + shift * (other.count / count), products)


class GramSums:
    """Accumulates :class:`Moments`: products in float32, sums in float64.

    A single group, as of a linear layer, is accumulated by the kernels of
    :class:`mudsc_fast.ops.CorrelationAccumulator`, which compute one half of a symmetric product. The many small groups
    of a grouped convolution use one batched product.

    Parameters
    ----------
    groups, inputs, outputs
        Number of groups, and each group's number of inputs and outputs.
    device
        Device of the sums.
    workspace
        Scratch memory of an update.
    name
        Name of these sums, unique among those that share the workspace at a time.
    """

    def __init__(
        self, groups: int, inputs: int, outputs: int, device: torch.device, workspace: Workspace, name: str
    ) -> None:
        self._size, self._workspace, self._name = inputs + outputs, workspace, name
        #: Number of inputs of each group.
        self.num_inputs = inputs
        #: Whether all samples so far are finite.
        self.is_finite = True
        batched = self._size if groups > 1 else 0
        self._alone = CorrelationAccumulator(1, self._size, blocks="full", device=device) if groups == 1 else None
        self._rows: Tensor | None = None
        self._num_rows = self._num_multiplied = 0
        self._sums = Moments(
            0,
            inputs,
            torch.zeros(groups, self._size, dtype=torch.float64, device=device),
            torch.zeros(groups, batched, batched, dtype=torch.float64, device=device),
        )

    def update(self, inputs: Tensor, residuals: Tensor) -> None:
        """Add samples: inputs [groups, samples, inputs] and residuals [samples, outputs of all groups]."""
        groups, count, _ = inputs.shape
        if self._alone is not None:
            self._collect(inputs[0], residuals)
            return
        samples = torch.cat([inputs, residuals.reshape(count, groups, -1).transpose(0, 1)], 2)
        samples = samples if samples.dtype == torch.float64 else samples.float()
        mean = samples.mean(1, dtype=torch.float64)
        centered = samples - mean[:, None].to(samples.dtype)
        rest = centered.sum(1, dtype=torch.float64)
        products = torch.bmm(centered.transpose(1, 2), centered).double()
        products -= rest[:, :, None] * rest[:, None, :] / count
        self.is_finite &= bool(products.isfinite().all())
        self._sums = self._sums.joined(Moments(count, self.num_inputs, mean + rest / count, products))

    def _collect(self, inputs: Tensor, residuals: Tensor) -> None:
        """Buffer samples until there are enough for one product."""
        if self._rows is None:
            capacity = chunk_samples(1, self._size)
            dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
            memory = self._workspace.empty(f"rows of {self._name}", capacity * self._size, dtype, inputs.device)
            self._rows = memory.view(capacity, self._size)
        begin = 0
        while begin < len(inputs):
            taken = min(len(inputs) - begin, len(self._rows) - self._num_rows)
            into = self._rows[self._num_rows : self._num_rows + taken]
            into[:, : self.num_inputs] = inputs[begin : begin + taken]
            into[:, self.num_inputs :] = residuals[begin : begin + taken]
            begin, self._num_rows = begin + taken, self._num_rows + taken
            if self._num_rows == len(self._rows):
                self._multiply()

    def rows(self) -> Tensor | None:
        """Return all samples, [samples, inputs + outputs], until the next update. None if not all are buffered."""
        if self._alone is None or self._num_multiplied:
            return None
        if self._rows is None:
            return self._sums.mean.new_empty(0, self._size)
        return self._rows[: self._num_rows]

    def _multiply(self) -> None:
        if self._alone is None or self._rows is None or self._num_rows == 0:
            return
        samples = self._rows[: self._num_rows]
        self._num_multiplied += self._num_rows
        self._num_rows = 0
        # The accumulator would take NaN as 0, and raise an error of its own for infinity.
        self.is_finite &= all(bool(extreme.isfinite()) for extreme in torch.aminmax(samples))
        if self.is_finite:
            with self._alone.computing_in(self._workspace):
                self._alone.update(samples, channel_axis=1)

    def moments(self) -> Moments:
        """Return the moments of all samples so far."""
        if self._alone is None:
            return self._sums
        self._multiply()
        state = self._alone.state_dict()
        # The accumulator may compute only the upper triangle.
        upper = state["comoments"][0].triu()
        return Moments(state["num_samples"], self.num_inputs, state["mean"], (upper + upper.triu(1).T)[None])
