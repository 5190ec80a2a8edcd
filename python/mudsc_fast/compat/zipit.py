"""ZipIt's matching functions and covariance metric, with its names, arguments and results.

Source: Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", arXiv 2305.03053, and the
interface of its program. Results are exactly the published ones, including the 1e-5 in the divisor and the merge inside
a model that is allowed where its budget rounds to 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mudsc_fast.compat._zip import zip_published
from mudsc_fast.ops.assignment import linear_assignment
from mudsc_fast.ops.zip import merges_inside

_logger = logging.getLogger(__name__)


class CovarianceMetric:
    """Covariance of the features of all models, accumulated over batches.

    The moments of each batch are weighted by its number of samples, whatever its number of positions; NaN and infinite
    features count as 0.

    Attributes
    ----------
    mean, outer
        Sums over batches of the batch size times the mean, and times the second moments; None before the first batch.
    """

    name = "covariance"

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.outer: Tensor | None = None

    def update(self, batch_size: int, *feats: Tensor, **aux_params: Any) -> None:  # noqa: ARG002
        """Add a batch: for each model [C, L], the values of C units at L places of all samples."""
        joined = torch.nan_to_num(torch.cat(feats), 0, 0, 0)
        mean = joined.mean(1) * batch_size
        outer = joined @ joined.T / joined.shape[1] * batch_size
        self.mean = mean if self.mean is None else self.mean + mean
        self.outer = outer if self.outer is None else self.outer.add_(outer)

    def finalize(self, numel: int, eps: float = 1e-4) -> Tensor:  # noqa: ARG002
        """Return the covariance [N * C, N * C] of all units, given the number of samples; `eps` is not used."""
        if self.mean is None or self.outer is None:
            raise ValueError("there are no features: call update before finalize")
        mean = self.mean / numel
        return torch.addr(self.outer / numel, mean, mean, alpha=-1)


def compute_correlation(covariance: Tensor, eps: float = 1e-7) -> Tensor:
    """Return ``covariance / max(deviation_i * deviation_j, eps)``; negative variances (by rounding) count as 0."""
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    return covariance / torch.outer(deviation, deviation).clamp(min=eps)


def match_tensors_zipit(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    a: float = 0.3,
    b: float = 0.125,
    print_merges: bool = False,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Any, ...]:
    """Cluster the units of all models greedily.

    Parameters
    ----------
    metric
        ``"covariance"`` [O, O], which is turned into correlations, or ``"cossim"`` [O, O], for O = models * units.
        Other entries are not read. Not modified, unlike in the published function.
    r
        Fraction of the units that is merged away. There are ``int(1 / (1 - r) + 0.5)`` models.
    a
        Factor on the similarities of a merged cluster, see `shrink` of :func:`mudsc_fast.zip_units`.
    b
        Fraction of a model's merges that may be inside the model.
    print_merges
        Whether to log, at level INFO, how many clusters are in one model or in both.
    get_merge_value
        Whether to also return the mean similarity of the merges. (The published function averages entries of the
        cluster matrix instead.)
    add_bias
        Whether to add a row and a column to `unmerge` for the bias of each model, which is not merged.
    **kwargs
        Arguments of other matching functions; not used.

    Returns
    -------
    merge, unmerge[, value]
        [clusters, O], rows divided by (their sum + 1e-5), and [O, clusters] of zeros and ones.

    Raises
    ------
    ValueError
        If `metric` holds neither similarity, a similarity is not finite, or no allowed merge is left.
    """
    if "covariance" in metric:
        similarity = compute_correlation(metric["covariance"])
    elif "cossim" in metric:
        similarity = metric["cossim"]
    else:
        raise ValueError(f"metric must hold 'covariance' or 'cossim', got {', '.join(map(repr, metric)) or 'nothing'}")
    num_models = _num_models(r)
    units = len(similarity)
    remaining = int(units * (1 - r) + 1e-4)
    zipped = zip_published(similarity, num_models, remaining, merges_inside(units - remaining, num_models, b), a)
    members = functional.one_hot(zipped.cluster_of_unit, zipped.num_clusters).to(torch.get_default_dtype())
    if print_merges:
        _log_merges(members)
    merge, unmerge = _matrices(list(members.chunk(num_models)), add_bias)
    return (merge, unmerge, zipped.value) if get_merge_value else (merge, unmerge)


def match_tensors_permute(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Any, ...]:
    """Permute the units of every model onto those of the first so that the summed correlation is the largest.

    Arguments and results are those of :func:`match_tensors_zipit`; `metric` holds ``"covariance"``, and the value is
    the mean correlation of the last model's units with theirs.
    """
    correlation = compute_correlation(metric["covariance"])
    num_models = _num_models(r)
    units = len(correlation) // num_models
    blocks = torch.stack([correlation[:units, i * units : (i + 1) * units] for i in range(num_models)])
    columns = linear_assignment(blocks[1:]).columns
    own = torch.eye(units, device=correlation.device)
    merge, unmerge = _matrices([own, *(own[order].T for order in columns)], add_bias)
    if not get_merge_value:
        return merge, unmerge
    return merge, unmerge, float(blocks[-1].gather(1, columns[-1:].T).mean())


def match_tensors_identity(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    add_bias: bool = False,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Match the units of all models by their index: plain averaging, in the form of the other functions."""
    num_models = _num_models(r)
    own = torch.eye(len(metric["covariance"]) // num_models, device=metric["covariance"].device)
    return _matrices([own] * num_models, add_bias)


def _num_models(r: float) -> int:
    if not 0 <= r < 1:
        raise ValueError(f"r must be in [0, 1), got {r}")
    return int(1 / (1 - r) + 0.5)


def _matrices(members: Sequence[Tensor], add_bias: bool) -> tuple[Tensor, Tensor]:
    """Return `merge` and `unmerge`, given a [units, clusters] matrix of zeros and ones for each model."""
    joined = torch.cat(list(members))
    merge = (joined / (joined.sum(0, keepdim=True) + 1e-5)).T
    if add_bias:
        with_bias = [functional.pad(of_model, (0, 1, 0, 1)) for of_model in members]
        for of_model in with_bias:
            of_model[-1, -1] = 1
        joined = torch.cat(with_bias)
    return merge, joined


def _log_merges(members: Tensor) -> None:
    first, second = (half.sum(0) > 0 for half in members.chunk(2))
    _logger.info(
        "clusters of the first half of the models only: %d, of the second only: %d, of both: %d; %.3f units in each",
        int((first & ~second).sum()),
        int((second & ~first).sum()),
        int((first & second).sum()),
        float(members.sum(0).mean()),
    )
