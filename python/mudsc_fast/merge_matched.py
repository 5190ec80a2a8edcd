"""Merge networks whose units are matched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mudsc_fast._checks import check_number
from mudsc_fast._models import Networks, as_given, fingerprint, with_state
from mudsc_fast._phases import Phases
from mudsc_fast._tensors import tied_tensors
from mudsc_fast.distributed.ranks import Ranks
from mudsc_fast.distributed.sharded import Sharded, is_sharded
from mudsc_fast.matching.apply import merge_state_dicts, task_tensors
from mudsc_fast.matching.checks import check_dtypes
from mudsc_fast.matching.node import NodeMatching, effective_weights
from mudsc_fast.matching.partial import Division
from mudsc_fast.merge_result import MergeResult
from mudsc_fast.spec.permutation_spec import PermutationSpec

if TYPE_CHECKING:
    from mudsc_fast.matching_result import Matching  # which merges with this module


def merge_matched(
    networks: Networks, matching: Matching, division: Division, weights: Sequence[float] | None
) -> MergeResult:
    """Merge networks whose units are matched; which tensors, `division` says."""
    shares = list(matching.weights) if weights is None else checked_weights(weights, len(networks))
    phases = Phases()
    check_dtypes(networks.state_dicts, matching.spec, division)
    with phases.timed("merging"):
        state_dicts, spec = networks.state_dicts, matching.spec
        merged = merge_state_dicts(state_dicts, spec, matching, effective_weights(shares, matching), division.shared)
        tasks = _task_state_dicts(networks, spec, matching, division, merged)
        merged = as_given(merged, networks, 0)
        tasks = tuple(_with_shared(task, merged) for task in tasks)
        task_models = _task_models(networks.modules, tasks, division)
    return MergeResult(
        model=None if division.per_task or not task_models else task_models[0],
        state_dict=merged,
        task_models=task_models,
        task_state_dicts=tasks,
        matching=matching,
        weights=tuple(shares),
        timings={**matching.timings, **phases.seconds},
        unmatched_tensors=tuple(
            name
            for name, tensor in merged.items()
            if isinstance(tensor, Tensor)
            and (tensor.is_floating_point() or tensor.is_complex())
            and name not in spec.layouts
        ),
        models=networks.modules,
        fingerprints=tuple(fingerprint(model) for model in networks.modules),
    )


def merge_sharded(
    networks: Networks,
    sharded: Sharded,
    matching: Matching,
    division: Division,
    weights: Sequence[float] | None,
    ranks: Ranks,
    holder: Mapping[str, int],
) -> MergeResult:
    """Merge networks that are sharded over processes, each tensor in the process that holds it.

    Parameters
    ----------
    networks
        The networks, with the tensors that this process holds gathered.
    sharded
        The sharded tensors.
    matching, division, weights
        As for :func:`merge_matched`.
    ranks, holder
        The processes, and the rank that holds each tensor.
    """
    shares = list(matching.weights) if weights is None else checked_weights(weights, len(networks))
    factors = effective_weights(shares, matching)
    phases, spec, states = Phases(), matching.spec, networks.state_dicts

    def merged_shard(name: str, rank: int, compute: Callable[[], Tensor], model: int = 0) -> Tensor:
        whole: Tensor | None = None
        with ranks.step("merging the tensors"):
            if rank == ranks.rank or not is_sharded(sharded.given[model][name]):
                whole = compute()
        return sharded.shard(name, whole, rank, ranks, model)

    with phases.timed("merging"):
        described = [{name: tensors[name] for name in division.shared} for tensors in sharded.described]
        first_name = {name: tied[0] for tied in tied_tensors(described) for name in tied}
        merged: dict[str, Tensor] = {}
        for name in division.shared:
            first = first_name.get(name, name)
            if first != name:
                merged[name] = merged[first]
                continue
            tied = [other for other in division.shared if first_name.get(other, other) == name]
            merged[name] = merged_shard(
                name,
                holder[name],
                lambda tied=tied, name=name: merge_state_dicts(  # type: ignore[misc]
                    [dict.fromkeys(tied, tensors[name]) for tensors in states], spec, matching, factors, tied
                )[name],
            )
        tasks = []
        for index, tensors in enumerate(states):
            own = {
                name: merged_shard(
                    name,
                    holder[name],
                    lambda name=name, tensors=tensors, index=index: task_tensors(  # type: ignore[misc]
                        tensors, index, spec, matching, division.shared, [name]
                    )[name],
                    index,
                )
                for name in division.per_task
            }
            tasks.append(
                as_given({name: merged[name] if name in merged else own[name] for name in states[0]}, networks, index)
            )
    return MergeResult(
        model=None,
        state_dict=as_given(merged, networks, 0),
        task_models=(),
        task_state_dicts=tuple(tasks),
        matching=matching,
        weights=tuple(shares),
        timings={**matching.timings, **phases.seconds},
        unmatched_tensors=tuple(
            name for name, tensor in merged.items() if tensor.is_floating_point() and name not in spec.layouts
        ),
    )


def checked_weights(weights: Sequence[float] | None, num_models: int) -> list[float]:
    """Return the models' shares, equal by default."""
    if weights is None:
        return [1.0 / num_models] * num_models
    checked = [check_number(f"weights[{index}]", weight) for index, weight in enumerate(weights)]
    if len(checked) != num_models:
        raise ValueError(f"weights must have one entry per model ({num_models}), got {len(checked)}")
    if min(checked) < 0 or abs(sum(checked) - 1) > 1e-6:
        raise ValueError(f"weights must be at least 0 and sum to 1, got {checked}")
    return checked


def _task_state_dicts(
    networks: Networks,
    spec: PermutationSpec,
    matching: Mapping[str, NodeMatching],
    division: Division,
    merged: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], ...]:
    """Return for each model all tensors, merged or its own, in the order of the first model; none that it lacks."""
    tasks = []
    for index, (state_dict, lacking) in enumerate(zip(networks.state_dicts, networks.lacking, strict=True)):
        kept = [name for name in division.per_task if name not in lacking]
        own = task_tensors(state_dict, index, spec, matching, division.shared, kept)
        held = [name for name in networks.state_dicts[0] if name not in lacking]
        whole = {name: merged[name] if name in merged else own[name] for name in held}
        tasks.append(as_given(whole, networks, index))
    return tuple(tasks)


def _with_shared(task: dict[str, Tensor], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let a task hold the merged tensors themselves, where a file made copies of their parts."""
    task.update({name: merged[name] for name in task if name in merged and isinstance(merged[name], Tensor)})
    return task


def _task_models(
    models: Sequence[nn.Module], tasks: Sequence[Mapping[str, Tensor]], division: Division
) -> tuple[nn.Module, ...]:
    if not models:
        return ()
    if not division.per_task:
        # The model that shares the fewest tensors between names need not be changed to hold the merged ones.
        return (with_state(min(models, key=_num_shared_names), tasks[0]),) * len(models)
    return tuple(with_state(model, task) for model, task in zip(models, tasks, strict=True))


def _num_shared_names(model: nn.Module) -> int:
    """Return how many names of parameters are further names of one."""
    return sum(1 for _ in model.named_parameters(remove_duplicate=False)) - sum(1 for _ in model.parameters())
