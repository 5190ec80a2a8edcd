"""What is learnt while a network is read: which factors occur together, where roles and obstacles lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mudsc_fast.spec.axes import Role
from mudsc_fast.spec.infer.factors import Factor, freeze, is_frozen, unify
from mudsc_fast.spec.infer.views import View, factors_of_view, whole


@dataclass(frozen=True)
class Obstacle:
    """An operator that kept units from being permuted.

    Attributes
    ----------
    operator
        Its name, e.g. ``"aten.cumsum"``.
    node
        Name of its node in the exported graph.
    module
        The submodule that called it.
    shape
        The shape of what it read.
    axes
        The axes of that whose order counts from now on.
    known
        Whether the operator is known to depend on the order of these axes; if not, it is one that the derivation
        cannot see through.
    """

    operator: str
    node: str
    module: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    known: bool

    def __str__(self) -> str:
        axes = ", ".join(map(str, self.axes))
        reason = "depends on the order of" if self.known else "is not known, so nothing moves on"
        where = f" in {self.module!r}" if self.module else ""
        return f"{self.operator} ({self.node}{where}) {reason} axes {axes} of {self.shape}"


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by name, tensors as views, and the shapes of its results."""

    operator: str
    node: str
    module: str
    arguments: Mapping[str, Any]
    shapes: Sequence[tuple[int, ...]]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str) -> Any:
        """Return an argument, or None where the operator has none of that name."""
        return self.arguments.get(name)

    def views(self) -> list[View]:
        """Return all tensors among the arguments."""
        found: list[View] = []
        for value in self.arguments.values():
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, View)]
        return found


@dataclass
class Record:
    """What has been learnt so far.

    Attributes
    ----------
    occurrences
        The factors of the axes of every tensor that occurred. One factor's order may depend on another (that of the
        units of a head on the head) only if the other occurs wherever it does.
    roles
        How the axes of the model's tensors were used.
    statistics
        Buffers that hold a norm's running statistics.
    obstacles
        What froze axes.
    """

    occurrences: list[tuple[Factor, ...]] = field(default_factory=list)
    roles: dict[tuple[str, int], set[Role]] = field(default_factory=dict)
    statistics: set[str] = field(default_factory=set)
    obstacles: list[Obstacle] = field(default_factory=list)

    def read(self, view: View, consumed: Sequence[int] = ()) -> list[Factor]:
        """Return the factors of what an operator reads; it sums over the axes that it consumes."""
        factors = factors_of_view(view)
        self.occurrences.append(tuple(factors))
        if view.base.tensor is not None:
            for position, axis in enumerate(view.axes):
                for piece in axis:
                    if piece.axis is not None:
                        roles = self.roles.setdefault((view.base.tensor, piece.axis), set())
                        roles.add("consume" if position in consumed else "produce")
        return factors

    def solid(self, view: View) -> View:
        """Return a view in which nothing repeats, to be read more than once.

        A repeated axis is another free factor each time that it is read, so nothing that is learnt of it would stay.
        """
        return self.result(self.read(view)) if view.repeats else view

    def result(self, axes: Sequence[Factor]) -> View:
        """Return a new tensor with the given axes."""
        self.occurrences.append(tuple(axes))
        return whole(axes)

    def freeze(self, call: Call, view: View, axes: Sequence[int], *, known: bool = True) -> list[Factor]:
        """Let the order of some axes count, and note it if it did not before; return the factors of all axes."""
        factors = self.read(view)
        moving = [any(piece.axis is not None for piece in axis) for axis in view.axes]
        cut = tuple(axis for axis in axes if moving[axis] and not is_frozen(factors[axis]))
        # Entries of a table that are chosen by their number are no units that could have moved.
        if cut and not (known and view.base.tensor is not None):
            self.obstacles.append(Obstacle(call.operator, call.node, call.module, view.shape, cut, known))
        for axis in axes:
            freeze(factors[axis])
        return factors

    def elementwise(self, views: Sequence[View], shape: Sequence[int]) -> View:
        """Return what is computed entry by entry of tensors that are broadcast to a shape."""
        if len(views) == 1 and views[0].shape == tuple(shape):
            return views[0]  # unread: what is cut out of it later is known more finely
        axes: list[Factor | None] = [None] * len(shape)
        for view in views:
            for position, factor in enumerate(self.read(view), start=len(shape) - len(view.axes)):
                if factor.size != 1:
                    earlier = axes[position]
                    if earlier is not None:
                        unify(earlier, factor)
                    axes[position] = factor
        # A tensor with the axes of the result stands for it, for the same reason.
        for view in views:
            if view.shape == tuple(shape) and not view.repeats and view.base.tensor is None:
                return view
        return self.result([Factor(1, frozen=True) if factor is None else factor for factor in axes])

    def contract(self, operands: Sequence[tuple[View, Sequence[str]]], labels: Sequence[str]) -> View:
        """Return the sum over products of entries, in the notation of einsum with words for labels."""
        found: dict[str, Factor] = {}
        for view, names in operands:
            consumed = [axis for axis, name in enumerate(names) if name not in labels]
            for name, factor in zip(names, self.read(view, consumed), strict=True):
                if factor.size != 1 or name not in found:
                    if name in found and found[name].size != 1:
                        unify(found[name], factor)
                    found[name] = factor
        return self.result([found[name] for name in labels])
