"""Merging and aligning networks in files, without ever having a whole one in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast._forward import Rewindable
from mudsc_fast._models import Networks
from mudsc_fast.io import models as loading
from mudsc_fast.io.checkpoint import FORMAT_OF_SUFFIX, Checkpoint, CheckpointError, Format, open_checkpoint, read_json
from mudsc_fast.io.writing import (
    TensorSize,
    Written,
    atomic_path,
    check_free,
    copy_companions,
    parse_size,
    write_checkpoint,
)
from mudsc_fast.match import PreparedMatching
from mudsc_fast.matching.activation import MatchingStatistics, collect_statistics
from mudsc_fast.matching.apply import merge_state_dicts, reindex
from mudsc_fast.matching.node import BLOCKS_OF_MODE, Mode, NodeMatching
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.ops.permute import UnitMap
from mudsc_fast.options import MatchOptions, Space, default_space
from mudsc_fast.spec.axes import Axis
from mudsc_fast.spec.choose import SpecLike, choose_spec
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Shards of a directory are no larger, unless a single tensor is: the size at which Hugging Face cuts.
DEFAULT_SHARD_SIZE = "5GB"

#: A permuted network may differ from the original by rounding alone: this share of its largest output, in float32.
_MOST_DIFFERENCE = 1e-3

_MOST_LISTED = 20

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class WriteResult:
    """What was written and how it came about.

    Attributes
    ----------
    output
        The file or directory.
    files
        Names of the files with tensors.
    num_bytes_in, num_bytes
        Bytes of each input's tensors, and of the output's.
    dtype
        The dtype asked for, or None where tensors keep theirs.
    spec
        The specification used.
    matching, objectives, timings
        As in :class:`mudsc_fast.MergeResult`; the matching of an alignment is that of both networks, the first being
        the base.
    unmatched_tensors
        Names of the tensors that the specification does not name; they stayed in their own order.
    difference
        Of an alignment: the largest difference between outputs of the network before and after, and the largest
        output. None where it was not checked, for the reason in `unchecked`.
    unchecked
        Why there is no `difference`.
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
    difference: tuple[float, float] | None = None
    unchecked: str | None = None

    def __str__(self) -> str:
        """Return a few lines: the similarities on average, sizes, seconds, and what was compared."""
        before, after = (
            sum(getattr(match, name) for match in self.matching.values()) / len(self.matching)
            for name in ("similarity_before", "similarity")
        )
        files = f"{len(self.files)} file" + ("s" if len(self.files) > 1 else "")
        lines = [
            f"{len(self.matching)} nodes matched: mean similarity {before:.4f} before, {after:.4f} after",
            f"{self.output}: {self.num_bytes / 1e6:.1f} MB of tensors in {files}",
            "seconds: " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.timings.items()),
        ]
        if self.unmatched_tensors:
            lines.append("in their own order: " + ", ".join(self.unmatched_tensors))
        if self.difference is not None:
            lines.append(
                f"outputs before and after differ by at most {self.difference[0]:.3g}, the largest being "
                f"{self.difference[1]:.3g}"
            )
        elif self.unchecked is not None:
            lines.append(f"outputs before and after were not compared: {self.unchecked}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the result as numbers, texts, lists and dicts."""
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
                }
                for node, match in self.matching.items()
            },
            "objectives": list(self.objectives),
            "seconds": dict(self.timings),
            "unmatched_tensors": list(self.unmatched_tensors),
            "difference": difference,
        }


