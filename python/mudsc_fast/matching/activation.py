"""Similarity of units in activation space.

All models run over the same batches; a node's features are what the specification's observation sees, every position
of every sample being one observation of all units. The similarity of two units is the Pearson correlation of their
features (Xu et al., "Training-Free Pretrained Model Merging", CVPR 2024, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mudsc_fast.matching.node import with_first
from mudsc_fast.matching.running import Forward, modes_restored, run_on_batch
from mudsc_fast.ops.correlation import Blocks, CorrelationAccumulator
from mudsc_fast.spec.axes import Observation, PermutationSpec

_LAST_AXIS_MODULES = (nn.Linear, nn.LayerNorm)
_SECOND_AXIS_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


@dataclass(frozen=True)
class ActivationSimilarity:
    """Similarity blocks of every node of a specification.

    Computed once, they serve any number of merges of the same models: pass them to :func:`mudsc_fast.merge` as its
    ``data``.

    Attributes
    ----------
    spec
        The specification that named the nodes.
    num_models
        Number of models compared.
    blocks
        ``"full"`` ([models * units, models * units] per node; serves both modes) or ``"cross"`` ([models - 1, units,
        units] per node; serves align).
    by_node
        The similarity of each node.
    """

    spec: PermutationSpec
    num_models: int
    blocks: Blocks
    by_node: Mapping[str, Tensor]

    def of(self, node: str, blocks: Blocks) -> Tensor:
        """Return a node's similarity as the given blocks.

        Raises
        ------
        ValueError
            If all blocks are asked for and only those with model 0 were computed.
        """
        similarity = self.by_node[node]
        if blocks == self.blocks:
            return similarity
        if self.blocks == "cross":
            raise ValueError("zip needs the similarities of all models: compute them with blocks='full', got 'cross'")
        return with_first(similarity, self.num_models)


def activation_similarity(
    models: Sequence[nn.Module],
    spec: PermutationSpec,
    data: Iterable[Any],
    *,
    blocks: Blocks = "full",
    forward: Forward | None = None,
    progress: bool = False,
) -> ActivationSimilarity:
    """Run all models over the data and correlate their units, node by node.

    Nothing of the data's size is kept: features of one batch are folded into running sums. The models run in
    evaluation mode without gradients and are left as they were.

    Parameters
    ----------
    models
        Two or more modules of one architecture.
    spec
        The axes map with the places to observe.
    data
        Batches: a tensor (the model's only argument), a dict (its keyword arguments), or a tuple or list as data
        loaders yield them (the first entry, itself a tensor or dict, is the input; targets behind it are not used).
        Tensors are moved to each model's device.
    blocks
        ``"full"`` for zip and align, ``"cross"`` for align alone at less work.
    forward
        Runs a model on a batch where that is not what the model needs.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        If the data yields nothing, a node has no place to observe, or what is seen there does not fit.
    """
    device = next(iter(models[0].state_dict().values())).device
    units = spec.units(models[0].state_dict())
    accumulators = {
        node: CorrelationAccumulator(len(models), units[node], blocks=blocks, device=device) for node in spec.nodes
    }
    observers = [_Observer(model, spec, units) for model in models]
    num_batches = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for model, observer in zip(models, observers, strict=True):
            stack.enter_context(modes_restored(model))
            model.eval()
            stack.enter_context(observer.attached())
        for batch in tqdm(data, desc="activations", disable=not progress):
            num_batches += 1
            seen = [observer.run(batch, forward) for observer in observers]
            for node, accumulator in accumulators.items():
                _accumulate(node, accumulator, [features[node] for features in seen])
    if num_batches == 0:
        raise ValueError("data must yield at least one batch, got none")
    return ActivationSimilarity(
        spec,
        len(models),
        blocks,
        {node: accumulator.finalize() for node, accumulator in accumulators.items()},
    )


def _accumulate(node: str, accumulator: CorrelationAccumulator, seen: Sequence[Sequence[_Feature]]) -> None:
    calls = {len(features) for features in seen}
    if len(calls) != 1:
        raise ValueError(f"node {node!r} was observed {[len(f) for f in seen]} times in the models of one batch")
    device = seen[0][0].values.device
    for features in zip(*seen, strict=True):
        accumulator.update(*(f.values.to(device) for f in features), channel_axis=features[0].axis)


@dataclass(frozen=True)
class _Feature:
    """A node's units as seen by one call of a module."""

    values: Tensor
    axis: int


class _Observer:
    """Collects the features of all nodes while one model runs."""

    def __init__(self, model: nn.Module, spec: PermutationSpec, units: Mapping[str, int]) -> None:
        self._model = model
        self._units = units
        self._device = next(iter(model.state_dict().values())).device
        self._observations = {node: _checked_observations(model, spec, node) for node in spec.nodes}
        self._features: dict[str, list[_Feature]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the modules while the enclosed code runs."""
        with ExitStack() as stack:
            for node, observations in self._observations.items():
                for observation in observations:
                    module = self._model.get_submodule(observation.module)
                    hook = self._hook(node, observation, _units_position(module, observation, node))
                    if observation.port == "input":
                        handle = module.register_forward_pre_hook(
                            lambda _module, args, kwargs, hook=hook: hook([*args, *kwargs.values()]), with_kwargs=True
                        )
                    elif observation.port == "projection":
                        handle = module.register_forward_pre_hook(
                            lambda module, args, kwargs, hook=hook: hook([_projection(module, args, kwargs)]),
                            with_kwargs=True,
                        )
                    else:
                        handle = module.register_forward_hook(
                            lambda _module, _args, output, hook=hook: hook(
                                output if isinstance(output, (tuple, list)) else [output]
                            )
                        )
                    stack.callback(handle.remove)
            yield

    def run(self, batch: Any, forward: Forward | None) -> dict[str, list[_Feature]]:
        """Run the model on a batch and return what was seen at each node."""
        self._features = {node: [] for node in self._observations}
        run_on_batch(self._model, batch, self._device, forward)
        for node, features in self._features.items():
            if not features:
                modules = " and ".join(repr(observation.module) for observation in self._observations[node])
                raise ValueError(f"node {node!r} is observed at {modules}, which the model did not call")
        return self._features

    def _hook(self, node: str, observation: Observation, position: int) -> Callable[[Sequence[object]], None]:
        split = (observation.outer, self._units[node], observation.inner)

        def observe(values: Sequence[object]) -> None:
            value = next((v for v in values if isinstance(v, Tensor)), None)
            if value is None:
                raise ValueError(f"the {observation.port} of {observation.module!r} holds no tensor to observe")
            shape = tuple(value.shape)
            expected = math.prod(split)
            fits = -len(shape) <= position < len(shape)
            if fits and observation.width is not None:
                fits = observation.start + observation.width <= shape[position]
                value = value.narrow(position, observation.start, observation.width) if fits else value
            if not fits or value.shape[position] != expected:
                raise ValueError(
                    f"node {node!r} has {self._units[node]} units, but the {observation.port} of "
                    f"{observation.module!r} has shape {shape}, {expected} entries expected on axis {position}"
                )
            positive = position % len(shape)
            self._features[node].append(_Feature(value.unflatten(positive, split), positive + 1))

        return observe


def _checked_observations(model: nn.Module, spec: PermutationSpec, node: str) -> Sequence[Observation]:
    observations = spec.observations(node)
    if not observations:
        raise ValueError(f"spec does not say where node {node!r} is observed: name a module in observe")
    for observation in observations:
        try:
            module = model.get_submodule(observation.module)
        except AttributeError:
            raise ValueError(
                f"spec observes node {node!r} at module {observation.module!r}, which the model does not have"
            ) from None
        if observation.port == "projection" and getattr(module, "in_proj_weight", None) is None:
            raise ValueError(
                f"spec observes node {node!r} at the projection of {observation.module!r}, which must be a "
                f"MultiheadAttention with one weight for queries, keys and values, got {type(module).__name__}"
            )
    return observations


def _projection(attention: nn.MultiheadAttention, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the queries, keys and values that self-attention computes of its input."""
    query = args[0] if args else kwargs["query"]
    return nn.functional.linear(query, attention.in_proj_weight, attention.in_proj_bias)


def _units_position(module: nn.Module, observation: Observation, node: str) -> int:
    if observation.position is not None:
        return observation.position
    if isinstance(module, _LAST_AXIS_MODULES):
        return -1
    if isinstance(module, _SECOND_AXIS_MODULES):
        return 1
    raise ValueError(
        f"spec observes node {node!r} at {observation.module!r}, a {type(module).__name__}: "
        "say on which axis its units are with Observation(position=...)"
    )
