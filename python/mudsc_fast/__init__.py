"""Training-free merging of pretrained networks, and the fast kernels under it."""

from __future__ import annotations

from mudsc_fast import compat, ops, spec
from mudsc_fast.batch_norm import reset_batch_norm
from mudsc_fast.compat import patch
from mudsc_fast.matching.activation import MatchingStatistics, collect_statistics
from mudsc_fast.matching.apply import permute_state_dict
from mudsc_fast.matching.node import Mode, NodeMatching
from mudsc_fast.merge import MergeResult, Space, merge
from mudsc_fast.ops import (
    Assignment,
    CorrelationAccumulator,
    UnitMap,
    ZipResult,
    linear_assignment,
    linear_sum_assignment,
    permute_,
    permute_merge,
    permute_merge_group,
    use_backend,
    zip_units,
)
from mudsc_fast.repair import repair
from mudsc_fast.spec import Observation, PermutationSpec

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "CorrelationAccumulator",
    "MatchingStatistics",
    "MergeResult",
    "Mode",
    "NodeMatching",
    "Observation",
    "PermutationSpec",
    "Space",
    "UnitMap",
    "ZipResult",
    "__version__",
    "collect_statistics",
    "compat",
    "linear_assignment",
    "linear_sum_assignment",
    "merge",
    "ops",
    "patch",
    "permute_",
    "permute_merge",
    "permute_merge_group",
    "permute_state_dict",
    "repair",
    "reset_batch_norm",
    "spec",
    "use_backend",
    "zip_units",
]
