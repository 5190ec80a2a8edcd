"""The result of merging or aligning networks in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mudsc_fast
from mudsc_fast.distributed.report import Distribution
from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.spec.permutation_spec import PermutationSpec

_MAX_LISTED = 8


@dataclass(frozen=True, repr=False, eq=False)
class WriteResult:
    """Description of what was written and how it was made.

    Attributes
    ----------
    output
        The file or directory.
    files
        Names of the files with tensors, relative to the directory.
    num_bytes_in, num_bytes
        Bytes of the tensors of each input, and of the output.
    dtype
        The requested dtype, or None if tensors keep theirs.
    spec
        The spec that was used.
    matching, objectives, timings
        As in :class:`mudsc_fast.MergeResult`. The matching of an alignment has two networks; the first is the base.
    unmatched_tensors
        Names of the tensors that are not in the spec. They were averaged, or kept, in their own order.
    task_tensors
        Names of the tensors that were not merged. Each network keeps its own (`task_heads`), or the result has those
        of the first network (`ignore`).
    difference
        For an alignment, how much the outputs of the network changed: the largest absolute difference, and the largest
        absolute output. None if it was not checked; `unchecked` has the reason.
    unchecked
        Why there is no `difference`.
    distribution
        How the processes of a group shared the work; None for one process.
    """

    output: Path
    files: tuple[str, ...]
    num_bytes_in: tuple[int, ...]
    num_bytes: int
    dtype: torch.dtype | None
    spec: PermutationSpec
    matching: Mapping[str, NodeMatching]
    objectives: Sequence[float]
    timings: Mapping[str, float]
    unmatched_tensors: tuple[str, ...]
    task_tensors: tuple[str, ...] = ()
    difference: tuple[float, float] | None = None
    unchecked: str | None = None
    distribution: Distribution | None = None

    def __repr__(self) -> str:
        """Return one line; ``str`` is the report."""
        return f"WriteResult({str(self.output)!r}, {len(self.matching)} nodes, {self.num_bytes / 1e6:.1f} MB)"

    def __str__(self) -> str:
        """Return a few lines: the mean similarity, sizes, seconds, and the comparison of outputs."""
        before, after = self.mean_similarities()
        files = f"{len(self.files)} file" + ("s" if len(self.files) > 1 else "")
        lines = [
            f"{len(self.matching)} nodes matched: mean similarity {before:.4f} before, {after:.4f} after",
            f"{self.output}: {self.num_bytes / 1e6:.1f} MB of tensors in {files}",
            "seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.timings.items()),
        ]
        if self.distribution is not None:
            lines.append(str(self.distribution))
        if self.task_tensors:
            lines.append("not merged: " + _listed(self.task_tensors))
        if self.unmatched_tensors:
            lines.append("in their own order: " + _listed(self.unmatched_tensors))
        if self.difference is not None:
            lines.append(
                f"outputs before and after differ by at most {self.difference[0]:.3g}; the largest output is "
                f"{self.difference[1]:.3g}"
            )
        elif self.unchecked is not None:
            lines.append(f"outputs before and after were not compared: {self.unchecked}")
        return "\n".join(lines)

    def mean_similarities(self) -> tuple[float, float]:
        """Return the mean similarity over the nodes before and after matching."""
        matches = list(self.matching.values())
        return (
            sum(match.similarity_before for match in matches) / len(matches),
            sum(match.similarity for match in matches) / len(matches),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-compatible numbers, strings, lists and dicts."""
        difference = None if self.difference is None else {"largest": self.difference[0], "output": self.difference[1]}
        return {
            "version": mudsc_fast.__version__,
            "output": str(self.output),
            "files": list(self.files),
            "bytes_in": list(self.num_bytes_in),
            "bytes": self.num_bytes,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "nodes": {
                node: {
                    "units": match.num_clusters,
                    "similarity_before": match.similarity_before,
                    "similarity": match.similarity,
                    "gap": match.gap,
                }
                for node, match in self.matching.items()
            },
            "objectives": list(self.objectives),
            "seconds": dict(self.timings),
            "unmatched_tensors": list(self.unmatched_tensors),
            "task_tensors": list(self.task_tensors),
            "difference": difference,
            "distribution": None if self.distribution is None else vars(self.distribution),
        }


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
