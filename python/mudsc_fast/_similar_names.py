"""Names that a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_MAX_LISTED = 12


def similar_names(given: str, tensors: Iterable[str], others: Sequence[str] = ()) -> str:
    """Return which names are like one that names nothing, or else the last modules (without tensors, the first others).

    Parameters
    ----------
    given
        What the user wrote.
    tensors
        Names of tensors, in order: each, and its beginnings up to a dot, is possible.
    others
        Other possible names.
    """
    beginnings = dict.fromkeys(
        name for tensor in tensors for name in (*_beginnings(tensor), tensor) if not name.isdecimal()
    )
    similar = difflib.get_close_matches(given, dict.fromkeys([*others, *beginnings]), n=3)
    if similar:
        return "did you mean " + " or ".join(map(repr, similar)) + "?"
    tops = list(dict.fromkeys(name.partition(".")[0] for name in beginnings))
    listed = tops[-_MAX_LISTED:] if tops else others[:_MAX_LISTED]
    return "there are " + ", ".join(map(repr, listed)) + (", ..." if not tops and len(others) > _MAX_LISTED else "")


def _beginnings(tensor: str) -> list[str]:
    parts = tensor.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
