"""Training-free merging of pretrained networks, built on fast kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mudsc_fast import ops
from mudsc_fast.ops import (
    Assignment,
    CorrelationAccumulator,
    PairwiseSimilarity,
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

if TYPE_CHECKING:
    from mudsc_fast import compat, evaluate, plot, spec
    from mudsc_fast.batch_norm import reset_batch_norm
    from mudsc_fast.compat import patch
    from mudsc_fast.match_models import match
    from mudsc_fast.matching.activation import collect_statistics
    from mudsc_fast.matching.apply import permute_state_dict
    from mudsc_fast.matching.node import Mode, NodeMatching
    from mudsc_fast.matching.statistics import MatchingStatistics
    from mudsc_fast.matching_result import Matching
    from mudsc_fast.merge_models import merge, search_balance
    from mudsc_fast.merge_result import MergeResult
    from mudsc_fast.options import Space
    from mudsc_fast.refitting.refit import refit  # not from the package: mypy would take the module of that name
    from mudsc_fast.repairing import repair
    from mudsc_fast.spec import Observation, PermutationSpec

__version__ = "0.1.0"

__all__ = [
    "Assignment",
    "CorrelationAccumulator",
    "Matching",
    "MatchingStatistics",
    "MergeResult",
    "Mode",
    "NodeMatching",
    "Observation",
    "PairwiseSimilarity",
    "PermutationSpec",
    "Space",
    "UnitMap",
    "ZipResult",
    "__version__",
    "collect_statistics",
    "compat",
    "evaluate",
    "linear_assignment",
    "linear_sum_assignment",
    "match",
    "merge",
    "ops",
    "patch",
    "permute_",
    "permute_merge",
    "permute_merge_group",
    "permute_state_dict",
    "plot",
    "refit",
    "repair",
    "reset_batch_norm",
    "search_balance",
    "spec",
    "use_backend",
    "zip_units",
]


# What not every program needs is loaded at first use, so that programs that only solve assignments start fast. A module
# must not have the name of a function: importing the module would replace the function.
_MODULES = ("compat", "evaluate", "plot", "spec")
_DEFINED_IN = {
    "Matching": "matching_result",
    "MatchingStatistics": "matching.statistics",
    "MergeResult": "merge_result",
    "Mode": "matching.node",
    "NodeMatching": "matching.node",
    "Observation": "spec",
    "PermutationSpec": "spec",
    "Space": "options",
    "collect_statistics": "matching.activation",
    "match": "match_models",
    "merge": "merge_models",
    "patch": "compat",
    "permute_state_dict": "matching.apply",
    "refit": "refitting",
    "repair": "repairing",
    "reset_batch_norm": "batch_norm",
    "search_balance": "merge_models",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mudsc_fast.{name}")
    if name in _DEFINED_IN:
        value = getattr(import_module(f"mudsc_fast.{_DEFINED_IN[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