def merge_checkpoints(
    inputs: Sequence[PathLike],
    output: PathLike,
    *,
    spec: SpecLike = None,
    data: Iterable[Any] | None = None,
    build: Callable[[], nn.Module] | None = None,
    mode: Mode = "align",
    space: Space | None = None,
    balance: float = 0.5,
    weights: Sequence[float] | None = None,
    shrink: float = 0.5,
    budget: float = 1.0,
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    precision: Precision = "float32",
    dtype: torch.dtype | None = None,
    file_format: Format | None = None,
    shard_size: str | None = None,
    progress: bool = False,
) -> WriteResult:
    """Merge networks in files into a new one.

    Tensors are read from mapped files when they are needed and written one after the other: memory holds the largest
    tensor of every model a few times and a node's similarity, not the models. Only activations need whole models.

    Parameters
    ----------
    inputs
        Two or more checkpoints, as for :func:`open_checkpoint`.
    output
        A new file, if its name ends as that of a checkpoint, or else a new directory, with shards and, where the first
        input is a directory, copies of its configuration, tokenizer and other small files. It appears when it is
        complete.
    spec
        The specification, or how to choose it, as for :func:`mudsc_fast.merge`.
    data
        Batches to run the models on, as for :func:`mudsc_fast.merge`; needed for the activation and the dual space.
    build
        Makes a module that takes the tensors, for `data`; not needed for directories of Hugging Face.
    mode, space, balance, weights, shrink, budget, random_state, max_sweeps, patience, precision, progress
        As for :func:`mudsc_fast.merge`.
    dtype
        Dtype of the floating point tensors in the output; by default their own.
    file_format
        ``"safetensors"`` or ``"torch"``; by default that of the output's name or else of the first input.
    shard_size
        The most bytes of tensors in a file of an output directory, e.g. ``"200MB"``; 5 GB by default.

    Raises
    ------
    CheckpointError
        If an input cannot be read, inputs do not go together, or the output exists or cannot be written.
    ValueError, TypeError
        As :func:`mudsc_fast.merge`.
    """
    plan = _Output.of(Path(output), file_format, shard_size)
    checkpoints = [open_checkpoint(path) for path in inputs]
    if len(checkpoints) < 2:
        raise CheckpointError(f"expected at least two checkpoints to merge, got {len(checkpoints)}")
    found, chosen = _match(
        checkpoints,
        spec,
        data,
        build,
        mode=mode,
        space=space,
        balance=balance,
        weights=weights,
        shrink=shrink,
        budget=budget,
        random_state=random_state,
        max_sweeps=max_sweeps,
        patience=patience,
        precision=precision,
        progress=progress,
    )

    def merged(name: str) -> Tensor:
        tensors = [checkpoint.tensors[name] for checkpoint in checkpoints]
        if dtype is not None and tensors[0].is_floating_point():
            wide = torch.promote_types(dtype, tensors[0].dtype)  # rounded once, to the output's dtype
            tensors = [tensor.to(wide) for tensor in tensors]
        columns = [{name: tensor} for tensor in tensors]
        return merge_state_dicts(columns, chosen, found.matching, found.weights)[name]

    began = time.perf_counter()
    written, _ = _write(plan, checkpoints[0], merged, dtype)
    return _result(plan, checkpoints, chosen, found, written, dtype, {"writing": time.perf_counter() - began})


def align_checkpoints(
    base: PathLike,
    other: PathLike,
    output: PathLike,
    *,
    spec: SpecLike = None,
    data: Iterable[Any] | None = None,
    build: Callable[[], nn.Module] | None = None,
    space: Space | None = None,
    balance: float = 0.5,
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    precision: Precision = "float32",
    file_format: Format | None = None,
    shard_size: str | None = None,
    check: bool = True,
    progress: bool = False,
) -> WriteResult:
    """Write a network with its units in the order of another one's; it computes the same as before.

    The result can be averaged with `base` by any tool, tensor by tensor.

    Parameters
    ----------
    base, other
        Checkpoints, as for :func:`open_checkpoint`; `other` is written anew.
    output, spec, data, build, space, balance, random_state, max_sweeps, patience, precision
        As for :func:`merge_checkpoints`.
    file_format, shard_size, progress
        As for :func:`merge_checkpoints`; what lies beside the weights is copied from `other`.
    check
        Whether to compute outputs of the network before and after, in float32, on a small batch: of random tokens or
        pixels for directories of Hugging Face where transformers is installed, else on the first batch of `data` where
        `build` is given. This loads both whole.

    Raises
    ------
    CheckpointError
        As :func:`merge_checkpoints`; and if the outputs differ by more than rounding, which a wrong specification
        brings about. Nothing is written then.
    ValueError, TypeError
        As :func:`mudsc_fast.merge`.
    """
    plan = _Output.of(Path(output), file_format, shard_size)
    checkpoints = [open_checkpoint(path) for path in (base, other)]
    batches = None if data is None else Rewindable(data)
    found, chosen = _match(
        checkpoints,
        spec,
        batches,
        build,
        mode="align",
        space=space,
        balance=balance,
        random_state=random_state,
        max_sweeps=max_sweeps,
        patience=patience,
        precision=precision,
        progress=progress,
    )
    source = checkpoints[1]

    def map_of(axis: Axis) -> UnitMap | None:
        return found.matching[axis.node].unit_map(axis.role, found.weights, 1) if axis.node in found.matching else None

    def permuted(name: str) -> Tensor:
        tensor = source.tensors[name]
        return reindex([tensor], chosen.layouts[name], map_of, [1.0]) if name in chosen.layouts else tensor

    def difference(written: Path) -> tuple[tuple[float, float] | None, str | None]:
        if not check:
            return None, "not asked for"
        result = loading.output_difference(source, open_checkpoint(written), build, batches)
        if isinstance(result, str):
            return None, result
        largest, scale = result
        if not largest <= _MOST_DIFFERENCE * scale:
            raise CheckpointError(
                f"{source.path}: its outputs change by up to {largest:.3g} (the largest is {scale:.3g}) when it is "
                "permuted: the specification does not describe this network"
            )
        return result, None

    began = time.perf_counter()
    written, (compared, unchecked) = _write(plan, source, permuted, None, difference)
    result = _result(plan, checkpoints, chosen, found, written, None, {"writing": time.perf_counter() - began})
    return replace(result, difference=compared, unchecked=unchecked)


