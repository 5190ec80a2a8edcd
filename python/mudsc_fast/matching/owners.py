"""Distribution of nodes and tensors over ranks by work.

The similarity of a node with C units takes C² operations per sample. A tensor of S entries has S / C samples for each
node on its axes. If the tensors of a node fit into the share of one rank, this rank, the owner, computes the
similarity. Otherwise, as for the residual stream of a transformer, the node is *spread*: each rank computes the sums
over some of the tensors, and the owner adds the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from mudsc_fast.matching.slices import TensorSlice, cut, tensor_slices
from mudsc_fast.matching.sweep import Bundle
from mudsc_fast.spec.permutation_spec import PermutationSpec

Task = TypeVar("Task")

#: A rank, and the begin and end, in [0, 1], of the part of a node's work that it does.
Share = tuple[int, float, float]

#: Work is moved from a rank only if its load exceeds an equal share by more than this fraction.
_TOLERANCE = 0.05

#: Shares of a slice below this size are rounding errors.
_MIN_PIECE = 1e-3


@dataclass(frozen=True)
class Owners:
    """The distribution of work over ranks.

    Attributes
    ----------
    owner
        The rank that matches each bundle of nodes.
    spread
        The bundles whose similarity is computed by several ranks.
    slices
        For each rank and each node, the slices of tensors that the rank compares.
    samples
        For each node, the total number of samples of all ranks.
    work
        For each rank, its fraction of the work.
    holder
        For each tensor, the rank that compares most of it. This rank merges and writes the tensor.
    """

    owner: Mapping[Bundle, int]
    spread: frozenset[Bundle]
    slices: Sequence[Mapping[str, Sequence[TensorSlice]]]
    samples: Mapping[str, int]
    work: tuple[float, ...]
    holder: Mapping[str, int]

    def needed(self, rank: int) -> set[str]:
        """Return the names of the tensors that a rank compares."""
        return {part.tensor for slices in self.slices[rank].values() for part in slices}


def pack(spec: PermutationSpec, state_dict: Mapping[str, Tensor], ranks: int) -> Owners:
    """Pack the nodes and tensors of a network onto ranks. Only the names and shapes of the tensors are read.

    Parameters
    ----------
    spec
        The spec of the tensors that are matched.
    state_dict
        The tensors of one network. Tensors without a node are packed by size.
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
    """The state of :func:`pack`: the loads of the ranks, and the owners of the bundles."""

    def __init__(self, spec: PermutationSpec, state_dict: Mapping[str, Tensor], ranks: int) -> None:
        self._spec, self._ranks = spec, ranks
        self._units = spec.units(state_dict)
        self._slices = tensor_slices(spec, state_dict)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        self.entries = {name: tensor.numel() for name, tensor in state_dict.items()}

    def pack(self, spread: set[Bundle]) -> None:
        """Pack all bundles: first those that are not spread, each on one rank, then the slices of the spread ones."""
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
        """Return the distribution."""
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
        """Divide a slice of a spread node that does not fit on any rank, in proportion to the room of the ranks."""
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
    after: Mapping[Task, float],
    is_worth_moving: Callable[[Task, float], bool],
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
    after
        For each task the work that the holder does when it is complete.
    is_worth_moving
        Tells whether it is worth moving some fraction of a task to another rank.

    Returns
    -------
    dict
        For each task to share the shares of ranks, (rank, begin, end) from 0 to 1; together they are the whole.
    """
    load = list(loads)
    for task, work in works.items():
        load[holder[task]] += work + after[task]
    share = sum(load) / len(load)
    helped = [0.0] * len(load)
    shares: dict[Task, list[Share]] = {}
    left = dict(works)
    edge = dict.fromkeys(works, 1.0)  # where the part that the holder still has ends
    while True:
        most, least = load.index(max(load)), load.index(min(load))
        whole = [task for task in works if holder[task] == most and left[task] > 0]
        if not whole:
            break
        task = max(whole, key=lambda item: left[item])
        # Ranks help before they do their own work. Then the holder completes the task.
        in_time = (load[most] - helped[least] - after[task]) / 2
        excess = min(load[most] - share, share - load[least], in_time)
        if excess <= _TOLERANCE * share:
            break
        moved = min(excess, left[task])
        if not is_worth_moving(task, moved / works[task]):
            break
        begin = max(0.0, edge[task] - moved / works[task]) if moved < left[task] else 0.0
        shares.setdefault(task, []).append((least, begin, edge[task]))
        edge[task] = begin
        left[task] -= moved
        load[most] -= moved
        load[least] += moved
        helped[least] += moved
    for task, moved_shares in shares.items():
        if left[task] > 0:
            moved_shares.append((holder[task], 0.0, edge[task]))
    return shares
