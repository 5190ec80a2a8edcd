"""Distribution of nodes and tensors over ranks by work.

The similarity of a node with C units takes C² operations for every sample, and a tensor of S entries has S / C samples
for each node on one of its axes. A node whose tensors fit into the share of one rank is computed there, by its owner. A
node whose tensors do not, such as the residual stream of a transformer, is *spread*: every rank computes the sums over
some of its tensors, and the sums are added in its owner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mudsc_fast.matching.slices import TensorSlice, cut, tensor_slices
from mudsc_fast.matching.sweep import Bundle
from mudsc_fast.spec.permutation_spec import PermutationSpec

Task = TypeVar("Task")

#: A rank, and the part of a node's samples that it computes: where it begins and ends, in [0, 1].
Share = tuple[int, float, float]

#: Ranks may have this much more work than their equal share before work is moved.
_TOLERANCE = 0.05

#: Smaller shares of a slice than this are rounding.
_MIN_PIECE = 1e-3

#: Minimum number of samples worth moving, by the type of the device: sending co-moments and adding them takes as long
#: as this number of samples. Measured on CPUs; reckoned for GPUs, which compute faster than they send.
_MIN_MOVED_SAMPLES = {"cpu": 768, "cuda": 8192}


@dataclass(frozen=True)
class Owners:
    """The distribution of work.

    Attributes
    ----------
    owner
        For each bundle of nodes the rank that matches it.
    spread
        The bundles whose similarity several ranks compute.
    slices
        For each rank and each node the slices of tensors that this rank compares.
    samples
        For each node the number of samples, of all ranks together.
    work
        For each rank its work, as a share of all work.
    holder
        For each tensor the rank that compares most of it; this rank merges and writes it.
    """

    owner: Mapping[Bundle, int]
    spread: frozenset[Bundle]
    slices: Sequence[Mapping[str, Sequence[TensorSlice]]]
    samples: Mapping[str, int]
    work: tuple[float, ...]
    holder: Mapping[str, int]

    def needed(self, rank: int) -> set[str]:
        """Return the tensors that a rank compares."""
        return {part.tensor for slices in self.slices[rank].values() for part in slices}


def pack(spec: PermutationSpec, state_dict: Mapping[str, Tensor], ranks: int) -> Owners:
    """Pack the nodes and tensors of a network onto ranks; of the tensors only names and shapes are read.

    Parameters
    ----------
    spec
        The specification of what is matched.
    state_dict
        One network's tensors. Those without a node are packed by their size.
    ranks
        The number of ranks.
    """
    packing = _Packing(spec, state_dict, ranks)
    share = sum(packing.entries.values()) / ranks
    spread = {bundle for bundle in spec.bundles if ranks > 1 and packing.entries_of(bundle) > share}
    while True:
        packing.pack(spread)
        most = max(range(ranks), key=lambda rank: packing.load[rank])
        inner = [bundle for bundle, rank in packing.owner.items() if rank == most and bundle not in spread]
        if packing.load[most] <= (1 + _TOLERANCE) * sum(packing.load) / ranks or not inner:
            return packing.owners(spread)
        spread.add(max(inner, key=packing.work_of))


class _Packing:
    """The state of :func:`pack`: the load of each rank, and the owners."""

    def __init__(self, spec: PermutationSpec, state_dict: Mapping[str, Tensor], ranks: int) -> None:
        self._spec, self._ranks = spec, ranks
        self._units = spec.units(state_dict)
        self._slices = tensor_slices(spec, state_dict)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        self.entries = {name: tensor.numel() for name, tensor in state_dict.items()}

    def pack(self, spread: set[Bundle]) -> None:
        """Pack all bundles: those that are not spread as wholes, then the slices of the others where there is room."""
        self.load = [0.0] * self._ranks
        self.owner: dict[Bundle, int] = {}
        self._own: list[dict[str, list[TensorSlice]]] = [
            {node: [] for node in self._spec.nodes} for _ in range(self._ranks)
        ]
        home: dict[str, int] = {}
        for bundle in sorted(self._spec.bundles, key=self.work_of, reverse=True):
            if bundle in spread:
                continue
            rank = self.owner[bundle] = self._least_loaded()
            for node in bundle:
                self._give(rank, node, self._slices[node])
                home.update({part.tensor: rank for part in self._slices[node]})
        parts = [(node, part) for bundle in spread for node in bundle for part in self._slices[node]]
        parts.sort(key=lambda item: (-self._work(*item), item[0], item[1].tensor))
        share = (sum(self.load) + sum(self._work(*item) for item in parts)) / self._ranks
        for node, part in parts:
            least = self._least_loaded()
            room = share - self._work(node, part)
            fitting = [rank for rank in (home.get(part.tensor, least), least) if self.load[rank] <= room]
            if fitting:
                self._give(fitting[0], node, [part])
                home.setdefault(part.tensor, fitting[0])
            else:
                self._divide(node, part, share)
        for bundle in sorted(spread):
            self.owner[bundle] = max(
                range(self._ranks), key=lambda rank: sum(self._work(n, p) for n in bundle for p in self._own[rank][n])
            )

    def work_of(self, bundle: Bundle) -> float:
        """Return the work of a bundle."""
        return sum(self._work(node, part) for node in bundle for part in self._slices[node])

    def entries_of(self, bundle: Bundle) -> int:
        """Return the number of entries of the tensors of a bundle."""
        return sum(self.entries[name] for name in {part.tensor for node in bundle for part in self._slices[node]})

    def owners(self, spread: set[Bundle]) -> Owners:
        """Return the result."""
        held: dict[str, list[float]] = {}
        for rank, slices in enumerate(self._own):
            for node, parts in slices.items():
                for part in parts:
                    held.setdefault(part.tensor, [0.0] * self._ranks)[rank] += self._work(node, part)
        holder = {name: works.index(max(works)) for name, works in held.items()}
        stored = [0] * self._ranks
        for name, rank in holder.items():
            stored[rank] += self.entries[name]
        for name in sorted(set(self.entries) - set(holder), key=lambda name: (-self.entries[name], name)):
            rank = holder[name] = stored.index(min(stored))
            stored[rank] += self.entries[name]
        total = sum(self.load)
        return Owners(
            owner={bundle: self.owner[bundle] for bundle in self._spec.bundles},
            spread=frozenset(spread),
            slices=tuple(self._own),
            samples={node: sum(part.samples for part in parts) for node, parts in self._slices.items()},
            work=tuple(load / total for load in self.load),
            holder=holder,
        )

    def _work(self, node: str, part: TensorSlice) -> float:
        return float(self._units[node]) ** 2 * part.samples

    def _give(self, rank: int, node: str, parts: Sequence[TensorSlice]) -> None:
        self._own[rank][node].extend(parts)
        self.load[rank] += sum(self._work(node, part) for part in parts)

    def _least_loaded(self) -> int:
        return self.load.index(min(self.load))

    def _divide(self, node: str, part: TensorSlice, share: float) -> None:
        """Give a slice of a spread node that fits on no rank to several, each as much as it has room for."""
        work, begin = self._work(node, part), 0.0
        while begin < 1:
            rank = self._least_loaded()
            room = (share - self.load[rank]) / work if work else 1.0
            end = min(1.0, begin + room) if room > _MIN_PIECE else 1.0
            piece = cut(part, begin, end, self._shapes[part.tensor], self._units)
            begin = end
            if piece is not None:
                self._give(rank, node, [piece])


def share_out(
    works: Mapping[Task, float],
    holder: Mapping[Task, int],
    loads: Sequence[float],
    samples: Mapping[Task, float],
    device: torch.device,
) -> dict[Task, list[Share]]:
    """Return the tasks of a wave that several ranks should compute so that all finish together.

    Parameters
    ----------
    works
        The work of each task that can be shared.
    holder
        The rank that has it.
    loads
        For each rank the work that cannot be shared.
    samples
        The samples of each task: few are not worth moving.
    device
        Where the ranks compute.

    Returns
    -------
    dict
        For each task to share the shares of ranks, (rank, begin, end) from 0 to 1; together they are the whole.
    """
    min_moved = _MIN_MOVED_SAMPLES.get(device.type, _MIN_MOVED_SAMPLES["cuda"])
    load = list(loads)
    for task, work in works.items():
        load[holder[task]] += work
    share = sum(load) / len(load)
    shares: dict[Task, list[Share]] = {}
    left = dict(works)
    while True:
        most, least = load.index(max(load)), load.index(min(load))
        excess = min(load[most] - share, share - load[least])
        whole = [task for task in works if holder[task] == most and left[task] > 0]
        if excess <= _TOLERANCE * share or not whole:
            break
        task = max(whole, key=lambda item: left[item])
        moved = min(excess, left[task])
        if moved / works[task] * samples[task] < min_moved:
            break
        end = left[task] / works[task]
        begin = end - moved / works[task] if moved < left[task] else 0.0
        shares.setdefault(task, []).append((least, begin, end))
        left[task] -= moved
        load[most] -= moved
        load[least] += moved
    for task, moved_shares in shares.items():
        if left[task] > 0:
            moved_shares.append((holder[task], 0.0, left[task] / works[task]))
    return shares
