"""Rules of operators that depend on the order of some axes: scans, sorting, pooling, Fourier transforms, padding."""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.infer import views
from mudsc_fast.spec.infer.factors import Factor, concatenation, freeze, product, split, unify
from mudsc_fast.spec.infer.record import Call, Record
from mudsc_fast.spec.infer.reductions import reduce
from mudsc_fast.spec.infer.registry import axes_of, rule
from mudsc_fast.spec.infer.views import NotAViewError, View


@rule("sort topk kthvalue mode median nanmedian max min")
def _ranking(record: Record, call: Call) -> View | list[View]:
    """Return values by rank, and their positions.

    The values do not depend on the order of the input. The positions do, so they freeze it if they are used.
    """
    if call.get("other") is not None:
        return record.elementwise(call.views(), call.shapes[0])
    if len(call.shapes) == 1:
        return reduce(record, call)
    if call.used <= {0}:
        axes = axes_of(call["self"], call.get("dim"))
        values = _resized(record, call, _ranked(record.read(call["self"]), axes, call), axes)
        return values if isinstance(values, list) else [values]
    return _scan(record, call)


@rule("cumsum cumprod cummax cummin logcumsumexp argsort flip roll diff argmax argmin")
def _scan(record: Record, call: Call) -> View | list[View]:
    chosen = call.get("dims") if call.get("dim") is None else call["dim"]
    return freeze_along(record, call, axes_of(call["self"], chosen))


@rule("tril triu")
def _triangle(record: Record, call: Call) -> View | list[View]:
    return freeze_along(record, call, axes_of(call["self"], [-2, -1]))


@rule("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft")
def _fourier(record: Record, call: Call) -> View | list[View]:
    return freeze_along(record, call, axes_of(call["self"], call["dim"]))


@rule(
    "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn "
    "fft_ihfftn fft_fftshift fft_ifftshift _fft_r2c _fft_c2r _fft_c2c"
)
def _fourier_along_axes(record: Record, call: Call) -> View | list[View]:
    value, chosen, sizes = call["self"], call.get("dim"), call.get("s")
    if chosen is None and sizes is not None:
        chosen = list(range(-len(sizes), 0))
    return freeze_along(record, call, axes_of(value, chosen))


