"""Results of matching and merging."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast import _matching_file
from mudsc_fast._checks import check_int, check_number
from mudsc_fast._models import Model, Models, Networks, as_given, checksum, fingerprint, with_state
from mudsc_fast._progress import progress_bar
from mudsc_fast._tables import as_html, as_text, node_rows
from mudsc_fast._tensors import tied_tensors
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.report import Distribution
from mudsc_fast.distributed.sharded import Sharded, is_sharded
from mudsc_fast.matching.apply import merge_state_dicts, permute_state_dict, task_tensors
from mudsc_fast.matching.checks import check_dtypes
from mudsc_fast.matching.node import Mode, NodeMatching, effective_weights
from mudsc_fast.matching.partial import Division
from mudsc_fast.options import Space
from mudsc_fast.prepare import Names, network_of, prepare
from mudsc_fast.spec.permutation_spec import PermutationSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Matching(Mapping[str, NodeMatching]):
    """How the units of several networks correspond: a mapping from the nodes of a spec to :class:`NodeMatching`.

    Made by :func:`match`. It merges and aligns the networks any number of times without matching them again. It can be
    saved and loaded. ``print(matching)`` shows the table of nodes.

    Attributes
    ----------
    spec
        The spec of the networks.
    nodes
        For each node how the units correspond.
    mode, space
        How the units were matched.
    balance
        Share of the weight similarity, where the units were matched in the dual space; else None.
    weights
        The models' shares that :meth:`merge` uses by default.
    objectives
        Mean similarity over the nodes after each sweep; empty without sweeps.
    timings
        Seconds by phase: ``"activations"``, ``"weight similarity"`` and ``"matching"``.
    shapes
        The shapes of the tensors that were matched: networks to merge or align must have them.
    task_heads
        The tensors that were not matched because every task keeps its own.
    distribution
        How the processes of a group shared the work; None for one process, and not saved.
    fingerprints
        Checksums of the tensors of each network, by which networks in another order are known.
    """

    spec: PermutationSpec
    nodes: Mapping[str, NodeMatching]
    mode: Mode
    space: Space
    balance: float | None
    weights: tuple[float, ...]
    objectives: list[float]
    timings: dict[str, float]
    shapes: Mapping[str, tuple[int, ...]]
    task_heads: tuple[str, ...] = ()
    distribution: Distribution | None = None
    fingerprints: tuple[int, ...] = ()

    # Compare by identity: a mapping would compare its entries, and tensors have no single truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, node: str) -> NodeMatching:
        return self.nodes[node]

    def __iter__(self) -> Iterator[str]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def num_models(self) -> int:
        """Number of networks that were matched."""
        return len(self.weights)

    def merge(
        self,
        models: Models,
        *,
        weights: Sequence[float] | None = None,
        stop_at: Names = (),
        task_heads: Names | None = None,
    ) -> MergeResult:
        """Merge networks by this matching.

        Parameters
        ----------
        models
            The networks that were matched, in the same order; or others with the same tensors and the same order of
            units, such as later checkpoints of one training run.
        weights
            The models' shares in the result, numbers of at least 0 that sum to 1; by default those of the matching.
        stop_at
            Where merging stops, as for :func:`mudsc_fast.merge`.
        task_heads
            Tensors to keep per task besides, as for :func:`mudsc_fast.merge`; by default those of the matching.

        Returns
        -------
        MergeResult

        Raises
        ------
        ValueError
            If the models are not as many as were matched, are in another order, or their tensors have other names or
            shapes, `stop_at` or `task_heads` name nothing, or the weights are negative or do not sum to 1.
        TypeError
            If an argument is of the wrong type.
        """
        heads = self.task_heads if task_heads is None else task_heads
        prepared = prepare(models, self.spec, None, task_heads=heads)
        networks = prepared.networks
        if len(networks) != self.num_models:
            raise ValueError(f"models must be the {self.num_models} models that were matched, got {len(networks)}")
        for index, state_dict in enumerate(networks.state_dicts):
            self._check_fits(f"models[{index}]", state_dict)
            self._check_order(f"models[{index}]", state_dict, index)
        division = prepared.divide(stop_at)
        unmatched = [node for node in division.comparable.nodes if node not in self.nodes]
        if unmatched:
            raise ValueError(
                f"task_heads must name the tensors of node {unmatched[0]!r}, which was not matched: the matching was "
                f"computed with task_heads={list(self.task_heads)}"
            )
        return merge_matched(networks, self, division, weights)

    def permute(self, model: Model, index: int) -> Any:
        """Return one network with its units in the order of the first network; its outputs stay the same.

        Parameters
        ----------
        model
            The network: a module, a state dict, or the path of a checkpoint. Not modified.
        index
            Which of the networks that were matched it is; number 0 keeps its order.

        Returns
        -------
        A new module for a module, else a new state dict.

        Raises
        ------
        ValueError
            If the units were not aligned but zipped, there is no such index, the tensors have other names or shapes, or
            they are those of another one of the networks that were matched.
        TypeError
            If an argument is of the wrong type.
        """
        if self.mode != "align":
            raise ValueError(
                f"permute needs a matching with mode='align', got mode={self.mode!r}: clusters do not order the units "
                "of one model; use merge, or match again"
            )
        index = check_int("index", index, 0)
        if index >= self.num_models:
            raise ValueError(
                f"index must be below the number of models that were matched ({self.num_models}), got {index}"
            )
        network = network_of(model, self.spec)
        tensors = network.state_dicts[0]
        self._check_fits("model", tensors)
        self._check_order("model", tensors, index)
        orders = {}
        for node, matched in self.nodes.items():
            permutations = matched.permutations
            assert permutations is not None  # of an alignment
            orders[node] = permutations[index]
        lacking = {name for name in self.spec.layouts if name not in tensors}  # task heads of other networks
        spec = self.spec.without(lacking) if lacking else self.spec
        permuted = as_given(permute_state_dict(tensors, spec, orders), network, 0)
        return with_state(model, permuted) if isinstance(model, nn.Module) else permuted

    def without_matching(self) -> Matching:
        """Return the matching of equally numbered units, which merges as a plain average does."""
        nodes = {}
        for node, matched in self.nodes.items():
            units = torch.arange(matched.cluster_of_unit.shape[1], device=matched.cluster_of_unit.device)
            nodes[node] = NodeMatching(
                mode="align",
                cluster_of_unit=units.expand(matched.cluster_of_unit.shape).contiguous(),
                num_clusters=len(units),
                similarity_before=matched.similarity_before,
                similarity=matched.similarity_before,
            )
        return replace(self, nodes=nodes, mode="align", objectives=[], timings={})

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the mean similarity of paired units of each node, before and after matching.

        Parameters
        ----------
        axes
            Where to draw; by default in a new figure. Needs matplotlib (the extra ``plot``).
        """
        from mudsc_fast.plot import plot_similarities  # imported only for plots

        return plot_similarities(self.nodes, axes)

    def save(self, path: _matching_file.PathLike) -> None:
        """Write the matching to a .safetensors file; a file that cannot be written completely is left as it was.

        Raises
        ------
        OSError
            If the file cannot be written.
        ValueError
            If its name does not end in ``.safetensors``.
        """
        fields = {name: getattr(self, name) for name in _matching_file.FIELDS}
        _matching_file.save(path, self.spec, self.nodes, fields)

    @classmethod
    def load(cls, path: _matching_file.PathLike, *, device: torch.device | str = "cpu") -> Matching:
        """Return the matching in a file of :meth:`save`.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is no such file, or damaged.
        """
        return cls(**_matching_file.load(path, torch.device(device)))

    def __str__(self) -> str:
        """Return a table of the nodes and the time that each phase took."""
        return as_text(node_rows(self.nodes), self._notes())

    def __repr__(self) -> str:
        balance = "" if self.balance is None else f", balance={self.balance:g}"
        return (
            f"Matching({len(self)} nodes, {self.num_models} models, mode={self.mode!r}, space={self.space!r}{balance})"
        )

    def _repr_html_(self) -> str:
        return as_html(node_rows(self.nodes), self._notes())

    def _notes(self) -> list[str]:
        notes = []
        if self.objectives:
            notes.append(f"{len(self.objectives)} sweeps, best mean similarity {max(self.objectives):.4f}")
        notes.append("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.timings.items()))
        return notes

    def _check_fits(self, argument: str, tensors: Mapping[str, Tensor]) -> None:
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise ValueError(f"{argument} must have the tensors that were matched, but has no {name!r}")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"{argument} must have the tensors that were matched, but {name!r} has shape "
                    f"{tuple(tensors[name].shape)}, expected {shape}"
                )

    def _check_order(self, argument: str, tensors: Mapping[str, Tensor], index: int) -> None:
        """Raise a ValueError if a network is another one of those that were matched than the one at `index`."""
        if not self.fingerprints:
            return
        found = checksum(tensors, self.shapes)
        if found != self.fingerprints[index] and found in self.fingerprints:
            raise ValueError(
                f"{argument} must be model {index} of those that were matched, got model "
                f"{self.fingerprints.index(found)}: pass the models in the order in which they were matched"
            )


