"""The distribution of work over processes, and the bytes sent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Distribution:
    """The distribution of a matching over several processes.

    Attributes
    ----------
    work
        For each rank, its fraction of the work of one sweep over all nodes.
    statistics_bytes
        Total number of bytes of tensors that all ranks sent for the statistics of activations.
    sweep_bytes
        The same for each sweep.
    """

    work: tuple[float, ...]
    statistics_bytes: int
    sweep_bytes: tuple[int, ...]

    def __str__(self) -> str:
        lines = f"{len(self.work)} ranks, with {', '.join(f'{share:.1%}' for share in self.work)} of the work"
        if self.statistics_bytes:
            lines += f"; sent {self.statistics_bytes / 1e6:.1f} MB of statistics"
        if self.sweep_bytes:
            lines += "; sent MB per sweep: " + ", ".join(f"{count / 1e6:.2f}" for count in self.sweep_bytes)
        return lines