@dataclass(frozen=True)
class _Output:
    """Where and how the result is written."""

    path: Path
    kind: Format | None
    shard_bytes: int | None

    @classmethod
    def of(cls, path: Path, file_format: Format | None, shard_size: str | None) -> _Output:
        path = Path(os.path.abspath(path))
        check_free(path)
        by_name = FORMAT_OF_SUFFIX.get(path.suffix)
        if by_name is None:
            return cls(path, file_format, parse_size(shard_size or DEFAULT_SHARD_SIZE))
        if file_format not in (None, by_name):
            raise CheckpointError(f"{path}: the name is that of a {by_name} file, but the format is {file_format}")
        if shard_size is not None:
            raise CheckpointError(f"{path}: a single file has no shards: name a directory or leave the shard size out")
        return cls(path, by_name, None)


@dataclass(frozen=True)
class _Found:
    """How the units of all networks correspond, and their shares in the result."""

    matching: Mapping[str, NodeMatching]
    objectives: Sequence[float]
    weights: Sequence[float]
    timings: Mapping[str, float]


def _match(
    checkpoints: Sequence[Checkpoint],
    spec: SpecLike,
    data: Iterable[Any] | None,
    build: Callable[[], nn.Module] | None,
    *,
    mode: Mode,
    space: Space | None,
    balance: float,
    weights: Sequence[float] | None = None,
    precision: Precision,
    progress: bool | None,
    **arguments: Any,
) -> tuple[_Found, PermutationSpec]:
    options = MatchOptions(
        mode=mode,
        space=default_space(space, data is not None),
        balance=balance,
        precision=precision,
        progress=progress,
        **arguments,
    )
    _check_together(checkpoints)
    batches = None if data is None else Rewindable(data)
    chosen = _spec_of_all(checkpoints, spec, build, batches)
    activations = None
    timings: dict[str, float] = {}
    if options.space != "weight":
        if batches is None:
            raise CheckpointError(f"the {options.space} space needs data: name a function that yields batches")
        began = time.perf_counter()
        activations = _activations(checkpoints, spec, chosen, batches, build, mode, precision, progress)
        timings["activations"] = time.perf_counter() - began
    networks = Networks((), tuple(checkpoint.tensors for checkpoint in checkpoints))
    found = PreparedMatching(networks, chosen, activations, options, weights).at(options.balance)
    return _Found(found.nodes, found.objectives, found.weights, {**found.timings, **timings}), chosen


def _activations(
    checkpoints: Sequence[Checkpoint],
    spec: SpecLike,
    chosen: PermutationSpec,
    data: Iterable[Any],
    build: Callable[[], nn.Module] | None,
    mode: Mode,
    precision: Precision,
    progress: bool | None,
) -> MatchingStatistics:
    models = [loading.load_model(checkpoint, build) for checkpoint in checkpoints]
    if build is None and chosen.problems(models[0].state_dict()):
        # In memory tensors may have other names than in files; nodes are the same.
        observed = choose_spec(spec, models[0].state_dict(), config=checkpoints[0].config, model=lambda: models[0])
    else:
        observed = chosen
    observed.validate(models[0])
    with loading.users_code("running the networks on the data"):
        statistics = collect_statistics(
            models, data, spec=observed, blocks=BLOCKS_OF_MODE[mode], precision=precision, progress=progress
        )
    statistics.spec = chosen
    return statistics


