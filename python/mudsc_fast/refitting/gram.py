"""Sums of products of a layer's inputs and residuals over a stream of batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast._checks import is_finite
from mudsc_fast.ops._centered_products import chunk_samples
from mudsc_fast.ops.correlation import CorrelationAccumulator, Workspace

#: Rows of a symmetric product that are computed at a time.
_BLOCK = 192


@dataclass(frozen=True)
class Moments:
    """Means and second central moments of inputs and residuals, in float64 unless they were rounded.

    Attributes
    ----------
    count
        Number of samples.
    mean_inputs, mean_residuals
        [groups, inputs] and [groups, outputs].
    gram
        [groups, inputs, inputs], sums of products of the inputs' deviations from their mean.
    cross
        [groups, inputs, outputs], sums of products of deviations of inputs and of residuals.
    squares
        [groups], sums of the squared deviations of all residuals.
    """

    count: int
    mean_inputs: Tensor
    mean_residuals: Tensor
    gram: Tensor
    cross: Tensor
    squares: Tensor

    @classmethod
    def zeros(cls, groups: int, inputs: int, outputs: int, device: torch.device) -> Moments:
        """Return the moments of no samples."""
        shapes = ((inputs,), (outputs,), (inputs, inputs), (inputs, outputs), ())
        return cls(0, *(torch.zeros(groups, *shape, dtype=torch.float64, device=device) for shape in shapes))

    @property
    def num_inputs(self) -> int:
        """Number of inputs of each group."""
        return self.gram.shape[1]

    def to(self, dtype: torch.dtype) -> Moments:
        """Return the moments in another precision."""
        parts = (self.mean_inputs, self.mean_residuals, self.gram, self.cross, self.squares)
        return Moments(self.count, *(part.to(dtype) for part in parts))

    def about_zero(self) -> Moments:
        """Return the moments about zero."""
        return Moments(
            self.count,
            torch.zeros_like(self.mean_inputs),
            torch.zeros_like(self.mean_residuals),
            _plus_outer(self.gram, self.mean_inputs, self.mean_inputs, self.count),
            _plus_outer(self.cross, self.mean_inputs, self.mean_residuals, self.count),
            self.squares + self.count * self.mean_residuals.square().sum(1),
        )

    def output_statistics(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance, [groups * outputs], of a matrix [groups, outputs, inputs] times the inputs."""
        variance = ((matrix @ self.gram) * matrix).sum(2).flatten().clamp(min=0) / self.count
        return (matrix @ self.mean_inputs[..., None]).flatten(), variance

    def joined(self, other: Moments) -> Moments:
        """Return the moments of the union of two sets of samples (Chan, Golub and LeVeque, 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        share = other.count / count
        inputs, residuals = other.mean_inputs - self.mean_inputs, other.mean_residuals - self.mean_residuals
        factor = self.count * share
        return Moments(
            count,
            self.mean_inputs + share * inputs,
            self.mean_residuals + share * residuals,
            _plus_outer(self.gram, inputs, inputs, factor).add_(other.gram),
            _plus_outer(self.cross, inputs, residuals, factor).add_(other.cross),
            self.squares + other.squares + factor * residuals.square().sum(1),
        )


def _plus_outer(matrices: Tensor, rows: Tensor, columns: Tensor, factor: float) -> Tensor:
    """Return matrices plus a factor times the outer products of rows and columns, one for each group."""
    return torch.baddbmm(matrices, rows[:, :, None], columns[:, None, :], alpha=factor)


class GramSums:
    """Accumulates :class:`Moments`: products in float32, sums in float64.

    The inputs of a single group, as of a linear layer, are multiplied by the kernels of
    :class:`mudsc_fast.ops.CorrelationAccumulator`, which compute one half of a symmetric product. The many small groups
    of a grouped convolution use batched products.

    Parameters
    ----------
    groups, inputs, outputs
        Number of groups, and each group's number of inputs and outputs.
    device
        Device of the sums.
    workspace
        Scratch memory of an update.
    name
        Name of these sums, unique among the sums that use the workspace at the same time.
    """

    def __init__(
        self, groups: int, inputs: int, outputs: int, device: torch.device, workspace: Workspace, name: str
    ) -> None:
        self._workspace, self._name = workspace, name
        self._sizes = (inputs, outputs)
        #: Whether all samples so far are finite.
        self.is_finite = True
        self._alone = CorrelationAccumulator(1, inputs, blocks="full", device=device) if groups == 1 else None
        self._buffers: list[Tensor] = []  # of inputs and residuals, [samples, numbers]
        self._num_buffered = 0
        #: Subtracted from inputs and residuals before they are multiplied: the means of the first samples.
        self._shifts: list[Tensor] = []
        # With a single group, these are sums about the shifts, and the accumulator has the products of the inputs.
        self._sums = Moments.zeros(groups, inputs if groups > 1 else 0, outputs, device)
        self._cross = torch.zeros(inputs if groups == 1 else 0, outputs, dtype=torch.float64, device=device)

    @property
    def num_inputs(self) -> int:
        """Number of inputs of each group."""
        return self._sizes[0]

    def update(self, inputs: Tensor, residuals: Tensor) -> None:
        """Add samples: inputs [groups, samples, inputs] and residuals [samples, outputs of all groups]."""
        if self._alone is not None:
            self._collect(inputs[0], residuals)
            return
        groups, count, _ = inputs.shape
        moments = _moments_of(inputs, residuals.reshape(count, groups, -1).transpose(0, 1))
        self.is_finite &= is_finite(moments.gram) and is_finite(moments.cross)
        self._sums = self._sums.joined(moments)

    def _collect(self, inputs: Tensor, residuals: Tensor) -> None:
        """Buffer samples until there are enough for one product."""
        if not self._buffers:
            kinds = zip(("inputs", "residuals"), self._sizes, (inputs, residuals), strict=True)
            self._buffers = [self._buffer(kind, numbers, like) for kind, numbers, like in kinds]
        begin = 0
        while begin < len(inputs):
            taken = min(len(inputs) - begin, len(self._buffers[0]) - self._num_buffered)
            for buffer, new in zip(self._buffers, (inputs, residuals), strict=True):
                buffer[self._num_buffered : self._num_buffered + taken] = new[begin : begin + taken]
            begin, self._num_buffered = begin + taken, self._num_buffered + taken
            if self._num_buffered == len(self._buffers[0]):
                self._multiply()

    def _buffer(self, kind: str, numbers: int, like: Tensor) -> Tensor:
        capacity = chunk_samples(1, self.num_inputs)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        memory = self._workspace.empty(f"{kind} {self._name}", capacity * numbers, dtype, like.device)
        return memory.view(capacity, numbers)

    def buffered(self) -> tuple[Tensor, Tensor] | None:
        """Return all inputs and residuals, [samples, numbers], until the next update. None if not all are buffered."""
        if self._alone is None or self._shifts:
            return None
        if not self._buffers:
            inputs, outputs = self._sizes
            return self._cross.new_empty(0, inputs), self._cross.new_empty(0, outputs)
        return self._buffers[0][: self._num_buffered], self._buffers[1][: self._num_buffered]

    def _multiply(self) -> None:
        """Add the products of the buffered samples."""
        if self._alone is None or not self._num_buffered:
            return
        parts = [buffer[: self._num_buffered] for buffer in self._buffers]
        self._num_buffered = 0
        # The accumulator would treat NaN as 0, and raise its own error for infinity.
        self.is_finite &= all(is_finite(part) for part in parts)
        if not self.is_finite:
            return
        if not self._shifts:
            self._shifts = [part.mean(0) for part in parts]
        inputs, residuals = (part.sub_(shift) for part, shift in zip(parts, self._shifts, strict=True))
        with self._alone.computing_in(self._workspace):
            self._alone.update(inputs, channel_axis=1)
        self._cross += matmul_without_overflow(inputs.T, residuals)
        sums = self._sums
        sums.mean_residuals.add_(residuals.sum(0, dtype=torch.float64))  # divided by the number of samples at the end
        sums.squares.add_(torch.linalg.vector_norm(residuals, dtype=torch.float64).square())

    def moments(self) -> Moments:
        """Return the moments of all samples so far."""
        if self._alone is None:
            return self._sums
        self._multiply()
        state = self._alone.state_dict()
        count, mean = state["num_samples"], state["mean"]
        # The accumulator may compute only the upper triangle.
        gram = state["comoments"].triu_()
        gram += gram.triu(1).transpose(1, 2)
        if not count:
            return Moments.zeros(1, *self._sizes, gram.device)
        total = self._sums.mean_residuals
        shifts = [shift.double() for shift in self._shifts]
        return Moments(
            count,
            mean + shifts[0],
            total / count + shifts[1],
            gram,
            torch.addr(self._cross, mean[0], total[0], alpha=-1)[None],
            self._sums.squares - total.square().sum(1) / count,
        )


def matmul_without_overflow(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in the dtype of the factors, or in float64 if float32 cannot hold it."""
    limit = torch.finfo(left.dtype).max / max(left.shape[1], 1)
    if left.dtype == torch.float32 and not _largest(left) * _largest(right) < limit:
        return left.double() @ right.double()
    return left @ right


