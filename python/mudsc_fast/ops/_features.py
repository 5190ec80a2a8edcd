"""Features as correlations read them: views, the order of their samples, chunks, and checks for infinities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast import _arrays, _checks
from mudsc_fast.kernels._samples import SampleOrder
from mudsc_fast.ops.permute import permute_merge
from mudsc_fast.unit_map import UnitMap


@dataclass(frozen=True)
class Samples:
    """The features of one model, viewed as [outer, C, inner], and the samples to take along both other axes.

    Attributes
    ----------
    view
        The features.
    outer, inner
        The order of the samples along that axis of `view`; None for all of them in their own order.
    """

    view: Tensor
    outer: SampleOrder | None = None
    inner: SampleOrder | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Number of samples along both axes."""
        return (
            self.view.shape[0] if self.outer is None else len(self.outer),
            self.view.shape[2] if self.inner is None else len(self.inner),
        )

    def chunk(self, outer: slice, inner: slice) -> Samples:
        """Return some of the samples."""
        view = self.view
        view = view[outer] if self.outer is None else view
        view = view[:, :, inner] if self.inner is None else view
        return Samples(
            view,
            None if self.outer is None else self.outer.part(outer),
            None if self.inner is None else self.inner.part(inner),
        )

    def gathered(self) -> Tensor:
        """Return [outer, C, inner]: the samples themselves, of a permutation."""
        view = self.view
        view = view if self.outer is None else view.index_select(0, self.outer.members)
        return view if self.inner is None else view.index_select(2, self.inner.members)


def check_features(
    features: Sequence[_arrays.Array], num_models: int, units: int, device: torch.device, channel_axis: int
) -> list[Tensor]:
    """Return one tensor per model, all of one shape with `units` entries on the channel axis, or raise an error."""
    if len(features) != num_models:
        raise ValueError(f"features must be one tensor for each of {num_models} models, got {len(features)}")
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
        if feature.device != device:
            raise ValueError(f"features[{i}] must be on {device}, got {feature.device}")
    if shape[channel_axis] != units:
        raise ValueError(f"features must have {units} units on axis {channel_axis}, got shape {list(shape)}")
    return checked


def flat(feature: Tensor, channel_axis: int) -> Tensor:
    """Return a view [outer, C, inner]: the axes before the units, and those after them, are each merged into one."""
    axis = channel_axis % feature.ndim
    shape = feature.shape
    return feature.detach().reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))


def samples_of(features: Sequence[Tensor], units_axis: int, maps: Mapping[int, UnitMap]) -> list[Samples]:
    """Return the samples of each model, in the order of at most one map."""
    return [_samples_of(feature, units_axis, maps, model) for model, feature in enumerate(features)]


def _samples_of(feature: Tensor, units_axis: int, maps: Mapping[int, UnitMap], model: int) -> Samples:
    view, shape = flat(feature, units_axis), feature.shape
    outer = inner = None
    for axis, unit_map in maps.items():
        begin, end = (0, units_axis) if axis < units_axis else (units_axis + 1, len(shape))
        before, after = math.prod(shape[begin:axis]), math.prod(shape[axis + 1 : end])
        order = _order_of(unit_map, model, before, after, view.device)
        outer, inner = (order, inner) if axis < units_axis else (outer, order)
    return Samples(view, outer, inner)


def _order_of(unit_map: UnitMap, model: int, before: int, after: int, device: torch.device) -> SampleOrder:
    """Return the map of one model as the order of an axis that holds `before` x units x `after` samples."""
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


def reindexed(features: Sequence[Tensor], maps: Mapping[int, UnitMap]) -> list[Tensor]:
    """Return copies of the features of each model in the order of its maps."""
    return [
        permute_merge([feature], {axis: unit_map.of_model(model) for axis, unit_map in maps.items()}, weights=[1.0])
        for model, feature in enumerate(features)
    ]


def chunks(outer: int, inner: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Divide outer x inner samples into parts of at most `limit` samples."""
    outer_step, inner_step = max(1, limit // max(inner, 1)), min(max(inner, 1), limit)
    for o in range(0, outer, outer_step):
        for i in range(0, inner, inner_step):
            yield slice(o, min(o + outer_step, outer)), slice(i, min(i + inner_step, inner))


def may_overflow(features: Tensor, unit_map: UnitMap) -> bool:
    """Return whether sums of finite features over clusters might be infinite."""
    if unit_map.is_permutation or features.numel() == 0:
        return False
    smallest, largest = features.aminmax()
    bound = max(-float(smallest), float(largest)) * unit_map.units_in
    if unit_map.scale is not None:
        bound *= max(1.0, float(unit_map.scale.abs().max()))
    return not bound < torch.finfo(features.dtype).max


def check_not_infinite(features: Sequence[Tensor], maps: Mapping[int, UnitMap] | None = None) -> None:
    """Raise ValueError if features are infinite, or would be after re-indexing by the given maps."""
    if maps:
        check_not_infinite(features)  # so that the error names a position in the original features
        features = reindexed(features, maps)
    for i, feature in enumerate(features):
        if _checks.is_finite(feature):
            continue
        infinite = feature.isinf().nonzero()
        if len(infinite):
            index = tuple(infinite[0].tolist())
            raise ValueError(f"features[{i}] must not be infinite, got {feature[index].item()} at {index}")
