"""Tensor names: removal of wrapper prefixes, and names of tensors that may differ between networks."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

#: Name components that torch.compile, FSDP and activation checkpointing insert. No user module has these names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

#: The prefix that DataParallel, DistributedDataParallel and AveragedModel add to all names except their own counter.
_PARALLEL = "module."
_COUNTERS = ("n_averaged",)

#: Counters, and tensors that modules compute for themselves. A network works the same without them.
_DERIVED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|num_batches_tracked|n_averaged|masked_bias|_extra_state"
    r"|attn_mask|relative_position_index|relative_coords_table)$"
    r"|(^|\.)h\.\d+\.attn\.bias$|(^|\.)rotary_emb\.(cos|sin)_cached$"
)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Map each name without wrapper prefixes to the original name, in the same order.

    If removing the prefixes would make two names equal, all names stay as they are.
    """
    stored = list(names)
    plain = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in stored]
    while any(name.startswith(_PARALLEL) for name in plain) and all(
        name.startswith(_PARALLEL) or name in _COUNTERS for name in plain
    ):
        plain = [name.removeprefix(_PARALLEL) for name in plain]
    if len(set(plain)) < len(stored):
        plain = stored
    return dict(zip(plain, stored, strict=True))


def is_derived(name: str) -> bool:
    """Return whether a tensor is a counter or computed by its module, so that a network works the same without it."""
    return _DERIVED.search(name) is not None


def matches(name: str, pattern: str) -> bool:
    """Return whether a name equals the pattern, has it as a prefix before a dot, or fits its wildcards (``*.fc.*``)."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
