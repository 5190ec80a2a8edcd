"""Streaming correlation in CUDA (csrc/cuda/correlation.cu, correlation_product.cu, correlation_wgmma.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mudsc_fast.kernels.cuda import _device, _tensor_cores

#: Element types that are multiplied on tensor cores.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Maximum number of samples in one float32 sum. The sums of several parts are added in float64.
_PART_SAMPLES = 8192
#: Number of blocks that fill a large device twice. If a product has fewer tiles, its samples are divided among more
#: blocks.
_BLOCKS = 264
_MAX_PARTS = 16


class Product(NamedTuple):
    """Sums over samples of the products of all units of two models, about the units' shifts: [parts, C, C] float32."""

    parts: Tensor
    symmetric: bool


class Samples:
    """Samples of several models, with their products and sums.

    Parameters
    ----------
    features
        One [outer, C, inner] tensor per model, all of one shape, dtype of `DTYPES` and device, with any strides. NaN
        counts as 0.
    outer_index
        For each model None, or [outer] int32: which places of the outer axis to take, the same number for all models.
    instructions
        The instructions that multiply, a name of `_tensor_cores`; None for what is used on the device by default.
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
        self._parts, self._samples_per_part = _parts(self._units, self.count)
        self._shifts = torch.empty(len(features), self._units, dtype=torch.float32, device=self._device)
        #: [models, parts, 2, C]: each unit's sum about its shift, and that of squares; of models in `_summed`.
        self._sums = torch.empty(len(features), self._parts, 2, self._units, dtype=torch.float64, device=self._device)
        self._summed: set[int] = set()
        with _device.launching_on(self._device) as launch:
            _device.extension().correlation_shift(
                features=list(zip(features, self._index, strict=True)),
                outer=self._outer,
                inner=self._inner,
                shifts=self._shifts,
                device=launch.device,
                stream=launch.stream,
            )

    def add_to(
        self,
        mean: Tensor,
        squares: Tensor,
        comoments: Tensor,
        pairs: Sequence[tuple[int, int]],
        num_samples: int,
        in_range: Tensor | None,
    ) -> Tensor:
        """Add these samples to moments of `num_samples` others, in place, and return whether all were in range.

        In "cross" and "full" every model is part of a pair, so that its sums are taken beside a product.

        Parameters
        ----------
        mean, squares
            [N, C] float64: each unit's mean and sum of squared deviations.
        comoments
            [P, C, C] float64: the co-moments of the `pairs` of models.
        in_range
            Whether the features so far were in range: a bool on the device, or None for yes.
        """
        weight = num_samples * (self.count / (num_samples + self.count))
        in_range, _ = self._accumulate(mean, squares, comoments, pairs, num_samples, in_range, weight, 1.0)
        return in_range

    def exchange_in(
        self,
        mean: Tensor,
        squares: Tensor,
        comoments: Tensor,
        pairs: Sequence[tuple[int, int]],
        stays: Sequence[bool],
        sign: int,
        in_range: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Add (`sign` 1) or subtract (-1) these samples in co-moments about a mean that does not move.

        Pairs of models that both stay are skipped.

        Returns
        -------
        in_range
            As of :meth:`add_to`.
        batch
            [N, 3, C] float64: each unit's sum about its shift; the mean of these samples minus `mean`; the sum of
            squares about the mean of these samples. Not of models that stay.
        """
        changed = [number for number, (i, j) in enumerate(pairs) if not (stays[i] and stays[j])]
        return self._accumulate(
            mean,
            squares,
            [comoments[number] for number in changed],
            [pairs[number] for number in changed],
            None,
            in_range,
            self.count,
            float(sign),
        )

    def _accumulate(
        self,
        mean: Tensor,
        squares: Tensor,
        comoments: Sequence[Tensor] | Tensor,
        pairs: Sequence[tuple[int, int]],
        num_samples: int | None,
        in_range: Tensor | None,
        shift_weight: float,
        weight: float,
    ) -> tuple[Tensor, Tensor]:
        """Add products to co-moments, pair by pair; update `mean` and `squares` if `num_samples` is given."""
        in_range = torch.ones((), dtype=torch.bool, device=self._device) if in_range is None else in_range
        batch = torch.empty(len(mean), 3, self._units, dtype=torch.float64, device=self._device)
        # Pairs of two models first: the moments of both then take one launch.
        for (i, j), own in sorted(zip(pairs, comoments, strict=True), key=lambda one: one[0][0] == one[0][1]):
            known = set(self._summed)
            product = self.product(i, j)
            for models in _runs(self._summed - known):
                self._moments(mean[models], squares[models], batch[models], models, num_samples, in_range)
            _join(
                own,
                product.parts,
                symmetric=product.symmetric,
                sums=(batch[i, 0], batch[j, 0]),
                count=self.count,
                shifts=(batch[i, 1], batch[j, 1]),
                shift_weight=shift_weight,
                weight=weight,
            )
        return in_range, batch

    def product(self, i: int, j: int) -> Product:
        """Return the products of models i and j.

        The sums of a model are taken beside its first product.
        """
        units, symmetric = self._units, i == j
        products = torch.empty(self._parts, units, units, dtype=torch.float32, device=self._device)
        takes_rows = i not in self._summed
        takes_columns = not symmetric and j not in self._summed
        with _device.launching_on(self._device) as launch:
            _device.extension().correlation_product(
                rows=(self._features[i], self._index[i]),
                row_shift=self._shifts[i],
                columns=(self._features[j], self._index[j]),
                column_shift=self._shifts[j],
                outer=self._outer,
                inner=self._inner,
                symmetric=symmetric,
                samples_per_part=self._samples_per_part,
                products=products,
                row_sums=self._sums[i] if takes_rows else None,
                column_sums=self._sums[j] if takes_columns else None,
                warpgroups=self._instructions == _tensor_cores.WGMMA,
                device=launch.device,
                stream=launch.stream,
            )
        self._summed |= {i, j}
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

    def _sums_of(self, model: int) -> Tensor:
        assert model in self._summed, "sums are taken beside products"
        return self._sums[model].sum(0)

    def _moments(
        self, mean: Tensor, squares: Tensor, batch: Tensor, models: slice, num_samples: int | None, in_range: Tensor
    ) -> None:
        """Write to `batch` what joins the samples of some models; `mean` and the next two are those of these models."""
        with _device.launching_on(self._device) as launch:
            _device.extension().correlation_moments(
                sums=self._sums[models],
                shifts=self._shifts[models],
                count=self.count,
                num_samples=num_samples or 0,
                mean=mean,
                squares=squares,
                updates=num_samples is not None,
                batch=batch,
                in_range=in_range,
                device=launch.device,
                stream=launch.stream,
            )


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether features of a dtype are multiplied by the kernels here; other features are centered first."""
    return dtype in DTYPES and _tensor_cores.serves(device, dtype)


def tensor_cores(device: torch.device) -> _tensor_cores.Choice:
    """Return which tensor-core instructions multiply on `device`, and why."""
    return _tensor_cores.choose(device, _products)


def _products(features: list[Tensor], axis: int, instructions: str) -> list[Tensor]:
    """Return the product of two models and their sums of squares, for a comparison of instructions."""
    samples = Samples([one[:, :, None] if axis == 1 else one[None] for one in features], instructions=instructions)
    product = samples.product(0, 1)
    return [product.parts.sum(0), samples.squares(0), samples.squares(1)]


def chunk_samples(units: int) -> int:
    """Return an efficient number of samples for one product of `units` units."""
    return _PART_SAMPLES * _wanted_parts(units)


def accumulate(comoment: Tensor, product: Tensor, row_shift: Tensor, column_shift: Tensor) -> None:
    """Add `product` + outer(row_shift, column_shift) to `comoment` [C, C] float64; all contiguous."""
    _join(comoment, product[None], shifts=(row_shift, column_shift))


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
    """Compute the same as the function in `kernels.reference`; bitwise equal if nothing is blended."""
    with _device.launching_on(out.device) as launch:
        _device.extension().correlation_blend(
            comoment=comoment,
            row_deviation=row_deviation,
            column_deviation=column_deviation,
            count=count,
            eps=eps,
            out=out,
            mirror=mirror,
            other=other,
            balance=balance,
            device=launch.device,
            stream=launch.stream,
        )


def _join(
    comoment: Tensor,
    products: Tensor,
    *,
    shifts: tuple[Tensor, Tensor],
    shift_weight: float = 1.0,
    sums: tuple[Tensor, Tensor] | None = None,
    count: int = 1,
    symmetric: bool = False,
    weight: float = 1.0,
) -> None:
    """Add the parts of a product, corrected by sums and shifts of rows and columns, to `comoment` [C, C] float64."""
    with _device.launching_on(comoment.device) as launch:
        _device.extension().correlation_join(
            products=products,
            symmetric=symmetric,
            row_sums=None if sums is None else sums[0],
            column_sums=None if sums is None else sums[1],
            count=count,
            row_shifts=shifts[0],
            column_shifts=shifts[1],
            shift_weight=shift_weight,
            weight=weight,
            comoment=comoment,
            device=launch.device,
            stream=launch.stream,
        )


def _runs(numbers: set[int]) -> list[slice]:
    """Return sets of adjacent numbers as slices."""
    runs: list[slice] = []
    for number in sorted(numbers):
        if runs and runs[-1].stop == number:
            runs[-1] = slice(runs[-1].start, number + 1)
        else:
            runs.append(slice(number, number + 1))
    return runs


def _is_one_run(feature: Tensor) -> bool:
    """Return whether consecutive samples are equally spaced."""
    _, _, inner = feature.shape
    return inner == 1 or feature.stride(0) == inner * feature.stride(2)


def _wanted_parts(units: int) -> int:
    tile: int = _device.extension().correlation_tile()
    return max(1, min(_MAX_PARTS, _BLOCKS // (-(-units // tile)) ** 2))


def _parts(units: int, count: int) -> tuple[int, int]:
    """Return in how many parts samples are summed, and the samples of each part but the last, a multiple of 64."""
    wanted = max(_wanted_parts(units), -(-count // _PART_SAMPLES))
    samples_per_part = -(-count // (64 * wanted)) * 64
    return -(-count // samples_per_part), samples_per_part
