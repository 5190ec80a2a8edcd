"""Sums of products of a layer's inputs and of what its outputs lack, over a stream of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast.ops.correlation import CorrelationAccumulator, Workspace


@dataclass(frozen=True)
class Moments:
    """Second moments about the mean of inputs and residuals, in float64.

    Attributes
    ----------
    count
        Number of samples.
    inputs
        Number of inputs: the first entries of the axes below.
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
        """Return the sums of products of the values themselves."""
        raw = self.products + self.count * self.mean[:, :, None] * self.mean[:, None, :]
        return Moments(self.count, self.inputs, torch.zeros_like(self.mean), raw)

    def joined(self, other: Moments) -> Moments:
        """Return the moments of both sets of samples together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        products = self.products + other.products
        products = products + (self.count * (other.count / count)) * shift[:, :, None] * shift[:, None, :]
        return Moments(count, self.inputs, self.mean + shift * (other.count / count), products)


class GramSums:
    """Accumulates :class:`Moments`: products in float32, sums in float64.

    One group of inputs, as of a linear layer, is accumulated by the kernels of
    :class:`mudsc_fast.ops.CorrelationAccumulator`, which compute one half of a symmetric product. Those of a grouped
    convolution are small and many: one batched product.

    Parameters
    ----------
    groups, inputs, outputs
        Numbers of groups, and of each group's inputs and outputs.
    device
        Where the sums are kept.
    workspace
        Memory for what an update computes on its way.
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device, workspace: Workspace) -> None:
        self._inputs, self._workspace = inputs, workspace
        size = inputs + outputs
        batched = size if groups > 1 else 0
        self._alone = CorrelationAccumulator(1, size, blocks="full", device=device) if groups == 1 else None
        self._sums = Moments(
            0,
            inputs,
            torch.zeros(groups, size, dtype=torch.float64, device=device),
            torch.zeros(groups, batched, batched, dtype=torch.float64, device=device),
        )

    def update(self, inputs: Tensor, residuals: Tensor) -> None:
        """Add samples: inputs [groups, inputs, samples] and residuals [outputs of all groups, samples]."""
        groups, _, count = inputs.shape
        samples = torch.cat([inputs, residuals.reshape(groups, -1, count)], 1)
        if samples.dtype not in (torch.float32, torch.float64):
            samples = samples.float()
        if self._alone is not None:
            with self._alone.computing_in(self._workspace):
                self._alone.update(samples, channel_axis=1)
            return
        mean = samples.mean(2, dtype=torch.float64)
        columns = samples - mean[..., None].to(samples.dtype)
        rest = columns.sum(2, dtype=torch.float64)
        products = torch.bmm(columns, columns.transpose(1, 2)).double()
        products -= rest[:, :, None] * rest[:, None, :] / count
        self._sums = self._sums.joined(Moments(count, self._inputs, mean + rest / count, products))

    def moments(self) -> Moments:
        """Return the moments of all samples so far."""
        if self._alone is None:
            return self._sums
        state = self._alone.state_dict()
        # Below the diagonal the product of features with themselves may be left out.
        upper = state["comoments"][0].triu()
        return Moments(state["num_samples"], self._inputs, state["mean"], (upper + upper.triu(1).T)[None])
