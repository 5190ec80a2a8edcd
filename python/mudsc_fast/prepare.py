"""Turn the models, spec and data that a user passes into networks that can be matched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mudsc_fast._forward import Forward, Rewindable
from mudsc_fast._labels import label_problem
from mudsc_fast._models import Model, Models, Networks
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.sharded import Sharded
from mudsc_fast.matching.partial import Division, divide
from mudsc_fast.matching.statistics import MatchingStatistics
from mudsc_fast.spec.choose import SpecLike
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: One or several names.
Names = str | Sequence[str]

#: Batches, or what was computed from them.
Data = Iterable[Any] | MatchingStatistics | None

#: For each node the rank that alone needs the sums of its activations; None if all ranks do.
Roots = Mapping[str, int] | None

#: What activations are matched by: batches, their statistics, or a function that collects these if they are needed.
Activations = Data | Callable[[Roots], MatchingStatistics]

_KINDS: dict[str, Any] = {"modules": nn.Module, "state dicts": Mapping, "paths": (str, os.PathLike)}


@dataclass(frozen=True)
class Prepared:
    """Networks that can be matched.

    Attributes
    ----------
    networks
        The networks.
    spec
        Their spec.
    data
        The data, or a function that collects its statistics. The first batch may have been read in advance.
    task_heads
        The tensors to keep per task: names, or prefixes of names that end before a dot.
    sharded
        The tensors of networks that are sharded over processes. `networks` then has only their shapes.
    """

    networks: Networks
    spec: PermutationSpec
    data: Activations
    task_heads: tuple[str, ...]
    sharded: Sharded | None = None

    def divide(self, stop_at: Names = ()) -> Division:
        """Return which tensors are merged.

        Raises
        ------
        ValueError
            If an entry names nothing, or classifiers that would be merged have different labels.
        """
        networks = self.networks
        division = divide(networks.state_dicts, self.spec, names("stop_at", stop_at), self.task_heads)
        problem = label_problem(
            networks.sources, networks.configs, networks.state_dicts[0], division.per_task, self.spec
        )
        if problem is not None:
            raise ValueError(problem)
        return division


def prepare(
    models: Models,
    spec: SpecLike,
    data: Data,
    *,
    run: bool = False,
    task_heads: Names = (),
    forward: Forward | None = None,
    verify: bool = True,
    ranks: Ranks | None = None,
) -> Prepared:
    """Check what a user passed, open files, and choose the spec.

    Parameters
    ----------
    models
        Modules, state dicts or paths.
    spec, data
        As for :func:`mudsc_fast.merge`.
    run
        Whether the networks are to be run: Hugging Face directories are then loaded as modules.
    task_heads
        Tensors that not all networks need to have.
    forward, verify
        How to run a model, and whether to verify a given spec, as for :func:`mudsc_fast.merge`.
    ranks
        The processes that match together; this one alone by default.

    Raises
    ------
    TypeError
        If `models` is not a sequence, has entries of other types or of several kinds, or if dtypes differ.
    ValueError
        If there are fewer than two, if a file cannot be read, if the networks differ in the names or the devices of
        their tensors, or if no spec can be found.
    """
    ranks = Ranks() if ranks is None else ranks
    options: dict[str, Any] = {"forward": forward, "verify": verify}
    with ranks.step("checking the arguments"):
        check_models(models, data)
        heads = tuple(names("task_heads", task_heads))
        batches = None if data is None or isinstance(data, MatchingStatistics) else Rewindable(data)
    ranks.check_same({"kind of spec": _kind_of(spec), "kind of data": _kind_of(data)})
    if isinstance(data, MatchingStatistics) and spec is None:
        spec = data.spec
    with ranks.step("checking the arguments"):
        if isinstance(models[0], (str, os.PathLike)):
            networks, known, heads = _open(models, spec, run, heads)  # type: ignore[arg-type]  # they are paths
            options["verify"] = verify and spec not in (None, "derive")
            spec = spec if known is None else known
        else:
            networks = Networks.of(models, heads)  # type: ignore[arg-type]  # no paths
    sharded = Sharded.of(networks.state_dicts, ranks)
    if sharded is not None:
        networks = replace(networks, state_dicts=sharded.described)
    chosen = networks.choose_spec(spec, batches, ranks, **options)
    return Prepared(networks, chosen, data if batches is None else batches, heads, sharded)


def _kind_of(given: object) -> str:
    """Return the arguments that must be equal in all processes, so that all take the same steps. Data may differ."""
    if given is None:
        return "None"
    if isinstance(given, (PermutationSpec, MatchingStatistics)):
        return type(given).__name__
    return str(given) if isinstance(given, (str, os.PathLike)) else "batches"


def _open(
    paths: Sequence[str | os.PathLike[str]], spec: SpecLike, run: bool, heads: tuple[str, ...]
) -> tuple[Networks, PermutationSpec | None, tuple[str, ...]]:
    """Return networks in files, the spec if it fits their tensors, and the names of their task heads."""
    from mudsc_fast.checkpoints.models import load_model  # only users of files pay for the import
    from mudsc_fast.checkpoints.networks import open_networks, prepare_networks

    checkpoints = open_networks(paths)
    run = run and all(checkpoint.config is not None for checkpoint in checkpoints)
    files = prepare_networks(checkpoints, spec, None, None, task_heads=heads, unequal_heads=True, names_in_memory=run)
    heads = tuple(files.task_heads)
    if not run:
        return Networks.of_files(files), files.spec, heads
    networks = Networks.of([load_model(checkpoint, None) for checkpoint in checkpoints], heads)
    networks = replace(networks, sources=tuple(str(checkpoint.path) for checkpoint in checkpoints))
    fits = not files.spec.problems(networks.state_dicts[0])
    return networks, files.spec if fits else None, heads


def check_models(models: Models, data: object = None) -> None:
    """Check that what a user passed as `models` is a sequence of two or more models of one kind.

    The message says so if the models were passed where the data belongs.

    Raises
    ------
    TypeError
        If it is not a sequence, or has entries of other types or of several kinds.
    ValueError
        If there are fewer than two.
    """
    if isinstance(models, (nn.Module, Mapping, str, os.PathLike)):
        raise TypeError(
            f"models must be one list of modules, state dicts, or paths of checkpoints, got {type(models).__name__}: "
            "write merge([a, b], data), not merge(a, b)"
        )
    if not isinstance(models, Sequence):
        raise TypeError(
            "models must be a sequence of modules, state dicts, or paths of checkpoints, got "
            f"{type(models).__name__}{_exchanged(data)}"
        )
    if len(models) < 2:
        raise ValueError(f"models must hold at least two models, got {len(models)}")
    if not any(all(isinstance(model, kind) for model in models) for kind in _KINDS.values()):
        raise TypeError(
            f"models must be all of one kind ({', '.join(_KINDS)}), got "
            + ", ".join(dict.fromkeys(type(model).__name__ for model in models))
            + _exchanged(data)
        )


def _exchanged(data: object) -> str:
    kinds = tuple(kind for group in _KINDS.values() for kind in (group if isinstance(group, tuple) else (group,)))
    are_models = isinstance(data, Sequence) and data and all(isinstance(model, kinds) for model in data)
    return ": write the models first, merge([a, b], data)" if are_models and not isinstance(data, str) else ""


def network_of(model: Model, spec: PermutationSpec) -> Networks:
    """Return one network. Tensors in files get the names that the spec uses.

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
        from mudsc_fast.checkpoints.networks import NetworkFiles, open_for_spec

        return Networks.of_files(NetworkFiles((open_for_spec(model, spec),), spec, frozenset()))
    raise TypeError(f"model must be a module, a state dict, or the path of a checkpoint, got {type(model).__name__}")


def names(argument: str, value: Names) -> list[str]:
    """Return one or several names as a list."""
    listed = [value] if isinstance(value, str) else list(value)
    for name in listed:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a name or a sequence of names, got {type(name).__name__}")
    return listed
