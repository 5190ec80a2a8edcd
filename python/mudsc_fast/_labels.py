"""Labels of Hugging Face classifiers: classifiers with different labels cannot be averaged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from mudsc_fast.spec.permutation_spec import PermutationSpec

Config = Mapping[str, Any] | None


def label_problem(
    sources: Sequence[object],
    configs: Sequence[Config],
    tensors: Mapping[str, Tensor],
    kept: Collection[str],
    spec: PermutationSpec,
) -> str | None:
    """Return what is wrong if classifiers that would be averaged have other labels, and what to do; else None.

    Parameters
    ----------
    sources
        What to call each network.
    configs
        Their configurations, None for other models.
    tensors
        The tensors of the first network.
    kept
        The tensors that are not averaged.
    spec
        The spec of the networks.
    """
    for source, config in zip(sources[1:], configs[1:], strict=True):
        differing = _differing_label(configs[0], config)
        heads = [name for name in label_heads(configs[0], tensors, spec) if name not in kept] if differing else []
        if differing and heads:
            layers = ",".join(dict.fromkeys(name.rpartition(".")[0] or name for name in heads))
            number, ours, theirs = differing
            return (
                f"{sources[0]} and {source} are incompatible: label {number} is {ours!r} in one config and {theirs!r} "
                f"in the other. Keep a classifier for each network with task_heads={layers!r}; if the labels mean the "
                "same, make id2label equal in both configs"
            )
    return None


def differing_labels(configs: Sequence[Config]) -> bool:
    """Tell whether the configurations name other labels."""
    return any(_differing_label(configs[0], config) is not None for config in configs[1:])


def label_heads(config: Config, tensors: Mapping[str, Tensor], spec: PermutationSpec) -> list[str]:
    """Return the tensors whose first axis is one entry for each label of the configuration."""
    count = len(_labels(config))
    return [
        name
        for name, tensor in tensors.items()
        if count and tensor.ndim and tensor.shape[0] == count and _is_output(spec, name)
    ]


def _is_output(spec: PermutationSpec, name: str) -> bool:
    layout = spec.layouts.get(name)
    if layout is None:
        return name.endswith((".weight", ".bias"))
    axes = [segment.axis for segments in layout for segment in segments]
    produces_units = any(axis is not None and axis.role == "produce" for axis in axes)
    return not produces_units and all(segment.axis is None for segments in layout[:1] for segment in segments)


def _labels(config: Config) -> dict[str, str]:
    labels = (config or {}).get("id2label")
    if isinstance(labels, Mapping):
        return {str(number): str(label) for number, label in labels.items()}
    # Files leave out the labels of two classes without names.
    return {"0": "LABEL_0", "1": "LABEL_1"} if config else {}


def _differing_label(first: Config, other: Config) -> tuple[str, str, str] | None:
    ours, theirs = _labels(first), _labels(other)
    for number in {**ours, **theirs} if ours and theirs else ():
        if ours.get(number) != theirs.get(number):
            return number, ours.get(number, "missing"), theirs.get(number, "missing")
    return None
