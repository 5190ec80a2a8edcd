"""Observe the units of a model while it runs: forward hooks at the places that the spec names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import Forward, HookError, run_on_batch
from mudsc_fast.spec.observation import Observation
from mudsc_fast.spec.permutation_spec import PermutationSpec
from mudsc_fast.spec.validation import port_problems

_LAST_AXIS_MODULES = (nn.Linear, nn.LayerNorm)
_SECOND_AXIS_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


def observed_nodes(spec: PermutationSpec) -> list[str]:
    """Return the nodes of which the specification says where they are observed."""
    return [node for node in spec.nodes if spec.observations(node)]


@dataclass(frozen=True)
class Feature:
    """A node's units in one call of a module."""

    values: Tensor
    axis: int


class Observer:
    """Collects the features of all nodes while one model runs."""

    def __init__(self, model: nn.Module, spec: PermutationSpec, units: Mapping[str, int]) -> None:
        self._model = model
        self._units = units
        self._device = next(iter(model.state_dict().values())).device
        self._observations = {node: _checked_observations(model, spec, node) for node in observed_nodes(spec)}
        #: Observations of each node while this model runs; empty while another model with shared modules runs.
        self._features: dict[str, list[Feature]] = {}

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
                    elif observation.port == "state":
                        handle = module.register_forward_hook(
                            lambda _module, _args, output, hook=hook: hook([_final_states(output)])
                        )
                    elif observation.port == "projection":
                        handle = module.register_forward_pre_hook(
                            lambda module, args, kwargs, hook=hook, start=observation.start: hook(
                                [_projection(module, args, kwargs, start)]
                            ),
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

    def run(self, batch: Any, index: int, forward: Forward | None) -> dict[str, list[Feature]]:
        """Run the model on batch `index` and return the features of each node."""
        features_of_node: dict[str, list[Feature]] = {node: [] for node in self._observations}
        self._features = features_of_node
        try:
            run_on_batch(self._model, batch, index, self._device, forward)
        finally:
            self._features = {}
        for node, features in features_of_node.items():
            if not features:
                modules = " and ".join(repr(observation.module) for observation in self._observations[node])
                raise ValueError(f"node {node!r} is observed at {modules}, which the model did not call")
        return features_of_node

    def _hook(self, node: str, observation: Observation, position: int) -> Callable[[Sequence[object]], None]:
        split = (observation.outer, self._units[node], observation.inner)

        def observe(values: Sequence[object]) -> None:
            if node not in self._features:
                return
            value = next((v for v in values if isinstance(v, Tensor)), None)
            if value is None:
                raise HookError(f"the {observation.port} of {observation.module!r} holds no tensor to observe")
            if torch._C._functorch.is_batchedtensor(value):
                raise HookError(
                    f"node {node!r} is observed at {observation.module!r}, which runs inside torch.vmap: observe it at "
                    "a module outside, or match with space='weight'"
                )
            shape = tuple(value.shape)
            expected = math.prod(split)
            fits = -len(shape) <= position < len(shape)
            if fits and observation.width is not None:
                fits = observation.start + observation.width <= shape[position]
                value = value.narrow(position, observation.start, observation.width) if fits else value
            if not fits or value.shape[position] != expected:
                raise HookError(
                    f"node {node!r} has {self._units[node]} units, but the {observation.port} of "
                    f"{observation.module!r} has shape {shape}, {expected} entries expected on axis {position}"
                )
            positive = position % len(shape)
            self._features[node].append(Feature(value.unflatten(positive, split), positive + 1))

        return observe


def _checked_observations(model: nn.Module, spec: PermutationSpec, node: str) -> Sequence[Observation]:
    observations = spec.observations(node)
    for observation in observations:
        try:
            module = model.get_submodule(observation.module)
        except AttributeError:
            raise ValueError(
                f"spec observes node {node!r} at module {observation.module!r}, which the model does not have"
            ) from None
        problems = port_problems(node, observation, module)
        if problems:
            raise ValueError(problems[0])
    return observations


def _projection(attention: nn.MultiheadAttention, args: Sequence[Any], kwargs: Mapping[str, Any], start: int) -> Tensor:
    """Return the queries, keys and values projected from the input that the entries at `start` are computed from."""
    width = attention.embed_dim
    place = start // width
    read = args[place] if place < len(args) else kwargs[("query", "key", "value")[place]]
    if attention.in_proj_weight is not None:
        return nn.functional.linear(read, attention.in_proj_weight, attention.in_proj_bias)
    weight = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)[place]
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias.narrow(0, place * width, width)
    # Only the observed projection, in its position among the three.
    return nn.functional.pad(nn.functional.linear(read, weight, bias), (place * width, 0))


def _final_states(output: Any) -> Tensor:
    """Return the final hidden states [batch, layers * directions * units] that a recurrent layer returns."""
    states = output[1][0] if isinstance(output[1], tuple) else output[1]
    result: Tensor = states.movedim(0, -2).flatten(-2)
    return result


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
