"""Training-free merging of pretrained networks, and the fast kernels under it."""

from __future__ import annotations

from mudsc_fast import ops, spec
from mudsc_fast.batch_norm import reset_batch_norm
from mudsc_fast.matching.activation import ActivationSimilarity, activation_similarity
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
from mudsc_fast.spec import Observation, PermutationSpec

__version__ = "0.1.0"

__all__ = [
    "ActivationSimilarity",
    "Assignment",
    "CorrelationAccumulator",
    "MergeResult",
    "Mode",
    "NodeMatching",
    "Observation",
    "PermutationSpec",
    "Space",
    "UnitMap",
    "ZipResult",
    "__version__",
    "activation_similarity",
    "linear_assignment",
    "linear_sum_assignment",
    "merge",
    "ops",
    "permute_",
    "permute_merge",
    "permute_merge_group",
    "permute_state_dict",
    "reset_batch_norm",
    "spec",
    "use_backend",
    "zip_units",
]
