"""How the axes of a tensor hold the units of nodes.

The user writes :data:`Entry` values, one per axis. :func:`parse_layout` turns them into segments, the form in which
the rest of the package reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["produce", "consume"]


@dataclass(frozen=True)
class Axis:
    """How one axis of a tensor holds the units of a node.

    Parameters
    ----------
    node
        Name of the node.
    role
        Whether the tensor produces or consumes the units. This matters when units are clustered: a cluster averages
        its members where they are produced and sums them where they are consumed.
    inner
        Number of consecutive entries that belong to one unit and keep their order, e.g. the positions of a flattened
        feature map, or the width of an attention head that moves as a whole.
    outer
        Number of times the sequence of all units repeats along the axis, e.g. the positions of a feature map that was
        flattened with its channels last.
    compared
        Whether the tensor counts in the weight similarity of the units. False for tensors that only follow the units:
        the running statistics of a norm, or a tensor that is tied to another one.
    """

    node: str
    role: Role
    inner: int = 1
    outer: int = 1
    compared: bool = True

    def __post_init__(self) -> None:
        if self.role not in ("produce", "consume"):
            raise ValueError(f"role of node {self.node!r} must be 'produce' or 'consume', got {self.role!r}")
        if self.inner < 1 or self.outer < 1:
            raise ValueError(
                f"inner and outer of node {self.node!r} must be at least 1, got {self.inner} and {self.outer}"
            )


@dataclass(frozen=True)
class Window:
    """A run of `width` entries on the axis of a fused tensor, e.g. the queries in a fused query-key-value weight.

    An axis is given as the sequence of its windows, which must cover it. A window whose `axis` is None keeps its
    order.
    """

    axis: Axis | str | None
    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width of a window must be at least 1, got {self.width}")


@dataclass(frozen=True)
class Segment:
    """A parsed part of an axis: `width` entries from `start` on, or the whole axis if `width` is None."""

    axis: Axis | None
    start: int = 0
    width: int | None = None


@dataclass(frozen=True)
class TensorAxis:
    """One use of a node: a segment of one axis of one tensor."""

    tensor: str
    position: int
    segment: Segment
    axis: Axis

    def __str__(self) -> str:
        window = "" if self.segment.width is None else f" (from entry {self.segment.start})"
        return f"axis {self.position} of {self.tensor!r}{window}"


#: What describes one axis of a tensor: the name of a node, an axis, the windows of a fused axis, or None.
Entry = str | Axis | Sequence[Window] | None

#: The segments of every axis of a tensor.
Layout = tuple[tuple[Segment, ...], ...]


def produces(node: str, *, inner: int = 1, outer: int = 1) -> Axis:
    """Return an axis that produces the units of `node`, e.g. the columns of an embedding table."""
    return Axis(node, "produce", inner, outer)


def consumes(node: str, *, inner: int = 1, outer: int = 1) -> Axis:
    """Return an axis that consumes the units of `node`, e.g. the rows of a transposed weight."""
    return Axis(node, "consume", inner, outer)


def parse_layout(tensor: str, entries: Sequence[Entry]) -> Layout:
    """Return the segments of every axis of a tensor.

    Raises
    ------
    TypeError
        If `entries` is not a sequence, or if an entry has another type than :data:`Entry`.
    """
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise TypeError(f"axes of {tensor!r} must be a sequence with one entry per axis, got {entries!r}")
    layout: list[tuple[Segment, ...]] = []
    for position, entry in enumerate(entries):
        if isinstance(entry, (list, tuple)) and entry and all(isinstance(window, Window) for window in entry):
            layout.append(_parse_windows(entry, position))
        elif entry is None or isinstance(entry, (str, Axis)):
            layout.append((Segment(_parse_axis(entry, position)),))
        else:
            raise TypeError(
                f"axis {position} of {tensor!r} must be the name of a node, an Axis, a sequence of Windows or None, "
                f"got {type(entry).__name__}"
            )
    return tuple(layout)


def entry_of(segments: Sequence[Segment]) -> Entry:
    """Return an entry that :func:`parse_layout` turns into these segments."""
    windows = [Window(segment.axis, segment.width) for segment in segments if segment.width is not None]
    return windows or segments[0].axis


def _parse_windows(windows: Sequence[Window], position: int) -> tuple[Segment, ...]:
    segments, start = [], 0
    for window in windows:
        segments.append(Segment(_parse_axis(window.axis, position), start, window.width))
        start += window.width
    return tuple(segments)


def _parse_axis(entry: str | Axis | None, position: int) -> Axis | None:
    return Axis(entry, "produce" if position == 0 else "consume") if isinstance(entry, str) else entry
