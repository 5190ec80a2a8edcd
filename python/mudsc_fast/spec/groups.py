"""Units that move only together with their group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Groups:
    """The groups of a node whose units move only together with their group, e.g. attention heads or GroupNorm groups.

    Parameters
    ----------
    count
        Number of groups. The units of a group are consecutive.
    tie
        A label shared by the nodes whose groups must keep one common order. For example, the query-key units and the
        value units of an attention layer are tied, because their heads belong together.
    """

    count: int
    tie: str | None = None


def tied_nodes(groups: Mapping[str, Groups]) -> tuple[tuple[str, ...], ...]:
    """Return all nodes in bundles: the nodes of one tie form a bundle, every other node is its own bundle.

    Raises
    ------
    ValueError
        If tied nodes have different numbers of groups.
    """
    bundles: dict[str, list[str]] = {}
    for node, grouped in groups.items():
        bundles.setdefault(f"node {node}" if grouped.tie is None else f"tie {grouped.tie}", []).append(node)
    for nodes in bundles.values():
        counts = {node: groups[node].count for node in nodes}
        if len(set(counts.values())) != 1:
            raise ValueError(f"nodes with the same tie must have the same number of groups, got {counts}")
    return tuple(map(tuple, bundles.values()))
