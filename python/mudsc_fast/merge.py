"""Models, a specification and data in; a merged model and a report out."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mudsc_fast._checks import check_choice, check_finite, check_int, check_number, check_tensor
from mudsc_fast.matching.activation import ActivationSimilarity, activation_similarity
from mudsc_fast.matching.apply import merge_state_dicts
from mudsc_fast.matching.node import BLOCKS_OF_MODE, Mode, NodeMatching, align_units, zip_all_units
from mudsc_fast.matching.running import Forward
from mudsc_fast.matching.sweep import sweep
from mudsc_fast.matching.weight import WeightSimilarity
from mudsc_fast.spec.axes import PermutationSpec

Space = Literal["weight", "activation", "dual"]


@dataclass(frozen=True)
class MergeResult:
    """A merged network and how it came about.

    Attributes
    ----------
    model
        A new module with the merged parameters and buffers, or None where only state dicts were given. Where it has
        BatchNorm layers, :func:`mudsc_fast.reset_batch_norm` gives it statistics of its own.
    state_dict
        The merged tensors by name.
    matching
        For each node how the units of all models correspond.
    objectives
        Mean similarity over the nodes after each sweep; empty without sweeps.
    timings
        Seconds by phase: ``"activations"``, ``"weight similarity"``, ``"matching"``, ``"merging"``.
    unmatched_tensors
        Names of the tensors that the specification does not name; they were averaged in their own order.
    """

    model: nn.Module | None
    state_dict: dict[str, Tensor]
    matching: dict[str, NodeMatching]
    objectives: list[float]
    timings: dict[str, float]
    unmatched_tensors: tuple[str, ...]

    def report(self) -> str:
        """Return a table of the nodes and the time that each phase took."""
        width = max(len("node"), *(len(node) for node in self.matching))
        lines = [f"{'node':<{width}}  {'units':>7}  {'similarity before':>17}  {'after':>7}"]
        for node, match in self.matching.items():
            lines.append(
                f"{node:<{width}}  {match.num_clusters:>7}  {match.similarity_before:>17.4f}  {match.similarity:>7.4f}"
            )
        lines.append("")
        if self.objectives:
            lines.append(f"{len(self.objectives)} sweeps, best mean similarity {max(self.objectives):.4f}")
        lines.append("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.timings.items()))
        if self.unmatched_tensors:
            lines.append("averaged without matching: " + ", ".join(self.unmatched_tensors))
        return "\n".join(lines)


def merge(
    models: Sequence[nn.Module] | Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    data: Iterable[Any] | ActivationSimilarity | None = None,
    *,
    mode: Mode = "align",
    balance: float = 0.5,
    space: Space | None = None,
    weights: Sequence[float] | None = None,
    shrink: float = 0.5,
    budget: float = 1.0,
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    forward: Forward | None = None,
    progress: bool = False,
) -> MergeResult:
    """Merge networks of one architecture into one of the same size, without training.

    Units of independently trained networks correspond only up to a permutation. They are matched by their similarity
    in weight space, in activation space, or in both at once (Xu et al., "Training-Free Pretrained Model Merging", CVPR
    2024), and averaged after.

    Parameters
    ----------
    models
        Two or more modules, or state dicts where no activations are needed. Units of the result are in the order of
        the first model (align). Not modified.
    spec
        Which axes of which tensors belong together.
    data
        Batches to run the models on, as for :func:`mudsc_fast.activation_similarity`, or what that function returned
        for these models and this `spec`. Not read where `space` is ``"weight"``.
    mode
        ``"align"``: each model gets a permutation onto the first. ``"zip"``: units of all models, also of one model,
        are clustered.
    balance
        Share of the weight similarity in the dual space, in [0, 1].
    space
        ``"weight"``, ``"activation"`` or ``"dual"``; by default dual if there is data, else weight.
    weights
        The models' shares in the result, one positive number each, summing to 1; equal by default.
    shrink, budget
        Of the zip: how a cluster's similarities shrink when it grows, and which share of a model's merges may be
        within the model; as in :func:`mudsc_fast.ops.zip_units`.
    random_state
        Seed of the order in which sweeps visit the nodes. The result depends on nothing else that is random.
    max_sweeps, patience
        End of the sweeps: at most so many, or so many in a row without improvement.
    forward
        Runs a model on a batch, where batches are neither tensors nor dicts nor tuples that begin with one.
    progress
        Whether to show progress bars.

    Returns
    -------
    MergeResult

    Raises
    ------
    ValueError
        If models differ in tensors, shapes or devices, the specification does not fit them, the data yields nothing, a
        number is out of range, or a similarity is not finite.
    TypeError
        If an argument is of the wrong type, the models' dtypes differ, or activations are asked of state dicts.
    """
    check_choice("mode", mode, get_args(Mode))
    space = ("weight" if data is None else "dual") if space is None else space
    check_choice("space", space, get_args(Space))
    if not isinstance(spec, PermutationSpec):
        raise TypeError(f"spec must be a PermutationSpec, got {type(spec).__name__}")
    balance = check_number("balance", balance)
    if not 0.0 <= balance <= 1.0:
        raise ValueError(f"balance must be in [0, 1], got {balance}")
    check_int("max_sweeps", max_sweeps, 1)
    check_int("patience", patience, 1)
    state_dicts = _checked_state_dicts(models)
    spec.units(state_dicts[0])
    _check_finite_tensors(state_dicts, spec)
    model_weights = _checked_weights(weights, len(models))

    phases = _Phases()
    blocks = BLOCKS_OF_MODE[mode]

    def match(similarities: Mapping[str, Tensor], groups: int) -> dict[str, NodeMatching]:
        with phases.timed("matching"):
            if mode == "align":
                return align_units(similarities, groups)
            return zip_all_units(similarities, len(models), groups, shrink=shrink, budget=budget)

    activations = None
    matching: dict[str, NodeMatching] = {}
    objectives: list[float] = []
    if space != "weight":
        with phases.timed("activations"):
            activations = _activations(models, spec, data, mode, forward, progress)
        for bundle in spec.bundles:
            similarities = {node: activations.of(node, blocks) for node in bundle}
            matching.update(match(similarities, spec.groups(bundle[0]).count))
    if space != "activation":
        weight_similarity = WeightSimilarity(state_dicts, spec, blocks, model_weights)

        def similarity_of(node: str, current: Mapping[str, NodeMatching]) -> Tensor:
            with phases.timed("weight similarity"):
                activation = None if activations is None else activations.of(node, blocks)
                return weight_similarity(node, current, activation, balance)

        swept = sweep(
            spec,
            similarity_of,
            match,
            matching,
            random_state=random_state,
            max_sweeps=max_sweeps,
            patience=patience,
            progress=progress,
        )
        matching, objectives = swept.matching, swept.objectives

    with phases.timed("merging"):
        merged = merge_state_dicts(state_dicts, spec, matching, model_weights)
        model = _with_state(models[0], merged) if isinstance(models[0], nn.Module) else None
    return MergeResult(
        model=model,
        state_dict=merged,
        matching={node: matching[node] for node in spec.nodes},
        objectives=objectives,
        timings=phases.seconds,
        unmatched_tensors=tuple(
            name for name, tensor in state_dicts[0].items() if tensor.is_floating_point() and name not in spec.layouts
        ),
    )


class _Phases:
    """Seconds by phase, in the order in which the phases began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def _activations(
    models: Sequence[Any],
    spec: PermutationSpec,
    data: Iterable[Any] | ActivationSimilarity | None,
    mode: Mode,
    forward: Forward | None,
    progress: bool,
) -> ActivationSimilarity:
    if isinstance(data, ActivationSimilarity):
        if data.spec != spec or data.num_models != len(models):
            raise ValueError(
                f"data was computed for {data.num_models} models with {data.spec!r}, "
                f"got {len(models)} models with {spec!r}"
            )
        return data
    if data is None:
        raise ValueError("data must be given to match in activation space, got None")
    if not all(isinstance(model, nn.Module) for model in models):
        raise TypeError("models must be modules to match in activation space, got state dicts")
    return activation_similarity(models, spec, data, blocks=BLOCKS_OF_MODE[mode], forward=forward, progress=progress)


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
        if found.shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(found.shape)} in models[{index}], but {tuple(tensor.shape)} in models[0]"
            )
        if found.dtype != tensor.dtype:
            raise TypeError(f"{name!r} has dtype {found.dtype} in models[{index}], but {tensor.dtype} in models[0]")
        if found.device != tensor.device:
            raise ValueError(
                f"{name!r} is on device {found.device} in models[{index}], but on {tensor.device} in models[0]"
            )


def _check_finite_tensors(state_dicts: Sequence[Mapping[str, Tensor]], spec: PermutationSpec) -> None:
    for index, state_dict in enumerate(state_dicts):
        for name in spec.layouts:
            check_finite(f"{name!r} of models[{index}]", check_tensor(f"{name!r} of models[{index}]", state_dict[name]))


def _checked_weights(weights: Sequence[float] | None, num_models: int) -> list[float]:
    if weights is None:
        return [1.0 / num_models] * num_models
    checked = [check_number(f"weights[{index}]", weight) for index, weight in enumerate(weights)]
    if len(checked) != num_models:
        raise ValueError(f"weights must have one entry per model ({num_models}), got {len(checked)}")
    if min(checked) <= 0 or abs(sum(checked) - 1) > 1e-6:
        raise ValueError(f"weights must be positive and sum to 1, got {checked}")
    return checked


def _with_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.load_state_dict(state_dict)
    return copied