def _check_together(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise a CheckpointError unless all checkpoints hold tensors of the same names, shapes and dtypes."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _check_configs(first, other)
        _check_tokenizers(first, other)
        problems = [f"{name!r} is not in {other.path}" for name in first.tensors if name not in other.tensors]
        problems += [f"{name!r} is not in {first.path}" for name in other.tensors if name not in first.tensors]
        for name in first.tensors:
            if name in other.tensors:
                problems += _differences(name, first, other)
        if problems:
            more = [f"... and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
            raise CheckpointError(
                "\n  ".join([f"{first.path} and {other.path} do not go together:", *problems[:_MOST_LISTED], *more])
            )


def _differences(name: str, first: Checkpoint, other: Checkpoint) -> list[str]:
    ours, theirs = first.tensors[name], other.tensors[name]
    if ours.shape != theirs.shape:
        return [f"{name!r} has shape {list(ours.shape)} in {first.path}, but {list(theirs.shape)} in {other.path}"]
    if ours.dtype != theirs.dtype:
        return [f"{name!r} has dtype {ours.dtype} in {first.path}, but {theirs.dtype} in {other.path}"]
    return []


def _check_configs(first: Checkpoint, other: Checkpoint) -> None:
    for key in ("model_type", "architectures"):
        ours, theirs = (checkpoint.config.get(key) if checkpoint.config else None for checkpoint in (first, other))
        if ours is not None and theirs is not None and ours != theirs:
            raise CheckpointError(
                f"{first.path} and {other.path} do not go together: {key} is {ours!r} in one config.json "
                f"and {theirs!r} in the other"
            )


def _check_tokenizers(first: Checkpoint, other: Checkpoint) -> None:
    """Raise a CheckpointError if two directories' tokenizers give one number to different texts."""
    ours, theirs = (_texts_of_tokens(checkpoint.path) for checkpoint in (first, other))
    for number, text in ours.items():
        if theirs.get(number, text) != text:
            raise CheckpointError(
                f"{first.path} and {other.path} do not go together: their tokenizers differ, token {number} is "
                f"{text!r} in one and {theirs[number]!r} in the other"
            )


def _texts_of_tokens(path: Path) -> dict[int, str]:
    if (path / "tokenizer.json").is_file():
        tokenizer = read_json(path / "tokenizer.json")
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        entries = enumerate(text for text, _ in vocabulary) if isinstance(vocabulary, list) else None
        texts = dict(entries) if entries else {number: text for text, number in vocabulary.items()}
        return texts | {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    if (path / "vocab.json").is_file():
        return {number: text for text, number in read_json(path / "vocab.json").items()}
    if (path / "vocab.txt").is_file():
        return dict(enumerate((path / "vocab.txt").read_text(encoding="utf-8").splitlines()))
    return {}


def _spec_of_all(
    checkpoints: Sequence[Checkpoint],
    spec: SpecLike,
    build: Callable[[], nn.Module] | None,
    batches: Rewindable | None,
) -> PermutationSpec:
    """Return the specification, having made sure that every configuration leads to the same."""

    def chosen(checkpoint: Checkpoint) -> PermutationSpec:
        return choose_spec(
            spec,
            checkpoint.tensors,
            config=checkpoint.config,
            model=None if build is None else lambda: loading.built(build),
            batch=None if batches is None else batches.first,
        )

    first = chosen(checkpoints[0])
    for checkpoint in checkpoints[1:]:
        if checkpoint.config != checkpoints[0].config and chosen(checkpoint) != first:
            raise CheckpointError(
                f"{checkpoints[0].path} and {checkpoint.path} do not go together: by their configurations they are of "
                "different architectures (numbers of heads, tied embeddings)"
            )
    return first


def _write(
    plan: _Output,
    source: Checkpoint,
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype | None,
    check: Callable[[Path], Any] = lambda _: (None, None),
) -> tuple[Written, Any]:
    """Write the output; `check` sees it before it appears, and its result is returned too."""

    def stored(tensor: Tensor) -> torch.dtype:
        return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype

    sizes = {name: TensorSize(tuple(tensor.shape), stored(tensor)) for name, tensor in source.tensors.items()}
    with atomic_path(plan.path) as temporary:
        written = write_checkpoint(
            temporary,
            plan.kind or source.format,
            sizes,
            lambda name: tensor_of(name).to(sizes[name].dtype),
            shard_bytes=plan.shard_bytes,
        )
        if plan.shard_bytes is not None and source.path.is_dir():
            copy_companions(source.path, temporary, dtype)
        return written, check(temporary)


def _result(
    plan: _Output,
    checkpoints: Sequence[Checkpoint],
    spec: PermutationSpec,
    found: _Found,
    written: Written,
    dtype: torch.dtype | None,
    timings: Mapping[str, float],
) -> WriteResult:
    return WriteResult(
        output=plan.path,
        files=written.files,
        num_bytes_in=tuple(checkpoint.num_bytes for checkpoint in checkpoints),
        num_bytes=written.num_bytes,
        dtype=dtype,
        spec=spec,
        matching=found.matching,
        objectives=found.objectives,
        timings={**found.timings, **timings},
        unmatched_tensors=tuple(
            name
            for name, tensor in checkpoints[0].tensors.items()
            if tensor.is_floating_point() and name not in spec.layouts
        ),
    )
