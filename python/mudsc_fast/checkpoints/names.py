"""Names of tensors: without the prefixes of wrappers, and tensors that differ between networks without harm."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

#: Components that torch.compile, FSDP and activation checkpointing put into names; no module is called so.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

#: What DataParallel, DistributedDataParallel and AveragedModel put before all names but their own counter.
_PARALLEL = "module."
_COUNTERS = ("n_averaged",)

#: Tensors that modules compute for themselves, and counters: a network works the same without them.
_DERIVED = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|num_batches_tracked|n_averaged|masked_bias|_extra_state"
    r"|attn_mask|relative_position_index|relative_coords_table)$"
    r"|(^|\.)h\.\d+\.attn\.bias$|(^|\.)rotary_emb\.(cos|sin)_cached$"
)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name without the prefixes of wrappers the name itself, in the same order.

    If two names were the same without them, all stay as they are.
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
    """Tell whether a tensor is a counter or computed by its module, so that a network works the same without it."""
    return _DERIVED.search(name) is not None


def matches(name: str, pattern: str) -> bool:
    """Tell whether a name is the pattern, begins with it up to a dot, or fits its wildcards (``*.pooler.*``)."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)