@rule(
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d fractional_max_pool2d fractional_max_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
def _pool(record: Record, call: Call) -> View | list[View]:
    rank = int(next(letter for letter in reversed(call.operator) if letter.isdigit()))
    count = len(_input_of(call).axes)
    return freeze_along(record, call, range(count - rank, count))


@rule("max_unpool2d max_unpool3d")
def _unpool(record: Record, call: Call) -> View | list[View]:
    both = record.elementwise([call["self"], call["indices"]], call["self"].shape)
    rank = int(call.operator[-2])
    count = len(both.axes)
    return _resized(record, call, record.freeze(call, both, range(count - rank, count)), range(count - rank, count))


@rule(
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "_pad_circular"
)
def _mirrored_pad(record: Record, call: Call) -> View | list[View]:
    """Return a tensor that is padded by copies of its own entries."""
    count = len(call["self"].axes)
    padded = [count - 1 - place // 2 for place, length in enumerate(call.get("padding") or call["pad"]) if length]
    return freeze_along(record, call, sorted(set(padded)))


@rule("constant_pad_nd pad")
def _pad(record: Record, call: Call) -> View | list[View]:
    """Return a tensor that is padded by a constant: along each padded axis a concatenation with free entries.

    Negative lengths cut entries off.
    """
    if call.get("mode") not in (None, "constant"):
        return _mirrored_pad(record, call)
    value: View = call["self"]
    count = len(value.axes)
    lengths = list(call["pad"])
    pads = {count - 1 - place // 2: tuple(lengths[place : place + 2]) for place in range(0, len(lengths), 2)}
    for axis, (before, behind) in pads.items():
        if before < 0 or behind < 0:
            start, stop = max(-before, 0), value.shape[axis] - max(-behind, 0)
            value = views.narrow(value, axis, start, stop - start)
    axes = record.read(value)
    for axis, (before, behind) in pads.items():
        axes[axis] = concatenation([Factor(max(before, 0)), axes[axis], Factor(max(behind, 0))])
    return record.result(axes)


@rule("unfold")
def _unfold(record: Record, call: Call) -> View:
    """Return sliding windows along one axis; the entries of a window are a new last axis."""
    axis = axes_of(call["self"], call["dimension"])[0]
    factors = record.freeze(call, call["self"], [axis])
    factors[axis] = Factor(call.shapes[0][axis], frozen=True, reason=call)
    return record.result([*factors, Factor(call["size"], frozen=True, reason=call)])


@rule("im2col")
def _image_to_columns(record: Record, call: Call) -> View:
    """Return the patches of an image [batch, channels * patch, positions]."""
    batch, channels, *_ = record.freeze(call, _with_batch(call, 4), [2, 3])
    *_, width, positions = call.shapes[0]
    patch = Factor(width // channels.size, frozen=True, reason=call)
    columns = product([channels, patch])
    return record.result([batch, columns, Factor(positions, frozen=True, reason=call)])


@rule("col2im")
def _columns_to_image(record: Record, call: Call) -> View:
    batch, columns, _ = record.freeze(call, _with_batch(call, 3), [2])
    *_, channels, height, width = call.shapes[0]
    units, patch = split(columns, channels)
    freeze(patch, call)
    spatial = [Factor(length, frozen=True, reason=call) for length in (height, width)]
    return record.result([batch, units, *spatial])


@rule("grid_sampler_2d grid_sampler_3d grid_sampler")
def _grid_sampler(record: Record, call: Call) -> View:
    value, grid = call["input"], call["grid"]
    factors = record.freeze(call, value, range(2, len(value.axes)))
    places = record.freeze(call, grid, range(1, len(grid.axes)))
    unify(places[0], factors[0])
    spatial = [Factor(length, frozen=True, reason=call) for length in call.shapes[0][2:]]
    return record.result([factors[0], factors[1], *spatial])


@rule("view_as_complex view_as_real")
def _complex(record: Record, call: Call) -> View:
    factors = record.read(call["self"])
    if call.name.endswith("real"):
        return record.result([*factors, Factor(2, frozen=True, reason=call)])
    return record.result(record.freeze(call, call["self"], [len(factors) - 1])[:-1])


def _ranked(factors: Sequence[Factor], axes: Sequence[int], call: Call) -> list[Factor]:
    """Return the axes of sorted values: the axes that were sorted have an order of their own."""
    return [Factor(f.size, frozen=True, reason=call) if axis in axes else f for axis, f in enumerate(factors)]


def freeze_along(record: Record, call: Call, axes: Sequence[int]) -> View | list[View]:
    """Freeze some axes of the input, and return results that have the other axes of the input."""
    return _resized(record, call, record.freeze(call, _input_of(call), list(axes)), axes)


def _resized(record: Record, call: Call, factors: Sequence[Factor], axes: Sequence[int]) -> View | list[View]:
    results = []
    for shape in call.shapes:
        kept = factors if len(shape) == len(factors) else [f for axis, f in enumerate(factors) if axis not in axes]
        if len(kept) != len(shape):
            raise NotAViewError
        same = [f if f.size == n else Factor(n, frozen=True, reason=call) for f, n in zip(kept, shape, strict=True)]
        results.append(record.result(same))
    return results[0] if len(results) == 1 else results


def _input_of(call: Call) -> View:
    value: View = call["self"] if call.get("self") is not None else call["input"]
    return value


def _with_batch(call: Call, rank: int) -> View:
    value: View = call["self"]
    if len(value.axes) != rank:
        raise NotAViewError  # without a batch
    return value
