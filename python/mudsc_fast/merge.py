"""Models, a specification and data in; a merged model and a report out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from mudsc_fast._checks import check_choice, check_finite, check_int, check_number, check_share, check_tensor
from mudsc_fast._forward import Forward
from mudsc_fast.matching.activation import MatchingStatistics, collect_statistics
from mudsc_fast.matching.apply import merge_state_dicts, task_tensors
from mudsc_fast.matching.node import BLOCKS_OF_MODE, Mode, NodeMatching, align_units, zip_all_units
from mudsc_fast.matching.partial import Division, divide
from mudsc_fast.matching.sweep import SweepResult, sweep
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.ops.assignment import Assignment
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.spec.permutation_spec import PermutationSpec

Space = Literal["weight", "activation", "dual"]

#: What ``balance="search"`` tries.
DEFAULT_BALANCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class MergeResult:
    """A merged network and how it came about.

    Attributes
    ----------
    model
        A new module with the merged parameters and buffers, or None where only state dicts were given or where some
        tensors stay per task. Where it has BatchNorm layers, :func:`mudsc_fast.reset_batch_norm` gives it statistics
        of its own.
    state_dict
        The merged tensors by name: all of them, or those of the trunk that all tasks share.
    task_models
        For each task a module with the trunk and the tensors of its own: new modules where some tensors stay per task,
        each with a copy of the trunk, else `model` for every task. Empty where only state dicts were given.
    task_state_dicts
        For each task all its tensors by name. Those of the trunk are the tensors of `state_dict`, not copies.
    spec
        The specification that was given.
    weights
        The models' shares in the result.
    matching
        For each node how the units of all models correspond. Nodes behind the stop of a partial merge are matched but
        not merged; nodes of heads alone are not matched.
    objectives
        Mean similarity over the nodes after each sweep; empty without sweeps.
    timings
        Seconds by phase: ``"activations"``, ``"weight similarity"``, ``"matching"``, ``"merging"`` and, of a search,
        ``"scoring"``; of a search for all its merges together.
    unmatched_tensors
        Names of the tensors that the specification does not name; they were averaged in their own order.
    repaired_layers
        Names of the layers that :func:`mudsc_fast.repair` rescaled.
    balance
        Share of the weight similarity, where the units were matched in the dual space.
    scores
        Of a search: the score of each balance tried.
    """

    model: nn.Module | None
    state_dict: dict[str, Tensor]
    task_models: tuple[nn.Module, ...]
    task_state_dicts: tuple[dict[str, Tensor], ...]
    spec: PermutationSpec
    weights: tuple[float, ...]
    matching: dict[str, NodeMatching]
    objectives: list[float]
    timings: dict[str, float]
    unmatched_tensors: tuple[str, ...]
    repaired_layers: tuple[str, ...] = ()
    balance: float | None = None
    scores: Mapping[float, float] = field(default_factory=dict)

    @property
    def num_shared(self) -> int:
        """Number of entries of the tensors that all tasks share."""
        return sum(tensor.numel() for tensor in self.state_dict.values())

    @property
    def num_per_task(self) -> tuple[int, ...]:
        """Number of entries of the tensors that each task keeps for itself."""
        return tuple(
            sum(tensor.numel() for name, tensor in tensors.items() if name not in self.state_dict)
            for tensors in self.task_state_dicts
        )

    def report(self) -> str:
        """Return a table of the nodes, what is shared, and the time that each phase took."""
        width = max(len("node"), *(len(node) for node in self.matching))
        lines = [f"{'node':<{width}}  {'units':>7}  {'similarity before':>17}  {'after':>7}"]
        for node, match in self.matching.items():
            lines.append(
                f"{node:<{width}}  {match.num_clusters:>7}  {match.similarity_before:>17.4f}  {match.similarity:>7.4f}"
            )
        lines.append("")
        if self.objectives:
            lines.append(f"{len(self.objectives)} sweeps, best mean similarity {max(self.objectives):.4f}")
        if any(self.num_per_task):
            lines.append(f"entries shared: {self.num_shared}; per task: " + ", ".join(map(str, self.num_per_task)))
        if self.scores:
            lines.append("scores by balance: " + ", ".join(f"{b:g}: {score:.4g}" for b, score in self.scores.items()))
        if self.repaired_layers:
            lines.append("rescaled: " + ", ".join(self.repaired_layers))
        lines.append("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.timings.items()))
        if self.unmatched_tensors:
            lines.append("averaged without matching: " + ", ".join(self.unmatched_tensors))
        return "\n".join(lines)


def merge(
    models: Sequence[nn.Module] | Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    data: Iterable[Any] | MatchingStatistics | None = None,
    *,
    mode: Mode = "align",
    balance: float | Literal["search"] = 0.5,
    space: Space | None = None,
    score: Callable[[MergeResult], float] | None = None,
    balances: Sequence[float] = DEFAULT_BALANCES,
    weights: Sequence[float] | None = None,
    shrink: float = 0.5,
    budget: float = 1.0,
    stop: str | Sequence[str] = (),
    heads: str | Sequence[str] = (),
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    forward: Forward | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> MergeResult:
    """Merge networks of one architecture into one of the same size, without training.

    Units of independently trained networks correspond only up to a permutation. They are matched by their similarity
    in weight space, in activation space, or in both at once (Xu et al., "Training-Free Pretrained Model Merging", CVPR
    2024), and averaged after. Merging may stop inside the network: what lies behind stays with each task and reads the
    merged units (Stoica et al., "ZipIt! Merging Models from Different Tasks without Training", ICLR 2024).

    Parameters
    ----------
    models
        Two or more modules, or state dicts where no activations are needed. Units of the result are in the order of
        the first model (align). Not modified.
    spec
        Which axes of which tensors belong together.
    data
        Batches to run the models on, as for :func:`mudsc_fast.collect_statistics`, or what that function returned
        for these models and this `spec`. Not read where `space` is ``"weight"``.
    mode
        ``"align"``: each model gets a permutation onto the first. ``"zip"``: units of all models, also of one model,
        are clustered.
    balance
        Share of the weight similarity in the dual space, in [0, 1]; or ``"search"`` for the best of `balances`.
    space
        ``"weight"``, ``"activation"`` or ``"dual"``; by default dual if there is data, else weight.
    score
        Of a search: how good a merge is; the higher, the better. Called once for each balance; use data that the
        networks were trained on, not the data that the result is judged by.
    balances
        Of a search: what to try, one number in [0, 1] or more. Activations are collected and matched once for all.
    weights
        The models' shares in the result, one positive number each, summing to 1; equal by default.
    shrink, budget
        Of the zip: how a cluster's similarities shrink when it grows, and which share of a model's merges may be
        within the model; as in :func:`mudsc_fast.ops.zip_units`.
    stop
        Where merging stops, by default nowhere: a node, or tensors by their name or its beginning up to a dot (a
        module). Tensors up to and with these, in the order of the axes map, are merged into one trunk; of those behind
        every task keeps its own. A node's last tensors are those of the last layer that produces it: with a residual
        stream, of the last block that writes to it. Where parts of a network share no node, as two towers, each can be
        given a stop; parts without one are merged as a whole. A tensor with two names (an embedding table that is the
        output layer too) is merged if one of them is. Matching is that of the whole network.
    heads
        Tensors to keep per task besides, by their name or its beginning up to a dot. They do not count in the
        similarity. Output layers that differ in size between the models are found without being named.
    random_state
        Seed of the order in which sweeps visit the nodes. The result depends on nothing else that is random.
    max_sweeps, patience
        End of the sweeps: at most so many, or so many in a row without improvement.
    forward
        Runs a model on a batch, where batches are neither tensors nor dicts nor tuples that begin with one.
    precision
        ``"bfloat16"`` for faster and coarser products of similarities where the processor has instructions for them;
        see :class:`mudsc_fast.ops.CorrelationAccumulator`. Merged weights are averaged in full precision all the same.
    progress
        Whether to show progress bars.

    Returns
    -------
    MergeResult

    Raises
    ------
    ValueError
        If models differ in tensors, shapes (other than of heads) or devices, the specification does not fit them,
        `stop` or `heads` name nothing, the data yields nothing, a number is out of range, or a similarity is not
        finite.
    TypeError
        If an argument is of the wrong type, the models' dtypes differ, or activations are asked of state dicts.
    """
    check_choice("mode", mode, get_args(Mode))
    space = ("weight" if data is None else "dual") if space is None else space
    check_choice("space", space, get_args(Space))
    if not isinstance(spec, PermutationSpec):
        raise TypeError(f"spec must be a PermutationSpec, got {type(spec).__name__}")
    candidates = _checked_balances(balance, balances, score, space)
    prepared = prepare_matching(
        models,
        spec,
        data,
        mode=mode,
        space=space,
        weights=weights,
        shrink=shrink,
        budget=budget,
        stop=stop,
        heads=heads,
        random_state=random_state,
        max_sweeps=max_sweeps,
        patience=patience,
        forward=forward,
        precision=precision,
        progress=progress,
    )
    state_dicts, division, phases = prepared.state_dicts, prepared.division, prepared.phases

    def merged(share: float) -> MergeResult:
        found = prepared.at(share)
        with phases.timed("merging"):
            tensors = merge_state_dicts(state_dicts, spec, found.matching, prepared.weights, division.shared)
            tasks = _task_state_dicts(state_dicts, spec, found.matching, division, tensors)
            task_models = _task_models(models, tasks, division)
        return MergeResult(
            model=None if division.per_task or not task_models else task_models[0],
            state_dict=tensors,
            task_models=task_models,
            task_state_dicts=tasks,
            spec=spec,
            weights=tuple(prepared.weights),
            matching={node: found.matching[node] for node in division.comparable.nodes},
            objectives=found.objectives,
            timings=phases.seconds,
            unmatched_tensors=tuple(
                name for name, tensor in tensors.items() if tensor.is_floating_point() and name not in spec.layouts
            ),
            balance=share if space == "dual" else None,
        )

    return merged(candidates[0]) if score is None else _best(merged, candidates, score, phases)


@dataclass(frozen=True)
class PreparedMatching:
    """All that matching needs but for the balance.

    Attributes
    ----------
    state_dicts
        The models' tensors.
    division
        Which of them are merged.
    weights
        The models' shares in the result.
    phases
        Seconds by phase so far.
    at
        Matches all nodes at a balance; called once for each.
    """

    state_dicts: Sequence[Mapping[str, Tensor]]
    division: Division
    weights: Sequence[float]
    phases: Phases
    at: Callable[[float], SweepResult]


def prepare_matching(
    models: Sequence[nn.Module] | Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    data: Iterable[Any] | MatchingStatistics | None = None,
    *,
    mode: Mode = "align",
    space: Space,
    weights: Sequence[float] | None = None,
    shrink: float = 0.5,
    budget: float = 1.0,
    stop: str | Sequence[str] = (),
    heads: str | Sequence[str] = (),
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    forward: Forward | None = None,
    precision: Precision = "float32",
    progress: bool = False,
) -> PreparedMatching:
    """Check what is to be merged and compute what does not depend on the balance; arguments are those of :func:`merge`.

    State dicts may make a tensor when it is asked for, as those of files do: each is asked for again and again, and
    kept no longer than it is needed.
    """
    check_int("max_sweeps", max_sweeps, 1)
    check_int("patience", patience, 1)
    state_dicts = _checked_state_dicts(models)
    division = divide(state_dicts, spec, _names("stop", stop), _names("heads", heads))
    _check_same_shapes(state_dicts, division)
    for state_dict in state_dicts:
        spec.units(state_dict)
    _check_finite_tensors(state_dicts, spec)
    model_weights = _checked_weights(weights, len(models))

    comparable = division.comparable
    phases = Phases()
    blocks = BLOCKS_OF_MODE[mode]
    solutions: dict[str, Assignment] = {}

    def match(similarities: Mapping[str, Tensor], groups: int) -> dict[str, NodeMatching]:
        with phases.timed("matching"):
            if mode == "align":
                return align_units(similarities, groups, earlier=solutions)
            return zip_all_units(similarities, len(models), groups, shrink=shrink, budget=budget)

    activations = None
    start: dict[str, NodeMatching] = {}
    if space != "weight":
        with phases.timed("activations"):
            activations = _activations(models, spec, comparable, data, mode, forward, precision, progress)
        for bundle in comparable.bundles:
            similarities = {node: activations.similarity(node, blocks) for node in bundle}
            start.update(match(similarities, comparable.groups(bundle[0]).count))
    weight_similarity = WeightSimilarity(state_dicts, comparable, blocks, model_weights, precision=precision)

    def at(share: float) -> SweepResult:
        if space == "activation":
            return SweepResult(start, [])

        def similarity_of(node: str, current: Mapping[str, NodeMatching]) -> Tensor:
            with phases.timed("weight similarity"):
                if activations is None:
                    return weight_similarity(node, current)
                return weight_similarity(node, current, activations.similarity(node, blocks), share)

        return sweep(
            comparable,
            similarity_of,
            match,
            start,
            random_state=random_state,
            max_sweeps=max_sweeps,
            patience=patience,
            progress=progress,
        )

    return PreparedMatching(state_dicts, division, model_weights, phases, at)


def _best(
    merged: Callable[[float], MergeResult],
    balances: Sequence[float],
    score: Callable[[MergeResult], float],
    phases: Phases,
) -> MergeResult:
    """Return the merge of the highest score, the first of several, with the scores of all."""
    best: MergeResult | None = None
    scores: dict[float, float] = {}
    for balance in balances:
        result = merged(balance)
        with phases.timed("scoring"):
            scores[balance] = check_number("the score", score(result))
        if best is None or scores[balance] > scores[cast(float, best.balance)]:
            best = result
    assert best is not None  # there is at least one balance
    return replace(best, scores=scores)


class Phases:
    """Seconds by phase, in the order in which the phases began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time that the enclosed code takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def _activations(
    models: Sequence[Any],
    spec: PermutationSpec,
    comparable: PermutationSpec,
    data: Iterable[Any] | MatchingStatistics | None,
    mode: Mode,
    forward: Forward | None,
    precision: Precision,
    progress: bool,
) -> MatchingStatistics:
    if isinstance(data, MatchingStatistics):
        if data.spec not in (spec, comparable) or data.num_models != len(models):
            raise ValueError(
                f"data was computed for {data.num_models} models with {data.spec!r}, "
                f"got {len(models)} models with {spec!r}"
            )
        return data
    if data is None:
        raise ValueError("data must be given to match in activation space, got None")
    if not all(isinstance(model, nn.Module) for model in models):
        raise TypeError("models must be modules to match in activation space, got state dicts")
    return collect_statistics(
        models,
        comparable,
        data,
        blocks=BLOCKS_OF_MODE[mode],
        forward=forward,
        precision=precision,
        progress=progress,
    )