@dataclass(frozen=True)
class RefitLayer:
    """How :func:`mudsc_fast.refit` fitted a layer.

    Attributes
    ----------
    name
        Of the layer.
    inputs, outputs
        Their numbers; inputs of a convolution count once for each entry of its kernel.
    samples
        Number of rows of the least-squares problem.
    ridge
        The ridge chosen; None where held-out samples say that the layer is best left as it is.
    error_before, error_after
        Mean squared distance from the target over the samples, as a share of the target's variance.
    """

    name: str
    inputs: int
    outputs: int
    samples: int
    ridge: float | None
    error_before: float
    error_after: float

    def __str__(self) -> str:
        ridge = "left as it was" if self.ridge is None else f"ridge {self.ridge:g}"
        return (
            f"{self.name}: {self.inputs} inputs, {self.samples} samples, {ridge}, "
            f"error {self.error_before:.4f} -> {self.error_after:.4f}"
        )


@dataclass(frozen=True, eq=False, repr=False)
class MergeResult:
    """A merged network, with its matching and report. ``print(result)`` shows a table.

    Attributes
    ----------
    model
        A new module with the merged parameters and buffers, or None where only tensors were given or where some
        tensors stay per task. Where it has BatchNorm layers, :func:`mudsc_fast.reset_batch_norm` gives it statistics
        of its own.
    state_dict
        The merged tensors by name: all of them, or those of the trunk that all tasks share.
    task_models
        For each task a module with the trunk and the tensors of its own: new modules where some tensors stay per task,
        each with a copy of the trunk, else `model` for every task. Empty where only tensors were given.
    task_state_dicts
        For each task all its tensors by name. Those of the trunk are the tensors of `state_dict`, not copies.
    matching
        For each node how the units of all models correspond. Nodes behind the stop of a partial merge are matched but
        not merged; nodes that only task heads have are not matched.
    weights
        The models' shares in the result.
    timings
        Seconds by phase: ``"activations"``, ``"weight similarity"``, ``"matching"``, ``"merging"``, ``"refit"`` and, of
        a search, ``"scoring"``; of a search for all its merges together.
    unmatched_tensors
        Names of the tensors that the spec does not name; they were averaged in their own order.
    repaired_layers
        Names of the layers that :func:`mudsc_fast.repair` rescaled.
    refit_layers
        How :func:`mudsc_fast.refit` fitted each layer.
    not_refitted
        Tensors that it left as they are, with the reason.
    scores
        Of :func:`mudsc_fast.search_balance`: the score of each balance tried.
    models
        The modules that were merged, not copies; empty where only tensors were given.
    fingerprints
        Checksums of the parameters of the modules that were merged, by which they are known again.
    """

    model: nn.Module | None
    state_dict: dict[str, Tensor]
    task_models: tuple[nn.Module, ...]
    task_state_dicts: tuple[dict[str, Tensor], ...]
    matching: Matching
    weights: tuple[float, ...]
    timings: dict[str, float]
    unmatched_tensors: tuple[str, ...]
    repaired_layers: tuple[str, ...] = ()
    refit_layers: tuple[RefitLayer, ...] = ()
    not_refitted: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[float, float] = field(default_factory=dict)
    models: tuple[nn.Module, ...] = ()
    fingerprints: tuple[int, ...] = ()

    @property
    def spec(self) -> PermutationSpec:
        """The spec of the networks."""
        return self.matching.spec

    @property
    def balance(self) -> float | None:
        """Share of the weight similarity where the units were matched in the dual space, else None."""
        return self.matching.balance

    @property
    def objectives(self) -> list[float]:
        """Mean similarity over the nodes after each sweep; empty without sweeps."""
        return self.matching.objectives

    @property
    def num_shared(self) -> int:
        """Number of entries of the tensors that all tasks share."""
        return sum(tensor.numel() for tensor in self.state_dict.values() if isinstance(tensor, Tensor))

    @property
    def num_per_task(self) -> tuple[int, ...]:
        """Number of entries of the tensors that each task keeps for itself."""
        return tuple(
            sum(
                tensor.numel()
                for name, tensor in tensors.items()
                if name not in self.state_dict and isinstance(tensor, Tensor)
            )
            for tensors in self.task_state_dicts
        )

    def plot_interpolation(
        self,
        evaluate: Callable[[nn.Module], float | Mapping[str, float]],
        steps: int = 11,
        *,
        compare: bool = True,
        axes: Axes | None = None,
        progress: bool | None = None,
    ) -> Axes:
        """Draw the loss or accuracy of merges of two models, from the first model alone to the second alone.

        Nothing is matched again: each point is a merge with other weights. Changes made after the merge, such as
        :func:`mudsc_fast.repair`, are not in the curve: `evaluate` can make them.

        Parameters
        ----------
        evaluate
            Returns the value of a module, or several values by name, each drawn as a separate curve. Networks
            with BatchNorm need their running statistics recomputed here (:func:`mudsc_fast.reset_batch_norm`).
        steps
            Number of points, both ends included; at least 2.
        compare
            Whether to draw the curve without matching, too.
        axes
            Where to draw; by default in a new figure. Needs matplotlib (the extra ``plot``).
        progress
            Whether to show a progress bar; by default in a terminal, if the work is long.

        Raises
        ------
        TypeError
            If the merge was one of state dicts or files, or kept tensors per task.
        ValueError
            If it was not one of two models, or `steps` is below 2.
        """
        from mudsc_fast.plot import interpolation_curves, plot_curves

        if self.model is None:
            raise TypeError(
                "plot_interpolation needs the merge of modules into one model: merge modules, without stop_at"
            )
        if len(self.models) != 2:
            raise ValueError(f"plot_interpolation needs the merge of two models, got {len(self.models)}")
        steps = check_int("steps", steps, 2)
        shares = [step / (steps - 1) for step in range(steps)]
        unmatched = self.matching.without_matching()
        curves = {}
        for matching, prefix in ((self.matching, ""), (unmatched, "unmatched"))[: 2 if compare else 1]:
            merges = (
                matching.merge(self.models, weights=[1 - share, share]).model
                for share in progress_bar(shares, description=f"interpolation {prefix}".strip(), progress=progress)
            )
            curves.update(interpolation_curves(evaluate, merges, prefix if compare and prefix else "matched" * compare))
        return plot_curves(shares, curves, axes)

    def __str__(self) -> str:
        """Return a table of the nodes, what is shared, and the time that each phase took."""
        return as_text(node_rows(self.matching), self._notes())

    def __repr__(self) -> str:
        model = "" if self.model is None else f"model={type(self.model).__name__}, "
        return (
            f"MergeResult({model}{len(self.state_dict)} merged tensors, {len(self.matching)} nodes, "
            f"mode={self.matching.mode!r}, {len(self.weights)} models)"
        )

    def _repr_html_(self) -> str:
        return as_html(node_rows(self.matching), self._notes())

    def _notes(self) -> list[str]:
        notes = []
        if self.objectives:
            notes.append(f"{len(self.objectives)} sweeps, best mean similarity {max(self.objectives):.4f}")
        if any(self.num_per_task):
            notes.append(f"entries shared: {self.num_shared}; per task: " + ", ".join(map(str, self.num_per_task)))
        if self.matching.distribution is not None:
            notes.append(str(self.matching.distribution))
        if self.scores:
            notes.append("scores by balance: " + ", ".join(f"{b:g}: {score:.4g}" for b, score in self.scores.items()))
        if self.repaired_layers:
            notes.append("rescaled: " + ", ".join(self.repaired_layers))
        notes.extend(f"refitted {layer}" for layer in self.refit_layers)
        notes.extend(f"not refitted {name}: {reason}" for name, reason in self.not_refitted.items())
        notes.append("seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.timings.items()))
        if self.unmatched_tensors:
            notes.append("averaged in their own order (not in the spec): " + ", ".join(self.unmatched_tensors))
        return notes


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


def merge_matched(
    networks: Networks, matching: Matching, division: Division, weights: Sequence[float] | None
) -> MergeResult:
    """Merge networks whose units are matched; which tensors, `division` says."""
    shares = list(matching.weights) if weights is None else checked_weights(weights, len(networks))
    phases = Phases()
    check_dtypes(networks.state_dicts, matching.spec, division)
    with phases.timed("merging"):
        state_dicts, spec = networks.state_dicts, matching.spec
        merged = merge_state_dicts(state_dicts, spec, matching, effective_weights(shares, matching), division.shared)
        tasks = _task_state_dicts(networks, spec, matching, division, merged)
        merged = as_given(merged, networks, 0)
        tasks = tuple(_with_shared(task, merged) for task in tasks)
        task_models = _task_models(networks.modules, tasks, division)
    return MergeResult(
        model=None if division.per_task or not task_models else task_models[0],
        state_dict=merged,
        task_models=task_models,
        task_state_dicts=tasks,
        matching=matching,
        weights=tuple(shares),
        timings={**matching.timings, **phases.seconds},
        unmatched_tensors=tuple(
            name
            for name, tensor in merged.items()
            if isinstance(tensor, Tensor)
            and (tensor.is_floating_point() or tensor.is_complex())
            and name not in spec.layouts
        ),
        models=networks.modules,
        fingerprints=tuple(fingerprint(model) for model in networks.modules),
    )


def merge_divided(
    networks: Networks,
    sharded: Sharded,
    matching: Matching,
    division: Division,
    weights: Sequence[float] | None,
    ranks: Ranks,
    holder: Mapping[str, int],
) -> MergeResult:
    """Merge networks that are divided over processes, tensor by tensor: each in the process that holds it.

    Parameters
    ----------
    networks
        The networks, with those tensors whole that this process holds.
    sharded
        The tensors of all processes.
    matching, division, weights
        As for :func:`merge_matched`.
    ranks, holder
        The processes, and which of them holds a tensor.
    """
    shares = list(matching.weights) if weights is None else checked_weights(weights, len(networks))
    factors = effective_weights(shares, matching)
    phases, spec, states = Phases(), matching.spec, networks.state_dicts

    def divided(name: str, rank: int, compute: Callable[[], Tensor], model: int = 0) -> Tensor:
        whole: Tensor | None = None
        with ranks.step("merging the tensors"):
            if rank == ranks.rank or not is_sharded(sharded.given[model][name]):
                whole = compute()
        return sharded.divided(name, whole, rank, ranks, model)

    with phases.timed("merging"):
        described = [{name: tensors[name] for name in division.shared} for tensors in sharded.described]
        first_name = {name: tied[0] for tied in tied_tensors(described) for name in tied}
        merged: dict[str, Tensor] = {}
        for name in division.shared:
            first = first_name.get(name, name)
            if first != name:
                merged[name] = merged[first]
                continue
            tied = [other for other in division.shared if first_name.get(other, other) == name]
            merged[name] = divided(
                name,
                holder[name],
                lambda tied=tied, name=name: merge_state_dicts(  # type: ignore[misc]
                    [dict.fromkeys(tied, tensors[name]) for tensors in states], spec, matching, factors, tied
                )[name],
            )
        tasks = []
        for index, tensors in enumerate(states):
            own = {
                name: divided(
                    name,
                    holder[name],
                    lambda name=name, tensors=tensors, index=index: task_tensors(  # type: ignore[misc]
                        tensors, index, spec, matching, division.shared, [name]
                    )[name],
                    index,
                )
                for name in division.per_task
            }
            tasks.append(
                as_given({name: merged[name] if name in merged else own[name] for name in states[0]}, networks, index)
            )
    return MergeResult(
        model=None,
        state_dict=as_given(merged, networks, 0),
        task_models=(),
        task_state_dicts=tuple(tasks),
        matching=matching,
        weights=tuple(shares),
        timings={**matching.timings, **phases.seconds},
        unmatched_tensors=tuple(
            name for name, tensor in merged.items() if tensor.is_floating_point() and name not in spec.layouts
        ),
    )


def checked_weights(weights: Sequence[float] | None, num_models: int) -> list[float]:
    """Return the models' shares, equal by default."""
    if weights is None:
        return [1.0 / num_models] * num_models
    checked = [check_number(f"weights[{index}]", weight) for index, weight in enumerate(weights)]
    if len(checked) != num_models:
        raise ValueError(f"weights must have one entry per model ({num_models}), got {len(checked)}")
    if min(checked) < 0 or abs(sum(checked) - 1) > 1e-6:
        raise ValueError(f"weights must be at least 0 and sum to 1, got {checked}")
    return checked


def _task_state_dicts(
    networks: Networks,
    spec: PermutationSpec,
    matching: Mapping[str, NodeMatching],
    division: Division,
    merged: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], ...]:
    """Return for each model all tensors, merged or its own, in the order of the first model; none that it lacks."""
    tasks = []
    for index, (state_dict, lacking) in enumerate(zip(networks.state_dicts, networks.lacking, strict=True)):
        kept = [name for name in division.per_task if name not in lacking]
        own = task_tensors(state_dict, index, spec, matching, division.shared, kept)
        held = [name for name in networks.state_dicts[0] if name not in lacking]
        whole = {name: merged[name] if name in merged else own[name] for name in held}
        tasks.append(as_given(whole, networks, index))
    return tuple(tasks)


