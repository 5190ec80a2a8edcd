"""Models as users pass them: modules, state dicts, or paths of checkpoints."""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._copy import copy_module
from mudsc_fast._forward import Rewindable
from mudsc_fast._huggingface import config_of
from mudsc_fast._tensors import Padded, same_values, tied_tensors, with_metadata
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.matching.verify import keeps_outputs
from mudsc_fast.spec.axes import entry_of
from mudsc_fast.spec.choose import SpecLike, choose_spec
from mudsc_fast.spec.join import join_specs
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Modules, state dicts, or paths: all of one kind.
Models = Sequence[nn.Module] | Sequence[Mapping[str, Tensor]] | Sequence[str | os.PathLike[str]]
Model = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

#: Entries of a parameter that its checksum reads.
_CHECKED_ENTRIES = 16

_KINDS: dict[str, Any] = {"modules": nn.Module, "state dicts": Mapping, "paths": (str, os.PathLike)}


@dataclass(frozen=True)
class Networks:
    """Two or more networks with the same tensors, except for task heads.

    Attributes
    ----------
    modules
        The networks as modules; empty where only their tensors are known.
    state_dicts
        The tensors of each. Those of files are read each time that they are asked for. Task heads that a network does
        not have are those of another network, so that all have the same names.
    given
        The state dicts as they were given.
    extras
        Their entries that are no tensors: ``_extra_state`` of modules.
    configs
        The entries of each network's configuration, None for what is no model of Hugging Face.
    lacking
        For each network the names in its `state_dicts` that it does not have itself.
    """

    modules: tuple[nn.Module, ...]
    state_dicts: tuple[Mapping[str, Tensor], ...]
    given: tuple[Mapping[str, Any], ...]
    extras: tuple[Mapping[str, Any], ...]
    configs: tuple[Mapping[str, Any] | None, ...]
    lacking: tuple[frozenset[str], ...]

    def __len__(self) -> int:
        return len(self.state_dicts)

    @classmethod
    def of(cls, models: Models, *, run: bool = False, task_heads: Sequence[str] = ()) -> Networks:
        """Check what a user passed as `models`.

        Parameters
        ----------
        models
            Modules, state dicts or paths.
        run
            Whether the networks are to be run: directories of Hugging Face are then loaded as modules.
        task_heads
            Tensors that not all networks need to have, by their name or its beginning up to a dot.

        Raises
        ------
        TypeError
            If `models` is not a sequence, holds other objects or different kinds of models, or if the dtypes differ.
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
        networks = cls._opened(models, run)._padded(task_heads)
        for index, other in enumerate(networks.state_dicts[1:], start=1):
            _check_same_types(networks.state_dicts[0], other, index)
        return networks

    @classmethod
    def of_modules(cls, models: Sequence[nn.Module]) -> Networks:
        """Return modules as they are."""
        return cls._of_state_dicts(
            [model.state_dict() for model in models], tuple(models), [config_of(model) for model in models]
        )

    @classmethod
    def of_tensors(
        cls, tensors: Sequence[Mapping[str, Tensor]], configs: Sequence[Mapping[str, Any] | None] | None = None
    ) -> Networks:
        """Return networks of which only the tensors are known; all entries are tensors."""
        count = len(tensors)
        known = (None,) * count if configs is None else tuple(configs)
        return cls((), tuple(tensors), tuple(tensors), ({},) * count, known, (frozenset(),) * count)

    @classmethod
    def _of_state_dicts(
        cls,
        state_dicts: Sequence[Mapping[str, Any]],
        modules: tuple[nn.Module, ...] = (),
        configs: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Networks:
        extras = tuple(
            {name: value for name, value in state_dict.items() if _is_extra(name, value)} for state_dict in state_dicts
        )
        tensors = tuple(
            {name: value for name, value in state_dict.items() if name not in extra} if extra else state_dict
            for state_dict, extra in zip(state_dicts, extras, strict=True)
        )
        count = len(state_dicts)
        known = (None,) * count if configs is None else tuple(configs)
        return cls(modules, tensors, tuple(state_dicts), extras, known, (frozenset(),) * count)

    @classmethod
    def _opened(cls, models: Sequence[Any], run: bool) -> Networks:
        if isinstance(models[0], nn.Module):
            return cls.of_modules(models)
        if isinstance(models[0], Mapping):
            return cls._of_state_dicts(models)
        from mudsc_fast.checkpoints.checkpoint import open_checkpoint  # only users of files pay for the import

        checkpoints = [open_checkpoint(path) for path in models]
        if run and all(checkpoint.config is not None for checkpoint in checkpoints):
            from mudsc_fast.checkpoints.models import load_model

            return cls.of_modules([load_model(checkpoint, None) for checkpoint in checkpoints])
        return cls.of_tensors([item.tensors for item in checkpoints], [item.config for item in checkpoints])

    def _padded(self, task_heads: Sequence[str]) -> Networks:
        """Return the networks with the same names; `task_heads` must name all that some of them lack."""
        own = self.state_dicts
        for index, other in enumerate(own[1:], start=1):
            _check_same_names(own[0], other, index, task_heads)
        names = dict.fromkeys(name for tensors in own for name in tensors)
        lacking = tuple(frozenset(name for name in names if name not in tensors) for tensors in own)
        if not any(lacking):
            return self
        return replace(self, state_dicts=tuple(Padded(tensors, own) for tensors in own), lacking=lacking)

    def choose_spec(
        self, spec: SpecLike, data: Iterable[Any] | None, ranks: Ranks | None = None
    ) -> tuple[PermutationSpec, Iterable[Any] | None]:
        """Return the spec of the networks, and `data` of which the first batch may have been looked at.

        Of several processes, each with its own data, the first that has a batch chooses the spec for all.
        """
        if ranks is None or ranks.alone:
            return self._choose_spec(spec, data)
        if any(tensor.is_meta for tensor in self.state_dicts[0].values()):
            # Modules that are divided over processes cannot be copied or exported: names and configurations decide.
            with ranks.step("choosing the spec"):
                return replace(self, modules=())._choose_spec(spec, None)[0], data
        doing = "choosing the spec"
        if isinstance(spec, PermutationSpec) or data is None:
            with ranks.step(doing):
                chosen, data = self._choose_spec(spec, data)
            return chosen, data
        with ranks.step("reading the first batch"):
            data = batches = Rewindable(data)
            has_batch = batches.has_first()
        having = [rank for rank, has in enumerate(ranks.gather_objects(has_batch, doing)) if has]
        text = ""
        with ranks.step(doing):
            if not having:
                raise ValueError("data must yield at least one batch, got none on any rank")
            if ranks.rank == having[0]:
                chosen, data = self._choose_spec(spec, data)
                text = chosen.to_json()
        return PermutationSpec.from_json(ranks.broadcast_object(text, doing, having[0])), data

    def _choose_spec(self, spec: SpecLike, data: Iterable[Any] | None) -> tuple[PermutationSpec, Iterable[Any] | None]:
        if isinstance(spec, PermutationSpec) or data is None:
            batches = None
        else:
            data = batches = Rewindable(data)
        batch = None if batches is None else batches.first
        if not any(self.lacking):
            return self._choose_spec_of(0, self.state_dicts[0], spec, batch), data
        if isinstance(spec, (PermutationSpec, os.PathLike)) or str(spec).endswith(".json"):
            chosen = self._choose_spec_of(0, self.state_dicts[0], spec, batch)
        else:
            own = [
                {name: tensors[name] for name in tensors if name not in lacking}
                for tensors, lacking in zip(self.state_dicts, self.lacking, strict=True)
            ]
            chosen = join_specs(
                [self._choose_spec_of(index, tensors, spec, batch) for index, tensors in enumerate(own)]
            )
        self._check_names_heads(chosen)
        return (self._observed_in_all(chosen) if self.modules else chosen), data

    def _observed_in_all(self, spec: PermutationSpec) -> PermutationSpec:
        """Return a spec without the observations in modules that some networks lack, such as the input of a head."""
        modules = set.intersection(*(set(dict(model.named_modules(remove_duplicate=False))) for model in self.modules))
        return PermutationSpec(
            {name: [entry_of(segments) for segments in layout] for name, layout in spec.layouts.items()},
            {node: [where for where in spec.observations(node) if where.module in modules] for node in spec.nodes},
            {node: spec.groups(node) for node in spec.nodes},
        )

    def _choose_spec_of(
        self, index: int, tensors: Mapping[str, Tensor], spec: SpecLike, batch: Callable[[], Any] | None
    ) -> PermutationSpec:
        model = (lambda: self.modules[index]) if self.modules else None
        verify = None
        if model is not None and batch is not None:
            network, first = self.modules[index], batch

            def verify(found: PermutationSpec) -> bool:
                return keeps_outputs(network, found, first())

        return choose_spec(spec, tensors, config=self.configs[index], model=model, batch=batch, verify=verify)

    def _check_names_heads(self, spec: PermutationSpec) -> None:
        """Raise a ValueError if heads that some networks lack are not in the spec.

        They would not follow the units of the trunk, and their tasks would compute something else without a word.
        """
        tensors = self.state_dicts[0]
        unknown = [
            name
            for name in tensors
            if any(name in lacking for lacking in self.lacking)
            and name not in spec.layouts
            and tensors[name].ndim > 1
            and (tensors[name].is_floating_point() or tensors[name].is_complex())
        ]
        if unknown:
            raise ValueError(
                f"spec must name the tensors of task heads that only some models have, so that they follow the units "
                f"of the trunk, but it lacks {unknown[:5]} ({len(unknown)} in all)"
            )


def network_of(model: Model) -> Networks:
    """Return what is known of one network.

    Raises
    ------
    TypeError
        If it is neither a module nor a state dict nor a path.
    """
    if isinstance(model, nn.Module):
        return Networks.of_modules([model])
    if isinstance(model, Mapping):
        return Networks._of_state_dicts([model])
    if isinstance(model, (str, os.PathLike)):
        return Networks._opened([model], run=False)
    raise TypeError(f"model must be a module, a state dict, or the path of a checkpoint, got {type(model).__name__}")


def like(tensors: Mapping[str, Tensor], original: Networks, index: int) -> dict[str, Tensor]:
    """Return a state dict with what that of one of the networks has besides tensors.

    These are the versions of its modules (``_metadata``) and the entries that are no tensors (``_extra_state``).
    """
    return with_metadata({**tensors, **copy.deepcopy(original.extras[index])}, original.given[index])


def with_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with other tensors.

    Where the model has one tensor under several names and the state dict has several, the copy has several.

    Raises
    ------
    ValueError
        If the model does not hold the tensors after loading them.
    """
    copied = copy_module(model)
    _untie(copied, state_dict)
    copied.load_state_dict(state_dict)
    found = copied.state_dict()
    changed = [
        name
        for name, tensor in state_dict.items()
        if isinstance(tensor, Tensor) and not same_values(found[name], tensor)
    ]
    if changed:
        raise ValueError(
            f"{type(model).__name__} does not keep the tensors that it loads: {', '.join(changed[:5])} "
            f"({len(changed)} in all). Merge its state dict instead, and load the result by the model's own means"
        )
    return copied


