"""Rules of operators that sum products over axes: linear layers, convolutions, attention, einsum."""

from __future__ import annotations

import string
from dataclasses import replace

from mudsc_fast.spec.infer import views
from mudsc_fast.spec.infer.factors import Factor, freeze, product, split, unify
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import per_channel, rule
from mudsc_fast.spec.infer.views import NotAViewError, View


@rule("linear")
def _linear(record: Record, call: Call) -> View:
    value, weight = call["input"], call["weight"]
    batch = _labels(len(value.axes) - 1)
    if len(weight.axes) == 1:
        return record.contract([(value, [*batch, "in"]), (weight, ["in"])], batch)
    result = record.contract([(value, [*batch, "in"]), (weight, ["out", "in"])], [*batch, "out"])
    return _with_bias(record, result, call.get("bias"))


@rule("addmm addmv addbmm baddbmm")
def _addmm(record: Record, call: Call) -> View:
    bias, first, second = (value for value in call.arguments.values() if isinstance(value, View))
    return _with_bias(record, _product(record, first, second), bias)


@rule("mm bmm matmul mv dot vdot inner")
def _matmul(record: Record, call: Call) -> View:
    first, second = call.views()
    if call.name == "inner" and len(second.axes) > 1:
        raise NotAViewError
    return _product(record, first, second)


@rule("outer")
def _outer(record: Record, call: Call) -> View:
    return record.contract([(call["self"], ["row"]), (call["vec2"], ["column"])], ["row", "column"])


@rule("bilinear")
def _bilinear(record: Record, call: Call) -> View:
    first, second, weight = call["input1"], call["input2"], call["weight"]
    batch = _labels(len(first.axes) - 1)
    operands = [(first, [*batch, "left"]), (second, [*batch, "right"]), (weight, ["out", "left", "right"])]
    return _with_bias(record, record.contract(operands, [*batch, "out"]), call.get("bias"))


@rule("cdist _cdist_forward")
def _distances(record: Record, call: Call) -> View:
    first, second = call["x1"], call["x2"]
    batch = _labels(max(len(first.axes), len(second.axes)) - 2)
    operands = [
        (tensor, [*batch[len(batch) - len(tensor.axes) + 2 :], place, "in"])
        for tensor, place in ((first, "row"), (second, "column"))
    ]
    return record.contract(operands, [*batch, "row", "column"])


@rule("tensordot")
def _tensordot(record: Record, call: Call) -> View:
    names = []
    for side, key in (("self", "dims_self"), ("other", "dims_other")):
        count = len(call[side].axes)
        summed = {axis % count: f"in {place}" for place, axis in enumerate(call[key])}
        names.append([summed.get(axis, f"{side} {axis}") for axis in range(count)])
    kept = [name for side in names for name in side if not name.startswith("in ")]
    return record.contract([(call["self"], names[0]), (call["other"], names[1])], kept)


