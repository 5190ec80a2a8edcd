"""Similarity of units in activation space.

All models run on the same batches. A node's features are the values at the places that the spec observes; every
position of every sample is one observation of all units. The similarity of two units is the Pearson correlation of
their features (Xu et al., "Training-Free Pretrained Model Merging", CVPR 2024, section 3).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast._files import atomic_write
from mudsc_fast._forward import Forward, Rewindable, preserve_training_mode, run_on_batch
from mudsc_fast._models import Networks
from mudsc_fast._progress import progress_bar
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.reduction import all_reduce_sums
from mudsc_fast.distributed.sharded import is_sharded
from mudsc_fast.matching.node import with_first
from mudsc_fast.ops.correlation import Blocks, CorrelationAccumulator, Precision, Workspace
from mudsc_fast.spec.choose import SpecLike
from mudsc_fast.spec.observation import Observation
from mudsc_fast.spec.permutation_spec import PermutationSpec
from mudsc_fast.spec.validation import port_problems

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger(__name__)

_FORMAT = "mudsc_fast statistics 1"
#: Correlations of fewer observations say little: of two, each is 1 or -1.
_MIN_SAMPLES = 8

_LAST_AXIS_MODULES = (nn.Linear, nn.LayerNorm)
_SECOND_AXIS_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


class MatchingStatistics:
    """Running sums of the activations of several models, from which the similarity of their units is computed.

    Made by :func:`collect_statistics`. Passed to :func:`mudsc_fast.merge` or :func:`mudsc_fast.match` as `data`, they
    serve any number of merges of the same models, in all modes and at any balance.

    Parameters
    ----------
    spec
        The specification that names the nodes.
    units
        Number of units of each node.
    num_models
        Number of models compared.
    blocks
        ``"full"`` (all models with all; serves both modes) or ``"cross"`` (model 0 with every other; serves align).
    device
        Where the sums are kept.
    precision
        Of the products, as for :class:`mudsc_fast.ops.CorrelationAccumulator`.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        units: Mapping[str, int],
        num_models: int,
        *,
        blocks: Blocks = "full",
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        self.spec = spec
        self.units = {node: units[node] for node in spec.nodes}
        self.num_models = num_models
        self.blocks: Blocks = blocks
        self._sums = {
            node: CorrelationAccumulator(num_models, count, blocks=blocks, device=device, precision=precision)
            for node, count in self.units.items()
        }
        self._similarities: dict[str, Tensor] = {}

    def update(self, node: str, *features: Tensor, channel_axis: int = 1) -> None:
        """Add features of a node, as :meth:`mudsc_fast.ops.CorrelationAccumulator.update`."""
        self._similarities.pop(node, None)
        self._sums[node].update(*features, channel_axis=channel_axis)

    @contextmanager
    def computing_in(self, workspace: Workspace) -> Iterator[None]:
        """Let all updates in the enclosed code share one workspace."""
        with ExitStack() as stack:
            for sums in self._sums.values():
                stack.enter_context(sums.computing_in(workspace))
            yield

    def num_samples(self, node: str) -> int:
        """Return the number of observations of a node's units: every position of every sample is one."""
        return self._sums[node].num_samples

    def constant_units(self, node: str) -> Tensor:
        """Return [models, units] bool: whether a unit is the same in all samples, such as one that never fires."""
        return self._sums[node]._moments.squares == 0

    def similarity(self, node: str, blocks: Blocks | None = None) -> Tensor:
        """Return a node's similarity. It is computed once and kept until there are more samples; do not modify it.

        Parameters
        ----------
        node
            The node's name.
        blocks
            ``"full"`` for [models * units, models * units], ``"cross"`` for [models - 1, units, units]; by default
            those that were collected.

        Raises
        ------
        ValueError
            If all blocks are requested and only those with model 0 were collected.
        """
        if blocks == "full" and self.blocks == "cross":
            raise ValueError("zip needs the similarities of all models: collect them with blocks='full', got 'cross'")
        if node not in self._similarities:
            self._similarities[node] = self._sums[node].finalize()
        similarity = self._similarities[node]
        return with_first(similarity, self.num_models) if blocks == "cross" and self.blocks == "full" else similarity

    def merge(self, other: MatchingStatistics) -> None:
        """Add the samples of other statistics, of the same models on other data.

        Raises
        ------
        TypeError
            If `other` is of another type.
        ValueError
            If its specification, units, number of models or blocks differ.
        """
        if not isinstance(other, MatchingStatistics):
            raise TypeError(f"other must be MatchingStatistics, got {type(other).__name__}")
        if self._configuration() != other._configuration():
            raise ValueError(f"other must be of {self._described()}, got {other._described()}")
        self._similarities.clear()
        for node, sums in self._sums.items():
            sums.merge(other._sums[node])

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Add the samples of all processes of a torch.distributed group, in each of them.

        Processes without samples take part, too. All nodes are summed together, in few messages.

        Parameters
        ----------
        group
            The processes, all of which must call this method; all processes by default.

        Raises
        ------
        RuntimeError
            If torch.distributed is not initialized.
        ValueError
            If the specification, units, number of models or blocks differ between processes, or features on a CUDA
            device were infinite. The sums are then unchanged.
        DistributedError
            If a process fails or is gone.
        """
        self._all_reduce(Ranks(torch.distributed.group.WORLD if group is None else group))

    def _all_reduce(self, ranks: Ranks) -> None:
        described = "/".join(f"{node}: {count} units" for node, count in self.units.items())
        ranks.check_same(
            {"statistics": f"{self._described()}, {described}", "spec of the statistics": self.spec.to_json()}
        )
        self._similarities.clear()
        all_reduce_sums(list(self._sums.values()), ranks, "summing activations")

    def checksum(self) -> str:
        """Return a short text that distinguishes statistics of different data."""
        digest = hashlib.sha256()
        for node, sums in self._sums.items():
            digest.update(f"{node} {sums.num_samples} ".encode())
            digest.update(sums._moments.mean.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics to a file (atomic file replacement).

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        state = {
            "format": _FORMAT,
            "spec": self.spec.to_json(),
            "units": self.units,
            "num_models": self.num_models,
            "blocks": self.blocks,
            "sums": {node: sums.state_dict() for node, sums in self._sums.items()},
        }
        with atomic_write(path) as temporary:
            torch.save(state, temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> MatchingStatistics:
        """Return the statistics in a file of :meth:`save`. Nothing in the file is executed.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it holds no such statistics.
        """
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{os.fspath(path)} must be a file of MatchingStatistics.save: {error}") from None
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"{os.fspath(path)} must be a file of MatchingStatistics.save in the format {_FORMAT!r}")
        try:
            spec = PermutationSpec.from_json(state["spec"])
            loaded = cls(spec, state["units"], state["num_models"], blocks=state["blocks"], device=device)
            for node, sums in loaded._sums.items():
                sums.load_state_dict(state["sums"][node])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no entry {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{os.fspath(path)} must be a file of MatchingStatistics.save: {reason}") from error
        return loaded

    def __repr__(self) -> str:
        return f"MatchingStatistics of {self._described()}"

    def _configuration(self) -> tuple[object, ...]:
        return self.spec, self.units, self.num_models, self.blocks

    def _described(self) -> str:
        return f"{self.num_models} models with {self.spec!r}, {self.blocks} blocks"


def collect_statistics(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    spec: SpecLike = None,
    blocks: Blocks = "full",
    forward: Forward | None = None,
    autocast: torch.dtype | None = None,
    precision: Precision = "float32",
    verify: bool = True,
    progress: bool | None = None,
    group: ProcessGroup | None = None,
) -> MatchingStatistics:
    """Run all models on the data and collect the statistics from which the correlation of their units is computed.

    Memory does not grow with the data: the features of each batch are added to running sums. The models run in
    evaluation mode without gradients and are left as they were.

    Parameters
    ----------
    models
        Two or more modules of one architecture.
    data
        Batches: a tensor (the model's only argument), a dict (its keyword arguments), or a tuple or list as data
        loaders yield them (the first entry, a tensor or dict, is the input; targets after it are ignored). Tensors are
        moved to each model's device.
    spec
        The spec of the models, which says where each node is observed; or how to choose it, as for
        :func:`mudsc_fast.merge`.
    blocks
        ``"full"`` for zip and align, ``"cross"`` for align alone, which is faster.
    forward
        Runs a model on a batch, if the batch cannot be passed to the model directly.
    autocast
        Run the models under ``torch.autocast`` in this dtype, e.g. ``torch.bfloat16``. Features of that dtype are still
        centered and summed in float32 and float64.
    precision
        Of the products of features, as for :class:`mudsc_fast.ops.CorrelationAccumulator`.
    verify
        Whether to check a given `spec` on the first batch, as for :func:`mudsc_fast.merge`.
    progress
        Whether to show a progress bar; by default in a terminal, if the work is long.
    group
        The processes of torch.distributed that collect together: each runs the models on its own `data`, which may be
        empty, and all get the statistics of all data.

    Raises
    ------
    ValueError
        If the data yields nothing, no node has a place where it is observed, or what is observed does not fit.
    TypeError
        If `autocast` is not a 16-bit dtype, or a model is a compiled ScriptModule.
    """
    ranks = Ranks(group)
    with ranks.step("checking the arguments"):
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise TypeError(f"autocast must be torch.float16, torch.bfloat16 or None, got {autocast!r}")
        networks, batches = Networks.of_modules(models), Rewindable(data)
    chosen = networks.choose_spec(spec, batches, ranks, forward=forward, verify=verify)
    return collect(
        ranks,
        models,
        batches,
        spec=chosen,
        blocks=blocks,
        forward=forward,
        autocast=autocast,
        precision=precision,
        progress=progress,
    )


def collect(
    ranks: Ranks,
    models: Sequence[nn.Module],
    data: Iterable[Any],
    *,
    spec: PermutationSpec,
    blocks: Blocks,
    forward: Forward | None = None,
    autocast: torch.dtype | None = None,
    precision: Precision = "float32",
    progress: bool | None = None,
) -> MatchingStatistics:
    """Collect the statistics of all processes, each of which has its own data; see :func:`collect_statistics`."""
    if any(is_sharded(tensor) for model in models for tensor in model.state_dict().values()):
        data = _InStep(data, ranks)  # its processes exchange parameters in every batch
    with ranks.step("running the models on the data"):
        statistics, num_batches = _collect_own(
            models, data, spec, blocks, forward, autocast, precision, ranks.progress(progress)
        )
    counts = ranks.gather_objects(num_batches, "summing activations")
    with ranks.step("running the models on the data"):
        if not any(counts):
            raise ValueError("data must yield at least one batch, got none" + ("" if ranks.alone else " on any rank"))
    statistics._all_reduce(ranks)
    return statistics


def _collect_own(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    spec: PermutationSpec,
    blocks: Blocks,
    forward: Forward | None,
    autocast: torch.dtype | None,
    precision: Precision,
    progress: bool | None,
) -> tuple[MatchingStatistics, int]:
    """Return the statistics of this process, and its number of batches."""
    for index, model in enumerate(models):
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"models[{index}] must be a module whose submodules can be observed, got a {type(model).__name__}: "
                "pass the module it was compiled from, or match with space='weight'"
            )
    device = next(iter(models[0].state_dict().values())).device
    units = spec.units(models[0].state_dict())
    statistics = MatchingStatistics(spec, units, len(models), blocks=blocks, device=device, precision=precision)
    observed = observed_nodes(spec)
    if not observed:
        raise ValueError("spec does not say where any node is observed: name modules in observe")
    observers = [_Observer(model, spec, units) for model in models]
    num_batches = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(statistics.computing_in(Workspace()))
        if autocast is not None:
            for kind in sorted({next(iter(model.state_dict().values())).device.type for model in models}):
                stack.enter_context(torch.autocast(kind, dtype=autocast))
        for model, observer in zip(models, observers, strict=True):
            stack.enter_context(preserve_training_mode(model))
            model.eval()
            stack.enter_context(observer.attached())
        for batch in progress_bar(data, description="activations", progress=progress):
            seen = [observer.run(batch, forward) for observer in observers]
            if isinstance(data, _InStep) and not data.is_own:
                continue
            num_batches += 1
            for node in observed:
                _accumulate(statistics, node, [features[node] for features in seen])
    return statistics, num_batches


class _InStep(Iterable[Any]):
    """Batches of which all processes yield as many: where one has no more, a batch of another's is yielded again."""

    def __init__(self, data: Iterable[Any], ranks: Ranks) -> None:
        self._data, self._ranks = data, ranks
        #: Whether the latest batch is one of this process, to be counted.
        self.is_own = True

    def __iter__(self) -> Iterator[Any]:
        doing = "running the models on the data"
        batches = iter(self._data)
        spare: list[Any] = []
        while True:
            found = list(itertools.islice(batches, 1))
            having = [rank for rank, has in enumerate(self._ranks.gather_objects(bool(found), doing)) if has]
            if not having:
                return
            if not spare:
                spare = [self._ranks.broadcast_object(found[0] if found else None, doing, having[0])]
            self.is_own = bool(found)
            yield (found or spare)[0]


def check_varied(statistics: MatchingStatistics) -> None:
    """Check that the data tells the units apart.

    Raises
    ------
    ValueError
        If there is one observation only, or the activations of all nodes are the same on all data.
    """
    observed = observed_nodes(statistics.spec)
    all_constant = [statistics.constant_units(node).all(1).any() for node in observed]
    is_constant = torch.stack(all_constant).tolist() if observed else []  # one wait for a device
    constant = [node for node, flag in zip(observed, is_constant, strict=True) if flag]
    few = [node for node in observed if statistics.num_samples(node) < _MIN_SAMPLES]
    single = [node for node in few if statistics.num_samples(node) < 2]
    if observed and len(single) == len(observed):
        raise ValueError(
            f"data must hold two samples or more to correlate activations, got {statistics.num_samples(observed[0])}: "
            "pass more data, or match with space='weight'"
        )
    if observed and len(constant) == len(observed):
        raise ValueError(
            "data must vary, but the activations of every node are the same in all samples (all zero or constant "
            "inputs?): pass other data, or match with space='weight'"
        )
    if constant:
        _log.warning(
            "the activations of %s are the same in all samples of some model: they say nothing about which units "
            "correspond",
            ", ".join(map(repr, constant[:8])),
        )
    elif few:
        _log.warning(
            "there are only %d samples of the activations of %s: larger batches match better",
            min(statistics.num_samples(node) for node in few),
            ", ".join(map(repr, few[:8])),
        )


def observed_nodes(spec: PermutationSpec) -> list[str]:
    """Return the nodes of which the specification says where they are observed."""
    return [node for node in spec.nodes if spec.observations(node)]


def _accumulate(statistics: MatchingStatistics, node: str, seen: Sequence[Sequence[_Feature]]) -> None:
    calls = {len(features) for features in seen}
    if len(calls) != 1:
        raise ValueError(f"node {node!r} was observed {[len(f) for f in seen]} times in the models of one batch")
    device = seen[0][0].values.device
    for features in zip(*seen, strict=True):
        values = [feature.values.to(device) for feature in features]
        try:
            statistics.update(node, *values, channel_axis=features[0].axis)
        except ValueError as error:
            raise ValueError(f"the activations of node {node!r} cannot be compared: {error}") from error


@dataclass(frozen=True)
class _Feature:
    """A node's units in one call of a module."""

    values: Tensor
    axis: int


class _Observer:
    """Collects the features of all nodes while one model runs."""

    def __init__(self, model: nn.Module, spec: PermutationSpec, units: Mapping[str, int]) -> None:
        self._model = model
        self._units = units
        self._device = next(iter(model.state_dict().values())).device
        self._observations = {node: _checked_observations(model, spec, node) for node in observed_nodes(spec)}
        #: Observations of each node while this model runs; empty while another model with shared modules runs.
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

    def run(self, batch: Any, forward: Forward | None) -> dict[str, list[_Feature]]:
        """Run the model on a batch and return the features of each node."""
        features_of_node: dict[str, list[_Feature]] = {node: [] for node in self._observations}
        self._features = features_of_node
        try:
            run_on_batch(self._model, batch, self._device, forward)
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
                raise ValueError(f"the {observation.port} of {observation.module!r} holds no tensor to observe")
            if torch._C._functorch.is_batchedtensor(value):
                raise ValueError(
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
                raise ValueError(
                    f"node {node!r} has {self._units[node]} units, but the {observation.port} of "
                    f"{observation.module!r} has shape {shape}, {expected} entries expected on axis {position}"
                )
            positive = position % len(shape)
            self._features[node].append(_Feature(value.unflatten(positive, split), positive + 1))

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
