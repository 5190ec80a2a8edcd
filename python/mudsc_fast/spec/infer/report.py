"""Descriptions of the reasons that keep axes in their order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from mudsc_fast.spec.infer.factors import reason_of
from mudsc_fast.spec.infer.graph import Reading
from mudsc_fast.spec.infer.nodes import segments_of
from mudsc_fast.spec.infer.record import Call

_log = logging.getLogger("mudsc_fast.spec.infer")

#: Share of the parameters in tensors that keep the order of all axes, from which there is a warning.
_MAX_FROZEN = 0.5


def explain(reading: Reading) -> dict[str, dict[int, str]]:
    """Return, for each tensor, the axes that keep their order, and why."""
    frozen: dict[str, dict[int, str]] = {}
    for tensor, axes in reading.tensors.items():
        for position, factor in enumerate(axes):
            if factor.size > 1 and not any(segment.key for segment in segments_of(factor)):
                frozen.setdefault(tensor, {})[position] = _in_words(reason_of(factor))
    return frozen


def summarize(frozen: Mapping[str, Mapping[int, str]], max_reasons: int = 6) -> str:
    """Return the reasons with the axes they apply to, the most frequent reasons first."""
    by_reason: dict[str, list[str]] = {}
    for tensor, axes in frozen.items():
        for position, reason in axes.items():
            by_reason.setdefault(reason, []).append(f"axis {position} of {tensor!r}")
    ranked = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    texts = [f"{_shorten(where)} ({reason})" for reason, where in ranked[:max_reasons]]
    if len(ranked) > max_reasons:
        texts.append(f"and {len(ranked) - max_reasons} more reasons")
    return "; ".join(texts)


def advice(frozen: Mapping[str, Mapping[int, str]]) -> str:
    """Return what to do so that fewer axes are frozen, or nothing."""
    if any("parametrizations" in tensor.split(".") for tensor in frozen):
        return ". To permute the resulting weights, call torch.nn.utils.parametrize.remove_parametrizations first"
    return ""


def warn_of_frozen_tensors(model: nn.Module, reading: Reading, frozen: Mapping[str, Mapping[int, str]]) -> None:
    """Log a warning if most parameters keep their order, and one if the model does not use some parameters."""
    sizes = {name: value.numel() for name, value in model.named_parameters() if name in reading.tensors}
    fixed = [
        name
        for name in sizes
        if not any(segment.key for factor in reading.tensors[name] for segment in segments_of(factor))
    ]
    share = sum(sizes[name] for name in fixed) / max(sum(sizes.values()), 1)
    if share > _MAX_FROZEN:
        _log.warning(
            "%d of %d tensors (%.0f %% of the parameters) keep the order of all their axes: %s%s",
            len(fixed),
            len(sizes),
            100 * share,
            summarize({name: frozen[name] for name in fixed if name in frozen}),
            advice(frozen),
        )
    if reading.unused:
        _log.warning(
            "the model does not use %s with the example inputs, neither in evaluation nor in training mode: their "
            "axes keep their order",
            _shorten([repr(name) for name in reading.unused]),
        )


def _in_words(reason: object) -> str:
    if isinstance(reason, Call):
        return f"{reason} depends on the order"
    return "the order matters" if reason is None else str(reason)


def _shorten(names: Sequence[str], max_names: int = 3) -> str:
    shown = ", ".join(names[:max_names])
    return shown if len(names) <= max_names else f"{shown} and {len(names) - max_names} more"