@rule("einsum")
def _einsum(record: Record, call: Call) -> View:
    equation = call["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    tensors = call["tensors"]
    if not arrow:
        letters = [letter for letter in sorted(set(inputs)) if letter in string.ascii_letters]
        output = ("..." if "..." in inputs else "") + "".join(n for n in letters if inputs.count(n) == 1)
    terms = inputs.split(",")
    rank = max(len(t.axes) - len(term.replace("...", "")) for t, term in zip(tensors, terms, strict=True))
    operands = []
    for tensor, term in zip(tensors, terms, strict=True):
        names = _einsum_labels(term, len(tensor.axes) - len(term.replace("...", "")))
        if len(set(names)) != len(names):
            raise NotAViewError  # a diagonal
        operands.append((tensor, names))
    return record.contract(operands, _einsum_labels(output, rank))


@rule(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention"
)
def _attention(record: Record, call: Call) -> View:
    query, key, value = call["query"], call["key"], call["value"]
    if call.get("enable_gqa") and key.shape[-3] != query.shape[-3]:
        key, value = (_heads_repeated(tensor, query.shape[-3]) for tensor in (key, value))
    batch = _labels(len(query.axes) - 2)
    scores = record.contract([(query, [*batch, "l", "d"]), (key, [*batch, "s", "d"])], [*batch, "l", "s"])
    if call.get("is_causal"):
        record.freeze(call, scores, [len(batch), len(batch) + 1])
    mask = call.get("attn_mask") if call.get("attn_mask") is not None else call.get("attn_bias")
    if mask is not None:
        scores = record.elementwise([scores, mask], scores.shape)
    return record.contract([(scores, [*batch, "l", "s"]), (value, [*batch, "s", "e"])], [*batch, "l", "e"])


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
def _convolution(record: Record, call: Call) -> View:
    value, weight, groups = call["input"], call["weight"], call["groups"]
    rank = len(weight.axes) - 2
    if len(value.axes) == rank + 1:  # without a batch
        batched = {**call.arguments, "input": views.reshape(value, [1, *value.shape])}
        result = _convolution(record, replace(call, arguments=batched, shapes=[(1, *call.shapes[0])]))
        assert isinstance(result, View)
        return views.reshape(result, call.shapes[0])
    transposed = bool(call.get("transposed")) or "transpose" in call.operator
    batch, channels, *_ = record.freeze(call, value, range(2, rank + 2))
    consumed = 0 if transposed else 1
    first, second, *kernel = record.read(weight, [consumed])
    for factor in kernel:
        freeze(factor, "it is the kernel of a convolution")
    if groups == 1:
        unify(channels, second if not transposed else first)
        written = first if not transposed else second
    else:
        of_value, within = split(channels, groups)
        of_weight, own = split(first, groups)
        unify(of_value, of_weight)
        unify(within, own if transposed else second)
        # The other axis of the weight belongs to one group: its units move within their own group.
        written = first if not transposed else product([of_weight, second])
    spatial = [Factor(length, frozen=True, reason=call) for length in call.shapes[0][2:]]
    return _with_bias(record, record.result([batch, written, *spatial]), call.get("bias"), channel=1)


@rule("_grouped_mm transformers::grouped_mm_fallback")
def _grouped_matmul(record: Record, call: Call) -> View:
    """Return rows, each multiplied by the matrix of its own expert. Rows and experts keep their order."""
    rows, matrices = (value for value in call.arguments.values() if isinstance(value, View) and len(value.axes) > 1)
    if len(rows.axes) != 2 or len(matrices.axes) != 3:
        raise NotAViewError
    rows = record.solid(rows)
    record.freeze(call, rows, [0])
    experts, *_ = record.read(matrices, [1])
    freeze(experts, call)
    return record.contract([(rows, ["row", "in"]), (views.select(matrices, 0, 0), ["in", "out"])], ["row", "out"])


@rule("glu")
def _glu(record: Record, call: Call) -> View:
    value: View = call["self"]
    axis = call["dim"] % len(value.axes)
    half = value.shape[axis] // 2
    return record.elementwise([views.narrow(value, axis, start, half) for start in (0, half)], call.shapes[0])


def _product(record: Record, first: View, second: View) -> View:
    left, right = len(first.axes), len(second.axes)
    rows = [*_labels(max(left, right) - 2)[-(left - 2) :], "row"] if left > 2 else ["row"] * (left - 1)
    columns = _labels(max(left, right) - 2)[-(right - 2) :] if right > 2 else []
    batch = _labels(max(left, right) - 2) if max(left, right) > 2 else []
    result = [*batch, *(["row"] if left > 1 else []), *(["column"] if right > 1 else [])]
    other = [*columns, "inner", "column"] if right > 1 else ["inner"]
    return record.contract([(first, [*rows, "inner"]), (second, other)], result)


def _with_bias(record: Record, value: View, bias: View | None, channel: int | None = None) -> View:
    if bias is None:
        return value
    return record.elementwise([value, bias if channel is None else per_channel(bias, value)], value.shape)


def _heads_repeated(tensor: View, heads: int) -> View:
    *batch, own, length, width = tensor.shape
    spread = views.reshape(tensor, [*batch, own, 1, length, width])
    spread = views.expand(spread, [*batch, own, heads // own, length, width])
    return views.reshape(spread, [*batch, heads, length, width])


def _labels(count: int) -> list[str]:
    return [f"batch {index}" for index in range(count)]


def _einsum_labels(term: str, rank: int) -> list[str]:
    before, dots, behind = term.partition("...")
    # Axes under the dots are numbered from the last.
    return [*before, *([f"batch {-i}" for i in range(rank, 0, -1)] if dots else []), *behind]
