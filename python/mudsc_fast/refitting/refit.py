"""Refits the layers of a merged network by least squares to the layers of the networks that were merged.

Matching finds which units correspond. Averaging then loses accuracy in every layer, because matched units differ.
:func:`refit` goes through the merged network in the order of execution. It sets the weights of each linear layer in
closed form, so that the layer's outputs, computed from the merged network's own activations, are closest to the mean
outputs of the corresponding units in their own networks. It needs a few hundred samples without labels.

Such layer-wise reconstruction is known from post-training quantization (Nagel et al., "Up or Down? Adaptive Rounding
for Post-Training Quantization", ICML 2020) and from merging without permutations (Jin et al., "Dataless Knowledge
Fusion by Merging Weights of Language Models", ICLR 2023). Nasery et al., "PLeaS", CVPR 2025, fit merged layers by
gradient steps.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any, get_args

import torch
from torch import Tensor, nn

from mudsc_fast._checks import check_choice, check_int, check_number, check_share
from mudsc_fast._copy import copy_module
from mudsc_fast._forward import Forward, inputs_of, preserve_training_mode, to_device
from mudsc_fast._tensors import with_metadata
from mudsc_fast.merge_result import MergeResult, RefitLayer, check_merged_models
from mudsc_fast.refitting.fit import Fitter, Outputs, Settings
from mudsc_fast.refitting.graph import Layer, Skipped, may_be_target, output_entries
from mudsc_fast.refitting.network import CHANNELS_LAST, Network
from mudsc_fast.refitting.tape import Tape
from mudsc_fast.refitting.targets import UnitTargets, shared_entries, task_entries

#: The values from which :func:`refit` chooses each layer's ridge.
DEFAULT_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def refit(
    result: MergeResult,
    models: Sequence[nn.Module],
    data: Iterable[Any] | Sequence[Iterable[Any]],
    *,
    ridge: float | Sequence[float] = DEFAULT_RIDGES,
    own_share: float = 1.0,
    outputs: Outputs = "values",
    max_samples: int | None = 2000,
    max_rows: int | None = None,
    memory: int = 2**31,
    random_state: int = 0,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> MergeResult:
    """Refit the layers of a merge by least squares to the outputs of the models' layers.

    Parameters
    ----------
    result
        A merge of modules. Not modified.
    models
        The networks that were merged, in the same order. Not modified.
    data
        Batches, as for :func:`mudsc_fast.collect_statistics`. Alternatively a sequence with one iterable of batches for
        each model, with data of that model's task. The targets of a sample are then the outputs of its own model.
    ridge
        Strength of the penalty on changes of the weights, relative to the mean square of a layer's inputs. Of several
        values, the best is chosen for each layer on held-out batches: the last fifth of each iterable.
    own_share
        With one iterable for each model: the share of a sample's own model in the targets, in [0, 1]. The other models
        share the rest in proportion to the weights of the merge.
    outputs
        ``"cosine"`` if only the direction of the network's outputs matters. Targets of the last layer are then
        normalized.
    max_samples
        Number of samples (entries of the first axis of a batch's first tensor) to read in total. Reading stops after
        the batch that reaches it. None for no limit.
    max_rows
        Maximum number of rows in a layer's least-squares problem. By default 16 for each input of the layer, but at
        least 8192. If there are more, rows of a linear layer and positions of a convolution are drawn at random. All
        images of a batch use the same positions.
    memory
        Maximum number of bytes of activations to keep between layers. If this is too small, activations are computed
        again for every layer, from the last ones that were kept.
    random_state
        Random seed. The result depends on no other source of randomness.
    forward
        Runs a model on a batch, if calling the model with the batch is not enough. For networks with task heads of
        different structure, it must run only the common backbone. The heads are then not refitted.
    progress
        Whether to show a progress bar. By default it is shown in a terminal if the work is long.

    Returns
    -------
    MergeResult
        With new tensors and modules, ``refit_layers`` and ``not_refitted``.

    Raises
    ------
    ValueError
        If the data is empty or not finite, the models are not those that were merged or run different operators, or an
        argument is out of range.
    TypeError
        If state dicts were merged instead of modules, or an argument has the wrong type.

    Warns
    -----
    UserWarning
        If a layer has more inputs than there are samples.

    Notes
    -----
    For a layer with weight W and inputs h, bias included, the new weight minimizes
    ``E |W' h - t|^2 + ridge * trace(E h h^T) / inputs * |W' - W|^2``. The target t of a merged unit is the mean over
    the models, with their weights, of the outputs of the unit's members in each model. It is taken after a BatchNorm,
    and after residual sums, where the other summand is subtracted. A merge with a permuted copy does not change.
    Models run in their own dtype, even inside of ``torch.autocast``.
    """
    began = time.perf_counter()
    check_choice("outputs", outputs, get_args(Outputs))
    settings = Settings(
        _checked_ridges(ridge),
        outputs,
        None if max_rows is None else check_int("max_rows", max_rows, 1),
        check_int("memory", memory, 0),
        check_int("random_state", random_state, 0),
        progress,
    )
    check_share("own_share", own_share)
    check_merged_models(result, models, "refit runs the networks")
    limit = None if max_samples is None else check_int("max_samples", max_samples, 1)
    with _plain_computation():
        refitted = {id(model): copy_module(model) for model in result.task_models}
        task_models = tuple(refitted[id(model)] for model in result.task_models)
        batches = _read(data, len(models), limit, forward)
        run = _Run(result, models, task_models, batches, own_share, settings, forward)
        layers = run.fit()
    _warn_of_few_samples(layers)
    fitted = _with_tensors(result, task_models, layers, run.skipped)
    return dataclasses.replace(fitted, timings={**result.timings, "refit": time.perf_counter() - began})


@contextmanager
def _plain_computation() -> Iterator[None]:
    """Run the enclosed code without gradients, outside of the caller's autocast and inference mode."""
    with ExitStack() as stack:
        # In inference mode, operators are not recorded, and new tensors cannot be changed later.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch, the model that it belongs to (None for all), and whether it is held out to choose the ridge."""

    content: Any
    owner: int | None
    held_out: bool = False


class _Run:
    """Fits the shared layers of a merge, then the layers of each task."""

    def __init__(
        self,
        result: MergeResult,
        models: Sequence[nn.Module],
        task_models: Sequence[nn.Module],
        batches: Sequence[_Batch],
        own_share: float,
        settings: Settings,
        forward: Forward | None,
    ) -> None:
        self._result, self._models, self._task_models = result, models, task_models
        self._batches, self._own_share = batches, own_share
        self._settings, self._forward = settings, forward
        self.skipped: dict[str, str] = {}

    def fit(self) -> list[RefitLayer]:
        """Fit all layers in place, and return a summary of each fit."""
        with ExitStack() as stack:
            for model in (*self._models, *self._task_models):
                stack.enter_context(preserve_training_mode(model))
                model.eval()
            layers = self._fit_shared()
            if any(self._result.num_per_task):
                for index in range(len(self._models)):
                    layers += self._fit_task(index)
        return layers

    def _fit_shared(self) -> list[RefitLayer]:
        result = self._result
        shared = {_layer_name(name) for name in result.state_dict}
        merged, *parents = self._networks([self._task_models[0], *self._models], self._batches)
        fitter = Fitter(
            merged,
            parents,
            [self._shares(batch.owner) for batch in self._batches],
            [batch.held_out for batch in self._batches],
            self._shared_targets,
            lambda name: name in shared,
            self._settings,
        )
        layers = fitter.run()
        self._note(fitter.skipped)
        trunk = self._task_models[0].state_dict()
        for model in self._task_models[1:]:
            own = model.state_dict()
            for name in result.state_dict:
                if isinstance(own[name], Tensor):
                    own[name].copy_(trunk[name])
        return layers

    def _fit_task(self, index: int) -> list[RefitLayer]:
        result = self._result
        own = {_layer_name(name) for name in result.task_state_dicts[index] if name not in result.state_dict}
        batches = [batch for batch in self._batches if batch.owner in (None, index)]
        merged, *parents = self._networks([self._task_models[index], self._models[index]], batches)
        fitter = Fitter(
            merged,
            parents,
            [[1.0] for _ in batches],
            [batch.held_out for batch in batches],
            lambda tape, parents, layer: self._task_targets(tape, parents, layer, index),
            lambda name: name in own,
            self._settings,
        )
        layers = fitter.run()
        self._note(fitter.skipped)
        return [dataclasses.replace(layer, name=f"{layer.name} of task {index}") for layer in layers]

    def _networks(self, models: Sequence[nn.Module], batches: Sequence[_Batch]) -> list[Network]:
        """Record the models, with images in the layout channels_last, which is faster, if the models support it."""
        tensors = [tensor for model in models for tensor in model.state_dict().values()]
        if any(isinstance(tensor, Tensor) and tensor.ndim in CHANNELS_LAST for tensor in tensors):
            try:
                networks = self._record(models, [_channels_last(batch.content) for batch in batches])
            except (RuntimeError, ValueError):  # e.g. a view needs the default layout; others recur below
                networks = []
            tapes = [tape for network in networks for tape in network.tapes]
            if tapes and not any(call.name == "as_strided" for tape in tapes for call in tape.calls):
                return networks
        return self._record(models, [batch.content for batch in batches])

    def _record(self, models: Sequence[nn.Module], contents: Sequence[Any]) -> list[Network]:
        """Record the merged network and its parents. Keep the parents' activations if they take little memory."""
        networks: list[Network] = []
        for model in models:
            device = next(iter(model.state_dict().values())).device
            on_device = [to_device(content, device) for content in contents]
            if not networks or _recorded_bytes(networks[0]) * (len(models) - 1) > self._settings.memory // 4:
                networks.append(Network(model, on_device, self._forward))
            else:
                networks.append(Network(model, on_device, self._forward, may_be_target))
        return networks

    def _shares(self, owner: int | None) -> list[float]:
        weights = list(self._result.weights)
        if owner is None:
            return weights
        others = sum(weights) - weights[owner]
        return [
            self._own_share if index == owner else (1 - self._own_share) * (weight / others if others else 0.0)
            for index, weight in enumerate(weights)
        ]

    def _shared_targets(self, tape: Tape, parents: Sequence[Tape], layer: Layer) -> UnitTargets:
        result = self._result

        def merged_entries(tensor: str, axis: int, length: int, model: int) -> Tensor:
            return shared_entries(result.spec, result.matching.nodes, tensor, axis, length, model)

        return _targets(tape, parents, layer, self._models, merged_entries)

    def _task_targets(self, tape: Tape, parents: Sequence[Tape], layer: Layer, index: int) -> UnitTargets:
        result = self._result
        merged_nodes = frozenset(
            segment.axis.node
            for name in result.state_dict
            for segments in result.spec.layouts.get(name, ())
            for segment in segments
            if segment.axis is not None
        )

        def merged_entries(tensor: str, axis: int, length: int, model: int) -> Tensor:  # noqa: ARG001
            return task_entries(result.spec, result.matching.nodes, merged_nodes, tensor, axis, length, index)

        return _targets(tape, parents, layer, [self._models[index]], merged_entries)

    def _note(self, skipped: Iterable[Skipped]) -> None:
        self.skipped |= {one.name: one.reason for one in skipped}


def _outputs_of(tape: Tape, layer: Layer) -> tuple[str, int, Tensor]:
    """Return the tensor, its axis, and the entries of that axis that a layer's outputs represent."""
    if layer.kind == "norm" or layer.call.name == "linear":
        return output_entries(tape, layer.weight, 0)
    if layer.kind == "convolution":
        named = layer.call.named
        if not named["transposed"]:
            return output_entries(tape, layer.weight, 0)
        if named["groups"] == 1:
            return output_entries(tape, layer.weight, 1)
        # The weight of a grouped transposed convolution has the outputs of one group. The bias has all of them.
        if layer.bias is not None:
            return output_entries(tape, layer.bias, 0)
        length = tape.shapes[layer.output][1]
        return tape.parameters[layer.weight], -1, torch.arange(length)
    return output_entries(tape, layer.weight, 1)


def _targets(
    tape: Tape,
    parents: Sequence[Tape],
    layer: Layer,
    models: Sequence[nn.Module],
    merged_entries: Callable[[str, int, int, int], Tensor],
) -> UnitTargets:
    """Return which output of a merged layer each output of the parents' layers belongs to.

    `merged_entries` returns, for a tensor, one of its axes, that axis' length in a model and the model's number, the
    entry of the merged tensor that each entry belongs to.
    """
    entries = _outputs_of(tape, layer)[2]
    members = []
    for index, (parent, model) in enumerate(zip(parents, models, strict=True)):
        tensor, axis, own = _outputs_of(parent, layer)
        merged = merged_entries(tensor, axis, model.state_dict()[tensor].shape[axis], index)
        # A layer may have only some entries of the tensor, e.g. one of several fused projections.
        place = torch.full((1 + int(max(entries.max(), merged.max())),), -1)
        place[entries] = torch.arange(len(entries))
        members.append(place[merged[own]])
    return UnitTargets(members, len(entries))


def _recorded_bytes(network: Network) -> int:
    """Return the bytes of the activations that are kept when a network with these tapes is recorded."""
    numbers = 0
    for tape in {id(tape): tape for tape in network.tapes}.values():
        values = [value for call in tape.calls if may_be_target(call) for value in call.outputs if value is not None]
        numbers += sum(math.prod(tape.shapes[value]) for value in values)
    return numbers * torch.float32.itemsize


def _channels_last(content: Any) -> Any:
    """Return a batch with images and volumes in the layout channels_last."""

    def laid_out(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim not in CHANNELS_LAST or not leaf.is_floating_point():
            return leaf
        return leaf.contiguous(memory_format=CHANNELS_LAST[leaf.ndim])

    return torch.utils._pytree.tree_map(laid_out, content)


def _layer_name(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _checked_ridges(ridge: float | Sequence[float]) -> tuple[float, ...]:
    values = tuple(ridge) if isinstance(ridge, Sequence) and not isinstance(ridge, str) else (ridge,)
    if not values:
        raise ValueError("ridge must be a positive number or a sequence of them, got an empty sequence")
    checked = tuple(check_number("ridge", value) for value in values)
    if min(checked) <= 0:
        raise ValueError(f"ridge must be positive, got {min(checked)}")
    return checked


def _read(
    data: Iterable[Any] | Sequence[Iterable[Any]], num_models: int, limit: int | None, forward: Forward | None
) -> list[_Batch]:
    """Return the batches to fit on, alternating between several iterables."""
    if _is_batch(data) and not isinstance(data, (list, tuple)):
        raise TypeError(f"data must be an iterable of batches, got one {type(data).__name__}: pass [data]")
    sources = _sources(data, num_models)
    owned = len(sources) > 1
    streams = [_limited(source, None if limit is None else -(-limit // len(sources)), forward) for source in sources]
    found: list[list[_Batch]] = []
    for index, stream in enumerate(streams):
        batches = [_Batch(content, index if owned else None) for content in stream]
        if not batches:
            which = f"data[{index}]" if owned else "data"
            raise ValueError(f"{which} must yield at least one batch, got none")
        num_held_out = 0 if len(batches) == 1 else max(1, len(batches) // 5)
        for position in range(len(batches) - num_held_out, len(batches)):
            batches[position] = dataclasses.replace(batches[position], held_out=True)
        found.append(batches)
    if owned and all(len(batches) == 1 for batches in found):
        # Choosing a ridge needs held-out samples: split each batch.
        found = [_cut(batches[0]) for batches in found]
    return [batch for turn in zip_longest(*found) for batch in turn if batch is not None]


def _cut(batch: _Batch) -> list[_Batch]:
    """Return the first four fifths of a batch, and the rest held out. Return the batch if it cannot be split."""
    tensor = batch.content
    if not isinstance(tensor, Tensor) or len(tensor) < 5:
        return [batch]
    cut = len(tensor) - len(tensor) // 5
    return [_Batch(tensor[:cut], batch.owner), _Batch(tensor[cut:], batch.owner, held_out=True)]


def _sources(data: Any, num_models: int) -> list[Iterable[Any]]:
    """Return the iterables of batches: one for each model, or a single one."""
    if isinstance(data, (list, tuple)) and data and not any(_is_batch(entry) for entry in data):
        if len(data) != num_models:
            raise ValueError(
                f"data must be batches, or one iterable of batches for each of {num_models} models, got {len(data)} "
                "iterables"
            )
        return list(data)
    if isinstance(data, (list, tuple)) and len(data) == num_models and all(_may_be_loader(entry) for entry in data):
        raise ValueError(
            "data is ambiguous: each entry is a list of tensors, which may be one batch or a list of batches; pass "
            "batches as tuples, and lists of batches as iterators or DataLoaders"
        )
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
    return [data]


def _is_batch(entry: Any) -> bool:
    if isinstance(entry, (Tensor, Mapping)):
        return True
    return isinstance(entry, (list, tuple)) and bool(entry) and isinstance(entry[0], (Tensor, Mapping))


def _may_be_loader(entry: Any) -> bool:
    """Return whether a list of tensors may be a list of batches: tensors that differ only in the number of samples."""
    if not isinstance(entry, list) or not all(isinstance(tensor, Tensor) for tensor in entry):
        return False
    return all(t.ndim > 1 and t.shape[1:] == entry[0].shape[1:] and t.dtype == entry[0].dtype for t in entry)


def _limited(source: Iterable[Any], limit: int | None, forward: Forward | None) -> list[Any]:
    """Return the model inputs of the batches, up to a number of samples."""
    contents: list[Any] = []
    count = 0
    for batch in source:
        content = batch if forward is not None else inputs_of(batch)
        content = dict(content) if isinstance(content, Mapping) else content
        tensors = [value for value in torch.utils._pytree.tree_leaves(content) if isinstance(value, Tensor)]
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"data must be finite, got NaN or infinity in batch {len(contents)}")
        samples = len(tensors[0]) if tensors and tensors[0].ndim else 1
        if samples:
            contents.append(content)
        count += samples
        if limit is not None and count >= limit:
            break
    return contents


def _warn_of_few_samples(layers: Sequence[RefitLayer]) -> None:
    few = [layer for layer in layers if layer.samples < layer.inputs]
    if few:
        warnings.warn(
            f"{len(few)} layers have more inputs than there are samples, the first: {few[0].name!r} with "
            f"{few[0].inputs} inputs and {few[0].samples} samples. Their fit may overfit the samples: pass more data",
            UserWarning,
            stacklevel=3,
        )


def _with_tensors(
    result: MergeResult, task_models: tuple[nn.Module, ...], layers: Sequence[RefitLayer], skipped: Mapping[str, str]
) -> MergeResult:
    def tensors_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
        own = model.state_dict()
        values = {name: own[name] for name in names}
        return {name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in values.items()}

    shared = tensors_of(task_models[0], result.state_dict)
    tasks = []
    for model, tensors in zip(task_models, result.task_state_dicts, strict=True):
        own = tensors_of(model, [name for name in tensors if name not in shared])
        whole = {name: shared[name] if name in shared else own[name] for name in tensors}
        tasks.append(with_metadata(whole, tensors))
    return dataclasses.replace(
        result,
        model=None if result.model is None else task_models[0],
        state_dict=with_metadata(shared, result.state_dict),
        task_models=task_models,
        task_state_dicts=tuple(tasks),
        refit_layers=tuple(layers),
        not_refitted=dict(skipped),
    )
