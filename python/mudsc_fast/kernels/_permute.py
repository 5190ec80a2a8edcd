"""What the fast kernels of permute take a tensor for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from mudsc_fast.unit_map import UnitMap

#: A lone mapped axis with fewer elements behind each unit is taken as columns: longer lines, fewer loops.
_SHORT_LINE = 64


class View(NamedTuple):
    """A tensor seen as [outer, rows, middle, columns, inner]."""

    outer: int
    rows: int
    row_map: UnitMap | None
    middle: int
    columns: int
    column_map: UnitMap | None
    inner: int


def view_of(shape: torch.Size, maps: Mapping[int, UnitMap]) -> View:
    """Return how a tensor with at most two mapped axes is seen.

    Calls that C++ does as a whole are seen the same way (csrc/bindings/register_permute.cpp).
    """
    axes = sorted(maps)
    if not axes:
        return View(1, math.prod(shape[:1]), None, 1, math.prod(shape[1:]), None, 1)
    a, b = axes[0], axes[-1]
    before, after = math.prod(shape[:a]), math.prod(shape[b + 1 :])
    if a != b:
        return View(before, shape[a], maps[a], math.prod(shape[a + 1 : b]), shape[b], maps[b], after)
    if after < _SHORT_LINE:
        return View(1, before, None, 1, shape[a], maps[a], after)
    return View(before, shape[a], maps[a], 1, after, None, 1)
