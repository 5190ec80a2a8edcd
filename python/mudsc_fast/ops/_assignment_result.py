"""The result of a linear assignment."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mudsc_fast.kernels._assignment import Arrays

_TENSORS = ("columns", "objective", "row_duals", "column_duals", "gap")


@dataclass(frozen=True, eq=False, repr=False)
class Assignment:
    """An optimal assignment and its certificate.

    When maximizing, ``row_duals[i] + column_duals[j] >= similarity[i, j]`` for all i and j, with equality for assigned
    pairs; rows and columns without a partner have dual 0, and no dual of the longer side is negative. The sum of all
    duals, ``objective + gap``, is therefore an upper bound of every assignment. When minimizing, the inequalities and
    the sign of the gap flip: the bound is ``objective - gap``. Duals are float64; float32 input is exact in it.

    With a threshold t the same holds for ``similarity - t`` and any number of pairs k: no dual is negative, and the sum
    of all duals is ``objective - k * t + gap``. When minimizing, no dual is positive, and the sum is
    ``objective - k * t - gap``.

    Attributes
    ----------
    columns
        [..., n] int64: the column of each row, -1 for a row without one (only if n > m or with a threshold).
    objective
        [...] float64: sum of the assigned entries.
    row_duals
        [..., n] float64.
    column_duals
        [..., m] float64.
    gap
        [...] float64: distance of the objective to the dual bound; 0 up to the rounding of its sum, never negative.
    threshold
        The threshold of the problem, or None.
    """

    columns: Tensor
    objective: Tensor
    row_duals: Tensor
    column_duals: Tensor
    gap: Tensor
    threshold: float | None = None

    def __getattr__(self, name: str) -> Tensor:
        # Called only for attributes that are not there yet.
        arrays = self.__dict__.get("_arrays")
        if arrays is not None and name in _TENSORS:
            columns, numbers = arrays
            if name == "columns":
                tensor = torch.from_numpy(columns)
            else:
                tensor = torch.from_numpy(numbers)[_place(name, len(columns))]
            self.__dict__[name] = tensor
            return tensor
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def indices(self) -> tuple[Tensor, Tensor]:
        """Return the rows that have a column, ascending, and their columns, as scipy does.

        Raises
        ------
        ValueError
            If this is a batch of assignments.
        """
        if self.columns.ndim != 1:
            raise ValueError(f"expected a single assignment, got a batch of shape {list(self.columns.shape[:-1])}")
        rows = (self.columns >= 0).nonzero().flatten()
        return rows, self.columns[rows]

    def clone(self) -> Assignment:
        """Return a copy that shares no memory."""
        return replace(self, **{name: getattr(self, name).clone() for name in _TENSORS})

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={list(getattr(self, name).shape)}" for name in _TENSORS)
        threshold = "" if self.threshold is None else f", threshold={self.threshold:g}"
        return f"Assignment({fields}{threshold})"

    def __str__(self) -> str:
        return "\n".join([self._title(), *(f"{name:<9}  {value}" for name, value in self._report())])

    def _repr_html_(self) -> str:
        from html import escape  # takes a millisecond to import, and only notebooks need it

        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._report())
        return f"<table><caption>{escape(self._title())}</caption>{rows}</table>"

    def _title(self) -> str:
        shape = f"{self.row_duals.shape[-1]} x {self.column_duals.shape[-1]}"
        problems = self.objective.numel()
        return f"Assignment of {shape}" if self.columns.ndim == 1 else f"{problems} assignments of {shape}"

    def _report(self) -> list[tuple[str, str]]:
        """Return name and value of each line of the report; of a batch, the range of a value."""

        def span(values: Tensor) -> str:
            if values.numel() == 0:
                return "none"
            low, high = (float(value) for value in values.aminmax())
            return f"{low:g}" if low == high else f"{low:g} to {high:g}"

        lines = [
            ("pairs", span((self.columns >= 0).sum(-1))),
            ("objective", span(self.objective)),
            ("gap", span(self.gap)),
        ]
        return lines if self.threshold is None else [*lines, ("threshold", f"{self.threshold:g}")]


def assignment_of_arrays(arrays: Arrays, threshold: float | None) -> Assignment:
    """Return an assignment of the arrays of the compiled solver; each attribute becomes a tensor when it is read.

    To make five tensors takes longer than to solve a small problem, and few callers read them all. For single small
    problems the compiled solver makes the same object itself.
    """
    result = object.__new__(Assignment)
    result.__dict__.update(_arrays=arrays, threshold=threshold)
    return result


def _place(name: str, rows: int) -> int | slice:
    """Return where an attribute is in the array of numbers."""
    places = {"objective": 0, "gap": 1, "row_duals": slice(2, 2 + rows), "column_duals": slice(2 + rows, None)}
    place = places[name]
    assert isinstance(place, (int, slice))
    return place