def _checked_state_dicts(models: Sequence[Any]) -> list[Mapping[str, Tensor]]:
    if isinstance(models, (nn.Module, Mapping)) or not isinstance(models, Sequence):
        raise TypeError(f"models must be a sequence of modules or state dicts, got {type(models).__name__}")
    if len(models) < 2:
        raise ValueError(f"models must hold at least two models, got {len(models)}")
    kinds = {isinstance(model, nn.Module) for model in models}
    if len(kinds) != 1 or not all(isinstance(model, (nn.Module, Mapping)) for model in models):
        raise TypeError(
            "models must be all modules or all state dicts, got " + ", ".join(type(model).__name__ for model in models)
        )
    state_dicts = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
    for index, other in enumerate(state_dicts[1:], start=1):
        _check_same_tensors(state_dicts[0], other, index)
    return state_dicts


def _check_same_tensors(first: Mapping[str, Tensor], other: Mapping[str, Tensor], index: int) -> None:
    missing = [name for name in first if name not in other]
    unexpected = [name for name in other if name not in first]
    if missing or unexpected:
        raise ValueError(
            f"models[{index}] must have the tensors of models[0]: missing {missing[:5]}, unexpected {unexpected[:5]} "
            f"({len(missing)} and {len(unexpected)} in all)"
        )
    for name, tensor in first.items():
        for state_dict in (first, other):
            if not isinstance(state_dict[name], Tensor):
                raise TypeError(f"{name!r} must be a tensor in every model, got {type(state_dict[name]).__name__}")
        found = other[name]
        if found.dtype != tensor.dtype:
            raise TypeError(f"{name!r} has dtype {found.dtype} in models[{index}], but {tensor.dtype} in models[0]")
        if found.device != tensor.device:
            raise ValueError(
                f"{name!r} is on device {found.device} in models[{index}], but on {tensor.device} in models[0]"
            )


