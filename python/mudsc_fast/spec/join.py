"""Join the specs of networks that share a backbone but have different layers after it."""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.axes import Axis, Entry, Segment, Window
from mudsc_fast.spec.groups import Groups
from mudsc_fast.spec.observation import Observation
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: A node of one of the specs: the number of the spec and the node's name.
_Node = tuple[int, str]


def join_specs(specs: Sequence[PermutationSpec]) -> PermutationSpec:
    """Return one spec for the tensors of several networks.

    If several specs name a tensor, the nodes of its axes are joined. A joined node has the name from the first spec
    that contains it. If one of the specs keeps the order of some units, the joined spec keeps it too.

    Parameters
    ----------
    specs
        The specs of the networks.

    Returns
    -------
    PermutationSpec
        A spec of all their tensors; the first one itself if all are equal.

    Raises
    ------
    ValueError
        If the specs divide an axis of a common tensor differently, or if no node is left.
    """
    first = specs[0]
    if all(spec == first for spec in specs[1:]):
        return first
    joined = _JoinedNodes(specs)
    layouts: dict[str, list[Entry]] = {}
    for index, spec in enumerate(specs):
        for tensor, layout in spec.layouts.items():
            if tensor not in layouts:
                layouts[tensor] = [joined.entry(index, segments) for segments in layout]
    named = {node for entries in layouts.values() for entry in entries for node in _nodes_of(entry)}
    observations: dict[str, Sequence[Observation]] = {}
    groups: dict[str, Groups] = {}
    for index, spec in enumerate(specs):
        for node in spec.nodes:
            name = joined.name(index, node)
            if name not in named:
                continue
            observations.setdefault(name, spec.observations(node))
            count, tie = spec.groups(node).count, spec.groups(node).tie
            known = groups.get(name)
            if known is None or known.count == 1:
                groups[name] = Groups(count, None if tie is None else f"{tie}" if index == 0 else f"{tie} ({index})")
            elif count not in (1, known.count):
                raise ValueError(
                    f"the networks have different numbers of groups (attention heads, groups of a norm) at node "
                    f"{name!r}: {known.count} and {count}"
                )
    return PermutationSpec(layouts, observations, groups)


class _JoinedNodes:
    """The nodes of several specs. Nodes on the same axis of a common tensor are joined (union-find)."""

    def __init__(self, specs: Sequence[PermutationSpec]) -> None:
        self._parent: dict[_Node, _Node] = {(i, node): (i, node) for i, spec in enumerate(specs) for node in spec.nodes}
        self._frozen: set[_Node] = set()
        first_with: dict[str, int] = {}
        for index, spec in enumerate(specs):
            for tensor, layout in spec.layouts.items():
                earlier = first_with.setdefault(tensor, index)
                if earlier != index:
                    self._join_layouts(tensor, (earlier, specs[earlier].layouts[tensor]), (index, layout))
        frozen = {self._root(node) for node in self._frozen}
        taken: dict[str, _Node] = {}
        self._names: dict[_Node, str | None] = dict.fromkeys(frozen)
        for index, node in self._parent:
            root = self._root((index, node))
            if root not in self._names:
                name = node if node not in taken else f"{node} ({index})"
                self._names[root] = name
                taken[name] = root

    def name(self, index: int, node: str) -> str | None:
        """Return the name of a node in the joined spec, None if its units keep their order."""
        return self._names[self._root((index, node))]

    def entry(self, index: int, segments: Sequence[Segment]) -> Entry:
        """Return the entry of an axis in the axes map of the joined spec."""
        axes = [self._axis(index, segment) for segment in segments]
        if segments[0].width is None:
            return axes[0]
        return [Window(axis, segment.width or 0) for axis, segment in zip(axes, segments, strict=True)]

    def _axis(self, index: int, segment: Segment) -> Axis | None:
        axis = segment.axis
        name = None if axis is None else self.name(index, axis.node)
        return None if axis is None or name is None else Axis(name, axis.role, axis.inner, axis.outer, axis.compared)

    def _root(self, node: _Node) -> _Node:
        while self._parent[node] != node:
            node = self._parent[node]
        return node

    def _join_layouts(
        self,
        tensor: str,
        first: tuple[int, Sequence[Sequence[Segment]]],
        other: tuple[int, Sequence[Sequence[Segment]]],
    ) -> None:
        for position in range(max(len(first[1]), len(other[1]))):
            ours, theirs = (
                layout[position] if position < len(layout) else (Segment(None),) for _, layout in (first, other)
            )
            if [(s.start, s.width) for s in ours] != [(s.start, s.width) for s in theirs]:
                raise ValueError(f"axis {position} of {tensor!r} is divided differently in the networks")
            for our, their in zip(ours, theirs, strict=True):
                self._join_axes(tensor, position, (first[0], our.axis), (other[0], their.axis))

    def _join_axes(
        self, tensor: str, position: int, first: tuple[int, Axis | None], other: tuple[int, Axis | None]
    ) -> None:
        nodes = [(index, axis.node) for index, axis in (first, other) if axis is not None]
        if len(nodes) == 1:
            self._frozen.add(nodes[0])
        elif len(nodes) == 2:
            ours, theirs = first[1], other[1]
            assert ours is not None
            assert theirs is not None
            if (ours.inner, ours.outer) != (theirs.inner, theirs.outer):
                raise ValueError(f"axis {position} of {tensor!r} has differently arranged units in the networks")
            roots = sorted(self._root(node) for node in nodes)
            self._parent[roots[1]] = roots[0]


def _nodes_of(entry: Entry) -> list[str]:
    axes = [window.axis for window in entry] if isinstance(entry, (list, tuple)) else [entry]
    return [axis.node for axis in axes if isinstance(axis, Axis)]
