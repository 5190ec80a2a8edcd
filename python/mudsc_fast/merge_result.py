"""The result of merging: :class:`MergeResult`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mudsc_fast._checks import check_int
from mudsc_fast._models import fingerprint
from mudsc_fast._progress import progress_bar
from mudsc_fast._tables import as_html, as_text, node_rows
from mudsc_fast.spec.permutation_spec import PermutationSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mudsc_fast.matching_result import Matching  # which makes merge results


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
            # A merge with `expand` has larger tensors than the models.
            wanted = result.matching.shapes.get(name, tuple(tensor.shape))
            if name not in own or tuple(own[name].shape) != wanted:
                found = tuple(own[name].shape) if name in own else "none"
                raise ValueError(
                    f"models[{index}] must be the model that was merged: {name!r} has shape {found}, expected {wanted}"
                )
        if result.fingerprints and fingerprint(model) != result.fingerprints[index]:
            raise ValueError(
                f"models[{index}] must be the model that was merged, but its parameters differ: pass the models in the "
                "order of the merge, or merge them again"
            )