def _check_same_shapes(state_dicts: Sequence[Mapping[str, Tensor]], division: Division) -> None:
    for name, tensor in state_dicts[0].items():
        for index, other in enumerate(state_dicts):
            if name not in division.heads and other[name].shape != tensor.shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(other[name].shape)} in models[{index}], but {tuple(tensor.shape)} in "
                    "models[0]: name it in heads to keep it per task"
                )


def _check_finite_tensors(state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec) -> None:
    for index, state_dict in enumerate(state_dicts):
        for name in spec.layouts:
            check_finite(f"{name!r} of models[{index}]", check_tensor(f"{name!r} of models[{index}]", state_dict[name]))


def _checked_balances(
    balance: float | Literal["search"], balances: Sequence[float], score: object, space: Space
) -> list[float]:
    """Return the balances to try: the one given, or those to search."""
    if balance != "search":
        if isinstance(balance, str):
            raise TypeError(f"balance must be a number in [0, 1] or 'search', got {balance!r}")
        if score is not None:
            raise ValueError(f"score is of a search: it needs balance='search', got {balance!r}")
        return [check_share("balance", balance)]
    if not callable(score):
        raise TypeError(f"score must be a function of a MergeResult to search the balance, got {type(score).__name__}")
    if space != "dual":
        raise ValueError(f"balance='search' needs the dual space: data, and no other space, got {space!r}")
    checked = [check_share(f"balances[{index}]", value) for index, value in enumerate(balances)]
    if not checked:
        raise ValueError("balances must hold at least one number, got none")
    return checked


