"""The ops: public functions that check their input and call the kernel that `_dispatch` chooses.

Where an op takes a tensor, it also takes a NumPy array and anything with ``__dlpack__`` or ``__array__`` (arrays of JAX
and CuPy). Results are tensors on the device of the input, which other libraries read through ``__dlpack__``. Only
:func:`linear_sum_assignment` returns NumPy arrays for arrays, like the function of scipy that it replaces.
"""

from mudsc_fast.ops import _correlation_op  # noqa: F401  registers the op
from mudsc_fast.ops._dispatch import backends, use_backend
from mudsc_fast.ops.assignment import Assignment, linear_assignment, linear_sum_assignment
from mudsc_fast.ops.correlation import CorrelationAccumulator
from mudsc_fast.ops.pairwise import PairwiseSimilarity
from mudsc_fast.ops.permute import UnitMap, permute_, permute_merge, permute_merge_group
from mudsc_fast.ops.zip import ZipResult, zip_units

__all__ = [
    "Assignment",
    "CorrelationAccumulator",
    "PairwiseSimilarity",
    "UnitMap",
    "ZipResult",
    "backends",
    "linear_assignment",
    "linear_sum_assignment",
    "permute_",
    "permute_merge",
    "permute_merge_group",
    "use_backend",
    "zip_units",
]
