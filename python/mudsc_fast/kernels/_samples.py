"""What the kernels that centre features are told of the order of their samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
