"""Factors: the structure of an axis, as far as a network tells its entries apart.

The axis of a tensor starts as one factor, an *atom*, whose entries may have any order. The network refines it: an axis
that is viewed as heads times units becomes a *product*; an axis that is split into queries, keys and values, or
concatenated from two streams, becomes a *sum*. Factors that must have the same order are unified. A factor whose order
matters is frozen. The atoms that are still free once the whole network has been read are the ones that may be
permuted.

This is unification of types with a union-find structure (Tarjan, 1975): every factor points to the factor it was
unified with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Kind = Literal["atom", "product", "sum"]

#: Reasons that arise in the algebra itself.
MISMATCH = "its entries are grouped in different ways that have no common refinement"
CUT = "some of its entries are selected or treated differently from the others"


class Factor:
    """A run of `size` entries. Factors that were unified form one class.

    `reason` is what froze the factor: ``str(reason)`` describes it.
    """

    __slots__ = ("_parent", "frozen", "kind", "parts", "reason", "size")

    def __init__(
        self,
        size: int,
        *,
        frozen: bool = False,
        reason: object = None,
        kind: Kind = "atom",
        parts: Sequence[Factor] = (),
    ) -> None:
        self.size = size
        self.frozen = frozen
        self.reason = reason
        self.kind: Kind = kind
        self.parts = list(parts)
        self._parent = self

    def find(self) -> Factor:
        """Return the representative of this factor's class."""
        root = self
        while root._parent is not root:
            root = root._parent
        step = self
        while step._parent is not root:
            step._parent, step = root, step._parent
        return root

    def replace_by(self, other: Factor) -> None:
        """Join this class to the class of `other`, whose structure then holds for both."""
        self.find()._parent = other.find()

    def become(self, kind: Kind, parts: Sequence[Factor]) -> None:
        """Give an atom, or a sum of equal parts, a structure."""
        self.kind, self.parts = kind, list(parts)


def product(parts: Sequence[Factor]) -> Factor:
    """Return the factor whose entries are tuples of entries of the parts. The last part varies fastest."""
    proper = [part.find() for part in parts if part.size != 1]
    if len(proper) == 1:
        return proper[0]
    flat = [factor for part in proper for factor in factors_of(part)]
    size = math.prod(factor.size for factor in flat)
    return Factor(size, kind="product", parts=flat) if flat else Factor(1, frozen=True)


def concatenation(parts: Sequence[Factor]) -> Factor:
    """Return the factor whose entries are those of the parts, one part after the other."""
    proper = [part.find() for part in parts if part.size != 0]
    if len(proper) == 1:
        return proper[0]
    flat = [term for part in proper for term in terms_of(part)]
    size = sum(term.size for term in flat)
    return Factor(size, kind="sum", parts=flat) if flat else Factor(0, frozen=True)


def factors_of(factor: Factor) -> list[Factor]:
    """Return the atoms and sums that a factor is the product of, slowest first, without factors of size 1."""
    factor = factor.find()
    if factor.kind != "product":
        return [factor] if factor.size != 1 else []
    return [inner for part in factor.parts for inner in factors_of(part)]


def terms_of(factor: Factor) -> list[Factor]:
    """Return the atoms and products that a factor is the sum of, in order."""
    factor = factor.find()
    return [factor] if factor.kind != "sum" else [inner for part in factor.parts for inner in terms_of(part)]


def atoms_of(factor: Factor) -> list[Factor]:
    """Return all atoms of a factor."""
    factor = factor.find()
    return [factor] if factor.kind == "atom" else [atom for part in factor.parts for atom in atoms_of(part)]


def is_frozen(factor: Factor) -> bool:
    """Return whether no entry of a factor may move."""
    return all(atom.frozen or atom.size <= 1 for atom in atoms_of(factor))


def reason_of(factor: Factor) -> object:
    """Return what froze a factor, or None if that is not known."""
    return next((atom.reason for atom in atoms_of(factor) if atom.reason is not None), None)


def freeze(factor: Factor, reason: object = None) -> None:
    """Freeze all entries of a factor. The first reason counts."""
    for atom in atoms_of(factor):
        if not atom.frozen:
            atom.frozen = True
            atom.reason = reason


