"""The order in which kernels read samples, and the results of the centering kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Centered(NamedTuple):
    """Centered features of one model, ready for a matrix product.

    Attributes
    ----------
    values
        [C, samples]: the features minus their mean, or minus a shift close to it; contiguous or the transpose of a
        contiguous tensor.
    mean, squares
        [C] float64: the mean of each unit, and the sum of its squared deviations from it.
    rest
        [C] float64: the sums of `values` if they are taken about a shift; None if they are about the mean, where the
        sums are 0.
    """

    values: Tensor
    mean: Tensor
    squares: Tensor
    rest: Tensor | None = None


@dataclass(frozen=True)
class SampleOrder:
    """Which samples to take along an axis of features, or which to sum (clusters).

    Attributes
    ----------
    members
        [M] int32: places along the axis of the features.
    starts
        [samples + 1] int32: where in `members` the terms of each sample's sum begin; None if each sample is one member.
    scale
        [samples] float64: factor of each sum, or None for 1.
    """

    members: Tensor
    starts: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.members) if self.starts is None else len(self.starts) - 1

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Members, starts and scale, as the C++ kernels take them."""
        return self.members, self.starts, self.scale

    def part(self, samples: slice) -> SampleOrder:
        """Return the order of some adjacent samples."""
        if self.starts is None:
            return SampleOrder(self.members[samples])
        starts = self.starts[samples.start : samples.stop + 1]
        return SampleOrder(self.members, starts, None if self.scale is None else self.scale[samples])
