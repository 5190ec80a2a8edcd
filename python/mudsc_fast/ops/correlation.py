"""Correlation between the units of several models, accumulated over batches of features."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
import torch.distributed
from torch import Tensor

from mudsc_fast import _arrays, _checks
from mudsc_fast.ops import _centered_products, _library, _merge_arguments, _tensor_core_products
from mudsc_fast.ops._all_reduce import all_reduce
from mudsc_fast.ops._centered_products import Precision, Workspace
from mudsc_fast.ops._correlation_result import correlations_of
from mudsc_fast.ops._features import (
    Samples,
    check_features,
    check_not_infinite,
    chunks,
    may_overflow,
    reindexed,
    samples_of,
)
from mudsc_fast.ops._moments import Blocks, Moments
from mudsc_fast.unit_map import UnitMap

__all__ = ["Blocks", "CorrelationAccumulator", "Precision", "Workspace"]

_OUT_OF_RANGE = (
    "features must be finite, with sums of squares that float32 can hold, got others in an earlier update or replace"
)


class CorrelationAccumulator:
    """Pearson correlation between units of N models, over a stream of batches.

    Every position of every batch element is one sample of all units. The accumulator keeps the number of samples, the
    mean and the sum of squared deviations of each unit, and the co-moments of the requested pairs of units, in float64.
    It centers each chunk of samples by its own mean, multiplies it in float32 (float64 for float64 features) and joins
    the result by the update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing
    sample variances", 1979). Nothing cancels, however far the means are from zero and however much they drift.

    Memory: 8 bytes for each pair of units ("cross": (N-1) C^2 pairs, "full": N (N+1)/2 C^2). An update also takes one
    [C, C] product and the centered copies of one chunk: at most max(2048, C / 2, 2^23 / (N C)) samples of N C numbers,
    in float32 (float64 for float64 features). Features are copied as a whole only if their strides do not allow the
    axes before the units, or those after them, to be merged into one.

    On a CUDA device whose tensor cores serve the dtype, one kernel reads features of up to 32 bits in their own layout,
    multiplies them on tensor cores as accurately as in float32 (exactly, for half formats) and computes the sums in the
    same pass. Nothing centered is written. An update takes [C, C] numbers in float32, up to 16 times that if there are
    few units. For other features and devices, a Triton kernel centers them in one read. The tensor-core kernel does not
    make the host wait: features that are not finite, or whose sums of squares float32 cannot hold, are reported when
    the sums are used.

    Parameters
    ----------
    num_models
        N: at least 1, for "cross" at least 2.
    units
        C: units of each model.
    blocks
        "cross" for the correlations of model 0 with each other model, which is all that an alignment needs; "full" for
        those between all units of all models.
    dtype
        Of the result: float16, bfloat16, float32 or float64.
    device
        The device of the features and the sums.
    precision
        ``"bfloat16"`` rounds the centered features that float32 products multiply to bfloat16 and adds in float32. This
        is several times faster on processors with instructions for it, and the same as ``"float32"`` on others. Means
        and variances stay exact; correlations have errors of about 1e-3.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described.
    """

    def __init__(
        self,
        num_models: int,
        units: int,
        *,
        blocks: Blocks = "cross",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        _checks.check_choice("blocks", blocks, get_args(Blocks))
        _checks.check_choice("precision", precision, get_args(Precision))
        if precision != "float32" and not _centered_products.can_round_products():
            raise ValueError(
                f"precision {precision!r} requires a version of torch with torch.backends.mkldnn.matmul, "
                f"got {torch.__version__}: upgrade torch, or use 'float32'"
            )
        if dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        self._num_models = _checks.check_int("num_models", num_models, 2 if blocks == "cross" else 1)
        self._units = _checks.check_int("units", units, 1)
        self._blocks: Blocks = blocks
        self._dtype = dtype
        self._precision: Precision = precision
        self._workspace: Workspace | None = None
        self._moments = Moments.zeros(num_models, units, blocks, device)

    def __repr__(self) -> str:
        return (
            f"CorrelationAccumulator(num_models={self._num_models}, units={self._units}, blocks={self._blocks!r}, "
            f"num_samples={self.num_samples})"
        )

    @property
    def num_samples(self) -> int:
        """Number of samples so far."""
        return self._moments.num_samples

    @contextmanager
    def computing_in(self, workspace: Workspace) -> Iterator[None]:
        """Make the updates of the enclosed code share the given memory, instead of allocating their own."""
        self._workspace = workspace
        try:
            yield
        finally:
            self._workspace = None

    @contextmanager
    def _only_rows(self, rows: tuple[int, int] | None) -> Iterator[None]:
        """Make the updates of the enclosed code compute some rows of the result only, for "cross" on the CPU.

        `rows` is the first of these units of model 0 and the one after the last; None for all. The means and variances
        of the other units of model 0 do not change.
        """
        self._moments.rows = slice(None) if rows is None else slice(*rows)
        try:
            yield
        finally:
            self._moments.rows = slice(None)

    @torch.no_grad()
    def update(
        self, *features: _arrays.Array, channel_axis: int = 1, maps: Mapping[int, UnitMap] | None = None
    ) -> None:
        """Add the samples of one batch.

        Parameters
        ----------
        *features
            One tensor (or array of another library) per model, all of one shape with C entries on the channel axis,
            e.g. [B, C], [B, C, H, W] or [B, T, C]; float16, bfloat16, float32 or float64, any strides. NaN counts as 0.
            Batches without samples change nothing. Gradients are not recorded.
        channel_axis
            The axis of the units; negative axes count from the end.
        maps
            How to re-index the samples of the N models along other axes, as for
            :func:`mudsc_fast.ops.permute_merge`. One map needs no extra pass and no extra memory: features are read in
            its order, and summed over its clusters, while they are centered. Features are re-indexed first if there
            are two maps; also, on a CUDA device, if the map has clusters or its axis holds adjacent samples. The
            result is the same.

        Raises
        ------
        TypeError
            If a feature is not a tensor or has another dtype, or `maps` is not a mapping of axes to UnitMaps.
        ValueError
            If the number of tensors is not N, a shape or device is wrong (the tensor is named), an axis is out of
            range, a map does not fit or maps the axis of the units, or a feature is infinite. The sums are then
            unchanged. (On a CUDA device, finalize, or another use of the sums, raises the error for infinite features.)
        """
        if _library.traced(features[0] if features else None):
            tensors = [_checks.check_tensor("features", feature) for feature in features]
            self._traced_update(tensors if maps is None else reindexed(tensors, maps), channel_axis)
            return
        checked = self._check_features(features, channel_axis)
        by_axis = {} if maps is None else _merge_arguments.check_maps(maps, checked)
        axis = channel_axis % checked[0].ndim
        if axis in by_axis:
            raise ValueError(f"maps must be of axes other than the units', got one of axis {axis}")
        on_tensor_cores = _tensor_core_products.serves(checked, self._moments.device)
        if by_axis and not self._reads_in_order_of(by_axis, checked, axis, on_tensor_cores):
            checked, by_axis = reindexed(checked, by_axis), {}
        samples = samples_of(checked, axis, by_axis)
        if on_tensor_cores:
            for outer, inner in chunks(*samples[0].shape, _tensor_core_products.chunk_samples(self._units)):
                _tensor_core_products.add(self._moments, [one.chunk(outer, inner) for one in samples])
            return
        dtype = _product_dtype(checked)
        parts = list(chunks(*samples[0].shape, _centered_products.chunk_samples(self._num_models, self._units)))
        options = (dtype, self._precision, self._workspace or Workspace())
        if len(parts) == 1:  # Its means reveal infinities. With several chunks, all are checked before any is added.
            _centered_products.add(self._moments, samples, *options, lambda: check_not_infinite(checked, by_axis))
            return
        sums = by_axis if any(may_overflow(one, unit_map) for one in checked for unit_map in by_axis.values()) else {}
        check_not_infinite(checked, sums)
        for outer, inner in parts:
            _centered_products.add(self._moments, [one.chunk(outer, inner) for one in samples], *options)

    @property
    def in_range(self) -> Tensor:
        """Whether all features that were not checked before they were added are in range: a bool on the device."""
        known = self._moments.in_range
        return self._moments.mean.new_ones((), dtype=torch.bool) if known is None else known

    def _traced_update(self, features: list[Tensor], channel_axis: int) -> None:
        moments = self._moments
        in_range = torch.ops.mudsc_fast.correlation_update(
            moments.mean,
            moments.squares,
            moments.comoments,
            moments.num_samples,
            features,
            channel_axis,
            self._blocks,
            self._precision,
        )
        moments.in_range = in_range if moments.in_range is None else moments.in_range & in_range
        moments.num_samples += features[0].numel() // self._units

    @torch.no_grad()
    def replace(
        self, old: Sequence[Tensor], new: Sequence[Tensor], *, channel_axis: int = 1, reordered: bool = False
    ) -> None:
        """Replace samples that were added before.

        This is cheaper than starting again if few samples change. Rounding errors add up over many calls: each call
        leaves an error like that of a product of the replaced samples.

        Parameters
        ----------
        old, new
            One tensor per model each, as for :meth:`update`, all of one shape. If samples of `old` were never added,
            the sums become meaningless, and no error can be raised. If the samples of a model do not change, pass the
            same tensor in both: its products with the other models then cost half (except where a CUDA kernel reads
            features in their own layout).
        channel_axis
            The axis of the units; negative axes count from the end.
        reordered
            Whether the new samples of each model are its old ones in another order. Means and variances then stay.

        Raises
        ------
        TypeError, ValueError
            As :meth:`update`; also if `old` and `new` differ in shape, or hold more samples than were added.
        """
        before = self._check_features(tuple(old), channel_axis)
        after = self._check_features(tuple(new), channel_axis)
        if before[0].shape != after[0].shape:
            raise ValueError(f"new must have the shape of old, {list(before[0].shape)}, got {list(after[0].shape)}")
        self._check_replaced(before[0].numel() // self._units)
        check_not_infinite(before)
        check_not_infinite(after)
        moments = self._moments
        stays = [o is n for o, n in zip(before, after, strict=True)]
        changes = None if reordered else (torch.zeros_like(moments.mean), torch.zeros_like(moments.squares))
        self._exchange(samples_of(before, channel_axis, {}), samples_of(after, channel_axis, {}), stays, changes)
        if changes is not None:
            moments.shift(*changes)

    @torch.no_grad()
    def _reorder(
        self, *features: Tensor, axis: int, old: Sequence[Tensor], new: Sequence[Tensor], channel_axis: int = 1
    ) -> None:
        """Replace samples that were added before by other samples of the same tensors, without copying them.

        Means and variances stay: after all calls that belong together, the samples of each model must be those before
        the calls, in another order.

        Parameters
        ----------
        *features
            One tensor per model, as for :meth:`update`.
        axis
            The axis along which samples are chosen; not that of the units.
        old, new
            For each model [K] int64: the places of the old samples on this axis, and of the new ones. If the samples of
            a model do not change, pass the same tensor in both: its products with the other models then cost half.
        channel_axis
            The axis of the units; negative axes count from the end.

        Raises
        ------
        TypeError, ValueError
            As :meth:`replace`.
        """
        checked = self._check_features(features, channel_axis)
        axis, units_axis = axis % checked[0].ndim, channel_axis % checked[0].ndim
        length = checked[0].shape[axis]
        self._check_replaced(checked[0].numel() // (self._units * max(length, 1)) * len(old[0]))
        sides = [
            samples_of(checked, units_axis, {axis: UnitMap.permutation(torch.stack(list(places)), units_in=length)})
            for places in (old, new)
        ]
        self._exchange(sides[0], sides[1], [o is n for o, n in zip(old, new, strict=True)], None)

    def _check_replaced(self, count: int) -> None:
        if count > self.num_samples:
            raise ValueError(f"old must hold at most the {self.num_samples} samples so far, got {count}")
        self._check_range()

    def _exchange(
        self, old: list[Samples], new: list[Samples], stays: list[bool], changes: tuple[Tensor, Tensor] | None
    ) -> None:
        """Replace samples in the co-moments about the present mean."""
        moments, views = self._moments, [one.view for one in (*old, *new)]
        if _tensor_core_products.serves(views, moments.device):
            for part in chunks(*old[0].shape, _tensor_core_products.chunk_samples(self._units)):
                chunk = [(o.chunk(*part).gathered(), n.chunk(*part).gathered()) for o, n in zip(old, new, strict=True)]
                _tensor_core_products.exchange(moments, chunk, stays, changes)
            return
        options = (_product_dtype(views), self._precision, self._workspace or Workspace(), changes)
        for part in chunks(*old[0].shape, _centered_products.chunk_samples(self._num_models, self._units)):
            before, after = ([one.chunk(*part) for one in side] for side in (old, new))
            _centered_products.exchange(moments, before, after, stays, *options)

    @torch.no_grad()
    def merge(self, other: CorrelationAccumulator) -> None:
        """Add the samples of another accumulator, as if they had been given to this one.

        Raises
        ------
        TypeError
            If `other` is not a CorrelationAccumulator.
        ValueError
            If its num_models, units or blocks differ.
        """
        if not isinstance(other, CorrelationAccumulator):
            raise TypeError(f"other must be a CorrelationAccumulator, got {type(other).__name__}")
        if self._configuration() != other._configuration():
            raise ValueError(f"other must have the configuration {self._configuration()}, got {other._configuration()}")
        if other is self:
            other = copy.deepcopy(other)  # sums must not be written while they are read
        self._check_range()
        other._check_range()
        added, device = other._moments, self._moments.device
        self._moments.join(
            added.num_samples, added.mean.to(device), added.squares.to(device), iter(added.comoments.to(device))
        )

    @torch.no_grad()
    def finalize(self, eps: float = 1e-7, *, other: Tensor | None = None, balance: float = 1.0) -> Tensor:
        """Return the correlations ``cov / max(sigma_i * sigma_j, eps)``, with population covariances.

        With another similarity, return ``balance * correlation + (1 - balance) * other``, for example to combine
        activations and weights. On a CUDA device this is a single pass.

        Units that do not vary, and streams of one sample, give 0. The accumulator can still be updated afterwards.

        Parameters
        ----------
        eps
            Smallest product of two standard deviations to divide by; positive.
        other
            None, or a similarity to blend with in the same pass, of the shape, dtype and device of the result. For
            "full" it must be symmetric.
        balance
            Share of the correlations, in [0, 1]; 1 without `other`.

        Returns
        -------
        Tensor
            "cross": [N-1, C, C], entry [i-1, a, b] for unit a of model 0 and unit b of model i.
            "full": [N*C, N*C], with unit a of model i at i*C + a; symmetric to the last bit.

        Raises
        ------
        TypeError, ValueError
            If `eps` is not a positive finite number, `other` or `balance` is not as described, there are no samples,
            or features on a CUDA device were infinite.
        """
        eps = _checks.check_number("eps", eps)
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {eps}")
        if self.num_samples == 0:
            raise ValueError("there are no samples: call update before finalize")
        self._check_range()
        return correlations_of(self._moments, self._blocks, self._dtype, eps, other, balance)

    @torch.no_grad()
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Add the samples of all processes of a torch.distributed group, in each of them.

        Afterwards all processes have the same sums, as if each had been given all samples. The co-moments are summed in
        place: apart from the numbers of samples, a process sends as many bytes as its accumulator takes.

        Parameters
        ----------
        group
            The processes, all of which must call this method; all processes by default.

        Raises
        ------
        RuntimeError
            If torch.distributed is not initialized.
        ValueError
            If num_models, units or blocks differ between processes, or features on a CUDA device were infinite. The
            sums are then unchanged, in all processes.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError("all_reduce needs a process group: call torch.distributed.init_process_group first")
        all_reduce(self._moments, self._configuration(), _OUT_OF_RANGE, group)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the configuration and the sums, for :meth:`load_state_dict`.

        Raises
        ------
        ValueError
            If features on a CUDA device were infinite.
        """
        self._check_range()
        return {
            **self._configuration(),
            "num_samples": self.num_samples,
            **{name: tensor.clone() for name, tensor in self._sums().items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sums with those of :meth:`state_dict`.

        Raises
        ------
        TypeError
            If `state` is not a mapping, or an entry has the wrong type.
        ValueError
            If an entry is missing, num_models, units or blocks differ, or a tensor has another shape or dtype. The sums
            are then unchanged.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        sums = self._sums()
        for name in (*self._configuration(), "num_samples", *sums):
            if name not in state:
                raise ValueError(f"state must have the entry {name!r}, got {sorted(state)}")
        for name, value in self._configuration().items():
            if state[name] != value:
                raise ValueError(f"state must have {name} {value!r}, got {state[name]!r}")
        num_samples = _checks.check_int("state['num_samples']", state["num_samples"], 0)
        for name, own in sums.items():
            tensor = _checks.check_tensor(f"state[{name!r}]", state[name])
            if tensor.shape != own.shape or tensor.dtype != own.dtype:
                raise ValueError(
                    f"state[{name!r}] must be {list(own.shape)} in {own.dtype}, "
                    f"got {list(tensor.shape)} in {tensor.dtype}"
                )
        for name, own in sums.items():
            own.copy_(state[name])
        self._moments.num_samples, self._moments.in_range = num_samples, None

    def _configuration(self) -> dict[str, Any]:
        return {"num_models": self._num_models, "units": self._units, "blocks": self._blocks}

    def _sums(self) -> dict[str, Tensor]:
        moments = self._moments
        return {"mean": moments.mean, "squares": moments.squares, "comoments": moments.comoments}

    def _check_features(self, features: Sequence[_arrays.Array], channel_axis: int) -> list[Tensor]:
        return check_features(features, self._num_models, self._units, self._moments.device, channel_axis)

    def _reads_in_order_of(
        self, maps: Mapping[int, UnitMap], features: list[Tensor], units_axis: int, on_tensor_cores: bool
    ) -> bool:
        """Return whether features need no copy in the order of `maps`. Kernels index one axis, with 32 bits."""
        if len(maps) > 1 or not 0 < features[0].numel() // self._units < 2**31:
            return False
        return not on_tensor_cores or _tensor_core_products.reads_in_order_of(maps, features, units_axis)

    def _check_range(self) -> None:
        if not self._moments.is_in_range():
            raise ValueError(_OUT_OF_RANGE)


def _product_dtype(features: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(feature.dtype == torch.float64 for feature in features) else torch.float32
