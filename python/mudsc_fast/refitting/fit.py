"""Fits the layers of a network one by one, each to inputs computed by the layers fitted before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mudsc_fast._checks import is_finite
from mudsc_fast._progress import progress_bar
from mudsc_fast.merge_result import RefitLayer
from mudsc_fast.ops.correlation import Workspace
from mudsc_fast.refitting.gram import GramSums
from mudsc_fast.refitting.graph import Layer, Skipped, find_layers, is_layer_call, undo
from mudsc_fast.refitting.network import Network, Progress, norm_affine, norm_epsilon
from mudsc_fast.refitting.parents import ParentTargets
from mudsc_fast.refitting.rows import Places, Sampler, layer_outputs
from mudsc_fast.refitting.solve import Solution, solve, solve_few
from mudsc_fast.refitting.tape import Tape, shallow_first
from mudsc_fast.refitting.targets import UnitTargets

#: How the outputs of the networks are compared: by value, or by direction only.
Outputs = Literal["values", "cosine"]


@dataclass(frozen=True)
class Settings:
    """Settings of a fit; see :func:`mudsc_fast.refit`."""

    ridges: tuple[float, ...]
    outputs: Outputs
    max_rows: int | None
    memory: int
    random_state: int
    progress: bool | None


#: A layer's outputs are not fitted where the network multiplies them by less than this fraction of the largest factor.
_HIDDEN = 1e-6


#: Returns mean and variance of a layer's outputs for a matrix [groups, outputs, inputs].
OutputStatistics = Callable[[Tensor], tuple[Tensor, Tensor]]


class Fitter:
    """Fits layers of one network, in place.

    Parameters
    ----------
    merged
        The network to fit.
    parents
        The networks that were merged.
    shares
        For each batch, the parents' shares in the targets.
    held_out
        For each batch, whether it is held out to choose the ridges.
    targets_of
        Returns which merged output each output of the parents belongs to, for a layer of the merged network's tape,
        given that tape and those of the parents.
    is_wanted
        Returns whether to fit the layer of a given name.
    settings
        All other settings.
    """

    def __init__(
        self,
        merged: Network,
        parents: Sequence[Network],
        shares: Sequence[Sequence[float]],
        held_out: Sequence[bool],
        targets_of: Callable[[Tape, Sequence[Tape], Layer], UnitTargets],
        is_wanted: Callable[[str], bool],
        settings: Settings,
    ) -> None:
        self._merged, self._parents, self._settings = merged, parents, settings
        self._held_out = held_out
        self._workspace = Workspace()
        self._use_one_order()
        self._layers: dict[int, list[Layer]] = {}
        self.skipped: list[Skipped] = []
        self._last_ridge: float | None = None
        for batch, tape in enumerate(merged.tapes):
            if id(tape) not in self._layers:
                layers, skipped = find_layers(tape, merged.fixed(batch))
                self._layers[id(tape)] = [layer for layer in layers if is_wanted(layer.name)]
                self.skipped = skipped
        self._check_same_layers()
        first, tapes = merged.tapes[0], [parent.tapes[0] for parent in parents]
        targets = [targets_of(first, tapes, layer) for layer in self._layers[id(first)]]
        self._targets = targets
        self._samplers_of: dict[int, list[Sampler]] = {}
        self._places = Places(self._samplers, settings.max_rows, settings.random_state)
        self._progress = Progress((merged, *parents), settings.memory)
        layers_of = [self._layers[id(tape)] for tape in merged.tapes]
        self._wanted = ParentTargets(self._progress, layers_of, targets, shares, self._samplers, self._places)

    def run(self) -> list[RefitLayer]:
        """Fit all layers, and return a summary of each fit."""
        indices = progress_bar(range(len(self._targets)), description="refit", progress=self._settings.progress)
        return [self._fit(index) for index in indices]

    def _fit(self, index: int) -> RefitLayer:
        fitted, held_out, spread = None, None, _Spread()
        for batch in range(len(self._merged.tapes)):
            inputs, residuals, target = self._samples(index, batch)
            if fitted is None:
                sizes = (inputs.shape[0], inputs.shape[2], residuals.shape[1] // len(inputs))
                fitted, held_out = (
                    GramSums(*sizes, inputs.device, self._workspace, name) for name in ("fitted", "held out")
                )
            assert held_out is not None
            spread.add(target)
            if len(self._merged.tapes) == 1 and len(self._settings.ridges) > 1:
                _update_parts(fitted, held_out, inputs, residuals)
            else:
                (held_out if self._held_out[batch] else fitted).update(inputs, residuals)
        assert fitted is not None  # there is a batch
        assert held_out is not None
        layer = self._layers[id(self._merged.tapes[0])][index]
        has_bias = layer.bias is not None or layer.norm is not None
        solution, samples, output_statistics = self._solve(fitted, held_out, layer.name, has_bias)
        self._write(index, solution, output_statistics)
        variance = spread.variance()
        scale = 1 / variance if variance > 0 else 0.0
        groups, outputs, size = solution.weight.shape
        return RefitLayer(
            layer.name,
            size,
            groups * outputs,
            samples,
            solution.ridge,
            solution.error_before * scale,
            solution.error_after * scale,
        )

    def _solve(
        self, fitted: GramSums, held_out: GramSums, name: str, has_bias: bool
    ) -> tuple[Solution, int, OutputStatistics]:
        """Return the change of a layer, the number of samples, and a function for the statistics of its new outputs."""
        ridges, few = self._settings.ridges, [part for part in (fitted.buffered(), held_out.buffered()) if part]
        samples = sum(len(inputs) for inputs, _ in few)
        # Products of samples cost less than products of inputs if there are fewer of them.
        if len(few) == 2 and samples <= fitted.num_inputs:
            if not all(is_finite(tensor) for part in few for tensor in part):
                raise _not_finite(name)
            solution = solve_few(few[0], few[1], ridges, has_bias=has_bias, first=self._last_ridge)
            statistics: OutputStatistics = partial(_statistics_of, [inputs for inputs, _ in few])
        else:
            moments = fitted.moments(), held_out.moments()
            if not (fitted.is_finite and held_out.is_finite):
                raise _not_finite(name)
            whole = moments[0].joined(moments[1])
            solution = solve(moments[0], moments[1], whole, ridges, has_bias=has_bias, first=self._last_ridge)
            samples, statistics = whole.count, whole.output_statistics
        self._last_ridge = solution.ridge or self._last_ridge
        return solution, samples, statistics

    def _samples(self, index: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a layer's inputs in a batch, the residuals of its outputs, and its targets."""
        tape = self._merged.tapes[batch]
        layer = self._layers[id(tape)][index]
        target = self._wanted.take(index, batch)
        values = self._progress.advance(0, batch, layer.position)
        values = {**self._merged.fixed(batch), **values}
        sampler = self._samplers(index)[batch]
        places = self._places.of(index, batch)
        inputs = sampler.inputs(values[layer.input], places)
        if self._settings.outputs == "cosine" and self._is_result(tape, layer):
            target = functional.normalize(target, dim=1) * target.norm(dim=1).mean()
        current, factor = self._current(layer, batch, values, sampler, inputs, places)
        residuals = target.to(current) - current
        if factor is not None:
            hidden = factor.abs() <= _HIDDEN * factor.abs().max()
            residuals = torch.where(hidden, 0.0, residuals / torch.where(hidden, 1.0, factor))
        has_target = self._targets[index].has_target()
        if not bool(has_target.all()):
            residuals = torch.where(has_target.to(residuals.device), residuals, 0.0)
        return inputs, residuals, target

    def _current(
        self,
        layer: Layer,
        batch: int,
        values: Mapping[int, Tensor],
        sampler: Sampler,
        inputs: Tensor,
        places: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the network's current value at the target, and the factors of the layer's output, if any."""
        tape = self._merged.tapes[batch]
        fixed = self._merged.fixed(batch)
        current = layer_outputs(sampler.matrix(), inputs)
        own_bias = layer.call.name != "mm" and layer.bias is not None
        if own_bias and layer.bias is not None:
            current = current + fixed[layer.bias]
        if layer.norm is not None:
            scale, shift = norm_affine(layer.norm, fixed)
            current = current * scale + shift
        factor: Tensor | None = None
        for position, step in enumerate(layer.steps):
            if step.kind == "move" or step.other is None:
                continue
            if isinstance(step.other, float):
                other: Tensor | float = step.other
            else:
                tensor = fixed[step.other] if step.other in fixed else values[step.other]
                tensor = tensor.expand(tape.shapes[_output(step.call)])
                other = sampler.output(undo(layer.steps[:position], tape.shapes, tensor), places)
            if step.kind == "add":
                current = current + other
            else:
                current = current * other
                factor = torch.ones_like(current) * other if factor is None else factor * other
        return current, factor

    def _write(self, index: int, solution: Solution, output_statistics: OutputStatistics) -> None:
        fixed, layer = self._merged.fixed(0), self._layers[id(self._merged.tapes[0])][index]
        self._merged.weights_changed()
        sampler = self._samplers(index)[0]
        matrix = sampler.matrix().double()
        if layer.norm is None:
            if solution.ridge is not None:
                sampler.set_matrix(matrix + solution.weight)
                if layer.bias is not None:
                    fixed[layer.bias].copy_(fixed[layer.bias].double() + solution.bias.flatten())
            return
        if solution.ridge is None:
            return
        scale, shift = (tensor.double() for tensor in norm_affine(layer.norm, fixed))
        if layer.bias is not None:
            shift = shift + scale * fixed[layer.bias].double()
            fixed[layer.bias].zero_()
        matrix = matrix * scale.view(*matrix.shape[:2], 1) + solution.weight
        shift = shift + solution.bias.flatten()
        # The norm stores the statistics of its new input, and its affine part undoes the normalization. It then only
        # adds the shift, and still does so, approximately, after its statistics are recomputed.
        mean, variance = output_statistics(matrix)
        sampler.set_matrix(matrix)
        named = layer.norm.named
        fixed[named["running_mean"].value].copy_(mean)
        variable = fixed[named["running_var"].value]
        variable.copy_(variance)
        fixed[named["weight"].value].copy_((variable.double() + norm_epsilon(layer.norm)).sqrt())
        fixed[named["bias"].value].copy_(shift + fixed[named["running_mean"].value].double())

    def _samplers(self, index: int) -> list[Sampler]:
        """Return the samplers of a layer, one for each batch."""
        if index not in self._samplers_of:
            self._samplers_of[index] = [
                Sampler(self._layers[id(tape)][index], self._merged.fixed(batch), tape.shapes)
                for batch, tape in enumerate(self._merged.tapes)
            ]
        return self._samplers_of[index]

    def _is_result(self, tape: Tape, layer: Layer) -> bool:
        read = {value for call in tape.calls for value in call.inputs}
        return layer.target not in read

    def _use_one_order(self) -> None:
        """Check that all networks run the same operators, and put them into one order for all networks."""
        for index, parent in enumerate(self._parents):
            for own, other in zip(self._merged.tapes, parent.tapes, strict=True):
                if _flow(own) != _flow(other):
                    names = set(self._merged.model.state_dict()) ^ set(parent.model.state_dict())
                    if names:
                        raise ValueError(
                            f"models[{index}] must run the same operators as models[0] on each batch, but one of them "
                            f"has {min(names)!r}, which the other lacks. Refit the common backbone only: pass a "
                            "forward that runs only the backbone, e.g. "
                            "forward=lambda model, batch: model.backbone(batch). Task heads then do not change"
                        )
                    raise ValueError(
                        f"models[{index}] must run the same operators as the merged network on each batch, but it "
                        "does not: control flow that depends on data or weights cannot be refitted"
                    )
        by_tape = {id(tape): shallow_first(tape, is_layer_call) for tape in self._merged.tapes}
        orders = [by_tape[id(tape)] for tape in self._merged.tapes]
        for network in (self._merged, *self._parents):
            reordered: dict[int, Tape] = {}
            for tape, order in zip(network.tapes, orders, strict=True):
                if id(tape) not in reordered:
                    reordered[id(tape)] = tape.reordered(order)
            network.use([reordered[id(tape)] for tape in network.tapes])

    def _check_same_layers(self) -> None:
        names = {tuple(layer.name for layer in layers) for layers in self._layers.values()}
        if len(names) != 1:
            raise ValueError("the network must use the same layers in every batch of data, but it does not")


class _Spread:
    """Variance of targets, summed over the outputs (Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, target: Tensor) -> None:
        count, means = len(target), target.mean(0)
        squares = torch.linalg.vector_norm(target - means, dtype=torch.float64).square()
        mean, squares = means.double().cpu(), squares.cpu()
        total = self._count + count
        shift = mean - self._mean
        self._squares = self._squares + squares + self._count * count / total * shift.square().sum()
        self._mean = self._mean + shift * (count / total)
        self._count = total

    def variance(self) -> float:
        return float(self._squares / self._count)


def _statistics_of(parts: Sequence[Tensor], matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a matrix [1, outputs, inputs] times the inputs of samples."""
    outputs = torch.cat([part.double() @ matrix[0].T for part in parts])
    return outputs.mean(0), outputs.var(0, correction=0)


def _not_finite(name: str) -> ValueError:
    return ValueError(f"data must give finite activations, but the inputs of layer {name!r} are not finite")


def _update_parts(fitted: GramSums, held_out: GramSums, inputs: Tensor, residuals: Tensor) -> None:
    """Add the samples of a single batch, whose last fifth is held out."""
    count = inputs.shape[1]
    cut = count - count // 5
    for part, begin, end in ((fitted, 0, cut), (held_out, cut, count)):
        if end > begin:
            part.update(inputs[:, begin:end], residuals[begin:end])


def _output(call: Any) -> int:
    value: int = call.outputs[0]
    return value


def _flow(tape: Tape) -> list[object]:
    return [(str(call.operator), call.inputs, call.outputs) for call in tape.calls]
