"""REPAIR: restores the statistics of a merged network's units.

Averaged units vary less than the units they are averages of. The loss adds up over the layers until activations
collapse. REPAIR (Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023) gives
the pre-activation of every merged unit the mean and the standard deviation that its units have on average.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mudsc_fast._checks import check_choice, check_finite
from mudsc_fast._copy import copy_module
from mudsc_fast._forward import Forward, HookError, check_batches, preserve_training_mode, run_on_batch
from mudsc_fast._progress import progress_bar
from mudsc_fast._tensors import with_metadata
from mudsc_fast.matching.apply import reindex
from mudsc_fast.matching.node import effective_weights
from mudsc_fast.merge_result import MergeResult, check_merged_models
from mudsc_fast.ops.permute import UnitMap
from mudsc_fast.spec.axes import Axis, Segment

MissingBias = Literal["error", "add", "skip"]

#: A unit with less than this share of its target deviation counts as constant: scaling it would amplify noise.
_CONSTANT = 1e-6


def repair(
    result: MergeResult,
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    missing_bias: MissingBias = "error",
    forward: Forward | None = None,
    progress: bool | None = None,
) -> MergeResult:
    """Rescale the units of a merged network to the statistics of the networks that it was made of.

    The outputs of each merged layer (linear or convolution, with a weight that produces units of a node) are shifted
    and scaled, unit by unit, to the mean and the standard deviation that the models' layers have on average:
    ``(deviation / its own) * (output - its own mean) + mean``, folded into the layer's weight and bias. The
    architecture does not change. For networks with BatchNorm use :func:`mudsc_fast.reset_batch_norm` instead.

    The averages are weighted like the merge and in the order of the merged units. A cluster of a zip gets the mean of
    its members' means and deviations. One pass over the data is enough: each layer's outputs are corrected by the
    statistics of the current batch before the next layer reads them.

    Parameters
    ----------
    result
        What :func:`mudsc_fast.merge` returned for `models`. Not modified.
    models
        The networks that were merged. Not modified.
    data
        Batches, as for :func:`mudsc_fast.collect_statistics`; a few thousand samples are enough. One batch matches the
        statistics exactly; of several batches, larger ones match better.
    missing_bias
        How to treat layers without a bias, whose mean cannot be set: ``"error"``, ``"add"`` (the layer gets a bias, a
        new tensor in the state dict), or ``"skip"`` (the layer stays as it is).
    forward
        Runs a model on a batch, if the batch cannot be passed to the model directly.
    progress
        Whether to show a progress bar; by default in a terminal, if the work is long.

    Returns
    -------
    MergeResult
        With new tensors and modules; ``repaired_layers`` names the layers that were rescaled. In a partial merge these
        are layers of the trunk. Layers that the model does not call as modules, such as the projections inside
        ``torch.nn.MultiheadAttention``, and layers that share their weight stay as they are.

    Raises
    ------
    ValueError
        If the data yields nothing, the models are not those of the merge in its order, there is no layer to rescale, a
        layer has no bias and `missing_bias` is ``"error"``, a layer's outputs are not finite, or the networks call it
        different numbers of times.
    TypeError
        If state dicts were merged instead of modules.
    """
    check_choice("missing_bias", missing_bias, get_args(MissingBias))
    check_batches(data)
    check_merged_models(result, models, "outputs must be observed")
    repaired = {id(model): copy_module(model) for model in result.task_models}
    task_models = tuple(repaired[id(model)] for model in result.task_models)
    layers = _layers(task_models[0], result, missing_bias)
    if not layers:
        raise ValueError("result must have a merged linear layer or convolution that produces units, got none")
    device = next(iter(task_models[0].state_dict().values())).device

    def target_of(name: str, moments: Sequence[_Moments]) -> _Moments:
        return _target(layers[name], moments, result, device)

    observer = _Observer(task_models[0], models, layers)
    num_batches = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in (task_models[0], *models):
            stack.enter_context(preserve_training_mode(model))
            model.eval()
        for batch in progress_bar(data, description="repair", progress=progress):
            observer.run(batch, num_batches, target_of, forward)
            num_batches += 1
        if num_batches == 0:
            raise ValueError("data must yield at least one batch, got none")
        for name, moments in observer.of_merged.items():
            scale, shift = _affine(moments, target_of(name, observer.of_models[name]))
            check_finite(f"the outputs of layer {name!r}", shift)
            for model in repaired.values():
                _fold(model.get_submodule(name), layers[name].weight_axis, scale, shift)
    changed = {
        f"{name}.{key}": tensor.detach().clone()
        for name in observer.of_merged
        for key, tensor in task_models[0].get_submodule(name).named_parameters()
    }
    return dataclasses.replace(
        result,
        model=None if result.model is None else task_models[0],
        state_dict=with_metadata({**result.state_dict, **changed}, result.state_dict),
        task_models=task_models,
        task_state_dicts=tuple(with_metadata({**own, **changed}, own) for own in result.task_state_dicts),
        repaired_layers=tuple(observer.of_merged),
    )


@dataclass(frozen=True)
class _Layer:
    """A layer to rescale: the axes of its weight and its output that hold its units, and their segments."""

    weight_axis: int
    output_axis: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class _Moments:
    """Mean [units] and standard deviation [units] of a layer's outputs, float64, over `count` observations of each."""

    count: int
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, output: Tensor, axis: int) -> _Moments:
        dimensions = [i for i in range(output.ndim) if i != axis % output.ndim]
        values = output.detach()
        values = values if values.dtype == torch.float64 else values.float()
        variance, mean = torch.var_mean(values, dimensions, correction=0)
        return cls(output.numel() // output.shape[axis], mean.double(), variance.double().sqrt())

    def joined(self, other: _Moments | None) -> _Moments:
        """Return the moments of both sets of observations together (Chan et al., 1979)."""
        if other is None:
            return self
        count = self.count + other.count
        share, distance = other.count / count, other.mean - self.mean
        variance = torch.lerp(self.deviation.square(), other.deviation.square(), share)
        variance = variance + share * (1 - share) * distance.square()
        return _Moments(count, self.mean + share * distance, variance.sqrt())


def _layers(model: nn.Module, result: MergeResult, missing_bias: MissingBias) -> dict[str, _Layer]:
    """Return the merged layers that produce units, by name."""
    owners = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    layers, without_bias = {}, []
    for name, module in model.named_modules():
        axes = _unit_axes(module)
        if axes is None or f"{name}.weight" not in result.state_dict or owners[id(module.weight)] > 1:
            continue
        layout = result.spec.layouts.get(f"{name}.weight", ())
        segments = layout[axes[0]] if axes[0] < len(layout) else ()
        if not any(segment.axis is not None and segment.axis.role == "produce" for segment in segments):
            continue
        if module.bias is None:
            without_bias.append(name)
        elif f"{name}.bias" not in result.state_dict:
            continue  # the bias stays per task: a shift would not be shared
        if module.bias is not None or missing_bias == "add":
            layers[name] = _Layer(*axes, segments)
    if without_bias and missing_bias == "error":
        shown = ", ".join(map(repr, without_bias[:5]))
        raise ValueError(
            f"layers must have a bias to set their means, but {len(without_bias)} have none, the first: {shown}; "
            "missing_bias='add' gives them one, 'skip' leaves them as they are, and reset_batch_norm does without"
        )
    return layers


def _unit_axes(module: nn.Module) -> tuple[int, int] | None:
    """Return which axis of a layer's weight and which of its output hold its units; None for other modules."""
    if isinstance(module, nn.Linear):
        return 0, -1
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return 0, -1 - len(module.kernel_size)
    # The linear layer of GPT-2 in transformers, with its weight transposed.
    return (1, -1) if type(module).__name__ == "Conv1D" else None


#: Returns the target moments of a merged layer, given its name and its moments in the models.
TargetOfLayer = Callable[[str, Sequence[_Moments]], _Moments]


class _Observer:
    """Runs the models, then the merged network corrected by their outputs, and keeps the moments of all layers."""

    def __init__(self, merged: nn.Module, models: Sequence[nn.Module], layers: Mapping[str, _Layer]) -> None:
        self._merged, self._models, self._layers = merged, models, layers
        #: For each layer its moments in the merged network, and those in each of the models.
        self.of_merged: dict[str, _Moments] = {}
        self.of_models: dict[str, list[_Moments]] = {}

    def run(self, batch: Any, index: int, target_of: TargetOfLayer, forward: Forward | None) -> None:
        """Run all networks on batch `index`; the merged network's layers get the models' moments of that batch."""
        calls: list[dict[str, list[_Moments]]] = []
        for model in self._models:
            calls.append({name: [] for name in self._layers})

            def keep(name: str, output: Tensor, seen: dict[str, list[_Moments]] = calls[-1]) -> None:
                seen[name].append(self._moments(name, output))

            self._run_hooked(model, keep, batch, index, forward)
        targets: dict[str, list[_Moments]] = {}
        for name in self._layers:
            times = [len(seen[name]) for seen in calls]
            if len(set(times)) != 1:
                raise ValueError(f"layer {name!r} was called {times} times by the models on one batch")
            by_call = list(zip(*(seen[name] for seen in calls), strict=True))
            for of_call in by_call:
                before = self.of_models.get(name, [None] * len(of_call))
                self.of_models[name] = [m.joined(b) for m, b in zip(of_call, before, strict=True)]
            targets[name] = [target_of(name, of_call) for of_call in by_call]

        def correct(name: str, output: Tensor) -> Tensor:
            moments = self._moments(name, output)
            self.of_merged[name] = moments.joined(self.of_merged.get(name))
            if not targets[name]:
                raise HookError(f"layer {name!r} was called more often by the merged network than by the models")
            scale, shift = _affine(moments, targets[name].pop(0))
            shape = [-1] + [1] * (-1 - self._layers[name].output_axis)
            return output * scale.to(output.dtype).view(shape) + shift.to(output.dtype).view(shape)

        self._run_hooked(self._merged, correct, batch, index, forward)

    def _moments(self, name: str, output: Tensor) -> _Moments:
        return _Moments.of(output, self._layers[name].output_axis)

    def _run_hooked(
        self,
        model: nn.Module,
        hook: Callable[[str, Tensor], Tensor | None],
        batch: Any,
        index: int,
        forward: Forward | None,
    ) -> None:
        """Run a model on a batch; what the hook returns for a layer replaces its output."""
        device = next(iter(model.state_dict().values())).device
        with ExitStack() as stack:
            for name in self._layers:
                handle = model.get_submodule(name).register_forward_hook(
                    lambda _module, _args, output, name=name: hook(name, output)
                )
                stack.callback(handle.remove)
            run_on_batch(model, batch, index, device, forward)


def _target(layer: _Layer, moments: Sequence[_Moments], result: MergeResult, device: torch.device) -> _Moments:
    """Return the target moments of a merged layer: those of the models, merged like a bias."""
    weights = effective_weights(result.weights, result.matching)

    def map_of(axis: Axis) -> UnitMap | None:
        return result.matching[axis.node].unit_map(axis.role, weights)

    mean, deviation = (
        reindex([tensor.to(device) for tensor in tensors], [layer.segments], map_of, weights)
        for tensors in ([m.mean for m in moments], [m.deviation for m in moments])
    )
    return _Moments(moments[0].count, mean, deviation)


def _affine(moments: _Moments, target: _Moments) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift that give outputs with these moments the target moments."""
    constant = moments.deviation <= _CONSTANT * target.deviation
    scale = torch.where(constant, 1.0, target.deviation / torch.where(constant, 1.0, moments.deviation))
    return scale, target.mean - scale * moments.mean


def _fold(layer: nn.Module, weight_axis: int, scale: Tensor, shift: Tensor) -> None:
    """Scale and shift a layer's outputs by its weight and bias, in place."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)  # every chosen layer has one
    along_axis = [-1 if i == weight_axis else 1 for i in range(weight.ndim)]
    weight.copy_(weight.double() * scale.view(along_axis))
    if isinstance(bias, Tensor):
        bias.copy_(bias.double() * scale + shift)
    else:
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
