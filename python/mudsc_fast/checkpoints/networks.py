"""The networks to merge: opened, with common names for their tensors, and checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mudsc_fast._forward import Rewindable
from mudsc_fast._huggingface import build_without_weights
from mudsc_fast._labels import differing_labels, label_heads
from mudsc_fast._tensors import Padded
from mudsc_fast.checkpoints.checkpoint import Checkpoint, RenamedTensors, open_checkpoint
from mudsc_fast.checkpoints.compatibility import (
    AUTO,
    check_configs,
    check_integers,
    check_labels,
    check_tokenizers,
    check_versions,
    kept_tensors,
)
from mudsc_fast.checkpoints.conversion import as_loaded
from mudsc_fast.checkpoints.errors import CheckpointError
from mudsc_fast.checkpoints.models import built
from mudsc_fast.checkpoints.names import is_derived
from mudsc_fast.checkpoints.quantized import check_not_quantized, dequantized
from mudsc_fast.checkpoints.ties import with_common_ties
from mudsc_fast.spec.choose import SpecLike, choose_spec
from mudsc_fast.spec.join import join_specs
from mudsc_fast.spec.permutation_spec import PermutationSpec

_LOGGER = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class NetworkFiles:
    """Networks in files whose tensors have common names.

    Attributes
    ----------
    checkpoints
        The networks.
    spec
        The spec of all their tensors.
    kept
        Names of the tensors that are not merged. Each network has its own, or none.
    """

    checkpoints: tuple[Checkpoint, ...]
    spec: PermutationSpec
    kept: frozenset[str]

    @property
    def state_dicts(self) -> list[Mapping[str, Tensor]]:
        """The tensors of each network, with the names of all networks. Missing ones are filled in from another one."""
        if not self.kept:
            return [checkpoint.tensors for checkpoint in self.checkpoints]
        tensors = [checkpoint.tensors for checkpoint in self.checkpoints]
        return [Padded(checkpoint.tensors, tensors) for checkpoint in self.checkpoints]

    @property
    def kept_names(self) -> list[str]:
        """The tensors that are neither matched nor merged, in the order of the files."""
        names = dict.fromkeys(name for checkpoint in self.checkpoints for name in checkpoint.tensors)
        return [name for name in names if name in self.kept]

    @property
    def task_heads(self) -> list[str]:
        """The tensors that are not merged, without the counters and tables that only some networks store."""
        own = [checkpoint.tensors for checkpoint in self.checkpoints]
        return [name for name in self.kept_names if not is_derived(name) or all(name in tensors for tensors in own)]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The floating point tensors of the first network that are not in the spec."""
        return tuple(
            name
            for name, tensor in self.checkpoints[0].tensors.items()
            if (tensor.is_floating_point() or tensor.is_complex()) and name not in self.spec.layouts
        )


