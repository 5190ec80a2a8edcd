"""Slices of tensors from which the weight similarity of a node is computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mudsc_fast.spec.axes import Axis, Segment
from mudsc_fast.spec.permutation_spec import PermutationSpec


@dataclass(frozen=True)
class TensorSlice:
    """A node's entries in one tensor: a window in which every axis belongs to at most one node.

    Attributes
    ----------
    tensor
        Its name.
    position, split
        The position of the node's axis, and its shape split into [outer, units, inner].
    windows
        (position, start, width) of each axis of which only a part belongs to the slice.
    layout
        The node of every axis. None for the node's own axis and for axes that keep their order.
    samples
        Number of entries that the slice adds to each unit's vector.
    chosen
        (position, begin, end) of an axis of another node that is restricted to these merged units.
    """

    tensor: str
    position: int
    split: tuple[int, int, int]
    windows: tuple[tuple[int, int, int], ...]
    layout: tuple[Axis | None, ...]
    samples: int
    chosen: tuple[int, int, int] | None = None

    def axis(self, position: int) -> Axis | None:
        """Return the node of an axis. Trailing axes are not in the layout."""
        return self.layout[position] if position < len(self.layout) else None

    @property
    def others(self) -> list[str]:
        """The nodes of the other axes."""
        return [axis.node for axis in self.layout if axis is not None]


def tensor_slices(spec: PermutationSpec, state_dict: Mapping[str, Tensor]) -> dict[str, list[TensorSlice]]:
    """Return the slices of every node. Only the shapes of the tensors are read."""
    units = spec.units(state_dict)
    return {node: list(_slices_of_node(spec, units, state_dict, node)) for node in spec.nodes}


def _slices_of_node(
    spec: PermutationSpec, units: Mapping[str, int], state_dict: Mapping[str, Tensor], node: str
) -> Iterator[TensorSlice]:
    for use in spec.uses(node):
        if not use.axis.compared:
            continue
        shape = state_dict[use.tensor].shape
        choices: list[Sequence[Segment]] = list(spec.layouts[use.tensor])
        choices[use.position] = (use.segment,)
        for segments in itertools.product(*choices):
            windows = tuple((at, s.start, s.width) for at, s in enumerate(segments) if s.width is not None)
            widths = {at: width for at, _, width in windows}
            yield TensorSlice(
                tensor=use.tensor,
                position=use.position,
                split=(use.axis.outer, units[node], use.axis.inner),
                windows=windows,
                layout=tuple(None if at == use.position else s.axis for at, s in enumerate(segments)),
                samples=math.prod(widths.get(at, length) for at, length in enumerate(shape)) // units[node],
            )


def cut(
    part: TensorSlice, begin: float, end: float, shape: Sequence[int], units: Mapping[str, int]
) -> TensorSlice | None:
    """Return the part of a slice from the fraction `begin` to the fraction `end`, or None if it is empty.

    The slice is cut along its longest other axis. Equal fractions give equal positions, so consecutive parts add up to
    the slice. A slice without an axis to cut belongs to the part in which it begins.

    Parameters
    ----------
    part, begin, end
        The slice and two fractions in [0, 1].
    shape
        The shape of its tensor.
    units
        The number of units of every node.
    """
    if begin <= 0 and end >= 1:
        return part
    if part.chosen is not None:
        position, low, high = part.chosen
        length = high - low
    else:
        lengths = _cuttable(part, shape, units)
        if not lengths:
            return part if begin <= 0 < end else None
        position = max(lengths, key=lambda at: lengths[at])
        low, length = 0, lengths[position]
    first, last = round(begin * length), round(min(end, 1.0) * length)
    if first >= last:
        return None
    samples = part.samples * (last - first) // length
    if part.axis(position) is not None:
        return replace(part, chosen=(position, low + first, low + last), samples=samples)
    start = next((start for at, start, _ in part.windows if at == position), 0)
    windows = (*(window for window in part.windows if window[0] != position), (position, start + first, last - first))
    return replace(part, windows=windows, samples=samples)


def cut_all(
    slices: Sequence[TensorSlice],
    begin: float,
    end: float,
    state_dict: Mapping[str, Tensor],
    units: Mapping[str, int],
) -> list[TensorSlice]:
    """Return the part of several slices from the fraction `begin` to the fraction `end` of all their samples."""
    total = sum(part.samples for part in slices)
    result = []
    before = 0
    for part in slices:
        ends = ((share * total - before) / part.samples for share in (begin, end))
        first, last = (min(max(place, 0.0), 1.0) for place in ends)
        before += part.samples
        found = cut(part, first, last, state_dict[part.tensor].shape, units) if last > 0 and first < 1 else None
        if found is not None:
            result.append(found)
    return result


def _cuttable(part: TensorSlice, shape: Sequence[int], units: Mapping[str, int]) -> dict[int, int]:
    """Return the axes along which a slice can be cut, with the number of possible positions on each."""
    widths = {at: width for at, _, width in part.windows}
    lengths = {}
    for at, length in enumerate(shape):
        axis = part.axis(at)
        if at == part.position:
            continue
        if axis is None:
            lengths[at] = widths.get(at, length)
        elif part.others.count(axis.node) == 1:
            lengths[at] = units[axis.node]
    return {at: length for at, length in lengths.items() if length > 1}
