"""Rules of sums, maxima and other operators that drop axes whose order does not matter."""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.infer.factors import Factor
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import axes_of, rule
from mudsc_fast.spec.infer.views import NotAViewError, View


@rule("sum mean nansum nanmean amax amin prod all any var std logsumexp")
def reduce(record: Record, call: Call) -> View:
    """Return the result of a reduction over `dim`, by default over all axes."""
    return _without(record, _read(record, call["self"]), axes_of(call["self"], call.get("dim")), call)


@rule("norm linalg_vector_norm linalg_norm linalg_matrix_norm count_nonzero var_mean std_mean aminmax")
def _reduce_further(record: Record, call: Call) -> View | list[View]:
    result = _without(record, _read(record, call["self"]), axes_of(call["self"], call.get("dim")), call)
    return result if len(call.shapes) == 1 else [result] * len(call.shapes)


@rule("cosine_similarity linalg_vecdot pairwise_distance")
def _reduce_pair(record: Record, call: Call) -> View:
    """Return the result of an operator that compares two tensors along one axis."""
    first, second = call.views()
    rank = max(len(first.axes), len(second.axes))
    lengths = zip(*([1] * (rank - len(v.axes)) + list(v.shape) for v in (first, second)), strict=True)
    both = record.elementwise([first, second], [max(pair) for pair in lengths])
    axis = call.get("dim") if call.get("dim") is not None else -1
    return _without(record, record.read(both), [axis % rank], call)


@rule("quantile nanquantile")
def _quantile(record: Record, call: Call) -> View:
    if isinstance(call["q"], View) and call["q"].axes:
        raise NotAViewError  # several quantiles: a new axis
    return _without(record, _read(record, call["self"]), axes_of(call["self"], call.get("dim")), call)


def _read(record: Record, value: View) -> list[Factor]:
    # The norm of a weight prepares the weight: how its axes are used is seen where the weight itself is used.
    return record.read(value, note_roles=value.base.sources is None)


def _without(record: Record, factors: Sequence[Factor], summed: Sequence[int], call: Call) -> View:
    kept = len(call.shapes[0]) == len(factors)
    axes = [Factor(1, frozen=True) if axis in summed else factor for axis, factor in enumerate(factors)]
    return record.result(axes if kept else [f for axis, f in enumerate(axes) if axis not in summed])