def open_networks(paths: Sequence[PathLike], *, dequantize: bool = False) -> list[Checkpoint]:
    """Open checkpoints. Quantized weights are refused or, on request, dequantized.

    Raises
    ------
    CheckpointError
        If there are fewer than two, one cannot be read, or its weights are quantized.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"inputs must be a sequence of paths, got {paths!r}")
    if len(paths) < 2:
        raise CheckpointError(f"expected at least two checkpoints to merge, got {len(paths)}")
    checkpoints = [open_checkpoint(path) for path in paths]
    if dequantize:
        return [dequantized(checkpoint) for checkpoint in checkpoints]
    for checkpoint in checkpoints:
        check_not_quantized(checkpoint)
    return checkpoints


def prepare_networks(
    checkpoints: Sequence[Checkpoint],
    spec: SpecLike,
    build: Callable[[], nn.Module] | None,
    batches: Rewindable | None,
    *,
    ignore: Sequence[str] = (),
    task_heads: Sequence[str] = (),
    unequal_heads: bool = False,
    names_in_memory: bool = False,
) -> NetworkFiles:
    """Give the tensors of networks common names, choose the spec, and check that they can be merged.

    Parameters
    ----------
    checkpoints
        The networks.
    spec, build, batches
        How to choose the spec, a function that builds the model, and data to run it on.
    ignore, task_heads
        Name patterns of tensors that are not merged. ``"auto"`` among `task_heads` selects all that differ.
    unequal_heads
        Whether output layers may differ in size or labels without being named. The caller then finds them.
    names_in_memory
        Whether to give tensors the names that they have in a model of transformers, if it knows them all.

    Raises
    ------
    CheckpointError
        If the networks cannot be merged.
    ValueError
        If there is no spec.
    """
    check_configs(checkpoints, task_heads=task_heads)
    check_versions(checkpoints)
    checkpoints = _with_common_names(checkpoints, build, names_in_memory or _lacks_names(checkpoints, spec))
    checkpoints = with_common_ties(checkpoints)
    kept = kept_tensors(checkpoints, ignore=ignore, task_heads=task_heads, check_shapes=not unequal_heads)
    checkpoints, chosen, kept = _with_spec(checkpoints, spec, build, batches, kept)
    configs = [checkpoint.config for checkpoint in checkpoints]
    if AUTO in task_heads and differing_labels(configs):
        kept |= frozenset(label_heads(configs[0], checkpoints[0].tensors, chosen))
    check_tokenizers(checkpoints, kept)
    if not unequal_heads:
        check_labels(checkpoints, kept, chosen)
    check_integers(checkpoints, kept, chosen)
    if kept:
        _LOGGER.info("not merged: %s", ", ".join(sorted(kept)))
    return NetworkFiles(tuple(checkpoints), chosen, kept)


def open_for_spec(path: PathLike, spec: PermutationSpec) -> Checkpoint:
    """Open one checkpoint and give its tensors the names that a spec uses.

    Raises
    ------
    CheckpointError
        If it cannot be read, or its weights are quantized.
    """
    checkpoint = open_checkpoint(path)
    check_not_quantized(checkpoint)
    return _with_common_names([checkpoint], None, _lacks_names([checkpoint], spec))[0]


def _lacks_names(checkpoints: Sequence[Checkpoint], spec: SpecLike) -> bool:
    """Return whether a spec names tensors that none of the networks has."""
    if not isinstance(spec, PermutationSpec):
        return False
    return any(all(name not in checkpoint.tensors for checkpoint in checkpoints) for name in spec.layouts)


def _with_common_names(checkpoints: Sequence[Checkpoint], build: Any, in_memory: bool) -> list[Checkpoint]:
    """Return checkpoints with the names in memory if the files name the tensors of one architecture differently.

    Different versions of transformers write different names. With `in_memory` the names are always changed.
    """
    names = [{name for name in checkpoint.tensors if not is_derived(name)} for checkpoint in checkpoints]
    configs = [checkpoint.config or {} for checkpoint in checkpoints]
    one_class = all(config.get("architectures") == configs[0].get("architectures") for config in configs)
    differ = one_class and any(other != names[0] for other in names[1:])
    if build is not None or not all(configs) or not (in_memory or differ):
        return list(checkpoints)
    try:
        return [as_loaded(checkpoint, model_of(checkpoint)) for checkpoint in checkpoints]
    except ValueError:
        return list(checkpoints)  # transformers does not know these networks: compare the names as they are


def model_of(checkpoint: Checkpoint) -> nn.Module:
    """Return the model that a configuration describes, without its weights."""
    return build_without_weights(checkpoint.config or {})


def spec_of_checkpoint(
    checkpoint: Checkpoint, spec: SpecLike, build: Callable[[], nn.Module] | None, batches: Rewindable | None
) -> tuple[Checkpoint, PermutationSpec]:
    """Return one network with the tensor names that its spec uses, and the spec.

    Raises
    ------
    ValueError
        If there is no spec.
    """
    found, chosen, _ = _with_spec([checkpoint], spec, build, batches, frozenset())
    return found[0], chosen


def _with_spec(
    checkpoints: Sequence[Checkpoint],
    spec: SpecLike,
    build: Callable[[], nn.Module] | None,
    batches: Rewindable | None,
    kept: frozenset[str],
) -> tuple[list[Checkpoint], PermutationSpec, frozenset[str]]:
    """Return the networks, their spec, and `kept`. All use names in memory if the spec needs these."""
    try:
        return list(checkpoints), _spec_of_all(checkpoints, spec, build, batches, kept), kept
    except ValueError as error:
        if build is not None or not all(checkpoint.config for checkpoint in checkpoints):
            raise
        try:
            loaded = [as_loaded(checkpoint, model_of(checkpoint)) for checkpoint in checkpoints]
        except ValueError:
            raise error from None
        if all(a is b for a, b in zip(loaded, checkpoints, strict=True)):
            raise
        renamed = {
            piece.name: after.pieces[stored].name
            for before, after in zip(checkpoints, loaded, strict=True)
            for stored, piece in before.pieces.items()
        }
        kept = frozenset(renamed.get(name, name) for name in kept)
        return loaded, _spec_of_all(loaded, spec, build, batches, kept), kept


def _spec_of_all(
    checkpoints: Sequence[Checkpoint],
    spec: SpecLike,
    build: Callable[[], nn.Module] | None,
    batches: Rewindable | None,
    kept: frozenset[str],
) -> PermutationSpec:
    if isinstance(spec, PermutationSpec):
        return spec
    specs: list[PermutationSpec] = []
    for index, checkpoint in enumerate(checkpoints):
        first = checkpoints[0]
        alike = _architecture(checkpoint) == _architecture(first) and set(checkpoint.tensors) == set(first.tensors)
        if index == 0 or not alike:
            specs.append(_chosen(checkpoint, spec, build, batches, kept))
    try:
        return join_specs(specs)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoints[0].path} and the other networks are incompatible: their configurations describe different "
            f"architectures: {error}"
        ) from error


def _architecture(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the entries of the configuration that may change the architecture."""
    if checkpoint.config is None:
        return None
    labels = ("id2label", "label2id", "_name_or_path", "transformers_version", "torch_dtype", "dtype")
    return {key: value for key, value in checkpoint.config.items() if key not in labels}


def _chosen(
    checkpoint: Checkpoint,
    spec: SpecLike,
    build: Callable[[], nn.Module] | None,
    batches: Rewindable | None,
    kept: frozenset[str],
) -> PermutationSpec:
    """Return the spec of one network. Tensors that are not merged may be missing from it."""

    def choose(left_out: Callable[[str], bool]) -> PermutationSpec:
        names = {name: name for name in checkpoint.tensors if not left_out(name)}
        return choose_spec(
            spec,
            RenamedTensors(checkpoint.tensors, names),
            config=checkpoint.config,
            model=None if build is None else lambda: built(build),
            batch=None if batches is None else batches.first,
        )

    try:
        return choose(is_derived)
    except ValueError:
        if not any(name in kept and not is_derived(name) for name in checkpoint.tensors):
            raise
        return choose(lambda name: is_derived(name) or name in kept)
