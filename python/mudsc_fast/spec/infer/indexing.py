"""Rules of operators that select or write entries by index."""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.infer import views
from mudsc_fast.spec.infer.data_movement import join
from mudsc_fast.spec.infer.factors import Factor, freeze, unify
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import axes_of, rule
from mudsc_fast.spec.infer.views import NotAViewError, View


@rule("embedding")
def _embedding(record: Record, call: Call) -> View:
    entries, units = record.read(call["weight"])
    freeze(entries, call)
    return record.result([*record.read(call["indices"]), units])


@rule("embedding_renorm")
def _embedding_renorm(record: Record, call: Call) -> View:
    """Scale the rows of a table in place. The order of the units does not matter."""
    table: View = call["self"]
    record.freeze(call, table, [0])
    return table


@rule("embedding_bag _embedding_bag _embedding_bag_forward_only")
def _embedding_bag(record: Record, call: Call) -> list[View]:
    entries, units = record.read(call["weight"])
    freeze(entries, call)
    bags = Factor(call.shapes[0][0], frozen=True, reason=call)
    return [record.result([bags, units]), *(views.frozen(shape, call) for shape in call.shapes[1:])]


@rule("index")
def _index(record: Record, call: Call) -> View:
    value: View = call["self"]
    chosen = [axis for axis, index in enumerate(call["indices"]) if index is not None]
    indices = [index for index in call["indices"] if index is not None]
    factors = record.freeze(call, value, chosen)
    kept = [factor for axis, factor in enumerate(factors) if axis not in chosen]
    rank = len(call.shapes[0]) - len(kept)
    if rank != max(len(index.axes) for index in indices):
        raise NotAViewError  # a mask
    places = record.read(record.elementwise(indices, _broadcast(indices)))
    begin = chosen[0] if chosen == list(range(chosen[0], chosen[-1] + 1)) else 0
    return record.result([*kept[:begin], *places, *kept[begin:]])


@rule("index_put")
def _index_put(record: Record, call: Call) -> View:
    """Return a tensor with new entries at some places of its leading axes."""
    value, written = record.solid(call["self"]), call["values"]
    indices = call["indices"]
    if any(index is None for index in indices):
        raise NotAViewError
    # A mask covers as many axes as it has.
    is_mask = len(indices) == 1 and indices[0].shape == value.shape[: len(indices[0].axes)]
    covered = len(indices[0].axes) if is_mask and len(indices[0].axes) > 1 else len(indices)
    factors = record.freeze(call, value, range(covered))
    kept = factors[covered:]
    read = record.freeze(call, written, range(max(len(written.axes) - len(kept), 0)))
    for mine, other in zip(kept[::-1], read[::-1], strict=False):
        if other.size == mine.size:
            unify(mine, other)
        elif other.size != 1:
            raise NotAViewError
    return record.result(factors)


@rule("index_select")
def _index_select(record: Record, call: Call) -> View:
    axis = axes_of(call["self"], call["dim"])[0]
    factors = record.freeze(call, call["self"], [axis])
    chosen = Factor(call.shapes[0][axis], frozen=True, reason=call)
    return record.result([*factors[:axis], chosen, *factors[axis + 1 :]])


@rule("index_add index_copy index_fill index_reduce")
def _index_write(record: Record, call: Call) -> View:
    value: View = record.solid(call["self"])
    axis = axes_of(value, call["dim"])[0]
    factors = record.freeze(call, value, [axis])
    source = call.get("source")
    if isinstance(source, View) and len(source.axes) == len(factors):
        for position, factor in enumerate(record.freeze(call, source, [axis])):
            if position != axis:
                unify(factors[position], factor)
    return record.result(factors)


@rule("gather")
def _gather(record: Record, call: Call) -> View:
    axis = axes_of(call["self"], call["dim"])[0]
    factors, places = record.freeze(call, call["self"], [axis]), record.read(call["index"])
    for position, (factor, place) in enumerate(zip(factors, places, strict=True)):
        if position != axis:
            if factor.size != place.size:
                raise NotAViewError
            unify(factor, place)
    return record.result(places)


