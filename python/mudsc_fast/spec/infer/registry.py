"""The table of operators: what each does to the factors of the axes it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.views import View, reshape

#: Returns what an operator computes: a view, or one for each of its results.
Rule = Callable[[Record, Call], "View | list[View]"]

#: The rules by the operators' names in ATen.
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operators, named in one string."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def axes_of(view: View, chosen: Any) -> list[int]:
    """Return positive axes, all where none are chosen."""
    count = len(view.axes)
    if chosen is None or chosen == []:
        return list(range(count))
    return [axis % count for axis in (chosen if isinstance(chosen, (list, tuple)) else [chosen])]


def per_channel(tensor: View, value: View) -> View:
    """Return a vector so that it is broadcast along axis 1 of a value."""
    return reshape(tensor, [value.shape[1]] + [1] * (len(value.axes) - 2))
