"""How the fast permute kernels view a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from mudsc_fast import _core
from mudsc_fast.unit_map import UnitMap


class View(NamedTuple):
    """A tensor viewed as [outer, rows, middle, columns, inner]."""

    outer: int
    rows: int
    row_map: UnitMap | None
    middle: int
    columns: int
    column_map: UnitMap | None
    inner: int


def view_of(shape: torch.Size, maps: Mapping[int, UnitMap]) -> View:
    """Return the view of a tensor with at most two mapped axes (permute_view in csrc/bindings)."""
    outer, rows, row_axis, middle, columns, column_axis, inner = _core.permute_view(shape, list(maps))
    return View(outer, rows, maps.get(row_axis), middle, columns, maps.get(column_axis), inner)
