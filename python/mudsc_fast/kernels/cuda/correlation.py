"""Streaming correlation in CUDA (csrc/cuda/correlation.cu, correlation_product.cu, correlation_wgmma.cu)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mudsc_fast.kernels._scalar_types import SCALAR_TYPES
from mudsc_fast.kernels.cuda import _device, _tensor_cores

#: Element types that are multiplied on tensor cores; others take the reference.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Samples of one float32 sum. Beyond them sums are added in float64.
_PART_SAMPLES = 8192
#: Blocks that fill a large device twice. Where a product has fewer tiles, samples are shared out among more blocks.
_BLOCKS = 264
_MOST_PARTS = 16
_LARGEST = torch.finfo(torch.float32).max


class Product(NamedTuple):
    """Sums over samples of the products of all units of two models, about the units' shifts: [parts, C, C] float32."""

    parts: Tensor
    symmetric: bool


class Samples:
    """Samples of several models, and their sums as far as products have been taken.

    Parameters
    ----------
    features
        One [outer, C, inner] tensor per model, all of one shape, dtype of `DTYPES` and device, any strides. NaN counts
        as 0.
    outer_index
        For each model None, or [outer] int32: which places of the features' outer axis to take; of all models as many.
    instructions
        What multiplies, a name of `_tensor_cores`; None for what the device is known to do rightly.
    """

    def __init__(
        self,
        features: list[Tensor],
        outer_index: list[Tensor | None] | None = None,
        *,
        instructions: str | None = None,
    ) -> None:
        self._features = features
        self._index = outer_index or [None] * len(features)
        self._outer, self._units, self._inner = features[0].shape
        if self._index[0] is not None:
            self._outer = len(self._index[0])
        elif self._outer > 1 and all(_is_one_run(one) for one in features):
            self._outer, self._inner = 1, self._outer * self._inner
        self.count = self._outer * self._inner
        self._device = features[0].device
        self._instructions = instructions or tensor_cores(self._device).instructions
        self._shifts = torch.empty(len(features), self._units, dtype=torch.float32, device=self._device)
        self._sums: list[Tensor | None] = [None] * len(features)
        with _device.launching_on(self._device) as launch:
            for feature, index, shift in zip(features, self._index, self._shifts, strict=True):
                _device.extension().correlation_shift(
                    dtype=SCALAR_TYPES[feature.dtype],
                    features=feature.data_ptr(),
                    strides=self._strides(feature),
                    index=0 if index is None else index.data_ptr(),
                    outer=self._outer,
                    units=self._units,
                    inner=self._inner,
                    shift=shift.data_ptr(),
                    device=launch.device,
                    stream=launch.stream,
                )

    def product(self, i: int, j: int) -> Product:
        """Return the products of models i and j.

        The sums of a model are taken beside its first product; its diagonal one or, with i = 0, any serves.
        """
        parts, samples_per_part = _parts(self._units, self.count)
        units, symmetric = self._units, i == j
        products = torch.empty(parts, units, units, dtype=torch.float32, device=self._device)
        sums = [torch.empty(parts, 2, units, dtype=torch.float64, device=self._device) for _ in range(2)]
        takes_rows = self._sums[i] is None
        takes_columns = not symmetric and self._sums[j] is None
        with _device.launching_on(self._device) as launch:
            _device.extension().correlation_product(
                dtype=SCALAR_TYPES[self._features[i].dtype],
                rows=self._features[i].data_ptr(),
                row_strides=self._strides(self._features[i]),
                row_index=self._index_address(i),
                row_shift=self._shifts[i].data_ptr(),
                columns=self._features[j].data_ptr(),
                column_strides=self._strides(self._features[j]),
                column_index=self._index_address(j),
                column_shift=self._shifts[j].data_ptr(),
                outer=self._outer,
                units=units,
                inner=self._inner,
                symmetric=symmetric,
                parts=parts,
                samples_per_part=samples_per_part,
                products=products.data_ptr(),
                row_sums=sums[0].data_ptr() if takes_rows else 0,
                column_sums=sums[1].data_ptr() if takes_columns else 0,
                warpgroups=self._instructions == _tensor_cores.WGMMA,
                device=launch.device,
                stream=launch.stream,
            )
        if takes_rows:
            self._sums[i] = sums[0].sum(0)
        if takes_columns:
            self._sums[j] = sums[1].sum(0)
        return Product(products, symmetric)

    def sum(self, model: int) -> Tensor:
        """Return each unit's sum about its shift; only after a product of the model."""
        return self._sums_of(model)[0]

    def mean(self, model: int) -> Tensor:
        """Return each unit's mean; only after a product of the model."""
        return self._shifts[model].double() + self.sum(model) / self.count

    def squares(self, model: int) -> Tensor:
        """Return each unit's sum of squares about its mean; only after a product of the model."""
        total, squares = self._sums_of(model)
        about_mean: Tensor = squares - total * total / self.count
        return about_mean.clamp_min(0)

    def are_in_range(self, model: int) -> Tensor:
        """Return whether all values are finite and their squares' sums float32: a bool on the device."""
        in_range: Tensor = (self._sums_of(model)[1] <= _LARGEST).all()
        return in_range

    def _sums_of(self, model: int) -> Tensor:
        sums = self._sums[model]
        assert sums is not None, "sums are taken beside products"
        return sums

    def _index_address(self, model: int) -> int:
        index = self._index[model]
        return 0 if index is None else index.data_ptr()

    def _strides(self, feature: Tensor) -> tuple[int, int, int]:
        outer, unit, inner = feature.stride()
        return outer, unit, outer if feature.shape[2] == 1 else inner


