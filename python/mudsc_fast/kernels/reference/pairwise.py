"""Entries of pairwise similarities and distances in PyTorch: float32 sums over the features, in order."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows whose entries are summed at a time, so that they stay in cache.
_BLOCK = 64


def entries(rows: Tensor, columns: Tensor, squared_distance: bool) -> Tensor:
    """Return the [n, m] float32 entries of [n, d] and [m, d] float32 points."""
    out = torch.zeros((rows.shape[0], columns.shape[0]), dtype=torch.float32)
    by_feature = columns.T.contiguous()
    for sums, points in zip(out.split(_BLOCK), rows.split(_BLOCK), strict=True):
        for feature, numbers in enumerate(by_feature):
            point = points[:, feature, None]
            sums += (point - numbers).square_() if squared_distance else point * numbers
    return out
