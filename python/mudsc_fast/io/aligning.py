"""Write a network to a file with its units in the order of another network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mudsc_fast._forward import Rewindable
from mudsc_fast.checkpoints import models as loading
from mudsc_fast.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mudsc_fast.checkpoints.compatibility import AUTO
from mudsc_fast.checkpoints.directory import Format
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.checkpoints.networks import PathLike, open_networks, prepare_networks
from mudsc_fast.io.matching import match_networks
from mudsc_fast.io.merging import patterns
from mudsc_fast.io.output import Output
from mudsc_fast.io.result import WriteResult
from mudsc_fast.io.writing import atomic_path
from mudsc_fast.ops.correlation import Precision
from mudsc_fast.options import Space
from mudsc_fast.spec.choose import SpecLike

#: Rounding changes the outputs of a permuted network by at most this fraction of the largest output, in float32.
_MAX_DIFFERENCE = 1e-3


def align_checkpoints(
    base: PathLike,
    other: PathLike,
    output: PathLike,
    *,
    spec: SpecLike = None,
    data: Iterable[Any] | None = None,
    build: Callable[[], nn.Module] | None = None,
    space: Space | None = None,
    balance: float | None = None,
    random_state: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
    precision: Precision = "float32",
    task_heads: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    dequantize: bool = False,
    file_format: Format | None = None,
    shard_size: str | None = None,
    check: bool = True,
    verify: bool = True,
    progress: bool | None = None,
) -> WriteResult:
    """Write a network with its units in the order of another network; its outputs do not change.

    Any tool can then average the result with `base`, tensor by tensor.

    Parameters
    ----------
    base, other
        Checkpoints, as for :func:`open_checkpoint`. `other` is written in the order of `base`.
    output, spec, data, build, space, balance, random_state, max_sweeps, patience, precision
        As for :func:`merge_checkpoints`.
    task_heads, ignore
        Tensors that are not compared, as for :func:`merge_checkpoints`; those of `other` are written in the new order
        too. Tensors that only one network has, tensors of different shapes, and classifiers with different labels need
        not be named.
    dequantize, file_format, shard_size, verify, progress
        As for :func:`merge_checkpoints`. Small files beside the weights are copied from `other`.
    check
        Whether to compare the outputs of the network before and after, in float32, on a small batch. For Hugging Face
        directories the batch has random tokens or pixels, and transformers must be installed; otherwise it is the
        first batch of `data`, and `build` is needed. This loads both networks.

    Returns
    -------
    WriteResult

    Raises
    ------
    CheckpointError
        As :func:`merge_checkpoints`; also if the outputs differ by more than rounding because the spec is wrong. In
        that case nothing is written.
    ValueError, TypeError
        As :func:`mudsc_fast.merge`.
    """
    target = Output.of(output, file_format, shard_size, None)
    checkpoints = open_networks([base, other], dequantize=dequantize)
    batches = None if data is None else Rewindable(data)
    networks = prepare_networks(
        checkpoints,
        spec,
        build,
        batches,
        ignore=patterns("ignore", ignore),
        task_heads=[*patterns("task_heads", task_heads), AUTO],
    )
    matched = match_networks(
        networks,
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
        verify=verify,
        progress=progress,
    )
    source = networks.checkpoints[1]

    def permuted(name: str) -> Tensor:
        if name in networks.kept:
            return matched.own(name, 1)
        return matched.permuted(name, source.tensors[name], 1)

    compared: tuple[float, float] | None = None
    unchecked: str | None
    began = time.perf_counter()
    with atomic_path(target.path) as temporary:
        written = target.write(temporary, source, permuted)
        timings = {**matched.timings, "writing": time.perf_counter() - began}
        began = time.perf_counter()
        if not check:
            unchecked = "not asked for"
        elif dequantize:
            unchecked = "the weights were dequantized"
        else:
            compared, unchecked = _compare(source, temporary, build, batches)
            timings["comparing outputs"] = time.perf_counter() - began
    result = WriteResult(
        output=target.path,
        files=written.files,
        num_bytes_in=tuple(checkpoint.num_bytes for checkpoint in networks.checkpoints),
        num_bytes=written.num_bytes,
        dtype=None,
        spec=networks.spec,
        matching=matched.matching,
        objectives=matched.objectives,
        timings=timings,
        unmatched_tensors=networks.unmatched,
        task_tensors=tuple(networks.kept_names),
    )
    return replace(result, difference=compared, unchecked=unchecked)


def _compare(
    source: Checkpoint, written: Path, build: Callable[[], nn.Module] | None, batches: Rewindable | None
) -> tuple[tuple[float, float] | None, str | None]:
    """Return by how much the outputs of a network changed, or the reason why this cannot be computed.

    Raises
    ------
    CheckpointError
        If the outputs differ by more than rounding.
    """
    result = loading.output_difference(source, open_checkpoint(written), build, batches)
    if isinstance(result, str):
        return None, result
    largest, scale = result
    if not largest <= _MAX_DIFFERENCE * scale:
        raise CheckpointError(
            f"{source.path}: permuting the units changes the outputs by up to {largest:.3g} (the largest output is "
            f"{scale:.3g}): the spec does not describe this network"
        )
    return result, None
