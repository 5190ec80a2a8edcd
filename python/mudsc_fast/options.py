"""The options of a matching, checked once and passed on as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mudsc_fast._checks import check_choice, check_finite_number, check_int, check_number, check_share
from mudsc_fast._forward import Forward
from mudsc_fast.matching.node import Mode
from mudsc_fast.ops.correlation import Precision

Space = Literal["weight", "activation", "dual"]

#: How many merged units to keep for each unit of a model: at all nodes, or by node.
Expand = float | Mapping[str, float]


@dataclass(frozen=True)
class MatchOptions:
    """How units are matched; the fields are the arguments of :func:`mudsc_fast.match` of the same names.

    Raises
    ------
    ValueError, TypeError
        If a value is out of range or of the wrong type.
    """

    mode: Mode = "align"
    space: Space = "weight"
    balance: float = 0.5
    shrink: float | None = None
    budget: float = 1.0
    expand: Expand = 1.0
    random_state: int = 0
    max_sweeps: int = 100
    patience: int = 5
    forward: Forward | None = None
    precision: Precision = "float32"
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("space", self.space, get_args(Space))
        check_choice("precision", self.precision, get_args(Precision))
        checked = {
            "balance": check_share("balance", self.balance),
            "shrink": None if self.shrink is None else check_finite_number("shrink", self.shrink),
            "budget": check_share("budget", self.budget),
            "expand": _checked_expand(self.expand),
            "random_state": check_int("random_state", self.random_state, 0),
            "max_sweeps": check_int("max_sweeps", self.max_sweeps, 1),
            "patience": check_int("patience", self.patience, 1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.mode == "align" and (self.shrink is not None or self.budget != 1.0):
            name, value = ("shrink", self.shrink) if self.shrink is not None else ("budget", self.budget)
            raise ValueError(f"{name}={value} is of mode='zip', got mode='align': pass mode='zip', or leave {name} out")
        if self.mode == "align" and self.expand != 1:
            raise ValueError(
                f"expand={self.expand} is of mode='zip', got mode='align': pass mode='zip', or leave expand out"
            )

    def expansion(self, node: str) -> float:
        """Return how many merged units to keep for each unit of a node."""
        return self.expand.get(node, 1.0) if isinstance(self.expand, Mapping) else self.expand


def _checked_expand(expand: object) -> Expand:
    """Return the numbers of merged units for each unit, which must be at least 1."""

    def checked(name: str, value: object) -> float:
        number = check_number(name, value)
        if not 1 <= number < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least 1, got {number}")
        return number

    if isinstance(expand, Mapping):
        return {str(node): checked(f"expand[{node!r}]", value) for node, value in expand.items()}
    return checked("expand", expand)


def zip_factors(shrink: float | None, num_models: int) -> tuple[float, float]:
    """Return how the similarities of a cluster shrink in a zip, and the factor of those of units of one model.

    For up to two models, and where `shrink` is given, these are the published ``shrink ** (k - 1)`` for a cluster of k
    units, and 1. Of two models every cluster of corresponding units has two members. Of more models the last unit
    compares a cluster of its copies, shrunken, with other single units, which are not, and prefers those if they are
    more similar than the shrink. So clusters do not shrink by default, but similarities within a model do. Otherwise
    complete clusters of the most similar units would join each other before less similar units, such as those that the
    first sweep has matched in a wrong order, find their copies.
    """
    if shrink is not None:
        return shrink, 1.0
    return (0.5, 1.0) if num_models <= 2 else (1.0, 0.5)


def default_balance(balance: float | None, space: Space | None, has_data: bool) -> float:
    """Return the balance of the dual space: one half by default.

    Raises
    ------
    ValueError
        If it is given although the units are matched by weights alone, because there is no data.
    """
    if balance is None:
        return 0.5
    balance = check_share("balance", balance)
    if space is None and not has_data:
        raise ValueError(
            f"balance={balance} shares similarity between weights and activations, which needs data: pass data and "
            "match by both, or leave balance out to match by weights"
        )
    return balance


def default_space(space: Space | None, has_data: bool) -> Space:
    """Return the space to match in: dual if there is data, else weight."""
    if space is not None:
        return space
    return "dual" if has_data else "weight"