def unify(first: Factor, second: Factor) -> None:
    """Give two factors of the same size the same order. What has no common structure is frozen."""
    first, second = first.find(), second.find()
    assert first.size == second.size, "only axes of the same length can have the same order"
    if first is second or first.size <= 1:
        return
    if is_frozen(first):
        freeze(second, reason_of(first))
    elif is_frozen(second):
        freeze(first, reason_of(second))
    elif second.kind == "atom":
        second.replace_by(first)
    elif first.kind == "atom":
        first.replace_by(second)
    elif first.kind == second.kind:
        _unify_parts(first, second)
    else:
        product_of, total = (first, second) if first.kind == "product" else (second, first)
        terms = terms_of(total)
        if len({term.size for term in terms}) == 1:
            split(total, len(terms))
            unify(product_of, total)
        else:
            freeze(first, MISMATCH)
            freeze(second, MISMATCH)


def split(factor: Factor, outer: int) -> tuple[Factor, Factor]:
    """Return two factors that a factor is the product of, the first with `outer` entries, which divides the size."""
    factor = factor.find()
    inner = factor.size // outer
    if outer == 1 or inner == 1:
        one = Factor(1, frozen=True)
        return (one, factor) if outer == 1 else (factor, one)
    if is_frozen(factor):
        return _frozen(outer, reason_of(factor)), _frozen(inner, reason_of(factor))
    if factor.kind == "atom":
        factor.become("product", [Factor(outer), Factor(inner)])
        return factor.parts[0], factor.parts[1]
    if factor.kind == "sum":
        return _split_sum(factor, outer)
    leading: list[Factor] = []
    trailing = factors_of(factor)
    missing = outer
    while missing != 1:
        part = trailing.pop(0)
        if missing % part.size == 0:
            leading.append(part)
            missing //= part.size
        elif part.size % missing == 0:
            before, behind = split(part, missing)
            leading.append(before)
            trailing.insert(0, behind)
            missing = 1
        else:
            freeze(factor, MISMATCH)
            return _frozen(outer, MISMATCH), _frozen(inner, MISMATCH)
    return product(leading), product(trailing)


def window(factor: Factor, start: int, width: int) -> Factor:
    """Return the factor of `width` entries from `start` on, after turning the whole into a sum with that term."""
    factor = factor.find()
    if width == factor.size:
        return factor
    if is_frozen(factor):
        return _frozen(width, reason_of(factor))
    if factor.kind == "atom":
        before, chosen, behind = Factor(start), Factor(width), Factor(factor.size - start - width)
        factor.become("sum", [part for part in (before, chosen, behind) if part.size])
        return chosen
    if factor.kind == "sum":
        chosen_parts, begin = [], 0
        for part in factor.parts:
            low, high = max(start, begin), min(start + width, begin + part.size)
            if low < high:
                chosen_parts.append(window(part, low - begin, high - low))
            begin += part.size
        return concatenation(chosen_parts)
    first, *others = factors_of(factor)
    rest = product(others)
    freeze(first, CUT)
    if start % rest.size == 0 and width % rest.size == 0:
        return product([_frozen(width // rest.size, CUT), rest])
    if start // rest.size == (start + width - 1) // rest.size:
        return window(rest, start % rest.size, width)
    freeze(factor, CUT)
    return _frozen(width, CUT)


def _frozen(size: int, reason: object) -> Factor:
    return Factor(size, frozen=True, reason=reason)


def _split_sum(total: Factor, outer: int) -> tuple[Factor, Factor]:
    """Turn a sum into a product. Its terms get the same order, and the order of the terms is frozen."""
    terms = terms_of(total)
    count = len(terms)
    if len({term.size for term in terms}) == 1 and outer % count == 0:
        for term in terms[1:]:
            unify(terms[0], term)
        total.become("product", [_frozen(count, CUT), terms[0]])
        return split(total, outer)
    freeze(total, MISMATCH)
    return _frozen(outer, MISMATCH), _frozen(total.size // outer, MISMATCH)


def _unify_parts(first: Factor, second: Factor) -> None:
    """Unify two products, or two sums: both get the coarsest structure that refines both."""
    kind = first.kind
    parts_of = factors_of if kind == "product" else terms_of
    left, right = parts_of(first), parts_of(second)
    while left:
        a, b = left.pop(0), right.pop(0)
        if a.size == b.size:
            unify(a, b)
            continue
        longer, rest = (a, left) if a.size > b.size else (b, right)
        shorter = b if longer is a else a
        if kind == "product" and longer.size % shorter.size:
            freeze(first, MISMATCH)
            freeze(second, MISMATCH)
            return
        if kind == "product":
            begin, end = split(longer, shorter.size)
        else:
            begin = window(longer, 0, shorter.size)
            end = window(longer, shorter.size, longer.size - shorter.size)
        unify(begin, shorter)
        rest.insert(0, end)
    second.replace_by(first)