def symmetric_product(rows: Tensor) -> Tensor:
    """Return rows @ rows.T as float64, computed in blocks of rows that skip most of one half."""
    count = len(rows)
    result = rows.new_empty(count, count, dtype=torch.float64)
    for first in range(0, count, _BLOCK):
        last = min(first + _BLOCK, count)
        result[first:last, first:] = matmul_without_overflow(rows[first:last], rows[first:].T)
        result[last:, first:last] = result[first:last, last:].T
    return result


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value."""
    return float(torch.stack(torch.aminmax(tensor)).abs().max()) if tensor.numel() else 0.0


def _moments_of(inputs: Tensor, residuals: Tensor) -> Moments:
    """Return the moments of samples: inputs [groups, samples, inputs] and residuals [groups, samples, outputs]."""
    count = inputs.shape[1]
    means, centered, rests = [], [], []
    for samples in (inputs, residuals):
        given = samples if samples.dtype == torch.float64 else samples.float()
        mean = given.mean(1, dtype=torch.float64)
        centered.append(given - mean[:, None].to(given.dtype))
        rests.append(centered[-1].sum(1, dtype=torch.float64))
        means.append(mean + rests[-1] / count)
    transposed = centered[0].transpose(1, 2)
    return Moments(
        count,
        means[0],
        means[1],
        _plus_outer(torch.bmm(transposed, centered[0]).double(), rests[0], rests[0], -1 / count),
        _plus_outer(torch.bmm(transposed, centered[1]).double(), rests[0], rests[1], -1 / count),
        centered[1].double().square().sum((1, 2)) - rests[1].square().sum(1) / count,
    )