def _with_shared(task: dict[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let a task hold the merged tensors themselves, where a file made copies of their parts."""
    task.update({name: merged[name] for name in task if name in merged and isinstance(merged[name], Tensor)})
    return task


def _task_models(
    models: Sequence[nn.Module], tasks: Sequence[Mapping[str, Tensor]], division: Division
) -> tuple[nn.Module, ...]:
    if not models:
        return ()
    if not division.per_task:
        # The model that shares the fewest tensors between names need not be changed to hold the merged ones.
        return (with_state(min(models, key=_num_shared_names), tasks[0]),) * len(models)
    return tuple(with_state(model, task) for model, task in zip(models, tasks, strict=True))


def _num_shared_names(model: nn.Module) -> int:
    """Return how many names of parameters are further names of one."""
    return sum(1 for _ in model.named_parameters(remove_duplicate=False)) - sum(1 for _ in model.parameters())


def check_merged_models(result: object, models: object, reason: str) -> None:
    """Raise unless `models` are the modules that were merged, in the order of the merge.

    `reason` says why tensors alone are not enough.
    """
    if not isinstance(result, MergeResult):
        raise TypeError(f"result must be a MergeResult, got {type(result).__name__}")
    if not result.task_models:
        raise TypeError(f"result must be a merge of modules, got one of state dicts: {reason}")
    if not isinstance(models, Sequence) or not all(isinstance(model, nn.Module) for model in models):
        raise TypeError("models must be the sequence of modules that were merged")
    if len(models) != len(result.weights):
        raise ValueError(f"models must be the {len(result.weights)} models that were merged, got {len(models)}")
    for index, (model, tensors) in enumerate(zip(models, result.task_state_dicts, strict=True)):
        own = model.state_dict()
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                continue  # extra state of a module
            if name not in own or (own[name].shape != tensor.shape):
                found = tuple(own[name].shape) if name in own else "none"
                raise ValueError(
                    f"models[{index}] must be the model that was merged: {name!r} has shape {found}, "
                    f"expected {tuple(tensor.shape)}"
                )
        if result.fingerprints and fingerprint(model) != result.fingerprints[index]:
            raise ValueError(
                f"models[{index}] must be the model that was merged, but its parameters differ: pass the models in the "
                "order of the merge, or merge them again"
            )
