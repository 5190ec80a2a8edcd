"""Families of similarity matrices that the tests of zip run on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def correlation(units: int, samples: int, seed: int) -> Tensor:
    """Return correlations of random features, some of them alike: [units, units]."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(samples, max(1, units // 4), generator=generator)
    mixing = torch.randn(latent.shape[1], units, generator=generator)
    return torch.corrcoef((latent @ mixing + torch.randn(samples, units, generator=generator)).T).reshape(units, units)


def random_entries(units: int, seed: int) -> Tensor:
    return torch.randn(units, units, generator=torch.Generator().manual_seed(seed))


def symmetric(matrix: Tensor) -> Tensor:
    return torch.triu(matrix) + torch.triu(matrix, 1).T


def dead_units(units: int, seed: int) -> Tensor:
    alive = torch.rand(units, generator=torch.Generator().manual_seed(seed)) < 0.6
    return symmetric(random_entries(units, seed)) * alive[:, None] * alive


def powers_of_two(matrix: Tensor) -> Tensor:
    return (2 * matrix).round().exp2()


#: Families of similarity matrices by name, from the number of units and a seed.
FAMILIES: dict[str, Callable[[int, int], Tensor]] = {
    "correlation": lambda units, seed: correlation(units, units + 20, seed),
    "symmetric": lambda units, seed: symmetric(random_entries(units, seed)),
    "asymmetric": random_entries,
    "few values": lambda units, seed: symmetric(random_entries(units, seed)).round(),
    "few values, asymmetric": lambda units, seed: random_entries(units, seed).round(),
    "all equal": lambda units, seed: torch.full((units, units), [0.75, 0.0, -0.75][seed % 3]),
    "dead units": dead_units,
    "negative": lambda units, seed: -symmetric(random_entries(units, seed)).abs() - 0.01,
    "negative, asymmetric": lambda units, seed: -random_entries(units, seed).abs() - 0.01,
    # Shrunken powers of two tie with other entries, and negative ones become the largest of their row.
    "powers of two": lambda units, seed: powers_of_two(symmetric(random_entries(units, seed))),
    "negative powers of two": lambda units, seed: -powers_of_two(symmetric(random_entries(units, seed))),
    "negative powers of two, asymmetric": lambda units, seed: -powers_of_two(random_entries(units, seed)),
}
