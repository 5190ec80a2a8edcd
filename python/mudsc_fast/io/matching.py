"""Match the units of networks in files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import Rewindable
from mudsc_fast._models import Networks
from mudsc_fast.checkpoints import models as loading
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.checkpoints.networks import NetworkFiles, PathLike
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.report import Distribution
from mudsc_fast.match_models import PreparedMatching
from mudsc_fast.matching.activation import collect
from mudsc_fast.matching.apply import merge_state_dicts, reindex, task_tensors
from mudsc_fast.matching.node import BLOCKS_OF_MODE, Mode, NodeMatching, effective_weights
from mudsc_fast.matching.statistics import MatchingStatistics
from mudsc_fast.matching.verify import check_keeps_outputs
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.options import MatchOptions, Space, default_balance, default_space
from mudsc_fast.prepare import Prepared, Roots
from mudsc_fast.spec.axes import Axis
from mudsc_fast.spec.choose import SpecLike, choose_spec
from mudsc_fast.unit_map import UnitMap

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MatchedNetworks:
    """Networks in files and how their units correspond.

    Attributes
    ----------
    networks
        The networks.
    matching
        For each matched node, which units of the networks correspond.
    objectives, timings
        As in :class:`mudsc_fast.MergeResult`.
    weights
        The shares of the networks in the result.
    holder
        For each tensor, the rank that merges and writes it.
    distribution
        As in :class:`mudsc_fast.Matching`.
    """

    networks: NetworkFiles
    matching: Mapping[str, NodeMatching]
    objectives: Sequence[float]
    weights: Sequence[float]
    timings: Mapping[str, float]
    holder: Mapping[str, int]
    distribution: Distribution | None = None

    def merged(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Return the weighted mean of one tensor over all networks, with corresponding units averaged."""
        columns = [{name: tensor} for tensor in tensors]
        return merge_state_dicts(columns, self.networks.spec, self.matching, self._effective_weights)[name]

    def permuted(self, name: str, tensor: Tensor, model: int) -> Tensor:
        """Return a tensor of an aligned network with its units in the order of the first network."""
        layout = self.networks.spec.layouts.get(name)
        if layout is None:
            return tensor

        def map_of(axis: Axis) -> UnitMap | None:
            match = self.matching.get(axis.node)
            return None if match is None else match.unit_map(axis.role, self.weights, model)

        return reindex([tensor], layout, map_of, [1.0])

    def own(self, name: str, model: int) -> Tensor:
        """Return a tensor that is not merged, with its axes adapted to the merged tensors that it is connected to."""
        networks = self.networks
        return task_tensors(networks.state_dicts[model], model, networks.spec, self.matching, self._shared, [name])[
            name
        ]

    @cached_property
    def _effective_weights(self) -> list[float]:
        return effective_weights(self.weights, self.matching)

    @cached_property
    def _shared(self) -> list[str]:
        return [name for name in self.networks.spec.layouts if name not in self.networks.kept]


def match_networks(
    networks: NetworkFiles,
    spec: SpecLike,
    batches: Rewindable | None,
    build: Callable[[], nn.Module] | None,
    *,
    mode: Mode,
    space: Space | None,
    balance: float | None,
    weights: Sequence[float] | None = None,
    precision: Precision,
    verify: bool,
    progress: bool | None,
    device: torch.device = _CPU,
    ranks: Ranks | None = None,
    checkpoint: PathLike | None = None,
    **arguments: Any,
) -> MatchedNetworks:
    """Match the units of networks in files. The arguments are those of :func:`mudsc_fast.io.merge_checkpoints`.

    Raises
    ------
    CheckpointError
        If activations are needed but there is no data, or if a network cannot be run.
    ValueError, TypeError
        As :func:`mudsc_fast.merge`.
    """
    ranks = Ranks() if ranks is None else ranks
    with ranks.step("checking the arguments"):
        options = MatchOptions(
            mode=mode,
            space=default_space(space, batches is not None),
            balance=default_balance(balance, space, batches is not None),
            precision=precision,
            progress=ranks.progress(progress),
            **arguments,
        )
        if options.space != "weight" and batches is None:
            raise CheckpointError(f"the {options.space} space needs batches to run the models on: pass data=")
    ranks.check_same({"space": options.space})
    collect_own = None
    if batches is not None:
        collect_own = functools.partial(
            _activations, ranks, networks, spec, batches, build, mode, precision, verify, progress, device
        )
    inputs = Prepared(Networks.of_tensors(networks.state_dicts), networks.spec, collect_own, tuple(networks.kept_names))
    prepared = PreparedMatching(inputs, options, weights, ranks, checkpoint, device)
    found = prepared.at(options.balance)
    return MatchedNetworks(
        networks,
        {node: matched.to(_CPU) for node, matched in found.nodes.items()},  # files are merged on the CPU
        found.objectives,
        found.weights,
        found.timings,
        prepared.owners.holder,
        found.distribution,
    )


def _activations(
    ranks: Ranks,
    networks: NetworkFiles,
    spec: SpecLike,
    batches: Rewindable,
    build: Callable[[], nn.Module] | None,
    mode: Mode,
    precision: Precision,
    verify: bool,
    progress: bool | None,
    device: torch.device,
    roots: Roots,
) -> MatchingStatistics:
    with ranks.step("loading the networks"):
        models = [loading.load_model(checkpoint, build).to(device) for checkpoint in networks.checkpoints]
        observed = networks.spec.without(networks.kept) if networks.kept else networks.spec
        if build is None and observed.problems(models[0].state_dict()):
            # Tensors may have other names in memory than in files. The nodes are the same.
            config = networks.checkpoints[0].config
            observed = choose_spec(spec, models[0].state_dict(), config=config, model=lambda: models[0])
        observed.validate(models[0])
        if verify and spec not in (None, "derive") and batches.has_first():
            check_keeps_outputs(models[0], observed, batches.first())
    with loading.users_code("running the networks on the data"):
        statistics = collect(
            ranks,
            models,
            batches,
            spec=observed,
            blocks=BLOCKS_OF_MODE[mode],
            precision=precision,
            progress=progress,
            roots=roots,
        )
    statistics.spec = networks.spec
    return statistics