def _checked_weights(weights: Sequence[float] | None, num_models: int) -> list[float]:
    if weights is None:
        return [1.0 / num_models] * num_models
    checked = [check_number(f"weights[{index}]", weight) for index, weight in enumerate(weights)]
    if len(checked) != num_models:
        raise ValueError(f"weights must have one entry per model ({num_models}), got {len(checked)}")
    if min(checked) <= 0 or abs(sum(checked) - 1) > 1e-6:
        raise ValueError(f"weights must be positive and sum to 1, got {checked}")
    return checked


def _names(argument: str, value: str | Sequence[str]) -> list[str]:
    names = [value] if isinstance(value, str) else list(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a name or a sequence of names, got {type(name).__name__}")
    return names


def _task_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    matching: Mapping[str, NodeMatching],
    division: Division,
    merged: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], ...]:
    """Return for each model all tensors, merged or its own, in the order of the first model."""
    tasks = []
    for index, state_dict in enumerate(state_dicts):
        own = task_tensors(state_dict, index, spec, matching, division.shared, division.per_task)
        tasks.append({name: merged[name] if name in merged else own[name] for name in state_dicts[0]})
    return tuple(tasks)


def _task_models(
    models: Sequence[Any], tasks: Sequence[Mapping[str, Tensor]], division: Division
) -> tuple[nn.Module, ...]:
    if not isinstance(models[0], nn.Module):
        return ()
    if not division.per_task:
        return (_with_state(models[0], tasks[0]),) * len(models)
    return tuple(_with_state(model, task) for model, task in zip(models, tasks, strict=True))


def _with_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.load_state_dict(state_dict)
    return copied