@rule("take_along_dim")
def _take_along(record: Record, call: Call) -> View:
    value, index = call["self"], call["indices"]
    if call.get("dim") is None:
        raise NotAViewError
    axis = axes_of(value, call["dim"])[0]
    factors, places = record.freeze(call, value, [axis]), record.freeze(call, index, [axis])
    for position, (factor, place) in enumerate(zip(factors, places, strict=True)):
        if position != axis and place.size == factor.size:
            unify(factor, place)
        elif position != axis and place.size != 1:
            raise NotAViewError
    factors[axis] = Factor(call.shapes[0][axis], frozen=True, reason=call)
    return record.result(factors)


@rule("bucketize")
def _bucketize(record: Record, call: Call) -> View:
    record.freeze(call, call["boundaries"], [0])
    return record.elementwise([call["self"]], call.shapes[0])


@rule("scatter scatter_add scatter_reduce")
def _scatter(record: Record, call: Call) -> View:
    """Return a tensor with entries written to the places that an index names along one axis."""
    value = record.solid(call["self"])
    axis = axes_of(value, call["dim"])[0]
    factors = record.freeze(call, value, [axis])
    for tensor in (call["index"], call.get("src")):
        if isinstance(tensor, View):
            for position, factor in enumerate(record.freeze(call, tensor, [axis])):
                if position != axis:
                    if factor.size != factors[position].size:
                        raise NotAViewError
                    unify(factors[position], factor)
    return record.result(factors)


@rule("slice_scatter")
def _slice_scatter(record: Record, call: Call) -> View:
    value = record.solid(call["self"])
    axis = axes_of(value, call["dim"])[0]
    length = value.shape[axis]
    start = min(max(_wrapped(call.get("start") or 0, length), 0), length)
    stop = start + call["src"].shape[axis]
    if (call.get("step") or 1) != 1:
        raise NotAViewError
    parts = [call["src"]]
    if start > 0:
        parts.insert(0, views.narrow(value, axis, 0, start))
    if stop < length:
        parts.append(views.narrow(value, axis, stop, length - stop))
    return join(record, parts, axis)


@rule("select_scatter")
def _select_scatter(record: Record, call: Call) -> View:
    value = record.solid(call["self"])
    axis = axes_of(value, call["dim"])[0]
    factors = record.freeze(call, value, [axis])
    others = [factor for position, factor in enumerate(factors) if position != axis]
    for mine, other in zip(others, record.read(call["src"]), strict=True):
        unify(mine, other)
    return record.result(factors)


@rule("diagonal")
def _diagonal(record: Record, call: Call) -> View:
    value: View = call["self"]
    first, second = axes_of(value, [call.get("dim1") or 0, 1 if call.get("dim2") is None else call["dim2"]])
    if call.get("offset") or value.shape[first] != value.shape[second]:
        raise NotAViewError
    factors = record.read(value)
    unify(factors[first], factors[second])
    return record.result([*(f for axis, f in enumerate(factors) if axis not in (first, second)), factors[first]])


@rule("diag_embed")
def _diag_embed(record: Record, call: Call) -> View:
    if call.get("offset") or (call.get("dim1"), call.get("dim2")) not in ((-2, -1), (None, None)):
        raise NotAViewError
    factors = record.read(call["self"])
    return record.result([*factors, factors[-1]])


def _broadcast(tensors: Sequence[View]) -> list[int]:
    rank = max(len(tensor.axes) for tensor in tensors)
    padded = [[1] * (rank - len(tensor.axes)) + list(tensor.shape) for tensor in tensors]
    return [max(lengths) for lengths in zip(*padded, strict=True)]


def _wrapped(index: int, length: int) -> int:
    return index + length if index < 0 else index
