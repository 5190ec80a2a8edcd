"""Plan a merge of networks in files without doing it (``--dry-run``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import Rewindable
from mudsc_fast.checkpoints.directory import Format
from mudsc_fast.checkpoints.networks import NetworkFiles, PathLike, open_networks, prepare_networks
from mudsc_fast.io.merging import patterns
from mudsc_fast.io.output import Output
from mudsc_fast.matching.node import Mode
from mudsc_fast.options import Space
from mudsc_fast.spec.choose import SpecLike

#: Usual number of sweeps for trained networks. Later sweeps skip the nodes that do not change.
_USUAL_SWEEPS = 4

#: Nanoseconds to assign or cluster units, for each entry of the similarity matrix. Trained networks take less, random
#: ones more.
_NANOSECONDS_PER_ENTRY = 10.0

#: Bytes of tensors that are permuted, averaged and written in a second, on an ordinary disk.
_BYTES_PER_SECOND = 4e8

_MAX_LISTED = 8


@dataclass(frozen=True)
class MergePlan:
    """The plan of a merge.

    Attributes
    ----------
    networks
        The networks and their spec.
    output
        Where the result would be written.
    units
        Number of units of each node.
    num_bytes
        Bytes of the output.
    memory_bytes
        Estimated bytes of memory, without the file cache.
    seconds
        Estimated time, without running the networks on data.
    activations
        Whether the networks would be run on data.
    """

    networks: NetworkFiles
    output: Output
    units: Mapping[str, int]
    num_bytes: int
    memory_bytes: int
    seconds: float
    activations: bool

    def __str__(self) -> str:
        """Return the plan as a table of nodes and a few lines."""
        spec, first = self.networks.spec, self.networks.checkpoints[0]
        width = max(len("node"), *map(len, self.units))
        lines = [f"{'node':<{width}}  {'units':>7}  {'groups':>6}  {'tensors':>7}"]
        for node, units in self.units.items():
            tensors = len({use.tensor for use in spec.uses(node)})
            lines.append(f"{node:<{width}}  {units:>7}  {spec.groups(node).count:>6}  {tensors:>7}")
        unmatched, kept = self.networks.unmatched, self.networks.kept_names
        lines += [
            "",
            f"{len(self.units)} nodes would be matched in {len(self.networks.checkpoints)} networks of "
            f"{first.num_bytes / 1e6:.1f} MB",
        ]
        if unmatched:
            lines.append("averaged in their own order: " + _listed(unmatched))
        if kept:
            lines.append("not merged: " + _listed(kept))
        more = " and the time to run the networks on the data" if self.activations else ""
        lines += [
            f"output: {self.num_bytes / 1e6:.1f} MB of tensors in {self.output.path}",
            f"memory: about {max(self.memory_bytes / 1e6, 1):.0f} MB besides the file cache",
            f"time: about {_duration(self.seconds)}{more}",
            "nothing was written (--dry-run)",
        ]
        return "\n".join(lines)


def plan_merge(
    inputs: Sequence[PathLike],
    output: PathLike,
    *,
    spec: SpecLike = None,
    data: Iterable[Any] | None = None,
    build: Callable[[], nn.Module] | None = None,
    mode: Mode = "align",
    space: Space | None = None,
    max_sweeps: int = 100,
    task_heads: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    dequantize: bool = False,
    file_format: Format | None = None,
    shard_size: str | None = None,
) -> MergePlan:
    """Return what :func:`merge_checkpoints` would do with these arguments, after the same checks.

    The time is estimated from a short measurement of matrix products and can be off by a factor of a few.

    Raises
    ------
    CheckpointError, ValueError, TypeError
        As :func:`merge_checkpoints`.
    """
    target = Output.of(output, file_format, shard_size, None)
    batches = None if data is None else Rewindable(data)
    heads = patterns("task_heads", task_heads)
    networks = prepare_networks(
        open_networks(inputs, dequantize=dequantize),
        spec,
        build,
        batches,
        ignore=patterns("ignore", ignore),
        task_heads=heads,
    )
    matched = networks.spec.without(networks.kept) if networks.kept else networks.spec
    tensors = networks.state_dicts[0]
    units = matched.units(tensors)
    runs = space in ("activation", "dual") or (space is None and batches is not None)
    num_bytes = sum(checkpoint.num_bytes for checkpoint in networks.checkpoints[: None if heads else 1])
    pairs = len(networks.checkpoints) ** 2 if mode == "zip" else len(networks.checkpoints) - 1
    memory = _memory(networks, units, pairs) + (sum(c.num_bytes for c in networks.checkpoints) if runs else 0)
    sweeps = min(max_sweeps, _USUAL_SWEEPS) if space != "activation" else 0
    seconds = _seconds(networks, tensors, units, pairs, sweeps) + num_bytes / _BYTES_PER_SECOND
    return MergePlan(networks, target, units, num_bytes, memory, seconds, runs)


def _memory(networks: NetworkFiles, units: Mapping[str, int], pairs: int) -> int:
    """Return the bytes of the widest node's similarity and its products in float32, and of copies of one tensor."""
    widest = max(units.values())
    count = len(networks.checkpoints)
    largest = max(tensor.numel() for tensor in networks.checkpoints[0].tensors.values())
    return 3 * 4 * pairs * widest**2 + 4 * (count + 1) * largest


def _seconds(
    networks: NetworkFiles, tensors: Mapping[str, Tensor], units: Mapping[str, int], pairs: int, sweeps: int
) -> float:
    products = entries = 0.0
    for node, count in units.items():
        samples = sum(
            tensors[name].numel() / count
            for name in {use.tensor for use in networks.spec.uses(node) if use.axis.compared}
            if name not in networks.kept
        )
        products += 2.0 * pairs * samples * count**2
        entries += float(pairs) * count**2
    return max(sweeps, 1) * (products / _products_per_second() + entries * _NANOSECONDS_PER_ENTRY / 1e9)


def _products_per_second(width: int = 512) -> float:
    """Measure how many floating point operations per second a matrix product reaches on this machine."""
    matrix = torch.ones(width, width)
    torch.mm(matrix, matrix)
    began = time.perf_counter()
    torch.mm(matrix, matrix)
    return 2.0 * width**3 / max(time.perf_counter() - began, 1e-9)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "1 second"
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
