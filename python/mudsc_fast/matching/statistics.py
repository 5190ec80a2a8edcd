"""Statistics of activations, from which the similarity of units is computed: :class:`MatchingStatistics`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mudsc_fast._files import load, save
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.reduction import all_reduce_sums, reduce_to_roots
from mudsc_fast.matching.node import with_first
from mudsc_fast.ops.correlation import Blocks, CorrelationAccumulator, Precision, Workspace
from mudsc_fast.spec.permutation_spec import PermutationSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FORMAT = "mudsc_fast statistics 1"


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
        #: For each node of which another process has the sums, the rank of that process.
        self._elsewhere: dict[str, int] = {}

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
        if node in self._elsewhere:
            raise RuntimeError(f"the sums of node {node!r} are on rank {self._elsewhere[node]}")
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

    def _all_reduce(self, ranks: Ranks, roots: Mapping[str, int] | None = None) -> None:
        """Add the samples of all processes: in each of them, or those of a node on the rank that is its root."""
        described = "/".join(f"{node}: {count} units" for node, count in self.units.items())
        ranks.check_same(
            {"statistics": f"{self._described()}, {described}", "spec of the statistics": self.spec.to_json()}
        )
        self._similarities.clear()
        doing = "summing activations"
        if roots is None or ranks.alone:
            all_reduce_sums(list(self._sums.values()), ranks, doing)
            return
        rank_of = {node: roots.get(node, 0) for node in self._sums}
        reduce_to_roots(self._sums, rank_of, ranks, doing)
        self._elsewhere = {node: rank for node, rank in rank_of.items() if rank != ranks.rank}

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
        save(state, path)

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
            state = load(path, device)
        except ValueError as error:
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
