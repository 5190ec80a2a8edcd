"""Families of matrices that the tests of assignment run on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FAMILIES = ("uniform", "ties", "constant", "low rank", "zeros", "equal rows", "dominating", "halves", "huge", "tiny")


def make(family: str, rows: int, columns: int, seed: int) -> Array:
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, columns))
    if family == "ties":
        return random.integers(-3, 4, (rows, columns)).astype(np.float32)
    if family == "constant":
        return np.full((rows, columns), random.standard_normal())
    if family == "low rank":
        return random.standard_normal((rows, 1)) @ random.standard_normal((1, columns))
    if family == "zeros":
        values[random.random(rows) < 0.3] = 0
        values[:, random.random(columns) < 0.3] = 0
    if family == "equal rows":
        values = values[random.integers(0, max(1, rows // 3), rows)] if rows else values
    if family == "dominating" and rows:
        values[random.integers(rows)] *= 1e9
    if family == "halves":
        return values.astype(np.float16)
    return {"huge": values * 1e20, "tiny": values * 1e-20}.get(family, values)
