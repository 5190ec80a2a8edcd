"""Merge networks in files without holding a whole network in memory."""

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
    device: torch.device | str = "cpu",
    group: ProcessGroup | None = None,
    checkpoint: PathLike | None = None,
) -> WriteResult:
    """Merge networks in files into a new one.

    Tensors are read from mapped files when they are needed and written one by one. Memory holds a few copies of the
    largest tensor of every model and the similarity of one node, but not the models. Only `data` needs whole models.

    Parameters
    ----------
    inputs
        Two or more checkpoints, as for :func:`open_checkpoint`.
    output
        A new file if its name has the suffix of a checkpoint, else a new directory. A directory gets shards and a model
        card and, if the first input is a directory, copies of its configuration, tokenizer and other small files.
        The output appears only when it is complete.
    spec
        The spec, or how to choose it, as for :func:`mudsc_fast.merge`.
    data
        Batches to run the models on, as for :func:`mudsc_fast.merge`. The activation and dual spaces need them.
    build
        A function that returns a module into which the tensors are loaded, to run it on `data`. Hugging Face
        directories do not need it.
    mode, space, balance, weights, shrink, budget, random_state, max_sweeps, patience, precision, verify, progress
        As for :func:`mudsc_fast.merge`.
    task_heads
        Tensors that each network keeps for itself: names, prefixes that end before a dot, or patterns with wildcards.
        ``"auto"`` selects the tensors that only some networks have or that differ in shape and, if the labels of
        classifiers differ, the classifiers. `output` is then a directory with one folder for each input. Each folder
        holds a whole network; all weights that are not task heads are the same in all folders.
    ignore
        Tensors that are not merged, given in the same way. The result has those of the first network.
    dequantize
        Whether to convert quantized weights (a number times a scale) to floating point. By default quantized weights
        are refused.
    dtype
        Dtype of the floating point tensors in the output. By default they keep their dtype.
    file_format
        ``"safetensors"`` or ``"torch"``. By default the suffix of `output` decides, or else the format of the first
        input.
    shard_size
        Maximum number of bytes of tensors in a file of an output directory, e.g. ``"200MB"``; 5 GB by default.
    command
        The command line to show on the model card.
    device
        Where units are compared and matched, and models run: each tensor is moved there when it is needed. Merged
        tensors are computed on the CPU. Of several processes each has a device of its own.
    group, checkpoint
        As for :func:`mudsc_fast.merge`. Each process of a group reads the tensors that it compares and merges, and
        writes them to its own shards. All processes must share the file system of the inputs and the output. Rank 0
        writes an output that is a single file.

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
            raise CheckpointError(
                f"{target.path}: task_heads needs a directory as the output, with one folder for each network; "
                "got a file name"
            )
        checkpoints = open_networks(inputs, dequantize=dequantize)
        batches = None if data is None else Rewindable(data)
        if dequantize and batches is not None:
            raise CheckpointError(
                "quantized networks cannot be run on batches: match by weights alone, or dequantize the networks first"
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
        device=torch.device(device),
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
    """Return the first batch of the first process that has one, so that all processes choose the same spec."""
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
    """Return names that were given as a sequence or as one string separated by commas.

    Raises
    ------
    TypeError
        If an entry is not a string.
    """
    entries = value.split(",") if isinstance(value, str) else list(value)
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{argument} must be a name or a sequence of names, got {type(entry).__name__}")
    return [entry.strip() for entry in entries if entry.strip()]


def task_folders(paths: Sequence[Path]) -> list[str]:
    """Return a folder name for each network, made from the names of the inputs. Equal names get a number."""
    names = [re.sub(r"[^\w.-]", "_", path.stem if path.is_file() else path.absolute().name) for path in paths]
    return [
        name if names.count(name) == 1 else f"{name}-{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]


def _write_task(target: Output, path: Path, matched: MatchedNetworks, task: int, ranks: Ranks) -> Written:
    """Write the merged network with the names and files of one input, and with the input's own unmerged tensors."""
    networks = matched.networks

    def tensor_of(name: str) -> Tensor:
        if name in networks.kept:
            return matched.own(name, task)
        tensors = [checkpoint.tensors[name] for checkpoint in networks.checkpoints]
        if target.dtype is not None and tensors[0].is_floating_point():
            wide = torch.promote_types(target.dtype, tensors[0].dtype)  # so that only the result is rounded
            tensors = [tensor.to(wide) for tensor in tensors]
        return matched.merged(name, tensors)

    return target.write(path, networks.checkpoints[task], tensor_of, ranks, lambda name: matched.holder.get(name, 0))
