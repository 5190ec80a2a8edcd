"""What is learned while a network is read: factors that occur together, roles of axes, and obstacles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mudsc_fast.spec.axes import Role
from mudsc_fast.spec.infer.factors import Factor, freeze, is_frozen, unify
from mudsc_fast.spec.infer.views import View, factors_of_view, whole


@dataclass(frozen=True)
class Obstacle:
    """An operator that keeps units from being permuted.

    Attributes
    ----------
    operator
        Its name, e.g. ``"aten.cumsum"``.
    node
        Name of its node in the exported graph.
    module
        Name of the submodule that calls it.
    shape
        Shape of the tensor that it reads.
    axes
        The axes of that tensor that it freezes.
    known
        Whether the operator is known to depend on the order of these axes. If False, the derivation does not support
        the operator.
    """

    operator: str
    node: str
    module: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    known: bool

    def __str__(self) -> str:
        axes = ", ".join(map(str, self.axes))
        reason = "depends on the order of" if self.known else "is not supported and freezes"
        return f"{_described(self.operator, self.node, self.module)} {reason} axes {axes} of a tensor {self.shape}"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an operator.

    Attributes
    ----------
    operator, node, module
        As for :class:`Obstacle`.
    arguments
        The arguments by name, with tensors as views.
    shapes
        The shapes of the results.
    used
        Which of the results the graph uses.
    """

    operator: str
    node: str
    module: str
    arguments: Mapping[str, Any]
    shapes: Sequence[tuple[int, ...]]
    used: frozenset[int] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def __str__(self) -> str:
        return _described(self.operator, self.node, self.module)

    @property
    def name(self) -> str:
        """The name of the operator without its namespace."""
        return self.operator.rpartition(".")[2]

    def get(self, name: str) -> Any:
        """Return an argument, or None if the operator has no argument of that name."""
        return self.arguments.get(name)

    def views(self) -> list[View]:
        """Return all tensors among the arguments."""
        found: list[View] = []
        for value in self.arguments.values():
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, View)]
        return found


@dataclass
class Record:
    """What has been learned so far.

    Attributes
    ----------
    occurrences
        For every tensor that occurred, the factors of its axes. The order of one factor may depend on another (the
        order of the units of a head on the head) only if the other occurs wherever it does.
    roles
        How the axes of the tensors of the model were used. The set is empty if that is not known.
    statistics
        Buffers that hold the running statistics of a norm.
    obstacles
        What froze axes.
    """

    occurrences: list[tuple[Factor, ...]] = field(default_factory=list)
    roles: dict[tuple[str, int], set[Role]] = field(default_factory=dict)
    statistics: set[str] = field(default_factory=set)
    obstacles: list[Obstacle] = field(default_factory=list)

    def read(self, view: View, consumed: Sequence[int] = (), *, note_roles: bool = True) -> list[Factor]:
        """Return the factors of a tensor that an operator reads. `consumed` are the axes that it sums over.

        `note_roles` is False if the operator only prepares a weight, which another operator then uses.
        """
        factors = factors_of_view(view)
        self.occurrences.append(tuple(factors))
        sources = view.base.sources
        if sources is not None:
            for position, axis in enumerate(view.axes):
                for piece in axis:
                    for source in sources[piece.axis] if piece.axis is not None else ():
                        roles = self.roles.setdefault(source, set())
                        if note_roles:
                            roles.add("consume" if position in consumed else "produce")
        return factors

    def solid(self, view: View) -> View:
        """Return a tensor without repetitions, to be read more than once.

        A repeated axis is a new free factor each time that it is read, so what is learned about it would be lost.
        """
        return self.result(self.read(view)) if view.repeats else view

    def result(self, axes: Sequence[Factor]) -> View:
        """Return a new tensor with the given axes."""
        self.occurrences.append(tuple(axes))
        return whole(axes)

    def freeze(self, call: Call, view: View, axes: Sequence[int], *, known: bool = True) -> list[Factor]:
        """Freeze some axes of a tensor, and note it if they were not frozen before. Return the factors of all axes."""
        factors = self.read(view)
        moving = [any(piece.axis is not None for piece in axis) for axis in view.axes]
        newly = tuple(axis for axis in axes if moving[axis] and not is_frozen(factors[axis]))
        # Entries of a table that are selected by their number are not units, so they are not worth a note.
        if newly and not (known and view.base.tensor is not None):
            self.obstacles.append(Obstacle(call.operator, call.node, call.module, view.shape, newly, known))
        for axis in axes:
            freeze(factors[axis], call if known else f"{call} is not supported")
        return factors

    def elementwise(self, views: Sequence[View], shape: Sequence[int]) -> View:
        """Return the result of an elementwise operator on tensors that are broadcast to a shape."""
        if len(views) == 1 and views[0].shape == tuple(shape):
            return views[0]  # not read: later cuts then refine the factors of the original tensor
        axes: list[Factor | None] = [None] * len(shape)
        is_weight = all(view.base.sources is not None for view in views)
        for view in views:
            factors = self.read(view, note_roles=not is_weight)
            for position, factor in enumerate(factors, start=len(shape) - len(view.axes)):
                if factor.size != 1:
                    earlier = axes[position]
                    if earlier is not None:
                        unify(earlier, factor)
                    axes[position] = factor
        factors = [Factor(1, frozen=True) if factor is None else factor for factor in axes]
        if is_weight:
            self.occurrences.append(tuple(factors))
            return whole(factors, sources=_joined_sources(views, len(shape)))
        # A tensor with the axes of the result represents the result, for the same reason.
        for view in views:
            if view.shape == tuple(shape) and not view.repeats and view.base.tensor is None:
                return view
        return self.result(factors)

    def contract(self, operands: Sequence[tuple[View, Sequence[str]]], labels: Sequence[str]) -> View:
        """Return the sum over products of entries, in the notation of einsum with words as labels."""
        found: dict[str, Factor] = {}
        for view, names in operands:
            consumed = [axis for axis, name in enumerate(names) if name not in labels]
            for name, factor in zip(names, self.read(view, consumed), strict=True):
                if factor.size != 1 or name not in found:
                    if name in found and found[name].size != 1:
                        unify(found[name], factor)
                    found[name] = factor
        return self.result([found[name] for name in labels])


def _joined_sources(views: Sequence[View], rank: int) -> list[frozenset[tuple[str, int]]]:
    """Return the sources of tensors that are broadcast against each other."""
    joined: list[set[tuple[str, int]]] = [set() for _ in range(rank)]
    for view in views:
        for position, axis in enumerate(view.axes, start=rank - len(view.axes)):
            for piece in axis:
                if piece.axis is not None and view.base.sources is not None:
                    joined[position] |= view.base.sources[piece.axis]
    return [frozenset(sources) for sources in joined]


def _described(operator: str, node: str, module: str) -> str:
    return f"{operator} ({node}{f' in {module!r}' if module else ''})"
