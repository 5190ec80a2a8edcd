"""The table of operators: what each does to the factors of the axes that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.views import View, reshape

#: Returns the result of an operator: a view, or a list with one view per result.
Rule = Callable[[Record, Call], "View | list[View]"]

#: The rules by the ATen name of the operator.
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operators, whose names are separated by spaces."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def axes_of(view: View, chosen: Any) -> list[int]:
    """Return non-negative axes: the chosen ones, or all if none are chosen."""
    count = len(view.axes)
    if chosen is None or chosen == []:
        return list(range(count))
    return [axis % count for axis in (chosen if isinstance(chosen, (list, tuple)) else [chosen])]


def per_channel(tensor: View, value: View) -> View:
    """Return a vector in a shape that is broadcast along axis 1 of `value`."""
    return reshape(tensor, [value.shape[1]] + [1] * (len(value.axes) - 2))
