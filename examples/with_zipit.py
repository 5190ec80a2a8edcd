"""ZipIt's matching function from mudsc_fast. In ZipIt's scripts only the import changes."""

from __future__ import annotations

import torch

# from matching_functions import match_tensors_zipit
# from metric_calculators import CovarianceMetric
from mudsc_fast.compat.zipit import CovarianceMetric, match_tensors_zipit


def main() -> None:
    """Cluster the units of two layers that share some features."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(48, 2000, generator=generator)
    layers = [
        torch.cat([shared[torch.randperm(48, generator=generator)], torch.randn(16, 2000, generator=generator)])
        for _ in range(2)
    ]
    metric = CovarianceMetric()
    for batch in range(4):
        metric.update(500, *(layer[:, 500 * batch : 500 * (batch + 1)] for layer in layers))
    merge, unmerge, value = match_tensors_zipit({"covariance": metric.finalize(2000)}, r=0.5, get_merge_value=True)
    first, second = unmerge.chunk(2)
    both = int(((first.sum(0) > 0) & (second.sum(0) > 0)).sum())
    print(f"{len(merge)} clusters, {both} of them of units of both layers; mean correlation at the merges {value:.3f}")


if __name__ == "__main__":
    main()
