"""Values of an exported network as views, so that data movement alone does not refine any factor.

Every value is a view of a *base*: a computed tensor or a parameter, each of whose axes is one factor. The axes of a
view consist of pieces: runs of equal steps along one axis of the base. Reshapes, transpositions, slices and selections
only rearrange pieces. The factors of the base are refined when an operator reads the view. So the keys in the output of
a fused layer are found to be the same window of it, however they were cut out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mudsc_fast.spec.infer.factors import CUT, Factor, freeze, product, reason_of, split, window


class NotAViewError(Exception):
    """The requested entries are not a grid of equal steps."""


@dataclass(eq=False)
class Base:
    """A computed tensor or, if `tensor` is its name, a tensor of the model.

    `sources` are the tensors of the model that a computed weight is made of: for each axis the (tensor, axis) pairs
    that have the same entries. None if the tensor depends on the inputs of the model.
    """

    axes: Sequence[Factor]
    tensor: str | None = None
    sources: Sequence[frozenset[tuple[str, int]]] | None = None


@dataclass(frozen=True)
class Piece:
    """A run of `count` entries, `step` apart, along one axis of a base. If `axis` is None, one entry is repeated."""

    axis: int | None
    step: int
    count: int


@dataclass(frozen=True, eq=False)
class View:
    """Entries of a base: the offset on each axis of the base, and the pieces of each axis of the view."""

    base: Base
    offsets: tuple[int, ...]
    axes: tuple[tuple[Piece, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(math.prod(piece.count for piece in axis) for axis in self.axes)

    @property
    def repeats(self) -> bool:
        """Whether entries are repeated along some axis."""
        return any(piece.axis is None for axis in self.axes for piece in axis)


def whole(
    axes: Sequence[Factor],
    tensor: str | None = None,
    sources: Sequence[frozenset[tuple[str, int]]] | None = None,
) -> View:
    """Return the view of a whole new base."""
    pieces = tuple((Piece(i, 1, f.size),) if f.size != 1 else () for i, f in enumerate(axes))
    if tensor is not None:
        sources = [frozenset([(tensor, position)]) for position in range(len(axes))]
    return View(Base(axes, tensor, sources), (0,) * len(axes), pieces)


def frozen(shape: Sequence[int], reason: object = None) -> View:
    """Return a tensor whose axes all keep their order."""
    return whole([Factor(length, frozen=True, reason=reason) for length in shape])


def fixed(shape: Sequence[int], reason: object = None) -> View:
    """Return a tensor whose axes all keep their order, and which does not depend on the inputs of the model."""
    return whole([Factor(length, frozen=True, reason=reason) for length in shape], sources=[frozenset()] * len(shape))


def constant(shape: Sequence[int]) -> View:
    """Return a tensor in which no entry differs from another, such as one number repeated."""
    return expand(fixed([1] * len(shape)), shape)


def factors_of_view(view: View) -> list[Factor]:
    """Return the factor of every axis of a view, after refining the factors of its base."""
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
    """Return the factors of pieces along one axis of a base. The pieces are sorted from long to short steps."""
    if not pieces:
        if factor.size > 1:
            freeze(factor, CUT)  # one entry is selected
        return []
    first, rest = pieces[0], pieces[1:]
    start, within = offset - offset % first.step, offset % first.step
    reach = within + sum((piece.count - 1) * piece.step for piece in rest)
    if start + first.count * first.step > factor.size or reach >= first.step:
        freeze(factor, CUT)
        return [Factor(piece.count, frozen=True, reason=reason_of(factor)) for piece in pieces]
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
    """Return a view of `length` entries of an axis, `step` apart, from `start` on."""
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
