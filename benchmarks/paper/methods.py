"""All methods that make one network from two, and the scores of their results."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import mudsc_fast
from mudsc_fast.evaluate import Ensemble

SPACES: tuple[mudsc_fast.Space, ...] = ("weight", "activation", "dual")
MODES: tuple[mudsc_fast.Mode, ...] = ("align", "zip")
BALANCES = tuple(share / 10 for share in range(9, 0, -1))
#: Balances that are tried next if the best one is the first or the last.
FINER = {0.9: (0.95, 0.98, 0.99), 0.1: (0.05, 0.02, 0.01)}

#: What a merge gets afterwards: nothing but BatchNorm statistics, REPAIR without BatchNorm, or a refit.
FINISHES = ("", " + repair", " + refit", " + refit, own data")

METHODS = (
    "parents",
    "ensemble",
    "average",
    *(f"{space} {mode}{finish}" for mode in MODES for space in SPACES for finish in FINISHES),
)

#: Returns scores in percent by name. Takes one model per task, or the same model twice.
Scores = Callable[[Sequence[nn.Module]], dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """The data and functions to merge and evaluate a pair of networks.

    Attributes
    ----------
    spec
        Specification of the networks.
    merging
        Training inputs without labels, for activations, BatchNorm statistics and refit.
    own
        The same inputs, split by the network that was trained on such data; None if all were trained on the same.
    test
        Returns the scores of models on test data.
    objective
        Returns the score of a merged network on training data, by which the balance is chosen.
    cosine
        Whether only the direction of the outputs matters.
    bfloat16
        Whether BatchNorm statistics are computed in bfloat16.
    """

    spec: mudsc_fast.PermutationSpec
    merging: Iterable[Any]
    own: Sequence[Iterable[Any]] | None
    test: Scores
    objective: Callable[[nn.Module], float]
    cosine: bool
    bfloat16: bool = False


@dataclass(frozen=True)
class Outcome:
    """One row of a table: scores in percent, the balance if one was chosen, and the seconds that merging took."""

    method: str
    scores: dict[str, float]
    balance: float | None
    seconds: float


def outcomes(models: Sequence[nn.Module], setting: Setting, done: Sequence[str]) -> Iterator[Outcome]:
    """Yield the outcomes of all methods except those in `done`. Networks with BatchNorm are not repaired."""
    simple: dict[str, Callable[[], Sequence[nn.Module]]] = {
        "parents": lambda: models,
        "ensemble": lambda: _twice(Ensemble(models, normalize=setting.cosine)),
        "average": lambda: _twice(normalized(_average(models), setting)),
    }
    for method, make in simple.items():
        if method not in done:
            began = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - began
            yield Outcome(method, setting.test(made), None, seconds)
    # As in the paper, the networks that are matched have BatchNorm statistics of all images too.
    prepared = [normalized(model, setting) for model in models]
    statistics: dict[str, mudsc_fast.MatchingStatistics] = {}
    for mode in MODES:
        for space in SPACES:
            name = f"{space} {mode}"
            if all(method in done for method in _methods(name, models[0], setting)):
                continue
            if mode not in statistics and space != "weight":
                statistics[mode] = collected(prepared, setting, mode)
            began = time.perf_counter()
            result = _merged(prepared, setting, mode, space, statistics.get(mode))
            seconds = time.perf_counter() - began
            yield from _finished(name, result, prepared, setting, seconds, done)


def _methods(name: str, model: nn.Module, setting: Setting) -> list[str]:
    """Return the methods that finish a merge of networks such as this one."""
    left_out = {" + repair": has_batch_norm(model), " + refit, own data": setting.own is None}
    return [name + finish for finish in FINISHES if not left_out.get(finish, False)]


def collected(models: Sequence[nn.Module], setting: Setting, mode: mudsc_fast.Mode) -> mudsc_fast.MatchingStatistics:
    """Collect the activation statistics that a mode needs."""
    return mudsc_fast.collect_statistics(
        models, setting.merging, spec=setting.spec, blocks="cross" if mode == "align" else "full"
    )


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
        return setting.objective(normalized(result.model, setting))

    best = mudsc_fast.search_balance(models, statistics, score=score, balances=BALANCES, spec=setting.spec, mode=mode)
    finer = FINER.get(best.balance or 0.0)
    if finer is None:
        return best
    found = mudsc_fast.search_balance(models, statistics, score=score, balances=finer, spec=setting.spec, mode=mode)
    return found if max(found.scores.values()) > max(best.scores.values()) else best


def _finished(
    name: str,
    result: mudsc_fast.MergeResult,
    models: Sequence[nn.Module],
    setting: Setting,
    seconds: float,
    done: Sequence[str],
) -> Iterator[Outcome]:
    """Yield the merge itself with BatchNorm recomputed, after REPAIR if there is no BatchNorm, and after refits."""
    for method in _methods(name, models[0], setting):
        if method not in done:
            began = time.perf_counter()
            finished = _finish(method.removeprefix(name), result, models, setting)
            spent = seconds + time.perf_counter() - began
            yield Outcome(method, setting.test(_twice(finished)), result.balance, spent)


def _finish(finish: str, result: mudsc_fast.MergeResult, models: Sequence[nn.Module], setting: Setting) -> nn.Module:
    assert result.model is not None
    if not finish:
        return normalized(result.model, setting)
    if finish == " + repair":
        finished = mudsc_fast.repair(result, models, setting.merging, missing_bias="add").model
    else:
        data = setting.merging if finish == " + refit" else setting.own
        assert data is not None
        finished = mudsc_fast.refit(result, models, data, outputs="cosine" if setting.cosine else "values").model
    assert finished is not None
    return finished


def _twice(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, model


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a network has BatchNorm layers."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def normalized(model: nn.Module, setting: Setting) -> nn.Module:
    """Return a copy with recomputed BatchNorm statistics, or the model itself if it has no BatchNorm."""
    if not has_batch_norm(model):
        return model
    copied = copy.deepcopy(model)
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=setting.bfloat16):
        mudsc_fast.reset_batch_norm(copied, setting.merging, progress=False)
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
