"""Checkpoints of interrupted runs: the statistics of the activations, and the state after each sweep."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mudsc_fast._files import atomic_write, load, save
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.matching.statistics import MatchingStatistics
from mudsc_fast.matching.sweep import SweepState, Visit

_FORMAT = "mudsc_fast checkpoint 1"
_INPUTS = "inputs.json"


def checkpoint_directory(checkpoint: object) -> Path:
    """Return the argument `checkpoint` as a path.

    Raises
    ------
    TypeError
        If it is not a path.
    NotADirectoryError
        If it is a file.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be the path of a directory, got {type(checkpoint).__name__}")
    path = Path(checkpoint)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"checkpoint {path} must be a directory, got a file: give another path")
    return path


class Checkpoint:
    """A directory that keeps what a run has computed. Rank 0 writes it, and all ranks read it.

    Parameters
    ----------
    path
        The directory; it is made if it does not exist.
    inputs
        What the run depends on, by name. The number of processes is not among it.
    ranks
        The processes of the run.

    Raises
    ------
    OSError
        If the directory cannot be written.
    ValueError
        If it was written by a run with other inputs, or some process cannot see what another writes in it.
    """

    def __init__(self, path: Path, inputs: Mapping[str, str], ranks: Ranks) -> None:
        self._path, self._inputs, self._ranks = path, path / _INPUTS, ranks
        inputs = {"format": _FORMAT, **inputs}
        with ranks.step("opening the checkpoint"):
            if ranks.rank == 0:
                self._path.mkdir(parents=True, exist_ok=True)
                for left in self._path.glob(".*.partial"):  # by a run that was killed while it wrote
                    left.unlink(missing_ok=True)
                if not self._inputs.exists():
                    with atomic_write(self._inputs) as temporary:
                        temporary.write_text(json.dumps(inputs, indent=2) + "\n", encoding="utf-8")
        with ranks.step("opening the checkpoint"):
            self._check_inputs(inputs)

    def __str__(self) -> str:
        return f"checkpoint {self._path}"

    def _check_inputs(self, inputs: Mapping[str, str]) -> None:
        if not self._inputs.exists():
            raise ValueError(f"{self} must be on a file system that all processes share")
        try:
            earlier = json.loads(self._inputs.read_text(encoding="utf-8"))
            changed = [name for name in inputs if earlier.get(name) != inputs[name]]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{self} is not one of mudsc_fast: {_INPUTS}: {error}") from error
        if changed:
            name = changed[0]
            raise ValueError(
                f"{self} belongs to a run with another {name}: {earlier.get(name)} there, "
                f"{inputs[name]} here. Give the same inputs, or another directory to start again"
            )

    def load_statistics(self, device: torch.device) -> MatchingStatistics | None:
        """Return the statistics of the activations, or None if they are incomplete."""
        with self._ranks.step("reading the checkpoint"):
            file = self._path / "statistics.pt"
            return MatchingStatistics.load(file, device=device) if file.exists() else None

    def save_statistics(self, statistics: MatchingStatistics) -> None:
        """Keep the statistics of all data."""
        with self._ranks.step("writing the checkpoint"):
            if self._ranks.rank == 0:
                statistics.save(self._path / "statistics.pt")

    def load_state(self, device: torch.device) -> SweepState | None:
        """Return the state after the last sweep, None before the first."""
        with self._ranks.step("reading the checkpoint"):
            file = self._path / "sweeps.pt"
            if not file.exists():
                return None
            try:
                return _unpacked(load(file, "cpu"), device)
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                raise ValueError(f"{file} is damaged: {error}. Remove it to sweep from the start") from error

    def save_state(self, state: SweepState) -> None:
        """Keep the state after a sweep."""
        with self._ranks.step("writing the checkpoint"):
            if self._ranks.rank == 0:
                save(_packed(state), self._path / "sweeps.pt")


def _packed(state: SweepState) -> dict[str, Any]:
    """Return a state as numbers, texts, tensors and containers; each matching is in it once."""
    place: dict[int, int] = {}
    matchings: list[dict[str, Any]] = []

    def places(matching: Mapping[str, NodeMatching]) -> dict[str, int]:
        for matched in matching.values():
            if id(matched) not in place:
                place[id(matched)] = len(matchings)
                clusters = matched.cluster_of_unit.cpu().to(torch.int32)
                matchings.append({**vars(matched), "cluster_of_unit": clusters})
        return {node: place[id(matched)] for node, matched in matching.items()}

    return {
        "format": _FORMAT,
        "current": places(state.current),
        "best": places(state.best),
        "visits": [
            (list(bundle), places(visit.neighbors), places(visit.result)) for bundle, visit in state.visits.items()
        ],
        "matchings": matchings,
        "generator": state.generator,
        "objectives": state.objectives,
        "misses": state.misses,
    }


def _unpacked(content: Mapping[str, Any], device: torch.device) -> SweepState:
    if content["format"] != _FORMAT:
        raise KeyError(f"format {_FORMAT!r}, got {content['format']!r}")

    def clusters(packed: Tensor) -> Tensor:
        return packed.to(device, torch.int64)

    matchings = [
        NodeMatching(**{**packed, "cluster_of_unit": clusters(packed["cluster_of_unit"])})
        for packed in content["matchings"]
    ]

    def named(places: Mapping[str, int]) -> dict[str, NodeMatching]:
        return {node: matchings[place] for node, place in places.items()}

    return SweepState(
        current=named(content["current"]),
        best=named(content["best"]),
        generator=content["generator"],
        objectives=content["objectives"],
        misses=content["misses"],
        visits={tuple(bundle): Visit(named(around), named(result)) for bundle, around, result in content["visits"]},
    )
