"""Similarity of units in activation space.

All models run on the same batches. A node's features are the values at the places that the spec observes; every
position of every sample is one observation of all units. The similarity of two units is the Pearson correlation of
their features (Xu et al., "Training-Free Pretrained Model Merging", CVPR 2024, section 3).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mudsc_fast._forward import Forward, Rewindable, preserve_training_mode
from mudsc_fast._models import Networks
from mudsc_fast._progress import progress_bar
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.sharded import is_sharded
from mudsc_fast.matching.observer import Feature, Observer, observed_nodes
from mudsc_fast.matching.statistics import MatchingStatistics
from mudsc_fast.ops.correlation import Blocks, Precision, Workspace
from mudsc_fast.spec.choose import SpecLike
from mudsc_fast.spec.permutation_spec import PermutationSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger(__name__)

#: Correlations of fewer observations say little: of two, each is 1 or -1.
_MIN_SAMPLES = 8


def collect_statistics(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    spec: SpecLike = None,
    blocks: Blocks = "full",
    forward: Forward | None = None,
    autocast: torch.dtype | None = None,
    precision: Precision = "float32",
    verify: bool = True,
    progress: bool | None = None,
    group: ProcessGroup | None = None,
) -> MatchingStatistics:
    """Run all models on the data and collect the statistics from which the correlation of their units is computed.

    Memory does not grow with the data: the features of each batch are added to running sums. The models run in
    evaluation mode without gradients and are left as they were.

    Parameters
    ----------
    models
        Two or more modules of one architecture.
    data
        Batches: a tensor (the model's only argument), a dict (its keyword arguments), or a tuple or list as data
        loaders yield them (the first entry, a tensor or dict, is the input; targets after it are ignored). Tensors are
        moved to each model's device.
    spec
        The spec of the models, which says where each node is observed; or how to choose it, as for
        :func:`mudsc_fast.merge`.
    blocks
        ``"full"`` for zip and align, ``"cross"`` for align alone, which is faster.
    forward
        Runs a model on a batch, if the batch cannot be passed to the model directly.
    autocast
        Run the models under ``torch.autocast`` in this dtype, e.g. ``torch.bfloat16``. Features of that dtype are still
        centered and summed in float32 and float64.
    precision
        Of the products of features, as for :class:`mudsc_fast.ops.CorrelationAccumulator`.
    verify
        Whether to check a given `spec` on the first batch, as for :func:`mudsc_fast.merge`.
    progress
        Whether to show a progress bar; by default in a terminal, if the work is long.
    group
        The processes of torch.distributed that collect together: each runs the models on its own `data`, which may be
        empty, and all get the statistics of all data.

    Raises
    ------
    ValueError
        If the data yields nothing, no node has a place where it is observed, or what is observed does not fit.
    TypeError
        If `autocast` is not a 16-bit dtype, or a model is a compiled ScriptModule.
    """
    ranks = Ranks(group)
    with ranks.step("checking the arguments"):
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise TypeError(f"autocast must be torch.float16, torch.bfloat16 or None, got {autocast!r}")
        networks, batches = Networks.of_modules(models), Rewindable(data)
    chosen = networks.choose_spec(spec, batches, ranks, forward=forward, verify=verify)
    return collect(
        ranks,
        models,
        batches,
        spec=chosen,
        blocks=blocks,
        forward=forward,
        autocast=autocast,
        precision=precision,
        progress=progress,
    )


def collect(
    ranks: Ranks,
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    spec: PermutationSpec,
    blocks: Blocks,
    forward: Forward | None = None,
    autocast: torch.dtype | None = None,
    precision: Precision = "float32",
    progress: bool | None = None,
    roots: Mapping[str, int] | None = None,
) -> MatchingStatistics:
    """Collect the statistics of all processes, each of which has its own data; see :func:`collect_statistics`.

    All processes get the sums of all nodes or, with `roots`, each those of the nodes whose root it is.
    """
    if any(is_sharded(tensor) for model in models for tensor in model.state_dict().values()):
        data = _InStep(data, ranks)  # its processes exchange parameters in every batch
    with ranks.step("running the models on the data"):
        statistics, num_batches = _collect_own(
            models, data, spec, blocks, forward, autocast, precision, ranks.progress(progress)
        )
    counts = ranks.gather_objects(num_batches, "summing activations")
    with ranks.step("running the models on the data"):
        if not any(counts):
            raise ValueError("data must yield at least one batch, got none" + ("" if ranks.alone else " on any rank"))
    statistics._all_reduce(ranks, roots)
    return statistics


def _collect_own(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    spec: PermutationSpec,
    blocks: Blocks,
    forward: Forward | None,
    autocast: torch.dtype | None,
    precision: Precision,
    progress: bool | None,
) -> tuple[MatchingStatistics, int]:
    """Return the statistics of this process, and its number of batches."""
    for index, model in enumerate(models):
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"models[{index}] must be a module whose submodules can be observed, got a {type(model).__name__}: "
                "pass the module it was compiled from, or match with space='weight'"
            )
    device = next(iter(models[0].state_dict().values())).device
    units = spec.units(models[0].state_dict())
    statistics = MatchingStatistics(spec, units, len(models), blocks=blocks, device=device, precision=precision)
    observed = observed_nodes(spec)
    if not observed:
        raise ValueError("spec does not say where any node is observed: name modules in observe")
    observers = [Observer(model, spec, units) for model in models]
    num_batches = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(statistics.computing_in(Workspace()))
        if autocast is not None:
            for kind in sorted({next(iter(model.state_dict().values())).device.type for model in models}):
                stack.enter_context(torch.autocast(kind, dtype=autocast))
        for model, observer in zip(models, observers, strict=True):
            stack.enter_context(preserve_training_mode(model))
            model.eval()
            stack.enter_context(observer.attached())
        for batch in progress_bar(data, description="activations", progress=progress):
            seen = [observer.run(batch, num_batches, forward) for observer in observers]
            if isinstance(data, _InStep) and not data.is_own:
                continue
            num_batches += 1
            for node in observed:
                _accumulate(statistics, node, [features[node] for features in seen])
    return statistics, num_batches


class _InStep(Iterable[Any]):
    """Batches of which all processes yield as many: where one has no more, a batch of another's is yielded again."""

    def __init__(self, data: Iterable[Any], ranks: Ranks) -> None:
        self._data, self._ranks = data, ranks
        #: Whether the latest batch is one of this process, to be counted.
        self.is_own = True

    def __iter__(self) -> Iterator[Any]:
        doing = "running the models on the data"
        batches = iter(self._data)
        spare: list[Any] = []
        while True:
            found = list(itertools.islice(batches, 1))
            having = [rank for rank, has in enumerate(self._ranks.gather_objects(bool(found), doing)) if has]
            if not having:
                return
            if not spare:
                spare = [self._ranks.broadcast_object(found[0] if found else None, doing, having[0])]
            self.is_own = bool(found)
            yield (found or spare)[0]


def check_varied(statistics: MatchingStatistics) -> None:
    """Check that the data tells the units apart.

    Raises
    ------
    ValueError
        If there is one observation only, or the activations of all nodes are the same on all data.
    """
    observed = observed_nodes(statistics.spec)
    all_constant = [statistics.constant_units(node).all(1).any() for node in observed]
    is_constant = torch.stack(all_constant).tolist() if observed else []  # one wait for a device
    constant = [node for node, flag in zip(observed, is_constant, strict=True) if flag]
    few = [node for node in observed if statistics.num_samples(node) < _MIN_SAMPLES]
    single = [node for node in few if statistics.num_samples(node) < 2]
    if observed and len(single) == len(observed):
        raise ValueError(
            f"data must hold two samples or more to correlate activations, got {statistics.num_samples(observed[0])}: "
            "pass more data, or match with space='weight'"
        )
    if observed and len(constant) == len(observed):
        raise ValueError(
            "data must vary, but the activations of every node are the same in all samples (all zero or constant "
            "inputs?): pass other data, or match with space='weight'"
        )
    if constant:
        _log.warning(
            "the activations of %s are the same in all samples of some model: they say nothing about which units "
            "correspond",
            ", ".join(map(repr, constant[:8])),
        )
    elif few:
        _log.warning(
            "there are only %d samples of the activations of %s: larger batches match better",
            min(statistics.num_samples(node) for node in few),
            ", ".join(map(repr, few[:8])),
        )


def _accumulate(statistics: MatchingStatistics, node: str, seen: Sequence[Sequence[Feature]]) -> None:
    calls = {len(features) for features in seen}
    if len(calls) != 1:
        raise ValueError(f"node {node!r} was observed {[len(f) for f in seen]} times in the models of one batch")
    device = seen[0][0].values.device
    for features in zip(*seen, strict=True):
        values = [feature.values.to(device) for feature in features]
        try:
            statistics.update(node, *values, channel_axis=features[0].axis)
        except ValueError as error:
            raise ValueError(f"the activations of node {node!r} cannot be compared: {error}") from error
