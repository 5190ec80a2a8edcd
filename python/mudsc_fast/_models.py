"""What users pass as models: modules, state dicts, or paths of checkpoints."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mudsc_fast._forward import Rewindable
from mudsc_fast._huggingface import config_of
from mudsc_fast.spec.choose import SpecLike, choose_spec
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Modules, state dicts, or paths: all of one kind.
Models = Sequence[nn.Module] | Sequence[Mapping[str, Tensor]] | Sequence[str | os.PathLike[str]]
Model = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

_KINDS: dict[str, Any] = {"modules": nn.Module, "state dicts": Mapping, "paths": (str, os.PathLike)}


@dataclass(frozen=True)
class Networks:
    """Two or more networks with the same tensors.

    Attributes
    ----------
    modules
        The networks as modules; empty where only their tensors are known.
    state_dicts
        The tensors of each. Those of files are read each time that they are asked for.
    config
        The entries of the first network's configuration, if it is a model of Hugging Face.
    """

    modules: tuple[nn.Module, ...]
    state_dicts: tuple[Mapping[str, Tensor], ...]
    config: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.state_dicts)

    @classmethod
    def of(cls, models: Models, *, run: bool = False) -> Networks:
        """Check what a user passed as `models`.

        Parameters
        ----------
        models
            Modules, state dicts or paths.
        run
            Whether the networks are to be run: directories of Hugging Face are then loaded as modules.

        Raises
        ------
        TypeError
            If `models` is no sequence, holds something else or a mixture, or if the networks' dtypes differ.
        ValueError
            If there are fewer than two, if a file cannot be read, or if the networks differ in the names or the devices
            of their tensors.
        """
        if isinstance(models, (nn.Module, Mapping, str)) or not isinstance(models, Sequence):
            raise TypeError(
                "models must be a sequence of modules, state dicts, or paths of checkpoints, got "
                f"{type(models).__name__}"
            )
        if len(models) < 2:
            raise ValueError(f"models must hold at least two models, got {len(models)}")
        if not any(all(isinstance(model, kind) for model in models) for kind in _KINDS.values()):
            raise TypeError(
                f"models must be all of one kind ({', '.join(_KINDS)}), got "
                + ", ".join(type(model).__name__ for model in models)
            )
        networks = cls._opened(models, run)
        for index, other in enumerate(networks.state_dicts[1:], start=1):
            _check_same_tensors(networks.state_dicts[0], other, index)
        return networks

    @classmethod
    def of_modules(cls, models: Sequence[nn.Module]) -> Networks:
        """Return modules as they are."""
        return cls(tuple(models), tuple(model.state_dict() for model in models), config_of(models[0]))

    @classmethod
    def _opened(cls, models: Sequence[Any], run: bool) -> Networks:
        if isinstance(models[0], nn.Module):
            return cls.of_modules(models)
        if isinstance(models[0], Mapping):
            return cls((), tuple(models))
        from mudsc_fast.io.checkpoint import open_checkpoint  # only users of files pay for the import

        checkpoints = [open_checkpoint(path) for path in models]
        if run and all(checkpoint.config is not None for checkpoint in checkpoints):
            from mudsc_fast.io.models import load_model

            return cls.of_modules([load_model(checkpoint, None) for checkpoint in checkpoints])
        return cls((), tuple(checkpoint.tensors for checkpoint in checkpoints), checkpoints[0].config)

    def choose_spec(self, spec: SpecLike, data: Iterable[Any] | None) -> tuple[PermutationSpec, Iterable[Any] | None]:
        """Return the spec of the networks, and `data` of which the first batch may have been looked at."""
        if isinstance(spec, PermutationSpec) or data is None:
            batches = None
        else:
            data = batches = Rewindable(data)
        chosen = choose_spec(
            spec,
            self.state_dicts[0],
            config=self.config,
            model=(lambda: self.modules[0]) if self.modules else None,
            batch=None if batches is None else batches.first,
        )
        return chosen, data


def tensors_of(model: Model) -> Mapping[str, Tensor]:
    """Return the tensors of one model.

    Raises
    ------
    TypeError
        If it is neither a module nor a state dict nor a path.
    """
    if isinstance(model, nn.Module):
        return model.state_dict()
    if isinstance(model, Mapping):
        return model
    if isinstance(model, (str, os.PathLike)):
        from mudsc_fast.io.checkpoint import open_checkpoint

        return open_checkpoint(Path(model)).tensors
    raise TypeError(f"model must be a module, a state dict, or the path of a checkpoint, got {type(model).__name__}")


def like(state_dict: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the versions of the modules that an original one keeps (its ``_metadata``).

    Modules that changed between versions of a library load an old state dict by them.
    """
    result = OrderedDict(state_dict)
    metadata = getattr(original, "_metadata", None)
    if metadata is not None:
        result._metadata = copy.deepcopy(metadata)  # type: ignore[attr-defined]
    return result


def with_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with other tensors."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(state_dict)
    return copied


def _check_same_tensors(first: Mapping[str, Tensor], other: Mapping[str, Tensor], index: int) -> None:
    missing = [name for name in first if name not in other]
    unexpected = [name for name in other if name not in first]
    if missing or unexpected:
        raise ValueError(
            f"models[{index}] must have the tensors of models[0]: missing {missing[:5]}, unexpected {unexpected[:5]} "
            f"({len(missing)} and {len(unexpected)} in all)"
        )
    for name, tensor in first.items():
        found = other[name]
        for value in (tensor, found):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name!r} must be a tensor in every model, got {type(value).__name__}")
        if found.dtype != tensor.dtype:
            raise TypeError(f"{name!r} has dtype {found.dtype} in models[{index}], but {tensor.dtype} in models[0]")
        if found.device != tensor.device:
            raise ValueError(
                f"{name!r} is on device {found.device} in models[{index}], but on {tensor.device} in models[0]"
            )
