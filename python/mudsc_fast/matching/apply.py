"""Applying matchings to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.ops.permute import UnitMap, permute_merge
from mudsc_fast.spec.axes import PermutationSpec


def merge_state_dicts(
    state_dicts: Sequence[Mapping[str, Tensor]],
    spec: PermutationSpec,
    matching: Mapping[str, NodeMatching],
    model_weights: Sequence[float],
) -> dict[str, Tensor]:
    """Return the weighted mean of all models after re-indexing every axis by its node's matching.

    Tensors that `spec` does not name are averaged as they are; tensors of integers (counters, index tables) are
    those of the first model.
    """
    merged: dict[str, Tensor] = {}
    for name, first in state_dicts[0].items():
        if not first.is_floating_point():
            merged[name] = first.detach().clone()
            continue
        maps = {
            position: matching[axis.node].unit_map(axis.role, model_weights)
            for position, axis in enumerate(spec.axes.get(name, ()))
            if axis is not None and axis.node in matching
        }
        tensors = [state_dict[name].detach() for state_dict in state_dicts]
        merged[name] = permute_merge(tensors, maps, weights=model_weights)
    return merged


def permute_state_dict(
    state_dict: Mapping[str, Tensor], spec: PermutationSpec, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a network's tensors with the units of some nodes re-ordered; the network's function stays the same.

    Parameters
    ----------
    state_dict
        Tensors by name; not modified.
    spec
        The axes map of the network.
    permutations
        For each node to re-order a permutation [units] int64: unit k of the result is unit ``permutation[k]``.

    Raises
    ------
    ValueError
        If a node is unknown, the specification does not fit, or an entry is no permutation of the node's units.
    """
    units = spec.units(state_dict)
    for node, permutation in permutations.items():
        if node not in units:
            raise ValueError(f"permutations names the node {node!r}, which spec does not have")
        expected = torch.arange(units[node], device=permutation.device)
        if permutation.shape != expected.shape or not torch.equal(permutation.sort().values, expected):
            raise ValueError(f"permutations[{node!r}] must be a permutation of {units[node]} units")
    permuted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        maps = {
            position: UnitMap.permutation(permutations[axis.node][None])
            for position, axis in enumerate(spec.axes.get(name, ()))
            if axis is not None and axis.node in permutations
        }
        permuted[name] = permute_merge([tensor.detach()], maps) if maps else tensor.detach().clone()
    return permuted
