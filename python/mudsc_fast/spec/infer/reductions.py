"""Norms, softmax, sums over axes, and operators for which the order along some axes counts."""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.infer.factors import Factor, freeze, split, unify
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import axes_of, per_channel, rule
from mudsc_fast.spec.infer.views import NotAViewError, View, factors_of_view


@rule("layer_norm rms_norm native_layer_norm")
def _layer_norm(record: Record, call: Call) -> View:
    value = record.solid(call["input"])
    scales = [call.get(name) for name in ("weight", "bias")]
    batch = record.read(value)[: len(value.axes) - len(call["normalized_shape"])]
    record.occurrences.append(tuple(batch))  # mean and variance
    return record.elementwise([value, *(scale for scale in scales if scale is not None)], value.shape)


@rule("batch_norm instance_norm _native_batch_norm_legit_no_training")
def _batch_norm(record: Record, call: Call) -> View:
    value: View = call["input"]
    tensors = [call.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    for statistic in tensors[2:]:
        if statistic is not None and statistic.base.tensor is not None:
            record.statistics.add(statistic.base.tensor)
    if call.get("use_input_stats"):
        record.occurrences.append(tuple(record.read(value)[:2]))
    scales = [per_channel(tensor, value) for tensor in tensors if tensor is not None]
    return record.elementwise([value, *scales], value.shape)


@rule("group_norm native_group_norm")
def _group_norm(record: Record, call: Call) -> View:
    value = record.solid(call["input"])
    batch, channels, *_ = record.read(value)
    groups, _ = split(channels, call.get("num_groups") or call["group"])
    record.occurrences.append((batch, groups))  # mean and variance
    scales = [per_channel(call[name], value) for name in ("weight", "bias") if call.get(name) is not None]
    return record.elementwise([value, *scales], value.shape)


@rule("prelu")
def _prelu(record: Record, call: Call) -> View:
    value: View = call["self"]
    slopes: View = call["weight"]
    return record.elementwise([value, slopes if slopes.shape == (1,) else per_channel(slopes, value)], value.shape)


@rule("_weight_norm")
def _weight_norm(record: Record, call: Call) -> View:
    """Return ``v * g / norm(v)``, which has the axes of `v`, so that later uses of it are uses of `v`."""
    direction: View = call["v"]
    for factor, scale in zip(factors_of_view(direction), record.read(call["g"]), strict=True):
        if scale.size != 1:
            unify(factor, scale)
            record.occurrences.append((factor,))
    return direction


@rule("softmax _softmax log_softmax _log_softmax")
def _softmax(record: Record, call: Call) -> View:
    value: View = call["self"]
    factors = record.read(value)
    summed = axes_of(value, call["dim"])
    record.occurrences.append(tuple(f for axis, f in enumerate(factors) if axis not in summed))
    return value


@rule("sum mean nansum nanmean amax amin prod all any var std logsumexp")
def _reduce(record: Record, call: Call) -> View:
    return _without(record, record.read(call["self"]), axes_of(call["self"], call.get("dim")), call)


@rule("norm linalg_vector_norm count_nonzero var_mean std_mean aminmax")
def _reduce_further(record: Record, call: Call) -> View | list[View]:
    result = _without(record, record.read(call["self"]), axes_of(call["self"], call.get("dim")), call)
    return result if len(call.shapes) == 1 else [result] * len(call.shapes)


def _without(record: Record, factors: Sequence[Factor], summed: Sequence[int], call: Call) -> View:
    kept = len(call.shapes[0]) == len(factors)
    axes = [Factor(1, frozen=True) if axis in summed else factor for axis, factor in enumerate(factors)]
    return record.result(axes if kept else [f for axis, f in enumerate(axes) if axis not in summed])


@rule(
    "cumsum cumprod cummax cummin logcumsumexp sort argsort topk kthvalue mode median flip roll diff argmax argmin "
    "max min"
)
def _ordered(record: Record, call: Call) -> View | list[View]:
    if call.get("other") is not None:
        return record.elementwise(call.views(), call.shapes[0])
    axes = axes_of(call["self"], call.get("dims") if call.get("dim") is None else call["dim"])
    if call.get("dim") is None and len(call.shapes) == 1 and call.operator.rpartition(".")[2] in ("max", "min"):
        return _reduce(record, call)
    return _ordered_along(record, call, axes)


@rule("constant_pad_nd pad")
def _pad(record: Record, call: Call) -> View | list[View]:
    before = call["self"].shape
    return _ordered_along(record, call, [i for i, n in enumerate(call.shapes[0]) if n != before[i]])


@rule(
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool2d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
def _pool(record: Record, call: Call) -> View | list[View]:
    value: View = call.get("self") or call.get("input")
    rank = int(next(letter for letter in reversed(call.operator) if letter.isdigit()))
    return _ordered_along(record, call, range(len(value.axes) - rank, len(value.axes)))


@rule("view_as_complex view_as_real")
def _complex(record: Record, call: Call) -> View:
    factors = record.read(call["self"])
    if call.operator.endswith("real"):
        return record.result([*factors, Factor(2, frozen=True)])
    return record.result(record.freeze(call, call["self"], [len(factors) - 1])[:-1])


def _ordered_along(record: Record, call: Call, axes: Sequence[int]) -> View | list[View]:
    value: View = call["self"] if call.get("self") is not None else call["input"]
    factors = record.freeze(call, value, list(axes))
    results = []
    for shape in call.shapes:
        kept = factors if len(shape) == len(factors) else [f for axis, f in enumerate(factors) if axis not in axes]
        if len(kept) != len(shape):
            raise NotAViewError
        same = [f if f.size == n else Factor(n, frozen=True) for f, n in zip(kept, shape, strict=True)]
        results.append(record.result(same))
    return results[0] if len(results) == 1 else results


@rule("embedding")
def _embedding(record: Record, call: Call) -> View:
    entries, units = record.read(call["weight"])
    freeze(entries)
    return record.result([*record.read(call["indices"]), units])


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


@rule("index_select")
def _index_select(record: Record, call: Call) -> View:
    axis = axes_of(call["self"], call["dim"])[0]
    factors = record.freeze(call, call["self"], [axis])
    return record.result([*factors[:axis], Factor(call.shapes[0][axis], frozen=True), *factors[axis + 1 :]])


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


def _broadcast(tensors: Sequence[View]) -> list[int]:
    rank = max(len(tensor.axes) for tensor in tensors)
    padded = [[1] * (rank - len(tensor.axes)) + list(tensor.shape) for tensor in tensors]
    return [max(lengths) for lengths in zip(*padded, strict=True)]