def _untie(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Give names of one tensor a tensor each where a state dict has different values for them, in place."""
    held = model.state_dict(keep_vars=True)
    untied = False
    for first, *others in tied_tensors([{name: value for name, value in held.items() if isinstance(value, Tensor)}]):
        for name in others:
            if not same_values(state_dict[first], state_dict[name]):
                module_name, _, leaf = name.rpartition(".")
                tensor = held[name].detach().clone()
                if isinstance(held[name], nn.Parameter):
                    tensor = nn.Parameter(tensor, requires_grad=held[name].requires_grad)
                setattr(model.get_submodule(module_name), leaf, tensor)
                untied = True
    config: Any = getattr(model, "config", None)
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # else they are tied again when the model is saved and loaded


def _check_same_names(
    first: Mapping[str, Tensor], other: Mapping[str, Tensor], index: int, task_heads: Sequence[str]
) -> None:
    def is_head(name: str) -> bool:
        return any(name == head or name.startswith(head + ".") for head in task_heads)

    missing = [name for name in first if name not in other and not is_head(name)]
    unexpected = [name for name in other if name not in first and not is_head(name)]
    if missing or unexpected:
        raise ValueError(
            f"models[{index}] must have the tensors of models[0]: missing {missing[:5]}, unexpected {unexpected[:5]} "
            f"({len(missing)} and {len(unexpected)} in all). Where they belong to the models' heads, name these in "
            "task_heads to keep them per task"
        )


def _check_same_types(first: Mapping[str, Tensor], other: Mapping[str, Tensor], index: int) -> None:
    for name, tensor in first.items():
        found = other[name]
        for value in (tensor, found):
            if not isinstance(value, Tensor) or value.is_quantized:
                raise TypeError(
                    f"{name!r} must be a tensor in every model, got {_described(value)}. Quantized networks must be "
                    "dequantized before they are merged"
                )
        if found.dtype != tensor.dtype:
            raise TypeError(f"{name!r} has dtype {found.dtype} in models[{index}], but {tensor.dtype} in models[0]")
        if found.device != tensor.device:
            raise ValueError(
                f"{name!r} is on device {found.device} in models[{index}], but on {tensor.device} in models[0]"
            )


def _is_extra(name: str, value: object) -> bool:
    return name.rpartition(".")[2] == "_extra_state" and not isinstance(value, Tensor)


def _described(value: object) -> str:
    return f"a quantized tensor ({value.dtype})" if isinstance(value, Tensor) else type(value).__name__


def fingerprint(model: nn.Module) -> int:
    """Return a checksum of some entries of all parameters of a model."""
    checksum = 0
    for parameter in model.parameters():
        tensor = parameter.detach()
        values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
        chosen = values[:: max(1, len(values) // _CHECKED_ENTRIES)]
        checksum = zlib.crc32(chosen.to("cpu", torch.float64).numpy().tobytes(), checksum)
    return checksum
