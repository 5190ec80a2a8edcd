"""Rules of norms, softmax and other operators that scale units by statistics or parameters of their own."""

from __future__ import annotations

from mudsc_fast.spec.infer.factors import split, unify
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.registry import axes_of, per_channel, rule
from mudsc_fast.spec.infer.views import View, factors_of_view


@rule("layer_norm rms_norm native_layer_norm")
def _layer_norm(record: Record, call: Call) -> View:
    value = record.solid(call["input"])
    scales = [call.get(name) for name in ("weight", "bias")]
    batch = record.read(value)[: len(value.axes) - len(call["normalized_shape"])]
    record.occurrences.append(tuple(batch))  # mean and variance
    return record.elementwise([value, *(scale for scale in scales if scale is not None)], value.shape)


@rule(
    "batch_norm instance_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit_no_training "
    "_native_batch_norm_legit_functional _native_batch_norm_legit _batch_norm_with_update _batch_norm_no_update"
)
def _batch_norm(record: Record, call: Call) -> View | list[View]:
    value: View = call["input"]
    tensors = [call.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    for statistic in tensors[2:]:
        if statistic is not None and statistic.base.tensor is not None:
            record.statistics.add(statistic.base.tensor)
    if call.get("use_input_stats"):
        record.occurrences.append(tuple(record.read(value)[:2]))
    scales = [per_channel(tensor, value) for tensor in tensors if tensor is not None]
    result = record.elementwise([value, *scales], value.shape)
    if len(call.shapes) == 1:
        return result
    # The other results are statistics of the channels, or empty.
    channels = record.read(value)[1]
    per_unit = record.result([channels])
    return [result, *(per_unit if shape == (channels.size,) else record.result([]) for shape in call.shapes[1:])]


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
    """Return ``v * g / norm(v)``. It has the axes of `v`, so later uses of the result are uses of `v`."""
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
