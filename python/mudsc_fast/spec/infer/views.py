"""Values of a traced network as views, so that moving data about leaves no trace of its own.

Every value is a view of a *base*: a tensor that was computed (or is a parameter), each of whose axes is one factor. The
axes of a view consist of pieces, runs of steps along one axis of the base. Views, transpositions, slices and selections
only re-arrange pieces; the base's factors are refined when an operator reads the view. So the keys in a fused layer's
output are found to be a window of it, however they were cut out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mudsc_fast.spec.infer.factors import Factor, freeze, product, split, window


class NotAViewError(Exception):
    """The entries asked for are no grid of steps."""


@dataclass(eq=False)
class Base:
    """A tensor that operators computed or, if `tensor` names one, a tensor of the model."""

    axes: Sequence[Factor]
    tensor: str | None = None


@dataclass(frozen=True)
class Piece:
    """A run of `count` entries, `step` apart, along one axis of a base; along None it is one entry again and again."""

    axis: int | None
    step: int
    count: int


@dataclass(frozen=True, eq=False)
class View:
    """Entries of a base: where they begin on each of its axes, and for each axis of the view its pieces."""

    base: Base
    offsets: tuple[int, ...]
    axes: tuple[tuple[Piece, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(math.prod(piece.count for piece in axis) for axis in self.axes)

    @property
    def repeats(self) -> bool:
        """Whether the same entries come again and again along some axis."""
        return any(piece.axis is None for axis in self.axes for piece in axis)


def whole(axes: Sequence[Factor], tensor: str | None = None) -> View:
    """Return the view of all of a new base."""
    pieces = tuple((Piece(i, 1, f.size),) if f.size != 1 else () for i, f in enumerate(axes))
    return View(Base(axes, tensor), (0,) * len(axes), pieces)


def frozen(shape: Sequence[int]) -> View:
    """Return a tensor with no free axis."""
    return whole([Factor(length, frozen=True) for length in shape])


def constant(shape: Sequence[int]) -> View:
    """Return a view of one number, again and again."""
    return expand(whole([Factor(1, frozen=True)] * len(shape)), shape)


def factors_of_view(view: View) -> list[Factor]:
    """Return the factor of every axis of a view, having refined those of its base."""
    located: dict[tuple[int, int], Factor] = {}
    for position, factor in enumerate(view.base.axes):
        pieces = [piece for axis in view.axes for piece in axis if piece.axis == position]
        pieces.sort(key=lambda piece: -piece.step)
        for piece, found in zip(pieces, _locate(factor, view.offsets[position], pieces), strict=True):
            located[position, piece.step] = found
    return [
        product([Factor(p.count) if p.axis is None else located[p.axis, p.step] for p in axis]) for axis in view.axes
    ]


def _locate(factor: Factor, offset: int, pieces: Sequence[Piece]) -> list[Factor]:
    """Return the factors of pieces along one axis of a base, from the longest steps to the shortest."""
    if not pieces:
        if factor.size > 1:
            freeze(factor)  # one entry is told apart from the others
        return []
    first, rest = pieces[0], pieces[1:]
    start, within = offset - offset % first.step, offset % first.step
    reach = within + sum((piece.count - 1) * piece.step for piece in rest)
    if start + first.count * first.step > factor.size or reach >= first.step:
        freeze(factor)
        return [Factor(piece.count, frozen=True) for piece in pieces]
    outer, inner = split(window(factor, start, first.count * first.step), first.count)
    return [outer, *_locate(inner, within, rest)]


def reshape(view: View, shape: Sequence[int]) -> View:
    """Return a view of the same entries, in the same order, in another shape."""
    if math.prod(shape) != math.prod(view.shape) or 0 in shape:
        raise NotAViewError
    pieces = [piece for axis in view.axes for piece in axis]
    axes = []
    for length in shape:
        taken: list[Piece] = []
        while length != 1:
            piece = pieces.pop(0)
            if length % piece.count == 0:
                taken.append(piece)
                length //= piece.count
            elif piece.count % length == 0:
                inner = piece.count // length
                taken.append(Piece(piece.axis, piece.step * inner, length))
                pieces.insert(0, Piece(piece.axis, piece.step, inner))
                length = 1
            else:
                raise NotAViewError
        axes.append(tuple(taken))
    return View(view.base, view.offsets, tuple(axes))


def permute(view: View, order: Sequence[int]) -> View:
    """Return a view with the axes in another order."""
    return View(view.base, view.offsets, tuple(view.axes[position] for position in order))


def expand(view: View, shape: Sequence[int]) -> View:
    """Return a view with axes of length 1, and new ones in front, repeated."""
    missing = len(shape) - len(view.axes)
    axes = [()] * missing + list(view.axes)
    found = [1] * missing + list(view.shape)
    repeated = [
        axis if before == after else (Piece(None, 1, after),)
        for axis, before, after in zip(axes, found, shape, strict=True)
    ]
    return View(view.base, view.offsets, tuple(repeated))


def narrow(view: View, position: int, start: int, length: int, step: int = 1) -> View:
    """Return a view of `length` of an axis' entries, `step` apart, from `start` on."""
    pieces = view.axes[position]
    if length == view.shape[position]:
        return view
    if length == 0:
        raise NotAViewError
    inner = math.prod(piece.count for piece in pieces[1:])
    first = pieces[0]
    offsets = list(view.offsets)
    if len(pieces) == 1 or (step == 1 and start % inner == 0 and length % inner == 0):
        chosen = replace(first, step=first.step * step, count=length // inner)
        kept: tuple[Piece, ...] = (*((chosen,) if chosen.count != 1 else ()), *pieces[1:])
        if first.axis is not None:
            offsets[first.axis] += start // inner * first.step
        return View(view.base, tuple(offsets), (*view.axes[:position], kept, *view.axes[position + 1 :]))
    if start // inner != (start + (length - 1) * step) // inner:
        raise NotAViewError
    if first.axis is not None:
        offsets[first.axis] += start // inner * first.step
    block = View(view.base, tuple(offsets), (*view.axes[:position], pieces[1:], *view.axes[position + 1 :]))
    return narrow(block, position, start % inner, length, step)


def select(view: View, position: int, index: int) -> View:
    """Return a view at one entry of an axis."""
    chosen = narrow(view, position, index % view.shape[position], 1)
    return View(chosen.base, chosen.offsets, (*chosen.axes[:position], *chosen.axes[position + 1 :]))
