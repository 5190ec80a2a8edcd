"""mudsc_fast as the assignment solver of PLeaS."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mudsc_fast.compat.pleas import lsa_solver


def activation_matching(first: Tensor, second: Tensor, lsa_solver: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the unit of `second` for each unit of `first`, like the functions of PLeaS that take a solver."""
    return lsa_solver(first @ second.T)


def main() -> None:
    """Match the units of a layer with a shuffled copy."""
    features = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = activation_matching(features[order], features, lsa_solver)
    print(f"{int((found == order).sum())} of {len(order)} units found")


if __name__ == "__main__":
    main()
