"""From factors to a specification: which atoms may be permuted in the specification's language, and as which nodes.

A segment of an axis is a product of atoms. The specification can say: positions that repeat (frozen), the units of a
node, positions that belong to a unit (frozen). The units of a node are one atom, or two, the first being its groups,
provided that the second's order may differ from group to group. What is not of this form is frozen, innermost first,
until everything is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations

from mudsc_fast.spec.infer.factors import Factor, factors_of, freeze, is_frozen, terms_of

#: The atoms of a node: its units, or its groups and the units in each.
Key = tuple[Factor, ...]

#: Values with more alternatives (sums within sums) than this are not told apart.
_MAX_ALTERNATIVES = 256


@dataclass(frozen=True)
class NodeSegment:
    """A segment of an axis: `width` entries from `start` on, the units of a node (no key: nothing moves)."""

    start: int
    width: int
    outer: int
    key: Key
    inner: int


def settle(axes: Sequence[Factor], occurrences: Sequence[Sequence[Factor]]) -> None:
    """Freeze atoms until every axis of a tensor has a form that a specification can express."""
    while _freeze_one_more(axes, _contexts(occurrences)):
        pass


def segments_of(factor: Factor) -> list[NodeSegment]:
    """Return the segments of a settled axis; neighbours that do not move are one segment."""
    segments: list[NodeSegment] = []
    start = 0
    for term in terms_of(factor):
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


def _freeze_one_more(axes: Sequence[Factor], contexts: Mapping[Factor, set[Factor]]) -> bool:
    """Freeze what the specification cannot express where it is found first; return whether there was anything."""
    in_front: dict[Factor, Factor | None] = {}
    for factor in axes:
        for term in terms_of(factor):
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
                if in_front.setdefault(atom, before) is not before:
                    beyond.append(atom)
            if beyond:
                for atom in beyond:
                    freeze(atom)
                return True
    return False


def _contexts(occurrences: Sequence[Sequence[Factor]]) -> dict[Factor, set[Factor]]:
    """Return, for each free atom, the atoms that occur, once, wherever it does: its order may depend on theirs."""
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
    """Yield the free atoms that occur together, one tuple for each choice of terms of the axes' sums."""
    choices = [found for found in (_choices(factor) for factor in axes) if found != [()]]
    if math.prod(map(len, choices)) > _MAX_ALTERNATIVES:
        # Each axis by itself: fewer atoms are found together, so less is left free.
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
