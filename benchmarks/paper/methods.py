"""Every way of making one network of two, and how good the result is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import mudsc_fast
from mudsc_fast.evaluate import Ensemble, joint_accuracy, task_accuracies
from paper.data import Batches

SPACES: tuple[mudsc_fast.Space, ...] = ("weight", "activation", "dual")
MODES: tuple[mudsc_fast.Mode, ...] = ("align", "zip")


@dataclass(frozen=True)
class Setting:
    """What a pair of networks is merged and judged with.

    Attributes
    ----------
    spec, class_vectors
        The networks' axes, and the vectors their outputs are compared with.
    merging
        Training images without labels' use: for activations, BatchNorm and refit.
    own
        The same, one for each network, of its own task's images alone.
    choosing
        Training images for the choice of the balance.
    test
        Test images of each task, with labels that index the class vectors.
    tasks
        Class vectors of each task.
    joint
        Whether both tasks' classes are distinct.
    balances
        What is tried.
    """

    spec: mudsc_fast.PermutationSpec
    class_vectors: Tensor
    merging: Batches
    own: Sequence[Batches]
    choosing: Sequence[Batches]
    test: Sequence[Batches]
    tasks: Sequence[Sequence[int]]
    joint: bool
    balances: Sequence[float]

    def scores(self, models: Sequence[nn.Module], data: Sequence[Batches]) -> dict[str, float]:
        """Return accuracies in percent; ``models`` has one network for each task, or the same one twice."""
        found = {}
        for index, (model, batches, classes) in enumerate(zip(models, data, self.tasks, strict=True)):
            found[f"task {index + 1}"] = 100 * task_accuracies(model, batches, self.class_vectors, [classes])[0]
        found["mean"] = sum(found.values()) / len(found)
        if self.joint and all(model is models[0] for model in models):
            counts = [len(batches.images) for batches in data]
            shares = [joint_accuracy(models[0], batches, self.class_vectors) for batches in data]
            found["joint"] = 100 * sum(c * s for c, s in zip(counts, shares, strict=True)) / sum(counts)
        return found


@dataclass(frozen=True)
class Outcome:
    """One line of a table: accuracies in percent, the balance if one was chosen, and seconds of merging."""

    method: str
    scores: dict[str, float]
    balance: float | None
    seconds: float


def outcomes(models: Sequence[nn.Module], setting: Setting, done: Sequence[str]) -> Iterator[Outcome]:
    """Yield the outcome of every method but those done."""
    simple: dict[str, Callable[[], Sequence[nn.Module]]] = {
        "parents": lambda: models,
        "ensemble": lambda: _twice(Ensemble(models, normalize=True)),
        "average": lambda: _twice(_normalized(_average(models), setting)),
    }
    for method, make in simple.items():
        if method not in done:
            began = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - began
            yield Outcome(method, setting.scores(made, setting.test), None, seconds)
    statistics: dict[str, mudsc_fast.MatchingStatistics] = {}
    for mode in MODES:
        for space in SPACES:
            names = [f"{space} {mode}", f"{space} {mode} + repair", f"{space} {mode} + refit"]
            if all(name in done for name in names):
                continue
            if mode not in statistics and space != "weight":
                statistics[mode] = mudsc_fast.collect_statistics(
                    models, setting.merging, spec=setting.spec, blocks="cross" if mode == "align" else "full"
                )
            began = time.perf_counter()
            result = _merged(models, setting, mode, space, statistics.get(mode))
            seconds = time.perf_counter() - began
            yield from (o for o in _finished(names, result, models, setting, seconds) if o.method not in done)


def _merged(
    models: Sequence[nn.Module],
    setting: Setting,
    mode: mudsc_fast.Mode,
    space: mudsc_fast.Space,
    statistics: mudsc_fast.MatchingStatistics | None,
) -> mudsc_fast.MergeResult:
    if space != "dual":
        data = None if space == "weight" else statistics
        return mudsc_fast.merge(models, data, spec=setting.spec, mode=mode, space=space)
    assert statistics is not None

    def score(result: mudsc_fast.MergeResult) -> float:
        assert result.model is not None
        found = setting.scores(_twice(_normalized(result.model, setting)), setting.choosing)
        return found["joint"] if setting.joint else found["mean"]

    return mudsc_fast.search_balance(
        models, statistics, score=score, balances=setting.balances, spec=setting.spec, mode=mode
    )


def _finished(
    names: Sequence[str],
    result: mudsc_fast.MergeResult,
    models: Sequence[nn.Module],
    setting: Setting,
    seconds: float,
) -> Iterator[Outcome]:
    """Yield the merge as it is (BatchNorm recomputed), after REPAIR where there is no BatchNorm, and after refit."""
    assert result.model is not None
    plain = setting.scores(_twice(_normalized(result.model, setting)), setting.test)
    yield Outcome(names[0], plain, result.balance, seconds)
    if not _has_batch_norm(result.model):
        began = time.perf_counter()
        repaired = mudsc_fast.repair(result, models, setting.merging, missing_bias="add").model
        assert repaired is not None
        spent = seconds + time.perf_counter() - began
        yield Outcome(names[1], setting.scores(_twice(repaired), setting.test), result.balance, spent)
    began = time.perf_counter()
    refitted = mudsc_fast.refit(result, models, setting.merging, outputs="cosine").model
    assert refitted is not None
    spent = seconds + time.perf_counter() - began
    yield Outcome(names[2], setting.scores(_twice(refitted), setting.test), result.balance, spent)


def _twice(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, model


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _normalized(model: nn.Module, setting: Setting) -> nn.Module:
    """Return a copy with BatchNorm statistics of its own, or the model itself where it has none."""
    if not _has_batch_norm(model):
        return model
    copied = copy.deepcopy(model)
    mudsc_fast.reset_batch_norm(copied, setting.merging)
    return copied


def _average(models: Sequence[nn.Module]) -> nn.Module:
    averaged = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    averaged.load_state_dict(
        {
            name: sum(state[name] for state in states) / len(states) if value.is_floating_point() else value
            for name, value in states[0].items()
        }
    )
    return averaged
