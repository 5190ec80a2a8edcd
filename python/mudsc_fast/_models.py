"""Models as users pass them: modules, state dicts, or paths of checkpoints."""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mudsc_fast._copy import copy_module
from mudsc_fast._forward import Forward, Rewindable
from mudsc_fast._huggingface import config_of
from mudsc_fast._resize import resize
from mudsc_fast._tensors import Padded, Piece, same_values, tied_tensors, with_metadata, with_versions
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.matching.verify import check_keeps_outputs, keeps_outputs
from mudsc_fast.spec.axes import entry_of
from mudsc_fast.spec.choose import SpecLike, choose_spec
from mudsc_fast.spec.join import join_specs
from mudsc_fast.spec.permutation_spec import PermutationSpec

if TYPE_CHECKING:
    from mudsc_fast.checkpoints.networks import NetworkFiles

#: Modules, state dicts, or paths: all of one kind.
Models = Sequence[nn.Module] | Sequence[Mapping[str, Tensor]] | Sequence[str | os.PathLike[str]]
Model = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

#: Entries of a tensor that its checksum reads.
_CHECKED_ENTRIES = 16


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
        The state dicts as they were given, with the versions of their modules (``_metadata``).
    extras
        Their entries that are no tensors: ``_extra_state`` of modules.
    configs
        The entries of each network's configuration, None for other models.
    lacking
        For each network the names in its `state_dicts` that it does not have itself.
    sources
        What to call each network in messages: ``models[0]``, or its path.
    pieces
        For each network in files the tensor, or the part of one, that is stored under each name there; empty for
        networks in memory.
    """

    modules: tuple[nn.Module, ...]
    state_dicts: tuple[Mapping[str, Tensor], ...]
    given: tuple[Mapping[str, Any], ...]
    extras: tuple[Mapping[str, Any], ...]
    configs: tuple[Mapping[str, Any] | None, ...]
    lacking: tuple[frozenset[str], ...]
    sources: tuple[str, ...]
    pieces: tuple[Mapping[str, Piece], ...] = ()

    def __len__(self) -> int:
        return len(self.state_dicts)

    @classmethod
    def of(
        cls, models: Sequence[nn.Module] | Sequence[Mapping[str, Tensor]], task_heads: Sequence[str] = ()
    ) -> Networks:
        """Return networks in memory that have the same tensors.

        Parameters
        ----------
        models
            Modules or state dicts.
        task_heads
            Tensors that not all networks need to have, by their name or its beginning up to a dot.

        Raises
        ------
        TypeError
            If the dtypes differ, or an entry is not a tensor.
        ValueError
            If the networks differ in the names or the devices of their tensors.
        """
        make: Any = cls.of_modules if isinstance(models[0], nn.Module) else cls._of_state_dicts
        networks: Networks = make(models)
        return networks._padded(task_heads)._checked()

    @classmethod
    def of_modules(cls, models: Sequence[nn.Module]) -> Networks:
        """Return modules as they are."""
        return cls._of_state_dicts(
            [model.state_dict() for model in models], tuple(models), [config_of(model) for model in models]
        )

    @classmethod
    def of_tensors(cls, tensors: Sequence[Mapping[str, Tensor]]) -> Networks:
        """Return networks of which only the tensors are known; all entries are tensors of the same names."""
        count = len(tensors)
        sources = tuple(f"models[{index}]" for index in range(count))
        return cls((), tuple(tensors), tuple(tensors), ({},) * count, (None,) * count, (frozenset(),) * count, sources)

    @classmethod
    def of_files(cls, files: NetworkFiles) -> Networks:
        """Return networks in files, whose tensors have common names."""
        tensors = files.state_dicts
        own = [checkpoint.tensors for checkpoint in files.checkpoints]
        return cls(
            modules=(),
            state_dicts=tuple(tensors),
            given=tuple(with_versions({}, checkpoint.versions) for checkpoint in files.checkpoints),
            extras=tuple(checkpoint.extra_state for checkpoint in files.checkpoints),
            configs=tuple(checkpoint.config for checkpoint in files.checkpoints),
            lacking=tuple(frozenset(name for name in tensors[0] if name not in held) for held in own),
            sources=tuple(str(checkpoint.path) for checkpoint in files.checkpoints),
            pieces=tuple(checkpoint.pieces for checkpoint in files.checkpoints),
        )._checked()

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
        sources = tuple(f"models[{index}]" for index in range(count))
        return cls(modules, tensors, tuple(state_dicts), extras, known, (frozenset(),) * count, sources)

    def _checked(self) -> Networks:
        for index, other in enumerate(self.state_dicts[1:], start=1):
            _check_same_types(self.state_dicts[0], other, index)
        return self

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
        self,
        spec: SpecLike,
        batches: Rewindable | None,
        ranks: Ranks | None = None,
        *,
        forward: Forward | None = None,
        verify: bool = True,
    ) -> PermutationSpec:
        """Return the spec of the networks; it may be derived with the first of the batches.

        A spec that the user gives is verified on the first batch by modules, unless `verify` is False. Of several
        processes, each with its own data, the first that has a batch chooses the spec for all.

        Raises
        ------
        ValueError
            If there is no spec, or the outputs of a module change with the order of its units.
        """
        ranks = Ranks() if ranks is None else ranks
        if ranks.alone:
            return self._choose_spec(spec, batches, forward, verify)
        if any(tensor.is_meta for tensor in self.state_dicts[0].values()):
            # Modules that are divided over processes cannot be copied or exported: names and configurations decide.
            with ranks.step("choosing the spec"):
                return replace(self, modules=())._choose_spec(spec, None, forward, verify)
        doing = "choosing the spec"
        if isinstance(spec, PermutationSpec) or batches is None:
            with ranks.step(doing):
                return self._choose_spec(spec, batches, forward, verify)
        with ranks.step("reading the first batch"):
            has_batch = batches.has_first()
        having = [rank for rank, has in enumerate(ranks.gather_objects(has_batch, doing)) if has]
        text = ""
        with ranks.step(doing):
            if not having:
                raise ValueError("data must yield at least one batch, got none on any rank")
            if ranks.rank == having[0]:
                text = self._choose_spec(spec, batches, forward, verify).to_json()
        return PermutationSpec.from_json(ranks.broadcast_object(text, doing, having[0]))

    def _choose_spec(
        self, spec: SpecLike, batches: Rewindable | None, forward: Forward | None, verify: bool
    ) -> PermutationSpec:
        batch = None if batches is None else batches.first
        if not any(self.lacking):
            chosen = self._choose_spec_of(0, self.state_dicts[0], spec, batch)
        else:
            chosen = self._choose_joined_spec(spec, batch)
        given = spec not in (None, "derive")
        if verify and given and self.modules and batches is not None and batch is not None and batches.has_first():
            for index in range(len(self.modules) if any(self.lacking) else 1):
                lacking = self.lacking[index].intersection(chosen.layouts)
                own = chosen.without(lacking) if lacking else chosen
                check_keeps_outputs(self.modules[index], own, batch(), forward)
        return chosen

    def _choose_joined_spec(self, spec: SpecLike, batch: Callable[[], Any] | None) -> PermutationSpec:
        """Return one spec for networks of which some have heads that others lack."""
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
        return self._observed_in_all(chosen) if self.modules else chosen

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


def as_given(tensors: Mapping[str, Tensor], networks: Networks, index: int) -> dict[str, Tensor]:
    """Return tensors as a state dict in the form of one of the networks.

    It has the names of the file where the network is one, the versions of modules (``_metadata``), and the entries that
    are no tensors (``_extra_state``).
    """
    if networks.pieces:
        pieces = networks.pieces[index]
        tensors = {
            stored: tensors[piece.name] if piece.view is None else piece.of(tensors[piece.name]).clone()
            for stored, piece in pieces.items()
            if piece.name in tensors
        }
    return with_metadata({**tensors, **copy.deepcopy(networks.extras[index])}, networks.given[index])


def with_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with other tensors.

    Where the model has one tensor under several names and the state dict has several, the copy has several. Layers have
    the sizes of the tensors.

    Raises
    ------
    ValueError
        If the model does not hold the tensors after loading them.
    TypeError
        If a layer cannot change its size.
    """
    copied = copy_module(model)
    resize(copied, state_dict)
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
            f"({len(missing)} and {len(unexpected)} in all). All models must have the same architecture. If only their "
            "heads differ, name the heads in task_heads: each task keeps its own"
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
    parameters = dict(model.named_parameters())
    return checksum(parameters, parameters)


def checksum(tensors: Mapping[str, Tensor], names: Iterable[str]) -> int:
    """Return a checksum of some entries of the tensors with these names, in their order."""
    chosen: list[Tensor] = []
    for name in names:
        tensor = tensors[name].detach()
        if type(tensor) is not Tensor or tensor.is_meta:
            continue  # of a tensor that is spread over processes each has another part
        values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
        entries = values[:: max(1, len(values) // _CHECKED_ENTRIES)]
        if entries.device.type not in ("cpu", "cuda"):
            entries = entries.cpu()  # other devices may have no float64
        chosen.append(entries.to(torch.float64))
    found = 0
    for _, run in groupby(chosen, key=lambda entries: entries.device):  # one copy from each device, as a rule
        found = zlib.crc32(torch.cat(list(run)).cpu().numpy().tobytes(), found)
    return found
