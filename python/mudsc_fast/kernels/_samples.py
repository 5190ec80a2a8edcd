"""What the kernels that centre features are told of the order of their samples, and what they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Centered(NamedTuple):
    """Features of one model as a product takes them.

    Attributes
    ----------
    values
        [C, samples]: the features less what may stand for their mean, of either order in memory.
    mean, squares
        [C] float64: each unit's mean, and the sum of squares about it.
    rest
        [C] float64: the sums of `values`, which a mean of the samples themselves would have made 0; None where it did.
    """

    values: Tensor
    mean: Tensor
    squares: Tensor
    rest: Tensor | None = None


@dataclass(frozen=True)
class SampleOrder:
    """Which samples of features are taken along an axis, and where they are summed (clusters), which.

    Attributes
    ----------
    members
        [M] int32: places in the features' axis.
    starts
        [samples + 1] int32: where in `members` those begin whose sum is each sample; None where it is one of them each.
    scale
        [samples] float64: factor of each sum, or None for 1.
    """

    members: Tensor
    starts: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.members) if self.starts is None else len(self.starts) - 1

    def part(self, samples: slice) -> SampleOrder:
        """Return the order of adjacent samples alone."""
        if self.starts is None:
            return SampleOrder(self.members[samples])
        starts = self.starts[samples.start : samples.stop + 1]
        return SampleOrder(self.members, starts, None if self.scale is None else self.scale[samples])
