"""Specifications of networks in files that have no builder: derived from what their modules compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import inputs_of
from mudsc_fast.io.checkpoint import CheckpointError
from mudsc_fast.io.models import built, class_of_config, random_inputs, users_code
from mudsc_fast.spec import PermutationSpec


def derive_from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PermutationSpec:
    """Return the specification of a network of Hugging Face, built without memory for its weights.

    Parameters
    ----------
    config
        What ``config.json`` says.
    tensors
        The tensors in files. What the network has besides is left out where it is the same tensor as one of them.

    Raises
    ------
    CheckpointError
        If transformers is missing or does not know the network, it cannot be derived from what it computes, or the
        files have tensors that it has not.
    """
    kind = str(config.get("model_type"))
    with users_code(f"building a network of the model type {kind!r} by transformers"):
        try:
            import transformers
        except ImportError as error:
            raise CheckpointError(
                f"the model type {kind!r} has no specification of its own, and deriving one needs transformers: "
                "pip install 'mudsc-fast[huggingface]', or give a .json file to --spec"
            ) from error
        network = class_of_config(transformers, config)
        rest = {name: value for name, value in config.items() if name != "model_type"}
        configuration = transformers.AutoConfig.for_model(kind, **rest)
        with torch.device("meta"):
            automatic = network is transformers.AutoModel
            model: nn.Module = network.from_config(configuration) if automatic else network(configuration)
    inputs = random_inputs(model)
    if not inputs:
        raise CheckpointError(f"there is no batch to derive the specification of {type(model).__name__} with")
    return _derived(model, inputs, tensors)


def derive_from_build(build: Callable[[], nn.Module], batch: Any, tensors: Mapping[str, Tensor]) -> PermutationSpec:
    """Return the specification of the network that `build` makes, which takes such batches.

    Raises
    ------
    CheckpointError
        As :func:`derive_from_config`.
    """
    return _derived(built(build), inputs_of(batch), tensors)


def _derived(model: nn.Module, inputs: Any, tensors: Mapping[str, Tensor]) -> PermutationSpec:
    """Return the specification of a model, without tensors that are the same as one that is in the files."""
    known = set(model.state_dict())
    unknown = [name for name in tensors if name not in known]
    if unknown:
        raise CheckpointError(
            f"{type(model).__name__} has no {unknown[0]!r}, as {len(unknown)} of the {len(tensors)} tensors in files: "
            "another architecture, or other names than in memory; give a .json file to --spec"
        )
    try:
        spec = PermutationSpec.from_model(model.eval(), inputs)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the specification of {type(model).__name__} cannot be derived: {error}") from error
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    stored = [names for names in names_of.values() if any(name in tensors for name in names)]
    return spec.without({name for names in stored for name in names if name not in tensors})