def tensor_cores(device: torch.device) -> _tensor_cores.Choice:
    """Return which tensor-core instructions multiply on `device`, and why."""
    return _tensor_cores.choose(device, _products)


def _products(features: list[Tensor], axis: int, instructions: str) -> list[Tensor]:
    """Return the product of two models and their sums of squares, for a comparison of instructions."""
    samples = Samples([one[:, :, None] if axis == 1 else one[None] for one in features], instructions=instructions)
    product = samples.product(0, 1)
    return [product.parts.sum(0), samples.squares(0), samples.squares(1)]


def chunk_samples(units: int) -> int:
    """Return how many samples make good use of one product of `units` units."""
    return _PART_SAMPLES * _wanted_parts(units)


def accumulate(comoment: Tensor, product: Tensor, row_shift: Tensor, column_shift: Tensor) -> None:
    """Add `product` + outer(row_shift, column_shift) to `comoment` [C, C] float64; all contiguous."""
    none = torch.zeros_like(row_shift)
    _join(comoment, product[None], False, torch.stack([row_shift, none]), torch.stack([column_shift, none]))


def join(
    comoment: Tensor,
    product: Product,
    samples: Samples,
    i: int,
    j: int,
    row_shift: Tensor,
    column_shift: Tensor,
    weight: float = 1.0,
) -> None:
    """Add the co-moment of samples about their mean, and outer(row_shift, column_shift), to `comoment`.

    `weight` is 1, or -1 to take both away.
    """
    rows = torch.stack([samples.sum(i) / -samples.count, row_shift])
    _join(comoment, product.parts, product.symmetric, rows, torch.stack([samples.sum(j), column_shift]), weight)


def correlate(
    comoment: Tensor,
    row_deviation: Tensor,
    column_deviation: Tensor,
    count: int,
    eps: float,
    out: Tensor,
    mirror: Tensor | None,
    other: Tensor | None,
    balance: float,
) -> None:
    """Do what the function of this name in `kernels.reference` does, bit for bit where nothing is blended."""
    with _device.launching_on(out.device) as launch:
        _device.extension().correlation_blend(
            comoment=comoment.data_ptr(),
            row_deviation=row_deviation.data_ptr(),
            column_deviation=column_deviation.data_ptr(),
            units=comoment.shape[0],
            count=count,
            eps=eps,
            dtype=SCALAR_TYPES[out.dtype],
            out=out.data_ptr(),
            mirror=0 if mirror is None else mirror.data_ptr(),
            row_stride=out.stride(0),
            other=0 if other is None else other.data_ptr(),
            other_stride=0 if other is None else other.stride(0),
            balance=balance,
            device=launch.device,
            stream=launch.stream,
        )


def _join(
    comoment: Tensor, products: Tensor, symmetric: bool, rows: Tensor, columns: Tensor, weight: float = 1.0
) -> None:
    with _device.launching_on(comoment.device) as launch:
        _device.extension().correlation_join(
            product_dtype=SCALAR_TYPES[products.dtype],
            products=products.data_ptr(),
            parts=products.shape[0],
            units=comoment.shape[0],
            symmetric=symmetric,
            rows=rows.data_ptr(),
            columns=columns.data_ptr(),
            weight=weight,
            comoment=comoment.data_ptr(),
            device=launch.device,
            stream=launch.stream,
        )


def _is_one_run(feature: Tensor) -> bool:
    """Return whether all samples lie at one distance."""
    _, _, inner = feature.shape
    return inner == 1 or feature.stride(0) == inner * feature.stride(2)


def _wanted_parts(units: int) -> int:
    tile: int = _device.extension().correlation_tile()
    return max(1, min(_MOST_PARTS, _BLOCKS // (-(-units // tile)) ** 2))


def _parts(units: int, count: int) -> tuple[int, int]:
    """Return how many parts samples are summed in, and the samples of each but the last, a multiple of 64."""
    wanted = max(_wanted_parts(units), -(-count // _PART_SAMPLES))
    samples_per_part = -(-count // (64 * wanted)) * 64
    return -(-count // samples_per_part), samples_per_part
