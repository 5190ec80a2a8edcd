"""Merging networks in files, without ever holding a whole network in memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import Rewindable
from mudsc_fast.checkpoints.directory import Format
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.checkpoints.networks import PathLike, open_networks, prepare_networks
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.io.matching import MatchedNetworks, match_networks
from mudsc_fast.io.model_card import write_model_card
from mudsc_fast.io.output import Output
from mudsc_fast.io.result import WriteResult
from mudsc_fast.io.writing import Written, common_path
from mudsc_fast.matching.node import Mode
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.options import Space
from mudsc_fast.spec.choose import SpecLike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def merge_checkpoints(
    inputs: Sequence[PathLike],
    output: PathLike,
    *,
    spec: SpecLike = None,
    data: Iterable[Any] | None = None,
    build: Callable[[], nn.Module] | None = None,
    mode: Mode = "align",
    space: Space | None = None,
    balance: float | None = None,
    weights: Sequence[float] | None = None,
    shrink: float | None = None,
    budget: float = 1.0,
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    precision: Precision = "float32",
    task_heads: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    dequantize: bool = False,
    dtype: torch.dtype | None = None,
    file_format: Format | None = None,
    shard_size: str | None = None,
    command: str | None = None,
    verify: bool = True,
    progress: bool | None = None,
    group: ProcessGroup | None = None,
    checkpoint: PathLike | None = None,
) -> WriteResult:
    """Merge networks in files into a new one.

    Tensors are read from mapped files when they are needed and written one after the other: memory holds the largest
    tensor of every model a few times and the similarity of a node, not the models. Only activations need whole models.

    Parameters
    ----------
    inputs
        Two or more checkpoints, as for :func:`open_checkpoint`.
    output
        A new file if its name has the suffix of a checkpoint, else a new directory, with shards and a model card and,
        if the first input is a directory, copies of its configuration, tokenizer and other small files. It appears
        when it is complete.
    spec
        The spec, or how to choose it, as for :func:`mudsc_fast.merge`.
    data
        Batches to run the models on, as for :func:`mudsc_fast.merge`; needed for the activation and the dual space.
    build
        Makes a module that takes the tensors, for `data`; not needed for directories of Hugging Face.
    mode, space, balance, weights, shrink, budget, random_state, max_sweeps, patience, precision, verify, progress
        As for :func:`mudsc_fast.merge`.
    task_heads
        Tensors that each network keeps for itself, by their name, its beginning up to a dot, or a pattern with
        wildcards; ``"auto"`` for those that only some networks have, that differ in shape, and, where the labels of
        classifiers differ, the classifiers. `output` is then a directory with one folder for each input, each a whole
        network that shares all other weights.
    ignore
        Tensors of which the result keeps those of the first network, given in the same way.
    dequantize
        Whether to read quantized weights as floating point numbers, where each is a number times a scale. By default
        they are refused.
    dtype
        Dtype of the floating point tensors in the output; by default their own.
    file_format
        ``"safetensors"`` or ``"torch"``; by default that of the name of the output, or else of the first input.
    shard_size
        Maximum number of bytes of tensors in a file of an output directory, e.g. ``"200MB"``; 5 GB by default.
    command
        The command line to show on the model card.
    group, checkpoint
        As for :func:`mudsc_fast.merge`. Each process of a group reads the tensors that it compares and merges, and
        writes them to shards of its own; the inputs and the output are on a file system that all share. An output that
        is a single file is written by rank 0.

    Returns
    -------
    WriteResult

    Raises
    ------
    CheckpointError
        If an input cannot be read, inputs are incompatible, or the output exists or cannot be written.
    ValueError, TypeError, DistributedError
        As :func:`mudsc_fast.merge`.
    """
    ranks = Ranks(group)
    with ranks.step("opening the networks"):
        target = Output.of(output, file_format, shard_size, dtype)
        heads, ignored = patterns("task_heads", task_heads), patterns("ignore", ignore)
        if heads and target.shard_bytes is None:
            raise CheckpointError(f"{target.path}: task_heads give one network for each input: name a directory")
        checkpoints = open_networks(inputs, dequantize=dequantize)
        batches = None if data is None else Rewindable(data)
        if dequantize and batches is not None:
            raise CheckpointError(
                "data cannot be run through quantized networks: match by weights, or dequantize first"
            )
    written_as = f"{target.path}, {target.format}, {target.shard_bytes} bytes, {target.dtype}, {ignored}"
    ranks.check_same({"output": written_as, "data": "none" if data is None else "batches"})
    example = _example(batches, ranks)
    with ranks.step("choosing the spec"):
        networks = prepare_networks(checkpoints, spec, build, example, ignore=ignored, task_heads=heads)
    matched = match_networks(
        networks,
        spec,
        batches,
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
        verify=verify,
        progress=progress,
        ranks=ranks,
        checkpoint=checkpoint,
    )
    began = time.perf_counter()
    with common_path(target.path, ranks) as temporary:
        if heads:
            with ranks.step("creating the output"):
                if ranks.rank == 0:
                    temporary.mkdir()
            folders = task_folders([Path(path) for path in inputs])
            written = [
                (folder, _write_task(target, temporary / folder, matched, index, ranks))
                for index, folder in enumerate(folders)
            ]
            files = tuple(f"{folder}/{file}" for folder, result in written for file in result.files)
            num_bytes = sum(result.num_bytes for _, result in written)
        else:
            result = _write_task(target, temporary, matched, 0, ranks)
            files, num_bytes = result.files, result.num_bytes
        done = WriteResult(
            output=target.path,
            files=files,
            num_bytes_in=tuple(checkpoint.num_bytes for checkpoint in networks.checkpoints),
            num_bytes=num_bytes,
            dtype=dtype,
            spec=networks.spec,
            matching=matched.matching,
            objectives=matched.objectives,
            timings={**matched.timings, "writing": time.perf_counter() - began},
            unmatched_tensors=networks.unmatched,
            task_tensors=tuple(networks.kept_names),
            distribution=matched.distribution,
        )
        if target.shard_bytes is not None and ranks.rank == 0:
            for folder in folders if heads else [""]:
                write_model_card(temporary / folder, done, inputs, matched.weights, mode, command)
    return done


def _example(batches: Rewindable | None, ranks: Ranks) -> Rewindable | None:
    """Return the first batch of the first process that has one, by which all processes choose the same spec."""
    if batches is None or ranks.alone:
        return batches
    with ranks.step("reading the first batch"):
        has_batch = batches.has_first()
    having = [rank for rank, has in enumerate(ranks.gather_objects(has_batch, "reading the first batch")) if has]
    if not having:
        return batches
    first = batches.first() if ranks.rank == having[0] else None
    return Rewindable([ranks.broadcast_object(first, "reading the first batch", having[0])])


def patterns(argument: str, value: str | Sequence[str]) -> list[str]:
    """Return names given as one text with commas between them, or as a sequence.

    Raises
    ------
    TypeError
        If an entry is not a text.
    """
    entries = value.split(",") if isinstance(value, str) else list(value)
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{argument} must be a name or a sequence of names, got {type(entry).__name__}")
    return [entry.strip() for entry in entries if entry.strip()]


def task_folders(paths: Sequence[Path]) -> list[str]:
    """Return a folder for each network, by the names of the inputs; equal names get a number."""
    names = [re.sub(r"[^\w.-]", "_", path.stem if path.is_file() else path.absolute().name) for path in paths]
    return [
        name if names.count(name) == 1 else f"{name}-{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]


def _write_task(target: Output, path: Path, matched: MatchedNetworks, task: int, ranks: Ranks) -> Written:
    """Write the merged network in the form of one input, with that input's tensors where they are not merged."""
    networks = matched.networks

    def tensor_of(name: str) -> Tensor:
        if name in networks.kept:
            return matched.own(name, task)
        tensors = [checkpoint.tensors[name] for checkpoint in networks.checkpoints]
        if target.dtype is not None and tensors[0].is_floating_point():
            wide = torch.promote_types(target.dtype, tensors[0].dtype)  # rounded once, to the dtype of the output
            tensors = [tensor.to(wide) for tensor in tensors]
        return matched.merged(name, tensors)

    return target.write(path, networks.checkpoints[task], tensor_of, ranks, lambda name: matched.holder.get(name, 0))
