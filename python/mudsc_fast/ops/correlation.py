"""Correlation between the units of several models, accumulated over batches of features."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.distributed
from torch import Tensor

from mudsc_fast import _checks
from mudsc_fast.kernels._samples import Centered, SampleOrder
from mudsc_fast.kernels.cpu import correlation as cpu
from mudsc_fast.kernels.cuda import correlation as cuda
from mudsc_fast.kernels.reference import correlation as reference
from mudsc_fast.ops import _arrays, _dispatch, _library
from mudsc_fast.ops.permute import UnitMap, check_maps, permute_merge

#: Which pairs of models are compared: model 0 with each other model, or all with all.
Blocks = Literal["cross", "full"]

#: What operands of the matrix products are rounded to.
Precision = Literal["float32", "bfloat16"]

#: Samples that are centred and multiplied at a time: at least so many that the product dominates, half as many as
#: there are units (adding a product to the sums moves 20 bytes for each pair of units), and beyond that no more than
#: fill this many numbers of all models.
_LEAST_CHUNK = 2048
_CHUNK_NUMBERS = 2**23

_TRITON = find_spec("triton") is not None

_OUT_OF_RANGE = "features must be finite, and the sums of their squares float32, got others in an earlier update"

#: Rows of a symmetric product that are computed at a time: fewer leave less of the other triangle to be computed with
#: them, more let torch's product reuse what it packs. Of 1024 units 192 rows take 1.21 times half a product, 256 1.31.
_TRIANGLE_BLOCK = 192


class Workspace:
    """Memory for what an update computes on its way, which later updates use again.

    Fresh memory costs an update of some megabytes more than the centring that fills it. Tensors are valid until one of
    the same name is asked for.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def empty(self, name: str, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialised numbers, [numbers]."""
        size = numbers * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size or memory.device != device:
            self._memory.pop(name, None)  # before there is another
            memory = self._memory[name] = torch.empty(size, dtype=torch.uint8, device=device)
        return memory[:size].view(dtype)


class CorrelationAccumulator:
    """Pearson correlation between units of N models, over a stream of batches.

    Every position of every batch element is one sample of all units. Kept are the number of samples, each
    unit's mean and sum of squared deviations, and the co-moments of the unit pairs asked for, in float64.
    Each chunk of samples is centred by its own mean, multiplied by torch's matrix product in float32 (float64
    for float64 features) and joined by the update of Chan, Golub and LeVeque ("Updating formulae and a
    pairwise algorithm for computing sample variances", 1979), so that nothing cancels, however far the means
    are from zero and however they drift.

    Memory: 8 bytes for each pair of units ("cross": (N-1) C^2 pairs, "full": N (N+1)/2 C^2). An update takes
    besides one [C, C] product and the centred copies of one chunk, at most max(2048, C / 2, 2^23 / (N C)) samples
    of N C numbers, in float32 (float64 for float64 features). Features whose strides do not let the axes before
    the units, or those behind, be seen as one are copied as a whole.

    On a CUDA device features of up to 32 bits are read in their own layout by one kernel that multiplies on tensor
    cores, as accurately as in float32 (half formats are exact there), and sums beside the product; nothing centred is
    written, and an update takes [C, C] in float32, for few units up to 16 of them. Where that kernel was not built, and
    for other features, one in Triton centres them in one read. The host does not wait for the former: whether
    features are finite, and their squares' sums float32, is seen only when the sums are used.

    Parameters
    ----------
    num_models
        N: at least 1, for "cross" at least 2.
    units
        C: units of each model.
    blocks
        "cross" for the correlations of model 0 with each other model, all that an alignment needs; "full" for
        those between all units of all models.
    dtype
        Of the result: float16, bfloat16, float32 or float64.
    device
        Where features come from and sums are kept.
    precision
        ``"bfloat16"`` rounds what float32 products multiply (centred features) to bfloat16 and adds in float32, several
        times faster on processors with instructions for it and the same as ``"float32"`` on others. Means and variances
        stay exact. The correlations then err by some 1e-3.

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
        if blocks not in ("cross", "full"):
            raise ValueError(f"blocks must be 'cross' or 'full', got {blocks!r}")
        _checks.check_choice("precision", precision, get_args(Precision))
        if precision != "float32" and _product_settings() is None:
            raise ValueError(
                f"precision {precision!r} needs a newer torch, whose products can be set, got {torch.__version__}"
            )
        if dtype not in _checks.FLOAT_DTYPES:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        self._num_models = _checks.check_int("num_models", num_models, 2 if blocks == "cross" else 1)
        self._units = _checks.check_int("units", units, 1)
        self._blocks = blocks
        self._dtype = dtype
        self._precision: Precision = precision
        self._num_samples = 0
        #: Of features that were not checked before they were added: whether they were fit to be.
        self._in_range: Tensor | None = None
        self._workspace: Workspace | None = None
        self._mean = torch.zeros(num_models, units, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._mean)
        shape = (len(self._pairs()), units, units)
        self._comoments = torch.zeros(shape, dtype=torch.float64, device=device)

    @property
    def num_samples(self) -> int:
        """Number of samples so far."""
        return self._num_samples

    @contextmanager
    def computing_in(self, workspace: Workspace) -> Iterator[None]:
        """Let the updates of the enclosed code compute in the given memory, rather than each in its own."""
        self._workspace = workspace
        try:
            yield
        finally:
            self._workspace = None

    @torch.no_grad()
    def update(
        self, *features: _arrays.Array, channel_axis: int = 1, maps: Mapping[int, UnitMap] | None = None
    ) -> None:
        """Add the samples of one batch.

        Parameters
        ----------
        *features
            One tensor (or array of another library) per model, all of one shape with C entries on the channel
            axis, e.g. [B, C], [B, C, H, W] or [B, T, C]; float16, bfloat16, float32 or float64, any strides. NaN
            counts as 0.
            Batches without samples change nothing. Gradients are not recorded.
        channel_axis
            The axis of the units; negative ones count from the end.
        maps
            How the samples of the N models are re-indexed along other axes, as for
            :func:`mudsc_fast.ops.permute_merge`. One map takes no pass and no memory of its own: the features are
            read in its order, and summed over its clusters, while they are centred. Two maps re-index first, and on a
            CUDA device clusters, and maps of an axis whose samples are adjacent, where features are multiplied as they
            lie. Either way the result is the same.

        Raises
        ------
        TypeError
            If a feature is no tensor or of another dtype, or `maps` is no mapping of axes to UnitMaps.
        ValueError
            If the number of tensors is not N, a shape or device is wrong (the tensor is named), an axis is out of
            range, a map does not fit or is of the units' axis, or a feature is infinite. The sums are unchanged then.
            (On a CUDA device it is finalize, or another use of the sums, that raises for infinite features.)
        """
        if _library.traced(features[0] if features else None):
            tensors = [_checks.check_tensor("features", feature) for feature in features]
            self._traced_update(tensors if maps is None else _reindexed(tensors, maps), channel_axis)
            return
        checked = self._check_features(features, channel_axis)
        by_axis = {} if maps is None else check_maps(maps, checked)
        axis = channel_axis % checked[0].ndim
        if axis in by_axis:
            raise ValueError(f"maps must be of axes other than the units', got one of axis {axis}")
        if not self._reads_in_order_of(by_axis, checked, axis):
            checked, by_axis = _reindexed(checked, by_axis), {}
        views = [_flat(feature, channel_axis) for feature in checked]
        samples = [_Samples.of(view, checked[0].shape, axis, by_axis, model) for model, view in enumerate(views)]
        if self._takes_as_they_are(views):
            for outer, inner in _chunks(*samples[0].shape, cuda.chunk_samples(self._units)):
                self._add_samples([one.chunk(outer, inner) for one in samples])
            return
        dtype = torch.float64 if any(view.dtype == torch.float64 for view in views) else torch.float32
        chunks = list(_chunks(*samples[0].shape, self._chunk_samples()))
        if len(chunks) == 1:  # Its means show infinities; of several chunks none may be added before all are known.
            self._add_chunk(samples, dtype, lambda: _check_not_infinite(checked, by_axis))
            return
        sums = by_axis if any(_may_overflow(one, unit_map) for one in checked for unit_map in by_axis.values()) else {}
        _check_not_infinite(checked, sums)
        for outer, inner in chunks:
            self._add_chunk([one.chunk(outer, inner) for one in samples], dtype)

    @classmethod
    def of_sums(
        cls,
        mean: Tensor,
        squares: Tensor,
        comoments: Tensor,
        num_samples: int,
        blocks: Blocks,
        precision: Precision,
    ) -> CorrelationAccumulator:
        """Return an accumulator that keeps its sums in the given tensors, which its updates then change."""
        sums = cls.__new__(cls)
        sums._num_models, sums._units = mean.shape
        sums._blocks, sums._dtype, sums._num_samples = blocks, torch.float32, num_samples
        sums._precision, sums._in_range, sums._workspace = precision, None, None
        sums._mean, sums._squares, sums._comoments = mean, squares, comoments
        return sums

    @property
    def in_range(self) -> Tensor:
        """Whether all features that were not checked before they were added were fit to be: a bool on the device."""
        return self._mean.new_ones((), dtype=torch.bool) if self._in_range is None else self._in_range

    def _traced_update(self, features: list[Tensor], channel_axis: int) -> None:
        in_range = torch.ops.mudsc_fast.correlation_update(
            self._mean,
            self._squares,
            self._comoments,
            self._num_samples,
            features,
            channel_axis,
            self._blocks,
            self._precision,
        )
        self._note_range([in_range])
        self._num_samples += features[0].numel() // self._units

    @torch.no_grad()
    def replace(
        self, old: Sequence[Tensor], new: Sequence[Tensor], *, channel_axis: int = 1, reordered: bool = False
    ) -> None:
        """Put other samples in the place of some that were added before.

        Cheaper than starting anew where few samples change. Rounding adds up over many calls: each leaves an error
        like that of a product of the replaced samples.

        Parameters
        ----------
        old, new
            One tensor per model each, as for :meth:`update`, all of one shape. Samples of `old` that were never added
            make the sums meaningless; nothing can notice. Where a model's samples stay, pass the same tensor in both:
            its products with the other models then cost half (but where a kernel reads features as they lie, on a CUDA
            device).
        channel_axis
            The axis of the units; negative ones count from the end.
        reordered
            Whether each model's new samples are its old ones in another order: means and variances then stay.

        Raises
        ------
        TypeError, ValueError
            As :meth:`update`; also where `old` and `new` differ in shape, or hold more samples than were added.
        """
        before = self._check_features(tuple(old), channel_axis)
        after = self._check_features(tuple(new), channel_axis)
        if before[0].shape != after[0].shape:
            raise ValueError(f"new must have the shape of old, {list(before[0].shape)}, got {list(after[0].shape)}")
        count = before[0].numel() // self._units
        if count > self._num_samples:
            raise ValueError(f"old must hold at most the {self._num_samples} samples so far, got {count}")
        _check_not_infinite(before)
        _check_not_infinite(after)
        self._check_range()
        double = any(feature.dtype == torch.float64 for feature in (*before, *after))
        dtype = torch.float64 if double else torch.float32
        views = [(_flat(o, channel_axis), _flat(n, channel_axis)) for o, n in zip(before, after, strict=True)]
        stays = [o is n for o, n in zip(before, after, strict=True)]
        shift, squares = torch.zeros_like(self._mean), torch.zeros_like(self._squares)
        shape = views[0][0].shape
        as_they_are = self._takes_as_they_are([view for pair in views for view in pair])
        limit = cuda.chunk_samples(self._units) if as_they_are else self._chunk_samples()
        for outer, inner in _chunks(shape[0], shape[2], limit):
            chunk = [(o[outer, :, inner], n[outer, :, inner]) for o, n in views]
            changes = None if reordered else (shift, squares)
            if as_they_are:
                self._exchange_samples(chunk, stays, changes)
            else:
                self._exchange(chunk, stays, dtype, changes)
        if not reordered:
            self._shift(shift, squares)

    @torch.no_grad()
    def merge(self, other: CorrelationAccumulator) -> None:
        """Add the samples of another accumulator, as if they had been given to this one.

        Raises
        ------
        TypeError
            If `other` is no CorrelationAccumulator.
        ValueError
            If its num_models, units or blocks differ.
        """
        if not isinstance(other, CorrelationAccumulator):
            raise TypeError(f"other must be a CorrelationAccumulator, got {type(other).__name__}")
        if self._configuration() != other._configuration():
            raise ValueError(f"other must have the configuration {self._configuration()}, got {other._configuration()}")
        if other is self:
            other = copy.deepcopy(other)  # sums are not written while they are read
        self._check_range()
        other._check_range()
        device = self._mean.device
        squares, comoments = other._squares.to(device), other._comoments.to(device)
        self._join(other._num_samples, other._mean.to(device), squares, iter(comoments))

    @torch.no_grad()
    def finalize(self, eps: float = 1e-7, *, other: Tensor | None = None, balance: float = 1.0) -> Tensor:
        """Return the correlations ``cov / max(sigma_i * sigma_j, eps)``, with population covariances.

        With another similarity, return ``balance * correlation + (1 - balance) * other``: weights and activations in
        one space. On a CUDA device it is one pass.

        Units that do not vary, and streams of one sample, give 0. The accumulator can be updated further.

        Parameters
        ----------
        eps
            Least product of two standard deviations that is divided by; positive.
        other
            None, or a similarity of the result's shape, dtype and device to blend with in the same pass; for "full" it
            must be symmetric.
        balance
            The correlations' share, in [0, 1]; 1 without `other`.

        Returns
        -------
        Tensor
            "cross": [N-1, C, C], entry [i-1, a, b] for unit a of model 0 and unit b of model i.
            "full": [N*C, N*C], unit a of model i at i*C + a; symmetric to the last bit.

        Raises
        ------
        TypeError, ValueError
            If `eps` is no positive finite number, `other` or `balance` is not as described, there are no samples,
            or features on a CUDA device were infinite.
        """
        eps = _checks.check_number("eps", eps)
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {eps}")
        if self._num_samples == 0:
            raise ValueError("there are no samples: call update before finalize")
        self._check_range()
        result = self._empty_result()
        other = _check_blend(other, balance, result)
        correlate = _dispatch.choose(
            "correlation.finalize",
            self._mean.device,
            {
                "cpu": cpu.correlate,
                "cuda": cuda.correlate,
                "triton": _correlate_by_triton,
                "reference": reference.correlate,
            },
        )
        deviation = (self._squares / self._num_samples).sqrt()
        for (i, j), comoment in zip(self._pairs(), self._comoments, strict=True):
            out, mirror = self._blocks_of(result, i, j)
            beside = None if other is None else self._blocks_of(other, i, j)[0]
            correlate(comoment, deviation[i], deviation[j], self._num_samples, eps, out, mirror, beside, balance)
        return result

    @torch.no_grad()
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Add the samples of all processes of a torch.distributed group, in each of them.

        Afterwards every process has the same sums, as if it had been given all samples. The co-moments are summed in
        place: besides the numbers of samples, as many bytes are sent as this accumulator takes.

        Parameters
        ----------
        group
            The processes, all of which call this; by default all there are.

        Raises
        ------
        RuntimeError
            If torch.distributed is not initialised.
        ValueError
            If num_models, units or blocks differ between processes, or features on a CUDA device were infinite. The
            sums are unchanged then, in all of them.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError("all_reduce needs a process group: call torch.distributed.init_process_group first")
        own_state = (self._configuration(), self._num_samples, self._is_in_range())
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, own_state, group=group)
        for rank, (configuration, _, in_range) in enumerate(gathered):
            if not in_range:
                raise ValueError(f"{_OUT_OF_RANGE} in rank {rank}")
            if configuration != gathered[0][0]:
                raise ValueError(
                    f"all processes must have the configuration of rank 0, {gathered[0][0]}, "
                    f"got {configuration} in rank {rank}"
                )
        total = sum(num_samples for _, num_samples, _ in gathered)
        if total == 0:
            return
        # Sums about the common mean can be added.
        mean = self._mean * (self._num_samples / total)
        torch.distributed.all_reduce(mean, group=group)
        shift = self._mean - mean
        for (i, j), own in zip(self._pairs(), self._comoments, strict=True):
            own.addr_(self._num_samples * shift[i], shift[j])
        self._squares += self._num_samples * shift * shift
        torch.distributed.all_reduce(self._squares, group=group)
        torch.distributed.all_reduce(self._comoments, group=group)
        self._mean.copy_(mean)
        self._num_samples = total

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
            "num_samples": self._num_samples,
            "mean": self._mean.clone(),
            "squares": self._squares.clone(),
            "comoments": self._comoments.clone(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sums by those of :meth:`state_dict`.

        Raises
        ------
        TypeError
            If `state` is no mapping, or an entry is of another type.
        ValueError
            If an entry is missing, num_models, units or blocks differ, or a tensor has another shape or
            dtype. The sums are unchanged then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        sums = {"mean": self._mean, "squares": self._squares, "comoments": self._comoments}
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
        self._num_samples, self._in_range = num_samples, None

    def _chunk_samples(self) -> int:
        return max(_LEAST_CHUNK, self._units // 2, _CHUNK_NUMBERS // (self._num_models * self._units))

    def _configuration(self) -> dict[str, Any]:
        return {"num_models": self._num_models, "units": self._units, "blocks": self._blocks}

    def _pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of models whose co-moments are kept, in the order of `_comoments`."""
        if self._blocks == "cross":
            return [(0, j) for j in range(1, self._num_models)]
        return [(i, j) for i in range(self._num_models) for j in range(i, self._num_models)]

    def _check_features(self, features: tuple[_arrays.Array, ...], channel_axis: int) -> list[Tensor]:
        if len(features) != self._num_models:
            raise ValueError(f"features must be one tensor for each of {self._num_models} models, got {len(features)}")
        checked = [_arrays.as_tensor(f"features[{i}]", feature) for i, feature in enumerate(features)]
        shape = checked[0].shape
        if isinstance(channel_axis, bool) or not isinstance(channel_axis, int):
            raise TypeError(f"channel_axis must be an int, got {type(channel_axis).__name__}")
        if not -len(shape) <= channel_axis < len(shape):
            raise ValueError(f"channel_axis is {channel_axis}, but features[0] has {len(shape)} axes")
        for i, feature in enumerate(checked):
            _checks.check_float(f"features[{i}]", feature)
            if feature.shape != shape:
                raise ValueError(
                    f"features[{i}] must have the shape of features[0], {list(shape)}, got {list(feature.shape)}"
                )
            if feature.device != self._mean.device:
                raise ValueError(f"features[{i}] must be on {self._mean.device}, got {feature.device}")
        if shape[channel_axis] != self._units:
            raise ValueError(f"features must have {self._units} units on axis {channel_axis}, got shape {list(shape)}")
        return checked

    def _is_in_range(self) -> bool:
        return self._in_range is None or bool(self._in_range)

    def _check_range(self) -> None:
        if not self._is_in_range():
            raise ValueError(_OUT_OF_RANGE)

    def _reads_in_order_of(self, maps: Mapping[int, UnitMap], features: list[Tensor], units_axis: int) -> bool:
        """Return whether features need no copy in the order of `maps`: kernels index one axis with 32 bits."""
        if not maps:
            return True
        if len(maps) > 1 or not 0 < features[0].numel() // self._units < 2**31:
            return False
        if not self._takes_as_they_are(features):
            return True
        # Where samples are adjacent, the product would read a whole sector for each number, for each of its tiles anew.
        axis, unit_map = next(iter(maps.items()))
        return unit_map.is_permutation and axis < units_axis and all(one.stride(axis) != 1 for one in features)

    def _takes_as_they_are(self, features: list[Tensor]) -> bool:
        """Return whether the kernel that reads features in their own layout serves these."""
        backend = _dispatch.backend_for("correlation", self._mean.device.type, self._mean.device.index)
        return backend == "cuda" and features[0].dtype in cuda.DTYPES and len({one.dtype for one in features}) == 1

    def _add_samples(self, chunk: list[_Samples]) -> None:
        """Add some samples whose sums are taken beside their products; the host does not wait for them."""
        samples = cuda.Samples(
            [one.view for one in chunk], [None if one.outer is None else one.outer.members for one in chunk]
        )
        total = self._num_samples + samples.count
        weight = self._num_samples * (samples.count / total)
        for (i, j), own in zip(self._pairs(), self._comoments, strict=True):
            product = samples.product(i, j)
            row_shift, column_shift = samples.mean(i) - self._mean[i], samples.mean(j) - self._mean[j]
            cuda.join(own, product, samples, i, j, weight * row_shift, column_shift)
        self._note_range([samples.are_in_range(i) for i in range(self._num_models)])
        shift = torch.stack([samples.mean(i) for i in range(self._num_models)]) - self._mean
        self._squares += torch.stack([samples.squares(i) for i in range(self._num_models)]) + weight * shift * shift
        self._mean += shift * (samples.count / total)
        self._num_samples = total

    def _exchange_samples(
        self, chunk: list[tuple[Tensor, Tensor]], stays: list[bool], changes: tuple[Tensor, Tensor] | None
    ) -> None:
        """Do what `_exchange` does, with sums that are taken beside the products."""
        changed = [i for i in range(self._num_models) if not stays[i]]
        for views, sign in zip(zip(*chunk, strict=True), (-1, 1), strict=True):
            samples = cuda.Samples(list(views))
            for (i, j), own in zip(self._pairs(), self._comoments, strict=True):
                if stays[i] and stays[j]:
                    continue
                product = samples.product(i, j)
                row_shift, column_shift = samples.mean(i) - self._mean[i], samples.mean(j) - self._mean[j]
                cuda.join(own, product, samples, i, j, samples.count * row_shift, column_shift, sign)
            if changed:
                self._note_range([samples.are_in_range(i) for i in changed])
            if changes is not None:
                for i in changed:
                    shift = samples.mean(i) - self._mean[i]
                    changes[0][i] += sign * samples.count * shift
                    changes[1][i] += sign * (samples.squares(i) + samples.count * shift * shift)

    def _note_range(self, in_range: list[Tensor]) -> None:
        """Remember whether features that were not checked were in range."""
        if self._in_range is not None:
            in_range = [*in_range, self._in_range]
        self._in_range = torch.stack(in_range).all()

    def _add_chunk(self, chunk: list[_Samples], dtype: torch.dtype, check: Callable[[], None] = lambda: None) -> None:
        """Add some samples of each model; `check` raises if they are infinite, and is called where they might be."""
        center = _dispatch.choose(
            "correlation",
            self._mean.device,
            {
                "cpu": cpu.center,
                # What the product of the features as they lie does not take.
                "cuda": _center_by_triton if _TRITON and self._mean.is_cuda else reference.center,
                "triton": _center_by_triton,
                "reference": reference.center,
            },
        )
        workspace, device = self._workspace or Workspace(), self._mean.device
        numbers = self._units * math.prod(chunk[0].shape)
        memory = [workspace.empty(f"centered {model}", numbers, dtype, device) for model in range(len(chunk))]
        results = [center(one.view, m, one.outer, one.inner) for one, m in zip(chunk, memory, strict=True)]
        centered, means, squares, rests = zip(*results, strict=True)
        if not all(bool(mean.isfinite().all()) for mean in means):
            check()
        # Squares that float32 cannot hold: the products are made in float64, where they fit.
        if dtype == torch.float32 and any(bool(s.max() > torch.finfo(dtype).max) for s in squares):
            centered = tuple(one.to(torch.float64) for one in centered)
        product = self._product_memory(workspace, centered[0].dtype)
        products = (
            _less_rest(_product(centered[i], centered[j], product), rests[i], rests[j], centered[i].shape[1])
            for i, j in self._pairs()
        )
        with _products_in(self._precision):
            self._join(centered[0].shape[1], torch.stack(means), torch.stack(squares), products)

    def _product_memory(self, workspace: Workspace, dtype: torch.dtype) -> Tensor:
        shape = self._comoments.shape[1:]
        return workspace.empty("product", shape.numel(), dtype, self._mean.device).view(shape)

    def _exchange(
        self,
        chunk: list[tuple[Tensor, Tensor]],
        stays: list[bool],
        dtype: torch.dtype,
        changes: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Exchange samples in the co-moments about the present mean, and note how sums and sums of squares change."""
        before, after = [], []
        for (old, new), same, mean in zip(chunk, stays, self._mean, strict=True):
            before.append(_deviations(old, mean, dtype))
            after.append(before[-1] if same else _deviations(new, mean, dtype))
        accumulate = self._accumulate_kernel()
        none = torch.zeros_like(self._mean[0])
        product = self._product_memory(self._workspace or Workspace(), dtype)
        for (i, j), own in zip(self._pairs(), self._comoments, strict=True):
            with _products_in(self._precision):
                if stays[i]:
                    torch.mm(after[i], (after[j] - before[j]).T, out=product)
                else:
                    _product(after[i], after[j], product).addmm_(before[i], before[j].T, alpha=-1)
            accumulate(own, product, none, none)
        if changes is not None:
            for i, (o, n) in enumerate(zip(before, after, strict=True)):
                changes[0][i] += (n - o).sum(1, dtype=torch.float64)
                changes[1][i] += _sum_of_squares(n) - _sum_of_squares(o)

    def _shift(self, shift: Tensor, squares: Tensor) -> None:
        """Move the mean that all moments are about by `shift` over the number of samples."""
        accumulate = self._accumulate_kernel()
        nothing = torch.zeros_like(self._comoments[0])
        for (i, j), own in zip(self._pairs(), self._comoments, strict=True):
            accumulate(own, nothing, shift[i] / -self._num_samples, shift[j])
        self._squares += squares - shift * shift / self._num_samples
        self._squares.clamp_(min=0)
        self._mean += shift / self._num_samples

    def _accumulate_kernel(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        return _dispatch.choose(
            "correlation",
            self._mean.device,
            {
                "cpu": cpu.accumulate,
                "cuda": cuda.accumulate,
                "triton": reference.accumulate,
                "reference": reference.accumulate,
            },
        )

    def _join(self, count: int, mean: Tensor, squares: Tensor, comoments: Iterator[Tensor]) -> None:
        """Add the sums of `count` samples about their own mean: the update of Chan, Golub and LeVeque."""
        if count == 0:
            return
        accumulate = self._accumulate_kernel()
        total = self._num_samples + count
        shift = mean - self._mean
        # n_a n_b / (n_a + n_b): what the distance of the two means adds to each (co-)moment.
        weighted = shift * (self._num_samples * (count / total))
        for (i, j), own, joined in zip(self._pairs(), self._comoments, comoments, strict=True):
            accumulate(own, joined, weighted[i], shift[j])
        self._squares += squares + weighted * shift
        self._mean += shift * (count / total)
        self._num_samples = total

    def _empty_result(self) -> Tensor:
        models, units = self._num_models, self._units
        shape = (models - 1, units, units) if self._blocks == "cross" else (models * units, models * units)
        return torch.empty(shape, dtype=self._dtype, device=self._mean.device)

    def _blocks_of(self, result: Tensor, i: int, j: int) -> tuple[Tensor, Tensor | None]:
        """Return the block of `result` for models i and j, and that of its transpose where there is one."""
        if self._blocks == "cross":
            return result[j - 1], None
        rows = slice(i * self._units, (i + 1) * self._units)
        columns = slice(j * self._units, (j + 1) * self._units)
        block = result[rows, columns]
        return block, block if i == j else result[columns, rows]


@dataclass(frozen=True)
class _Samples:
    """Features of one model, seen as [outer, C, inner], and which of them to take along either axis of samples.

    Attributes
    ----------
    view
        The features.
    outer, inner
        The order along that axis of `view`; None for all as they are.
    """

    view: Tensor
    outer: SampleOrder | None
    inner: SampleOrder | None

    @classmethod
    def of(
        cls, view: Tensor, shape: Sequence[int], units_axis: int, maps: Mapping[int, UnitMap], model: int
    ) -> _Samples:
        """Return one model's features, of `shape` before they were seen as `view`, in the order of one map or none."""
        outer = inner = None
        for axis, unit_map in maps.items():
            begin, end = (0, units_axis) if axis < units_axis else (units_axis + 1, len(shape))
            before, after = math.prod(shape[begin:axis]), math.prod(shape[axis + 1 : end])
            if axis < units_axis:
                outer = _order_of(unit_map, model, before, after, view.device)
            else:
                inner = _order_of(unit_map, model, before, after, view.device)
        return cls(view, outer, inner)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of samples along both axes."""
        return (
            self.view.shape[0] if self.outer is None else len(self.outer),
            self.view.shape[2] if self.inner is None else len(self.inner),
        )

    def chunk(self, outer: slice, inner: slice) -> _Samples:
        """Return some of the samples."""
        view = self.view
        view = view[outer] if self.outer is None else view
        view = view[:, :, inner] if self.inner is None else view
        return _Samples(
            view,
            None if self.outer is None else self.outer.part(outer),
            None if self.inner is None else self.inner.part(inner),
        )


def _order_of(unit_map: UnitMap, model: int, before: int, after: int, device: torch.device) -> SampleOrder:
    """Return a map of one model as the order of an axis that holds `before` x units x `after` samples."""
    index, scale = unit_map.index[model].to(device), unit_map.scale
    length = unit_map.units_in if unit_map.is_permutation else unit_map.units_out
    slices = torch.arange(before, device=device)[:, None, None] * length
    places = ((slices + index[:, None]) * after + torch.arange(after, device=device)).flatten()
    if unit_map.is_permutation:
        return SampleOrder(places.to(torch.int32))
    sample_of_member, members = places.sort(stable=True)
    begins = torch.arange(before * unit_map.units_out * after + 1, device=device)
    return SampleOrder(
        members.to(torch.int32),
        torch.searchsorted(sample_of_member, begins).to(torch.int32),
        None if scale is None else scale.to(device)[None, :, None].expand(before, -1, after).flatten(),
    )


def _reindexed(features: Sequence[Tensor], maps: Mapping[int, UnitMap]) -> list[Tensor]:
    """Return copies of the features of each model in the order of its maps."""
    return [
        permute_merge([feature], {axis: unit_map.of_model(model) for axis, unit_map in maps.items()}, weights=[1.0])
        for model, feature in enumerate(features)
    ]


def _center_by_triton(*arguments: Any) -> Centered:
    from mudsc_fast.kernels.triton import center  # takes a second to import, for CUDA tensors only

    return center.center(*arguments)


def _correlate_by_triton(*arguments: Any) -> None:
    from mudsc_fast.kernels.triton import correlation

    correlation.correlate(*arguments)


def _check_blend(other: Tensor | None, balance: float, result: Tensor) -> Tensor | None:
    """Return `other`, checked, with rows of adjacent entries."""
    balance = _checks.check_number("balance", balance)
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must be in [0, 1], got {balance}")
    if other is None:
        if balance != 1:
            raise ValueError(f"balance must be 1 without other, got {balance}")
        return None
    other = _checks.check_tensor("other", other)
    if (other.shape, other.dtype, other.device) != (result.shape, result.dtype, result.device):
        raise ValueError(
            f"other must be {list(result.shape)} in {result.dtype} on {result.device}, "
            f"got {list(other.shape)} in {other.dtype} on {other.device}"
        )
    return other if other.stride(-1) == 1 else other.contiguous()


def _flat(feature: Tensor, channel_axis: int) -> Tensor:
    """Return [outer, C, inner]: the axes before and behind the units are each taken together."""
    axis = channel_axis % feature.ndim
    shape = feature.shape
    return feature.detach().reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))


def _deviations(features: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Return features [outer, C, inner] less `mean` [C], as [C, samples], with NaN as 0."""
    units = features.transpose(0, 1).flatten(1).to(dtype)
    return units.nan_to_num(0.0) - mean[:, None].to(dtype)


def _sum_of_squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


def _product_settings() -> Any:
    """Return torch's settings of products on the CPU; None where this torch has none."""
    return getattr(torch.backends.mkldnn, "matmul", None)


@contextmanager
def _products_in(precision: Precision) -> Iterator[None]:
    """Let torch's float32 products on the CPU round their operands while the enclosed code runs."""
    if precision == "float32":
        yield
        return
    settings = _product_settings()
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _product(rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Return rows @ columns.T in `out`; of a product with itself only the upper triangle counts.

    Blocks below the diagonal are then zeros: a product with itself costs little more than half.
    """
    if rows is not columns or len(rows) < 2 * _TRIANGLE_BLOCK:
        return torch.mm(rows, columns.T, out=out)
    for first in range(0, len(rows), _TRIANGLE_BLOCK):
        last = min(first + _TRIANGLE_BLOCK, len(rows))
        torch.mm(rows[first:last], columns[first:].T, out=out[first:last, first:])
        out[first:last, :first].zero_()
    return out


def _less_rest(product: Tensor, row_rest: Tensor | None, column_rest: Tensor | None, count: int) -> Tensor:
    """Return the product of samples about their means, given that of samples whose sums are the rests."""
    if row_rest is None or column_rest is None:
        return product
    return product.addr_((row_rest / -count).to(product), column_rest.to(product))


def _chunks(outer: int, inner: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut outer x inner samples into parts of at most `limit` samples."""
    outer_step, inner_step = max(1, limit // max(inner, 1)), min(max(inner, 1), limit)
    for o in range(0, outer, outer_step):
        for i in range(0, inner, inner_step):
            yield slice(o, min(o + outer_step, outer)), slice(i, min(i + inner_step, inner))


def _may_overflow(features: Tensor, unit_map: UnitMap) -> bool:
    """Return whether sums of finite features over clusters might be infinite."""
    if unit_map.is_permutation or features.numel() == 0:
        return False
    least, most = features.aminmax()
    largest = max(-float(least), float(most)) * unit_map.units_in
    if unit_map.scale is not None:
        largest *= max(1.0, float(unit_map.scale.abs().max()))
    return not largest < torch.finfo(features.dtype).max


def _check_not_infinite(features: Sequence[Tensor], maps: Mapping[int, UnitMap] | None = None) -> None:
    """Raise if features are infinite, or would be, re-indexed by the given maps."""
    if maps:
        _check_not_infinite(features)  # which names places in the features as they were given
        features = _reindexed(features, maps)
    for i, feature in enumerate(features):
        if feature.numel() == 0:
            continue
        # One read; only extremes that are not finite, NaN among them, need the mask of the tensor's size.
        least, most = feature.aminmax()
        if math.isfinite(least) and math.isfinite(most):
            continue
        infinite = feature.isinf().nonzero()
        if len(infinite):
            index = tuple(infinite[0].tolist())
            raise ValueError(f"features[{i}] must not be infinite, got {feature[index].item()} at {index}")
