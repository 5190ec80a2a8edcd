"""How the units along one axis of several models are re-indexed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mudsc_fast import _arrays, _checks

#: Kernels index units with 32 bits, and the value after the last unit means "none".
_MAX_UNITS = 2**31 - 2


@dataclass(frozen=True, eq=False, repr=False)
class UnitMap:
    """How the units along one axis of N models become the units of the result.

    Create one with :meth:`permutation` (each output unit is one input unit) or :meth:`clusters` (each output unit is a
    sum of input units). A map keeps its own copy of the indices.

    Attributes
    ----------
    index
        Permutation: [N, units_out] int64, the input unit of each output unit.
        Clusters: [N, units_in] int64, the output unit that each input unit is added to.
    units_in, units_out
        Length of the axis before and after.
    is_permutation
        Whether each output unit is one input unit. The map does not have to be a bijection: any selection counts.
    scale
        Clusters only: [units_out] float64 factor of each sum, or None for 1.
    """

    index: Tensor
    units_in: int
    units_out: int
    is_permutation: bool
    scale: Tensor | None = None

    def __repr__(self) -> str:
        kind = "permutation" if self.is_permutation else "clusters"
        scaled = "" if self.scale is None else ", scaled"
        device = "" if self.index.is_cpu else f", device={str(self.index.device)!r}"
        return (
            f"UnitMap({kind}, num_models={self.num_models}, units_in={self.units_in}, "
            f"units_out={self.units_out}{scaled}{device})"
        )

    @cached_property
    def members(self) -> tuple[Tensor, Tensor]:
        """The input units of each output unit, for kernels that run over output units.

        [members] int32, all models one after the other, sorted by output unit; and [N, units_out + 1] int32, the place
        where the members of each output unit begin.
        """
        models, device = self.num_models, self.index.device
        if self.is_permutation:
            starts = torch.arange(self.units_out + 1, device=device).repeat(models, 1)
            order = self.index
        else:
            order = torch.argsort(self.index, dim=1, stable=True)
            ends = torch.arange(self.units_out + 1, device=device).repeat(models, 1)
            starts = torch.searchsorted(self.index.gather(1, order), ends)
        starts += torch.arange(models, device=device)[:, None] * order.shape[1]
        return order.flatten().to(torch.int32), starts.to(torch.int32)

    @property
    def num_models(self) -> int:
        """Number N of models."""
        return self.index.size(0)

    @cached_property
    def on_cpu(self) -> tuple[Tensor, Tensor | None]:
        """Index and scale as the CPU kernels read them: contiguous, in host memory."""
        scale = None if self.scale is None else self.scale.to("cpu").contiguous()
        return self.index.to("cpu").contiguous(), scale

    def of_model(self, model: int) -> UnitMap:
        """Return the map of one of the models."""
        return UnitMap(self.index[model : model + 1], self.units_in, self.units_out, self.is_permutation, self.scale)

    @classmethod
    def permutation(cls, index: _arrays.Array, *, units_in: int | None = None) -> UnitMap:
        """Return the map that takes input unit ``index[i, k]`` of model i as output unit k.

        Parameters
        ----------
        index
            [N, K] int64 with entries in [0, units_in). Repeats and omissions are allowed.
        units_in
            Length of the axis that is gathered from; K by default.

        Raises
        ------
        TypeError
            If `index` is not an int64 tensor or `units_in` not an int.
        ValueError
            If `index` is not [N, K] with N >= 1, or an entry is out of range (the error names its value and place).
        """
        index = _check_index("index", index)
        length = int(index.shape[1]) if units_in is None else _checks.check_int("units_in", units_in, 0)
        _check_units("units_in", length)
        _check_units("the number of columns of index", int(index.shape[1]))
        _check_range("index", index, length)
        return cls(index.clone(), length, int(index.shape[1]), True)._prepared()

    @classmethod
    def clusters(cls, cluster_of_unit: _arrays.Array, num_clusters: int, scale: _arrays.Array | None = None) -> UnitMap:
        """Return the map that adds up the input units of each cluster, times a factor.

        ``out[k] = scale[k] * sum of input units c with cluster_of_unit[i, c] == k``. A cluster without units gives 0.

        Parameters
        ----------
        cluster_of_unit
            [N, C] int64 with entries in [0, num_clusters).
        num_clusters
            K, the length of the axis in the result.
        scale
            [K] finite factors of any float dtype, stored in float64; None for 1.

        Raises
        ------
        TypeError
            If `cluster_of_unit` is not an int64 tensor, `num_clusters` not an int or `scale` not a float tensor.
        ValueError
            If a shape is wrong, an entry of `cluster_of_unit` is out of range (the error names its value and place) or
            `scale` is not finite.
        """
        cluster_of_unit = _check_index("cluster_of_unit", cluster_of_unit)
        num_clusters = _checks.check_int("num_clusters", num_clusters, 0)
        _check_units("num_clusters", num_clusters)
        _check_units("the number of columns of cluster_of_unit", int(cluster_of_unit.shape[1]))
        _check_range("cluster_of_unit", cluster_of_unit, num_clusters)
        if scale is not None:
            scale = _arrays.as_tensor("scale", scale)
            _checks.check_float("scale", scale)
            if scale.shape != (num_clusters,):
                raise ValueError(f"scale must be [num_clusters] = [{num_clusters}], got {list(scale.shape)}")
            _checks.check_finite("scale", scale)
            scale = scale.detach().to(torch.float64, copy=True)
        return cls(cluster_of_unit.clone(), int(cluster_of_unit.shape[1]), num_clusters, False, scale)._prepared()

    def _prepared(self) -> UnitMap:
        """Return this map with everything that kernels on its device read, computed on the current stream.

        Computed at first use instead, it might not be ready for other streams, or for a graph that is captured, that
        wait only for the map itself.
        """
        if self.index.is_cuda:
            _ = self.members
        return self


def _check_index(argument: str, value: object) -> Tensor:
    index = _arrays.as_tensor(argument, value)
    if index.dtype != torch.int64:
        raise TypeError(f"{argument} must have dtype int64, got {str(index.dtype).removeprefix('torch.')}")
    if index.ndim != 2 or index.shape[0] == 0:
        raise ValueError(f"{argument} must be [num_models, units] with num_models >= 1, got {list(index.shape)}")
    return index


def _check_units(argument: str, count: int) -> None:
    if count > _MAX_UNITS:
        raise ValueError(f"{argument} must be at most {_MAX_UNITS}, got {count}")


def _check_range(argument: str, index: Tensor, length: int) -> None:
    if index.numel() == 0:
        return
    smallest, largest = torch.stack(index.aminmax()).tolist()  # the only time that the host waits for a device
    if smallest >= 0 and largest < length:
        return
    model, unit = ((index < 0) | (index >= length)).nonzero()[0].tolist()
    value = index[model, unit].item()
    raise ValueError(f"{argument} must have entries in [0, {length}), got {value} at ({model}, {unit})")
