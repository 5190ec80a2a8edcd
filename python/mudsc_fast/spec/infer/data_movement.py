"""Rules of operators that move data. All but concatenation return views."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from mudsc_fast.spec.infer import views
from mudsc_fast.spec.infer.factors import Factor, concatenation, unify
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import axes_of, rule
from mudsc_fast.spec.infer.views import NotAViewError, View


@rule("view reshape flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as ravel")
def _reshape(_record: Record, call: Call) -> View:
    return views.reshape(call["self"], call.shapes[0])


@rule("expand expand_as broadcast_to")
def _expand(_record: Record, call: Call) -> View:
    return views.expand(call["self"], call.shapes[0])


@rule("transpose swapaxes swapdims t numpy_T mT adjoint permute movedim")
def _permute(_record: Record, call: Call) -> View:
    value: View = call["self"]
    count = len(value.axes)
    order = list(range(count))
    if call.get("dims") is not None:
        order = [axis % count for axis in call["dims"]]
    elif call.get("source") is not None:
        source, target = axes_of(value, call["source"]), axes_of(value, call["destination"])
        rest = iter([axis for axis in order if axis not in source])
        moved = dict(zip(target, source, strict=True))
        order = [moved[axis] if axis in moved else next(rest) for axis in range(count)]
    elif call.name == "numpy_T":
        order.reverse()
    else:
        first, second = (call.get(name) for name in ("dim0", "dim1"))
        if first is None:
            first, second = (call.get("axis0"), call.get("axis1")) if call.get("axis0") is not None else (-2, -1)
        first, second = first % count, second % count
        order[first], order[second] = second, first
    return views.permute(value, order)


@rule("select")
def _select(record: Record, call: Call) -> View:
    return _cut(record, call, lambda v: views.select(v, call["dim"] % len(v.axes), call["index"]), call["dim"])


@rule("slice narrow")
def _slice(record: Record, call: Call) -> View:
    value: View = call["self"]
    axis = call["dim"] % len(value.axes)
    length, step = call.shapes[0][axis], call.get("step") or 1
    start = min(max(_wrapped(call["start"] or 0, value.shape[axis]), 0), value.shape[axis])
    return _cut(record, call, lambda v: views.narrow(v, axis, start, length, step), axis)


@rule("split split_with_sizes chunk unbind tensor_split unsafe_chunk unsafe_split")
def _split(record: Record, call: Call) -> list[View]:
    value: View = call["self"]
    axis = call["dim"] % len(value.axes)
    results, start = [], 0
    for shape in call.shapes:
        if len(shape) < len(value.axes):  # unbind
            chosen = _cut(record, call, partial(views.select, position=axis, index=start), axis)
            length = 1
        else:
            length = shape[axis]
            chosen = _cut(record, call, partial(views.narrow, position=axis, start=start, length=length), axis)
        results.append(chosen)
        start += length
    return results


@rule("repeat_interleave")
def _repeat_interleave(_record: Record, call: Call) -> View:
    value, repeats = call["self"], call.get("repeats")
    if not isinstance(value, View) or not isinstance(repeats, int) or call.get("dim") is None:
        raise NotAViewError
    axis = call["dim"] % len(value.axes)
    shape = list(value.shape)
    spread = views.expand(
        views.reshape(value, [*shape[: axis + 1], 1, *shape[axis + 1 :]]),
        [*shape[: axis + 1], repeats, *shape[axis + 1 :]],
    )
    return views.reshape(spread, call.shapes[0])


@rule("repeat tile")
def _repeat(_record: Record, call: Call) -> View:
    value: View = call["self"]
    shape = call.shapes[0]
    own = [1] * (len(shape) - len(value.axes)) + list(value.shape)
    apart = [length for pair in zip([1] * len(own), own, strict=True) for length in pair]
    spread = [n for total, length in zip(shape, own, strict=True) for n in (total // max(length, 1), length)]
    return views.reshape(views.expand(views.reshape(value, apart), spread), shape)


@rule("pixel_shuffle")
def _pixel_shuffle(_record: Record, call: Call) -> View:
    *batch, _, height, width = call["self"].shape
    factor, count = call["upscale_factor"], len(batch)
    parts = views.reshape(call["self"], [*batch, call.shapes[0][count], factor, factor, height, width])
    order = [*range(count), *(count + place for place in (0, 3, 1, 4, 2))]
    return views.reshape(views.permute(parts, order), call.shapes[0])


@rule("pixel_unshuffle")
def _pixel_unshuffle(_record: Record, call: Call) -> View:
    *batch, channels, height, width = call["self"].shape
    factor, count = call["downscale_factor"], len(batch)
    parts = views.reshape(call["self"], [*batch, channels, height // factor, factor, width // factor, factor])
    order = [*range(count), *(count + place for place in (0, 2, 4, 1, 3))]
    return views.reshape(views.permute(parts, order), call.shapes[0])


@rule("cat concat concatenate")
def _concatenate(record: Record, call: Call) -> View:
    parts = [part for part in call["tensors"] if math.prod(part.shape)]
    if not parts:
        raise NotAViewError
    return join(record, parts, call["dim"] % len(parts[0].axes))


@rule("hstack vstack dstack")
def _stack_along(record: Record, call: Call) -> View:
    axis = {"hstack": 1, "vstack": 0, "dstack": 2}[call.name]
    if len(call["tensors"][0].axes) <= max(axis, 1):
        raise NotAViewError  # axes are added first
    return join(record, call["tensors"], axis)


def join(record: Record, parts: Sequence[View], axis: int) -> View:
    """Return the concatenation of tensors along an axis."""
    if len(parts) == 1:
        return parts[0]
    read = [record.read(part) for part in parts]
    for other in read[1:]:
        for position, (a, b) in enumerate(zip(read[0], other, strict=True)):
            if position != axis:
                unify(a, b)
    axes = list(read[0])
    axes[axis] = concatenation([factors[axis] for factors in read])
    return record.result(axes)


@rule("stack")
def _stack(record: Record, call: Call) -> View:
    axis = call["dim"] % len(call.shapes[0])
    axes = []
    for factors in zip(*(record.read(part) for part in call["tensors"]), strict=True):
        for other in factors[1:]:
            unify(factors[0], other)
        axes.append(factors[0])
    axes.insert(axis, Factor(len(call["tensors"]), frozen=True, reason=call))
    return record.result(axes)


@rule("channel_shuffle native_channel_shuffle")
def _channel_shuffle(_record: Record, call: Call) -> View:
    batch, channels, *spatial = call["self"].shape
    groups = call["groups"]
    grouped = views.reshape(call["self"], [batch, groups, channels // groups, *spatial])
    order = [0, 2, 1, *range(3, len(spatial) + 3)]
    return views.reshape(views.permute(grouped, order), call.shapes[0])


def _cut(record: Record, call: Call, cut: Callable[[View], View], axis: int) -> View:
    """Cut out a part of an axis. If that is not a grid of steps, freeze the axis first."""
    value: View = call["self"]
    try:
        return cut(value)
    except NotAViewError:
        return cut(views.whole(record.freeze(call, value, [axis % len(value.axes)])))


def _wrapped(index: int, length: int) -> int:
    return index + length if index < 0 else index
