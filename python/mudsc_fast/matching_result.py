"""The result of matching: :class:`Matching`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast import _matching_file
from mudsc_fast._checks import check_int
from mudsc_fast._models import Model, Models, as_given, checksum, with_state
from mudsc_fast._tables import as_html, as_text, node_rows
from mudsc_fast.distributed.report import Distribution
from mudsc_fast.matching.apply import permute_state_dict
from mudsc_fast.matching.node import Mode, NodeMatching
from mudsc_fast.merge_matched import merge_matched
from mudsc_fast.merge_result import MergeResult
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
