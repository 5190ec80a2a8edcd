"""Describe a network in files: its tensors, family and spec, and which axes keep their order and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mudsc_fast._forward import Rewindable, inputs_of
from mudsc_fast._huggingface import quiet_transformers, random_inputs
from mudsc_fast.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mudsc_fast.checkpoints.models import built
from mudsc_fast.checkpoints.networks import model_of, spec_of_checkpoint
from mudsc_fast.checkpoints.quantized import quantized_names
from mudsc_fast.spec.choose import SpecLike
from mudsc_fast.spec.infer import derive
from mudsc_fast.spec.permutation_spec import PermutationSpec
from mudsc_fast.spec.recognize import family_of_config, family_of_names

_MAX_LISTED = 12


@dataclass(frozen=True)
class Inspection:
    """Description of a network in files.

    Attributes
    ----------
    checkpoint
        The network. If the spec needs the names that tensors have in memory, the tensors have these names.
    family
        The family recognized by the configuration or the tensor names, or None.
    spec
        The spec, or None if there is none.
    problem
        Why there is no spec.
    frozen_axes
        For each tensor the axes that keep their order, and why. Empty if the model cannot be built and run.
    """

    checkpoint: Checkpoint
    family: str | None
    spec: PermutationSpec | None
    problem: str | None
    frozen_axes: Mapping[str, Mapping[int, str]]

    def report(self, *, tensors: bool = False) -> str:
        """Return the report as text, with a list of all tensors if `tensors` is set."""
        checkpoint = self.checkpoint
        shapes = dict(checkpoint.tensors)
        entries = sum(tensor.numel() for tensor in shapes.values())
        dtypes: dict[str, int] = {}
        for tensor in shapes.values():
            name = str(tensor.dtype).removeprefix("torch.")
            dtypes[name] = dtypes.get(name, 0) + tensor.numel()
        kinds = ", ".join(f"{name} {count:,}" for name, count in sorted(dtypes.items(), key=lambda item: -item[1]))
        facts = {
            "path": str(checkpoint.path),
            "format": checkpoint.format,
            "tensors": f"{len(shapes)} with {entries:,} entries, {checkpoint.num_bytes / 1e6:.1f} MB",
            "dtypes": kinds,
        }
        if checkpoint.config:
            model_type = checkpoint.config.get("model_type")
            architecture = ", ".join(checkpoint.config.get("architectures") or []) or "not named"
            facts["model"] = f"{model_type} ({architecture})"
        facts["family"] = self.family or "none; the spec is derived from the model"
        quantized = quantized_names(checkpoint)
        if quantized:
            facts["quantized"] = f"{len(quantized)} tensors, {quantized[0]!r} is one: merge with --dequantize"
        width = max(map(len, facts))
        lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
        if self.spec is None:
            lines += ["", f"no spec: {self.problem}"]
        else:
            lines += ["", *_nodes(self.spec, shapes), "", *_frozen(self.spec, shapes, self.frozen_axes)]
        if tensors:
            lines += ["", *_tensors(self.spec, shapes)]
        return "\n".join(lines)


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    spec: SpecLike = None,
    data: Iterable[Any] | None = None,
    build: Callable[[], nn.Module] | None = None,
) -> Inspection:
    """Describe a network in files.

    Parameters
    ----------
    path
        A checkpoint, as for :func:`open_checkpoint`.
    spec, data, build
        How to choose the spec, as for :func:`merge_checkpoints`.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read.
    """
    checkpoint = open_checkpoint(path)
    family = family_of_config(checkpoint.config) if checkpoint.config else family_of_names(checkpoint.tensors)
    batches = None if data is None else Rewindable(data)
    chosen, problem = None, None
    try:
        checkpoint, chosen = spec_of_checkpoint(checkpoint, spec, build, batches)
    except ValueError as error:
        problem = str(error)
    frozen = _frozen_axes(checkpoint, build, batches) if chosen is not None else {}
    return Inspection(checkpoint, family, chosen, problem, frozen)


def _frozen_axes(
    checkpoint: Checkpoint, build: Callable[[], nn.Module] | None, batches: Rewindable | None
) -> Mapping[str, Mapping[int, str]]:
    """Return which axes of a model keep their order and why, from its derived spec; empty if it cannot be derived."""
    if build is None and not checkpoint.config:
        return {}
    try:
        if build is None:
            model = model_of(checkpoint)
            inputs: Any = random_inputs(model)
        elif batches is not None:
            model, inputs = built(build), inputs_of(batches.first())
        else:
            return {}
        with quiet_transformers():
            return derive(model.eval(), inputs).frozen_axes
    except (ValueError, TypeError, AttributeError):
        return {}


def _nodes(spec: PermutationSpec, tensors: Mapping[str, Tensor]) -> list[str]:
    units = spec.units(tensors)
    width = max(len("node"), *map(len, spec.nodes))
    lines = [f"{'node':<{width}}  {'units':>7}  {'groups':>6}  {'tensors':>7}  produced by"]
    for node in spec.nodes:
        uses = spec.uses(node)
        producers = [use.tensor for use in uses if use.axis.role == "produce" and use.axis.compared]
        shown = producers[0] + (f" and {len(producers) - 1} more" if len(producers) > 1 else "") if producers else ""
        count = len({use.tensor for use in uses})
        lines.append(f"{node:<{width}}  {units[node]:>7}  {spec.groups(node).count:>6}  {count:>7}  {shown}")
    return lines


def _frozen(
    spec: PermutationSpec, tensors: Mapping[str, Tensor], frozen_axes: Mapping[str, Mapping[int, str]]
) -> list[str]:
    """Return lines that list the tensors that keep their order on all axes, with the reasons that are known."""
    unnamed = [name for name, tensor in tensors.items() if name not in spec.layouts and tensor.is_floating_point()]
    if not unnamed:
        return ["all floating point tensors are in the spec"]
    entries = sum(tensors[name].numel() for name in unnamed)
    total = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    share = entries / max(total, 1)
    lines = [f"{len(unnamed)} tensors ({share:.1%} of the entries) keep their order and are averaged without matching"]
    for name in unnamed[:_MAX_LISTED]:
        lines.append(f"  {name} {list(tensors[name].shape)}")
        lines += [f"    axis {axis}: {reason}" for axis, reason in frozen_axes.get(name, {}).items()]
    if len(unnamed) > _MAX_LISTED:
        lines.append(f"  ... and {len(unnamed) - _MAX_LISTED} more")
    return lines


def _tensors(spec: PermutationSpec | None, tensors: Mapping[str, Tensor]) -> list[str]:
    width = max(map(len, tensors))
    lines = [f"{'tensor':<{width}}  {'dtype':<9}  shape and nodes"]
    for name, tensor in tensors.items():
        layout = spec.layouts.get(name, ()) if spec is not None else ()
        axes = []
        for position, length in enumerate(tensor.shape):
            nodes = [s.axis.node for s in layout[position] if s.axis is not None] if position < len(layout) else []
            axes.append(f"{length} ({' + '.join(nodes)})" if nodes else str(length))
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines.append(f"{name:<{width}}  {dtype:<9}  [{', '.join(axes)}]")
    return lines
