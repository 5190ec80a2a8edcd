"""Merge models, and search the balance of weights and activations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mudsc_fast._checks import check_number, check_share
from mudsc_fast._forward import Forward
from mudsc_fast._models import Models
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.match_models import PreparedMatching
from mudsc_fast.matching.node import Mode
from mudsc_fast.matching.partial import Division
from mudsc_fast.matching.statistics import MatchingStatistics
from mudsc_fast.matching_result import Matching
from mudsc_fast.merge_matched import merge_matched, merge_sharded
from mudsc_fast.merge_result import MergeResult
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.options import Expand, MatchOptions, Space, default_balance, default_space
from mudsc_fast.prepare import Names, Prepared, prepare
from mudsc_fast.spec.choose import SpecLike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: What :func:`search_balance` tries by default.
DEFAULT_BALANCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def merge(
    models: Models,
    data: Iterable[Any] | MatchingStatistics | None = None,
    *,
    spec: SpecLike = None,
    mode: Mode = "align",
    balance: float | None = None,
    space: Space | None = None,
    weights: Sequence[float] | None = None,
    shrink: float | None = None,
    budget: float = 1.0,
    expand: Expand = 1.0,
    stop_at: Names = (),
    task_heads: Names = (),
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    forward: Forward | None = None,
    precision: Precision = "float32",
    verify: bool = True,
    progress: bool | None = None,
    refit: bool = False,
    group: ProcessGroup | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> MergeResult:
    """Merge networks of one architecture into one of the same size, without training.

    Units of independently trained networks correspond only up to a permutation. They are matched by their similarity
    in weight space, in activation space, or in both (Xu et al., "Training-Free Pretrained Model Merging", CVPR 2024),
    and then averaged. Merging may stop inside the network: the layers after it stay task-specific and read the merged
    units (Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", ICLR 2024).

    It is :func:`mudsc_fast.match` followed by :meth:`mudsc_fast.Matching.merge`: to merge the same models several
    times, match them once.

    Parameters
    ----------
    models
        Two or more modules, state dicts, or paths of checkpoints (.safetensors files, ``torch.save`` files, Hugging
        Face directories). They are not modified. With ``mode="align"``, the units of the result are in the order of the
        first model. Tensors in files are read when they are needed. If activations are needed, transformers loads
        Hugging Face directories as modules.
    data
        Batches to run the models on, as for :func:`mudsc_fast.collect_statistics`, or what that function returned
        for these models and this `spec`. Activations are not computed if `space` is ``"weight"``.
    spec
        Which axes of which tensors belong together: a :class:`mudsc_fast.PermutationSpec`, the path of its ``.json``
        file, or the name of a family, with the numbers that tensor shapes do not determine (``"resnet"``, ``"llama"``,
        ``"vit:num_heads=12"``). By default the family is recognized by the tensor names or the Hugging Face
        configuration. If that fails, the spec is derived from the first model and the first batch of `data`, as by
        :meth:`mudsc_fast.PermutationSpec.from_model`.
    mode
        ``"align"`` permutes the units of each model onto those of the first. ``"zip"`` clusters the units of all
        models; units of the same model may be joined too.
    balance
        Share of the weight similarity in the dual space, in [0, 1]. Default: 0.5. :func:`mudsc_fast.search_balance`
        finds the best value.
    space
        ``"weight"``, ``"activation"`` or ``"dual"`` (both); by default dual if there is data, else weight.
    weights
        The models' shares in the result: non-negative numbers that sum to 1. Default: equal shares.
    shrink, budget
        Of ``mode="zip"`` alone: how a cluster's similarities shrink when it grows, and which share of a model's merges
        may be within the model; as in :func:`mudsc_fast.ops.zip_units`. By default `shrink` is the published 0.5 for up
        to two models. For more, clusters do not shrink, but the similarities of units of one model count half: permuted
        copies of any number of models find each other.
    expand
        Of ``mode="zip"`` alone: how many merged units to keep for each unit of a model, a number of at least 1 for all
        nodes, or one for each node named. The layers of the result have more channels: more accuracy for more
        parameters, which grow by the square of this number. Modules are resized if the layers concerned are linear
        layers, convolutions and BatchNorm, and `forward` does not depend on their numbers of channels. Nodes whose
        units form groups, such as attention heads, stay as they are.
    stop_at
        The last layers to merge: a node, a module, or a tensor name. By default the whole network is merged. Tensors
        up to and including the stop, in the order of the spec, are merged into one trunk; every task keeps its own
        tensors after it. A node ends with the last layer that produces it: for a residual stream, the last block that
        writes to it. If parts of a network share no node, such as two towers, each can have a stop; parts without one
        are merged as a whole. A tensor with two names (an embedding table that is also the output layer) is merged if
        one of its names is. The whole network is matched in any case.
    task_heads
        Further tensors that each task keeps: modules or tensor names. They are not compared. Output layers that differ
        in size between the models need not be named. Heads that only some of the models have must be named: each task
        keeps those of its model.
    random_state
        Seed of the order in which sweeps visit the nodes. Nothing else in the result is random.
    max_sweeps, patience
        Maximum number of sweeps, and of sweeps without improvement before stopping.
    forward
        Runs a model on a batch. Needed if batches are neither tensors nor dicts nor tuples that begin with one.
    precision
        ``"bfloat16"`` for faster, less precise similarities on processors with instructions for it; see
        :class:`mudsc_fast.ops.CorrelationAccumulator`. Weights are always averaged in full precision.
    verify
        Whether to check a given `spec` if modules and data are given too: a random order of the first model's units
        must not change its outputs on the first batch. This needs a copy of the model and two runs. Pass False if the
        spec is not meant to keep the outputs, like the published ones that match the heads of queries and values
        independently, or if the outputs are features that follow the units.
    progress
        Whether to show progress bars. By default they are shown in a terminal if the work is long.
    refit
        Whether to fit the merged layers by least squares to what the models compute on `data`, with the defaults of
        :func:`mudsc_fast.refit`. `data` must then be batches that can be read twice.
    group
        The torch.distributed processes that merge together. All of them make this call with the same arguments, but
        each with its own `data`, which may be empty. All get the result that one process would get from all data.
        Modules and state dicts that are sharded over the processes (DTensor, FSDP2) are merged tensor by tensor. The
        tensors of the result are then sharded like those of the first model, and `model` is None.
    checkpoint
        A directory for the statistics of the activations and the state after every sweep. If a run is interrupted, the
        same call with the same directory continues it, also with another number of processes. Other models or options
        are an error. The batches are not compared: if their statistics are complete, they are not read again. The
        directory can be removed afterwards.

    Returns
    -------
    MergeResult

    Raises
    ------
    ValueError
        If models differ in tensors, devices, or shapes outside of task heads; if no spec is found, or it does not fit
        the tensors or does not keep the outputs; if `stop_at` or `task_heads` name nothing, the data is empty, a number
        is out of range, or a similarity is not finite.
    TypeError
        If an argument has the wrong type, the models' dtypes differ, or activations are needed but `models` are state
        dicts.
    DistributedError
        If a process of the group fails or dies. The message names its rank and the cause.
    """
    ranks = Ranks(group)
    with ranks.step("checking the arguments"):
        options = MatchOptions(
            mode=mode,
            space=default_space(space, data is not None),
            balance=default_balance(balance, space, data is not None),
            shrink=shrink,
            budget=budget,
            expand=expand,
            random_state=random_state,
            max_sweeps=max_sweeps,
            patience=patience,
            forward=forward,
            precision=precision,
            progress=ranks.progress(progress),
        )
        if refit:
            _check_refit_data(data, group)
    run = options.space != "weight" or refit
    inputs = prepare(models, spec, data, run=run, task_heads=task_heads, forward=forward, verify=verify, ranks=ranks)
    networks = inputs.networks
    with ranks.step("checking the arguments"):
        if refit and not networks.modules:
            raise TypeError("refit=True needs modules to run, got tensors alone: load the models, or leave refit out")
        division = inputs.divide(stop_at)
    ranks.check_same({"stop_at": repr(stop_at)})
    prepared = PreparedMatching(inputs, options, weights, ranks, checkpoint)
    result = _merged(inputs, prepared, prepared.at(options.balance), division, weights, ranks)
    return _refitted(result, inputs, data, options) if refit else result


def _merged(
    inputs: Prepared,
    prepared: PreparedMatching,
    matching: Matching,
    division: Division,
    weights: Sequence[float] | None,
    ranks: Ranks,
) -> MergeResult:
    """Merge networks by a matching of theirs."""
    if inputs.sharded is not None:
        held = replace(inputs.networks, modules=(), state_dicts=tuple(prepared.state_dicts))
        return merge_sharded(held, inputs.sharded, matching, division, weights, ranks, prepared.owners.holder)
    with ranks.step("merging the tensors"):
        return merge_matched(inputs.networks, matching, division, weights)


def _refitted(result: MergeResult, inputs: Prepared, data: object, options: MatchOptions) -> MergeResult:
    """Refit a merge with the data and the settings that its units were matched with."""
    from mudsc_fast.refitting import refit  # only here, so that `import mudsc_fast` stays fast

    assert isinstance(data, Iterable)  # _check_refit_data has checked that
    return refit(
        result,
        inputs.networks.modules,
        data,
        random_state=options.random_state,
        forward=options.forward,
        progress=options.progress,
    )


def _check_refit_data(data: object, group: ProcessGroup | None) -> None:
    """Raise an error unless there are batches to refit on that can be read twice, in one process."""
    if group is not None:
        raise ValueError("refit=True fits on the data of one process: call mudsc_fast.refit on the result instead")
    if not isinstance(data, Iterable):
        raise TypeError(
            f"refit=True needs data as batches, got {type(data).__name__}: pass the batches, or call "
            "mudsc_fast.refit(result, models, batches)"
        )
    if isinstance(data, Iterator):
        raise TypeError("refit=True reads data more than once, got an iterator: pass a list or a DataLoader")


def search_balance(
    models: Models,
    data: Iterable[Any] | MatchingStatistics,
    *,
    score: Callable[[MergeResult], float],
    balances: Sequence[float] = DEFAULT_BALANCES,
    spec: SpecLike = None,
    mode: Mode = "align",
    weights: Sequence[float] | None = None,
    shrink: float | None = None,
    budget: float = 1.0,
    expand: Expand = 1.0,
    stop_at: Names = (),
    task_heads: Names = (),
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    forward: Forward | None = None,
    precision: Precision = "float32",
    verify: bool = True,
    progress: bool | None = None,
    refit: bool = False,
    group: ProcessGroup | None = None,
) -> MergeResult:
    """Merge in the dual space at several balances and return the best merge.

    Activations are collected once for all balances.

    Parameters
    ----------
    models, data
        As for :func:`mudsc_fast.merge`.
    score
        How good a merge is; the higher, the better. Called once for each balance. Use data that the networks were
        trained on, not the data that the result is judged by; several thousand samples, since accuracies of 1,000
        vary by more than good balances differ.
    balances
        The shares of the weight similarity to try: one number in [0, 1] or more.
    spec, mode, weights, shrink, budget, expand, stop_at, task_heads, random_state, max_sweeps, patience, forward,
    precision, verify, progress
        As for :func:`mudsc_fast.merge`.
    refit
        As for :func:`mudsc_fast.merge`. Every merge is refitted before it is scored.
    group
        As for :func:`mudsc_fast.merge`. `score` is called in all processes, each of which may score the merge on data
        of its own; the mean of their scores counts.

    Returns
    -------
    MergeResult
        The merge of the highest score, the first of several; its ``scores`` are those of all balances.

    Raises
    ------
    ValueError, TypeError
        As :func:`mudsc_fast.merge`; and if `score` is no function or returns no number, or `balances` holds none.
    """
    ranks = Ranks(group)
    with ranks.step("checking the arguments"):
        if not callable(score):
            raise TypeError(f"score must be a function of a MergeResult, got {type(score).__name__}")
        if data is None:
            raise TypeError("data must be batches to search the balance of weights and activations, got None")
        tried = [check_share(f"balances[{index}]", value) for index, value in enumerate(balances)]
        if not tried:
            raise ValueError("balances must hold at least one number, got none")
        options = MatchOptions(
            mode=mode,
            space="dual",
            shrink=shrink,
            budget=budget,
            expand=expand,
            random_state=random_state,
            max_sweeps=max_sweeps,
            patience=patience,
            forward=forward,
            precision=precision,
            progress=ranks.progress(progress),
        )
        if refit:
            _check_refit_data(data, group)
    inputs = prepare(models, spec, data, run=True, task_heads=task_heads, forward=forward, verify=verify, ranks=ranks)
    with ranks.step("checking the arguments"):
        division = inputs.divide(stop_at)
    ranks.check_same({"stop_at": repr(stop_at), "balances": repr(tried)})
    prepared = PreparedMatching(inputs, options, weights, ranks)
    best: MergeResult | None = None
    best_score = -float("inf")
    scores: dict[float, float] = {}
    for balance in tried:
        matching = prepared.at(balance)
        with prepared.phases.timed("merging"):
            result = _merged(inputs, prepared, matching, division, weights, ranks)
        if refit:
            with prepared.phases.timed("refit"):
                result = _refitted(result, inputs, data, options)
        with prepared.phases.timed("scoring"):
            with ranks.step("scoring a merge"):
                own = check_number("the score", score(result))
            all_scores = ranks.gather_objects(own, "scoring a merge")
            scores[balance] = math.fsum(all_scores) / len(all_scores)
        if best is None or scores[balance] > best_score:
            best, best_score = result, scores[balance]
    assert best is not None  # there is at least one balance
    return replace(best, scores=scores, timings=dict(prepared.phases.seconds))
