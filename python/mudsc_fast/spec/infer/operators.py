"""What an operator computes, by its rule.

Elementwise operators are recognized by the tag that PyTorch gives them. An operator without a rule freezes everything
that it reads.
"""

from __future__ import annotations

from mudsc_fast.spec.infer import data_movement, indexing, matmul, norms, ordered, recurrent, reductions, views
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import RULES
from mudsc_fast.spec.infer.views import NotAViewError, View

__all__ = [
    "apply",
    "data_movement",
    "indexing",
    "matmul",
    "norms",
    "opaque",
    "ordered",
    "recurrent",
    "reductions",
]

#: Elementwise operators that lack the tag in some version of PyTorch, and operators that do not change values.
_ELEMENTWISE = frozenset(
    name
    for names in (
        "leaky_relu hardswish log_sigmoid subtract multiply divide __and__ __or__ __xor__ __invert__ rsub",
        "floor_divide alias contiguous to _to_copy type_as dropout native_dropout feature_dropout alpha_dropout",
        "feature_alpha_dropout detach clone lift_fresh_copy special_expit special_erf greater less greater_equal",
        "less_equal not_equal absolute negative copy fill requires_grad rrelu rrelu_with_noise bernoulli normal real",
        "imag conj _conj resolve_conj resolve_neg complex polar square mish selu celu threshold relu6 hardtanh",
        "hardsigmoid softplus softshrink hardshrink nan_to_num masked_fill where clamp clip",
    )
    for name in names.split()
)

#: Operators that create tensors in which no place differs from another: constants and independent noise.
_UNIFORM = frozenset(
    name
    for names in (
        "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor empty empty_like",
        "new_empty empty_strided new_empty_strided empty_permuted rand randn rand_like randn_like randint_like uniform",
        "exponential",
    )
    for name in names.split()
)


def apply(record: Record, call: Call, name: str, pointwise: bool) -> View | list[View]:
    """Return the result of the operator of the given name."""
    try:
        if name in _UNIFORM or name.removesuffix("_") in _UNIFORM:
            return views.constant(call.shapes[0])
        if name in RULES:
            return RULES[name](record, call)
        if name.endswith("_") and name[:-1] in RULES:
            return RULES[name[:-1]](record, call)
        if pointwise or name in _ELEMENTWISE or name.removesuffix("_") in _ELEMENTWISE:
            tensors = call.views()
            return record.elementwise(tensors, call.shapes[0]) if tensors else views.constant(call.shapes[0])
    except NotAViewError:
        return opaque(record, call, known=True)
    return opaque(record, call)


def opaque(record: Record, call: Call, *, known: bool = False) -> View | list[View]:
    """Freeze everything that an operator reads and computes."""
    for view in call.views():
        record.freeze(call, view, range(len(view.axes)), known=known)
    if not call.views():
        created = f"it has the order of the result of {call}"
        results = [views.fixed(shape, created) for shape in call.shapes]
    else:
        results = [views.frozen(shape, call if known else f"{call} is not supported") for shape in call.shapes]
    return results[0] if len(results) == 1 else results
