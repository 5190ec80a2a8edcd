"""Checks a spec against a network's outputs: after a permutation of its units, the network must compute the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mudsc_fast._copy import copy_module
from mudsc_fast._forward import inputs_of, preserve_training_mode, to_device
from mudsc_fast._tensors import with_metadata
from mudsc_fast.matching.apply import permute_state_dict
from mudsc_fast.spec.permutation_spec import PermutationSpec

_log = logging.getLogger(__name__)

#: Largest difference of outputs, relative to the largest output, that rounding explains in float32.
_ROUNDING = 1e-3


def keeps_outputs(model: nn.Module, spec: PermutationSpec, batch: Any) -> bool:
    """Return whether a network computes the same on a batch after its units were put in a random order.

    A spec that is chosen by the names of tensors fits their shapes, but not necessarily the wiring: a residual
    connection has no tensor. True if it cannot be found out, because the model does not run on the batch as it is.
    """
    state_dict = model.state_dict()
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    other = copy_module(model)
    permuted = permute_state_dict(tensors, spec, _random_orders(spec, tensors))
    other.load_state_dict(with_metadata({**state_dict, **permuted}, state_dict))
    try:
        before, after = (_outputs(network, to_device(batch, device)) for network in (model, other))
    except Exception as error:
        _log.info("the spec was not verified, because the model does not run on the first batch: %s", error)
        return True
    return all(_close(one, two) for one, two in zip(before, after, strict=True))


def _random_orders(spec: PermutationSpec, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a random order for every node; groups move as wholes, and tied groups alike."""
    generator = torch.Generator().manual_seed(0)
    units = spec.units(state_dict)
    orders = {}
    for bundle in spec.bundles:
        count = spec.groups(bundle[0]).count
        groups = torch.randperm(count, generator=generator, device="cpu").tolist()
        for node in bundle:
            size = units[node] // count
            parts = [group * size + torch.randperm(size, generator=generator, device="cpu") for group in groups]
            orders[node] = torch.cat(parts)
    return orders


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    inputs = inputs_of(batch)
    with preserve_training_mode(model), torch.no_grad():
        model.eval()
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _close(one: Tensor, two: Tensor) -> bool:
    scale = float(one.abs().amax()) if one.numel() else 0.0
    return one.shape == two.shape and bool(((one - two).abs() <= _ROUNDING * scale + 1e-12).all())
