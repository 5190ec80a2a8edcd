"""What an operator computes, by its rule.

Operators that work entry by entry are known by PyTorch's own tag. What is in no rule freezes all that it reads.
"""

from __future__ import annotations

from mudsc_fast.spec.infer import data_movement, matmul, reductions, views
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import RULES
from mudsc_fast.spec.infer.views import NotAViewError, View

__all__ = ["CONSTANTS", "apply", "data_movement", "matmul", "opaque", "reductions"]

#: Entry by entry, or leaving values as they are, but without PyTorch's tag for it, in some version at least.
ELEMENTWISE = (
    "leaky_relu hardswish log_sigmoid subtract multiply divide __and__ __or__ __xor__ __invert__ rsub floor_divide "
    "alias contiguous to _to_copy type_as dropout native_dropout feature_dropout alpha_dropout detach clone "
    "lift_fresh_copy special_expit special_erf greater less greater_equal less_equal not_equal absolute negative copy "
    "fill requires_grad"
)

#: One number everywhere.
CONSTANTS = frozenset(
    ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
)

_UNTAGGED = frozenset(ELEMENTWISE.split())


def apply(record: Record, call: Call, name: str, pointwise: bool) -> View | list[View]:
    """Return what an operator of some name computes."""
    try:
        if name in CONSTANTS:
            return views.constant(call.shapes[0])
        if name in RULES:
            return RULES[name](record, call)
        if name.endswith("_") and name[:-1] in RULES:
            return RULES[name[:-1]](record, call)
        if pointwise or name in _UNTAGGED or name.removesuffix("_") in _UNTAGGED:
            return record.elementwise(call.views(), call.shapes[0])
    except NotAViewError:
        return opaque(record, call, known=True)
    return opaque(record, call)


def opaque(record: Record, call: Call, *, known: bool = False) -> View | list[View]:
    """Freeze all that an operator reads and computes."""
    for view in call.views():
        record.freeze(call, view, range(len(view.axes)), known=known)
    results = [views.frozen(shape) for shape in call.shapes]
    return results[0] if len(results) == 1 else results
