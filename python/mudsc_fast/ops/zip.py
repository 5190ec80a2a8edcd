"""Zip: greedy clustering of the units of several models, across models and within each model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mudsc_fast import _arrays, _checks
from mudsc_fast.kernels.cpu import zip as cpu
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.kernels.cuda import zip as cuda
from mudsc_fast.kernels.reference import zip as reference
from mudsc_fast.ops import _dispatch, _library


@dataclass(frozen=True, eq=False, repr=False)
class ZipResult:
    """Clusters of units.

    ``print(result)`` shows how many units the clusters have.

    Attributes
    ----------
    cluster_of_unit
        ``[N * C]`` int64, the cluster of every unit. Clusters are numbered in the order of their first unit.
    sizes
        ``[clusters]`` int64, the number of units in every cluster.
    value
        Mean similarity over the merges, each taken when the merge was made; 0.0 if there were no merges, so that
        a mean over nodes is always defined.
    """

    cluster_of_unit: Tensor
    sizes: Tensor
    value: float

    def __repr__(self) -> str:
        return f"ZipResult(units={len(self.cluster_of_unit)}, clusters={len(self.sizes)}, value={self.value:.4g})"

    def __str__(self) -> str:
        lines = [self._summary()]
        lines += [
            f"{count} cluster{'s' if count != 1 else ''} of {size} unit{'s' if size != 1 else ''}"
            for size, count in self._counts()
        ]
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{size}</td><td>{count}</td></tr>" for size, count in self._counts())
        return f"<p>{self._summary()}</p><table><tr><th>units</th><th>clusters</th></tr>{rows}</table>"

    def _summary(self) -> str:
        return (
            f"{len(self.cluster_of_unit)} units in {len(self.sizes)} clusters, "
            f"mean similarity of merged units {self.value:.4g}"
        )

    def _counts(self) -> list[tuple[int, int]]:
        """Return the numbers of units that clusters have, and how many clusters have that many."""
        sizes, counts = self.sizes.unique(return_counts=True)
        return list(zip(sizes.tolist(), counts.tolist(), strict=True))


def zip_units(
    similarity: _arrays.Array,
    num_models: int,
    *,
    ratio: float | None = None,
    shrink: float = 0.5,
    budget: float = 1.0,
) -> ZipResult:
    """Cluster the units of several models greedily by similarity.

    Merges the pair of clusters with the largest similarity (the first in row-major order if several are equal) until
    ``int(N * C * (1 - ratio) + 1e-4)`` clusters are left. The similarities of a merged cluster are the smaller of those
    of its two parts, times `shrink`. A cluster belongs to the model of its first unit.

    Parameters
    ----------
    similarity
        ``[N * C, N * C]``, a tensor on any device or an array of another library, of float16, bfloat16, float32 or
        float64; block (i, j) compares the units of model i with those of model j. It does not have to be symmetric.
        Its diagonal is not used, but must be finite. Half types are computed in float32. It is not modified.
    num_models
        N. Unit u of the N * C belongs to model ``u // C``.
    ratio
        Share of the units that is merged away, in [0, 1). None means ``1 - 1 / num_models``, which leaves C clusters.
    shrink
        Published as `a`. If it is not positive, a merged cluster cannot merge with further clusters of the two models
        that its parts came from, and its other similarities are not multiplied.
    budget
        Published as `b`, in [0, 1]: ``int(merges // N * budget + 1e-4)`` merges are allowed inside each model. If
        that number is 0, no such merges are allowed.

    Returns
    -------
    ZipResult
        With tensors on the device of `similarity`.

    Raises
    ------
    TypeError
        If `similarity` is not a dense floating-point tensor or array, or another argument is not a number.
    ValueError
        If `similarity` is not square, its size is not divisible by `num_models`, it holds NaN or inf, an argument
        is out of range, or no legal merge is left before the requested number of clusters is reached. Unless
        similarities overflow, the last cannot happen if `budget` is 1 and `shrink` positive, or if at least C clusters
        of one or two models are requested.

    Notes
    -----
    Source: Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", arXiv 2305.03053, as used in
    Xu et al., "Training-Free Pretrained Model Merging", arXiv 2403.01753. The result equals that of the published
    procedure merge for merge, in expected O((N C)^2) time on a CPU. A symmetric `similarity` is read where it is; one
    that is not symmetric is transposed into a copy. Memory grows by a row for each cluster of more than two units, and
    by one bit per entry if `budget` or `shrink` forbids merges. On a CUDA device another kernel gives the same result.
    A tensor on another device is copied to the CPU, and the result back.
    """
    similarity = _arrays.as_tensor("similarity", similarity)
    units = _check_shape(similarity, num_models)
    ratio = 1.0 - 1.0 / num_models if ratio is None else _checks.check_number("ratio", ratio)
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    remaining = int(units * (1.0 - ratio) + 1e-4)
    if units > 0 and remaining == 0:
        raise ValueError(f"ratio must leave at least one cluster of {units} units, got {ratio}")
    allowed = merges_inside(units - remaining, num_models, budget)
    return zip_within_budget(similarity, num_models, remaining, allowed, shrink)


def merges_inside(merges: int, num_models: int, budget: float, groups: int = 1) -> int:
    """Return how many of the merges may be made inside each model, or inside each of its groups of units.

    The published program rounds the two differently.

    Raises
    ------
    TypeError
        If `budget` is not a number.
    ValueError
        If it is not in [0, 1].
    """
    budget = _checks.check_share("budget", budget)
    if groups == 1:
        return int(merges // num_models * budget + 1e-4)
    return int(merges * budget // (num_models * groups) + 1e-4)


def zip_within_budget(similarity: Tensor, num_models: int, remaining: int, budget: int, shrink: float) -> ZipResult:
    """Cluster units as :func:`zip_units` does, given the numbers that it derives from `ratio` and `budget`.

    Parameters
    ----------
    similarity, num_models, shrink
        As for :func:`zip_units`.
    remaining
        Number of clusters to end with.
    budget
        Number of merges allowed inside each model.
    """
    units = _check_shape(similarity, num_models)
    shrink = _check_shrink(shrink, similarity.dtype)
    if _library.traced(similarity):
        cluster_of_unit, sizes, value = torch.ops.mudsc_fast.zip_units(
            similarity, num_models, remaining, budget, shrink
        )
        return ZipResult(cluster_of_unit, sizes, float(value))
    kernels = {"cuda": cuda.zip_units, "cpu": cpu.zip_units, "reference": reference.zip_units}
    _device.refuse_capture("zip_units", similarity.device)
    kernel = _dispatch.choose("zip", similarity.device, kernels)
    if kernel is not cpu.zip_units:  # the kernel checks while it reads
        _checks.check_finite("similarity", similarity)
    cluster_of_unit, values = kernel(similarity, num_models, remaining, budget, shrink)
    if len(values) < units - remaining:
        raise ValueError(
            f"no legal merge is left at {units - len(values)} clusters, {remaining} were requested: "
            f"budget allows {budget} merges inside each of num_models={num_models} models, shrink={shrink}; "
            "raise budget, keep more clusters, or make shrink positive and at most 1"
        )
    return ZipResult(
        cluster_of_unit=cluster_of_unit,
        sizes=torch.bincount(cluster_of_unit, minlength=remaining),
        value=float(values.mean()) if len(values) else 0.0,
    )


def _check_shape(similarity: Tensor, num_models: int) -> int:
    """Return the number of units of all models together."""
    _checks.check_tensor("similarity", similarity)
    _checks.check_float("similarity", similarity)
    _checks.check_int("num_models", num_models, minimum=1)
    shape = list(similarity.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"similarity must be square, [N * C, N * C], got shape {shape}")
    if shape[0] % num_models != 0:
        raise ValueError(f"similarity must have a size divisible by num_models={num_models}, got shape {shape}")
    return shape[0]


def _check_shrink(shrink: float, dtype: torch.dtype) -> float:
    """Return `shrink` if multiplying by it in the dtype of the computation is defined."""
    shrink = _checks.check_number("shrink", shrink)
    if not math.isfinite(shrink):
        raise ValueError(f"shrink must be finite, got {shrink}")
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    # A factor that rounds to 0 or inf would turn -inf and 0 into NaN.
    if shrink > 0.0 and not computed.tiny <= shrink <= computed.max:
        raise ValueError(
            f"shrink, if positive, must be in [{computed.tiny}, {computed.max}], the range of {computed.dtype}, "
            f"got {shrink}"
        )
    return shrink


def _zip_units(
    similarity: Tensor, num_models: int, remaining: int, budget: int, shrink: float
) -> tuple[Tensor, Tensor, Tensor]:
    zipped = zip_within_budget(similarity, num_models, remaining, budget, shrink)
    value = torch.tensor(zipped.value, dtype=torch.float64, device=similarity.device)
    return zipped.cluster_of_unit, zipped.sizes, value


def _zip_units_fake(
    similarity: Tensor,
    num_models: int,  # noqa: ARG001
    remaining: int,
    budget: int,  # noqa: ARG001
    shrink: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        similarity.new_empty(similarity.shape[0], dtype=torch.int64),
        similarity.new_empty(remaining, dtype=torch.int64),
        similarity.new_empty((), dtype=torch.float64),
    )


_library.define(
    "zip_units(Tensor similarity, int num_models, SymInt remaining, SymInt budget, float shrink) "
    "-> (Tensor, Tensor, Tensor)",
    _zip_units,
    _zip_units_fake,
)
