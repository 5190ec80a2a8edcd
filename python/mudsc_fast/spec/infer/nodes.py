"""From factors to nodes: which atoms a specification can permute, and as which nodes.

A segment of an axis is a product of atoms. A specification can express products of three parts: repetitions (frozen),
the units of a node, and entries that belong to one unit (frozen). The units of a node are one atom, or two atoms where
the first is the groups and the order of the second may differ from group to group. Atoms that do not fit this form are
frozen, one at a time, until all axes fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations

from mudsc_fast.spec.infer.factors import Factor, atoms_of, factors_of, freeze, is_frozen, product, terms_of

#: The atoms of a node: its units, or its groups and the units in each group.
Key = tuple[Factor, ...]

#: Tensors with more combinations of terms (sums within sums) than this are treated axis by axis.
_MAX_ALTERNATIVES = 256

_UNREAD = "the model does not read these entries for the example inputs"
_INEXPRESSIBLE = "its units could only move in a way that a specification cannot express"


@dataclass(frozen=True)
class NodeSegment:
    """A segment of an axis: `width` entries from `start` on that hold the units of a node.

    Without a key, the segment keeps its order.
    """

    start: int
    width: int
    outer: int
    key: Key
    inner: int


def settle(tensors: Sequence[Sequence[Factor]], occurrences: Sequence[Sequence[Factor]]) -> None:
    """Freeze atoms until a specification can express every axis of every tensor of the model.

    `occurrences` are the axes of all tensors that operators read or return.
    """
    axes = [factor for factors in tensors for factor in factors]
    _freeze_unread(axes, occurrences)
    while _freeze_one_more(axes, _contexts([*tensors, *occurrences])):
        pass


def segments_of(factor: Factor) -> list[NodeSegment]:
    """Return the segments of a settled axis. Consecutive segments that keep their order are joined."""
    segments: list[NodeSegment] = []
    start = 0
    for term in _terms_of(factor):
        atoms = factors_of(term)
        places = [i for i, atom in enumerate(atoms) if not is_frozen(atom)]
        if places:
            first, last = places[0], places[-1] + 1
            outer, inner = (math.prod(atom.size for atom in run) for run in (atoms[:first], atoms[last:]))
            segments.append(NodeSegment(start, term.size, outer, tuple(atoms[first:last]), inner))
        elif segments and not segments[-1].key:
            segments[-1] = NodeSegment(segments[-1].start, segments[-1].width + term.size, 1, (), 1)
        else:
            segments.append(NodeSegment(start, term.size, 1, (), 1))
        start += term.size
    return segments


def _terms_of(factor: Factor) -> Iterator[Factor]:
    """Yield the terms of a factor. A product whose slowest part is a sum, such as a flattened map, is a sum too."""
    for term in terms_of(factor):
        first, *others = factors_of(term) or [term]
        if first.kind == "sum" and others:
            for part in terms_of(first):
                yield from _terms_of(product([part, *others]))
        else:
            yield term


def _freeze_unread(axes: Sequence[Factor], occurrences: Sequence[Sequence[Factor]]) -> None:
    """Freeze entries of tensors that the network does not read, e.g. of a position table that is longer than needed."""
    read = {atom for factors in occurrences for factor in factors for atom in atoms_of(factor)}
    for factor in axes:
        for atom in atoms_of(factor):
            if atom not in read:
                freeze(atom, _UNREAD)


def _freeze_one_more(axes: Sequence[Factor], contexts: Mapping[Factor, set[Factor]]) -> bool:
    """Freeze atoms on the first axis that a specification cannot express. Return whether there was one."""
    in_front: dict[Factor, Factor | None] = {}
    for factor in axes:
        for term in _terms_of(factor):
            atoms = factors_of(term)
            free = [i for i, atom in enumerate(atoms) if not is_frozen(atom)]
            if not free:
                continue
            sums = [atom for atom in atoms if atom.kind == "sum" and not is_frozen(atom)]
            run = [atoms[i] for i in free if i - free[0] == free.index(i)][:2]
            beyond = [*sums, *(atoms[i] for i in free if atoms[i] not in run)]
            if len(run) == 2 and run[0] not in contexts.get(run[1], ()):
                beyond.append(run[1])
            for before, atom in zip([None, *run], run, strict=False):
                earlier = in_front.setdefault(atom, before)
                if earlier is not before:
                    # Two orders of the same atoms, as after a channel shuffle: give up the smallest.
                    beyond.append(min((a for a in (atom, before, earlier) if a is not None), key=lambda a: a.size))
            if beyond:
                for atom in beyond:
                    freeze(atom, _INEXPRESSIBLE)
                return True
    return False


def _contexts(occurrences: Sequence[Sequence[Factor]]) -> dict[Factor, set[Factor]]:
    """Return, for each free atom, the atoms that occur once wherever it does: its order may depend on theirs."""
    contexts: dict[Factor, set[Factor]] = {}
    seen: set[frozenset[tuple[Factor, int]]] = set()
    for axes in occurrences:
        for atoms in _alternatives(axes):
            counts = Counter(atoms)
            key = frozenset(counts.items())
            if key in seen:
                continue
            seen.add(key)
            once = {atom for atom, count in counts.items() if count == 1}
            for atom in counts:
                others = once - {atom}
                contexts[atom] = contexts[atom] & others if atom in contexts else others
    return contexts


def _alternatives(axes: Sequence[Factor]) -> Iterator[tuple[Factor, ...]]:
    """Yield the free atoms that occur together: one tuple for each choice of terms of the sums on the axes."""
    choices = [found for found in (_choices(factor) for factor in axes) if found != [()]]
    if math.prod(map(len, choices)) > _MAX_ALTERNATIVES:
        # Each axis on its own: fewer atoms are found together, so fewer stay free.
        for found in choices:
            yield from found
        return
    for chosen in combinations(*choices):
        yield tuple(atom for atoms in chosen for atom in atoms)


def _choices(factor: Factor) -> list[tuple[Factor, ...]]:
    factor = factor.find()
    if factor.kind == "atom":
        return [() if is_frozen(factor) else (factor,)]
    if factor.kind == "sum":
        return list(dict.fromkeys(choice for part in factor.parts for choice in _choices(part)))
    together = combinations(*(_choices(part) for part in factor.parts))
    return list(dict.fromkeys(tuple(atom for atoms in chosen for atom in atoms) for chosen in together))
