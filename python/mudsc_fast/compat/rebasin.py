"""Weight matching with the interface of the PyTorch ports of git-re-basin.

Source: Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv 2209.04836, algorithm 1.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mudsc_fast.ops.assignment import linear_assignment

_logger = logging.getLogger(__name__)


class PermutationSpec(NamedTuple):
    """Mapping between permutations and the axes that they permute.

    Attributes
    ----------
    perm_to_axes
        The (tensor, axis) pairs of each permutation.
    axes_to_perm
        The permutation of every axis of each tensor, None where an axis keeps its order.
    """

    perm_to_axes: Mapping[str, Sequence[tuple[str, int]]]
    axes_to_perm: Mapping[str, Sequence[str | None]]


def permutation_spec_from_axes_to_perm(axes_to_perm: Mapping[str, Sequence[str | None]]) -> PermutationSpec:
    """Return the specification with both maps, given the second."""
    perm_to_axes: dict[str, list[tuple[str, int]]] = {}
    for tensor, permutations in axes_to_perm.items():
        for axis, permutation in enumerate(permutations):
            if permutation is not None:
                perm_to_axes.setdefault(permutation, []).append((tensor, axis))
    return PermutationSpec(perm_to_axes, axes_to_perm)


def get_permuted_param(
    ps: PermutationSpec,
    perm: Mapping[str, Tensor],
    k: str,
    params: Mapping[str, Tensor],
    except_axis: int | None = None,
) -> Tensor:
    """Return the tensor `k` of `params` with every axis but `except_axis` in the order of its permutation."""
    tensor = params[k]
    for axis, name in enumerate(ps.axes_to_perm.get(k, ())):
        if name is not None and axis != except_axis:
            tensor = tensor.index_select(axis, perm[name].to(device=tensor.device, dtype=torch.int64))
    return tensor


def apply_permutation(
    ps: PermutationSpec, perm: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return all tensors permuted; those that the specification does not name are returned unchanged."""
    return {k: get_permuted_param(ps, perm, k, params) for k in params}


def weight_matching(
    ps: PermutationSpec,
    params_a: Mapping[str, Tensor],
    params_b: Mapping[str, Tensor],
    max_iter: int = 100,
    init_perm: Mapping[str, Tensor] | None = None,
    silent: bool = False,
) -> dict[str, Tensor]:
    """Find the permutations of `params_b` that bring it closest to `params_a`.

    Each iteration visits the permutations in the order of ``torch.randperm``, from torch's default generator, so a seed
    gives the order of the ports. Each is set to the assignment that maximizes the summed products of both networks'
    weights. The search ends after an iteration without improvement.

    Parameters
    ----------
    ps
        The specification.
    params_a, params_b
        Tensors by name, on any device.
    max_iter
        Maximum number of iterations.
    init_perm
        Initial permutations; by default the identity.
    silent
        False to log the gain of each step, at level INFO.

    Returns
    -------
    dict
        [units] int64 for each permutation: unit i of the result is unit ``perm[i]`` of `params_b`.

    Raises
    ------
    ValueError
        If `init_perm` lacks a permutation, or an entry is not one.
    """
    units = {p: params_a[uses[0][0]].shape[uses[0][1]] for p, uses in ps.perm_to_axes.items()}
    perm = (
        {p: torch.arange(n, device="cpu") for p, n in units.items()}
        if init_perm is None
        else _checked(init_perm, units)
    )
    names = list(perm)
    changes = 0
    changed_at = dict.fromkeys(names, 0)
    visited_at = dict.fromkeys(names, -1)
    for iteration in range(max_iter):
        progress = False
        for index in torch.randperm(len(names), device="cpu").tolist():
            p = names[index]
            # If no neighbor has changed since the last visit, the products and the permutation are the same.
            if max((changed_at[other] for other in _neighbors(ps, p)), default=0) <= visited_at[p]:
                continue
            visited_at[p] = changes
            products = _products(ps, perm, p, params_a, params_b)
            matched = linear_assignment(products).columns
            gain = _total(products, matched) - _total(products, perm[p].to(products.device))
            if not silent:
                _logger.info("iteration %d, permutation %s: gain %g", iteration, p, gain)
            progress = progress or gain > 1e-12
            matched = matched.cpu()
            if not torch.equal(matched, perm[p]):
                changes += 1
                changed_at[p] = changes
            perm[p] = matched
        if not progress:
            break
    return perm


def _checked(init_perm: Mapping[str, Tensor], units: Mapping[str, int]) -> dict[str, Tensor]:
    if init_perm.keys() != units.keys():
        raise ValueError(f"init_perm must hold the permutations {', '.join(units)}, got {', '.join(init_perm)}")
    checked = {p: given.to(device="cpu", dtype=torch.int64) for p, given in init_perm.items()}
    for p, count in units.items():
        if not torch.equal(checked[p].sort().values, torch.arange(count, device="cpu")):
            raise ValueError(f"init_perm[{p!r}] must be a permutation of {count} units")
    return checked


def _neighbors(ps: PermutationSpec, p: str) -> set[str]:
    """Return the permutations of the other axes of the tensors that `p` permutes."""
    return {
        other
        for tensor, axis in ps.perm_to_axes[p]
        for position, other in enumerate(ps.axes_to_perm[tensor])
        if other is not None and position != axis
    }


def _products(
    ps: PermutationSpec, perm: Mapping[str, Tensor], p: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> Tensor:
    """Return [units, units]: the inner product of every unit's weights in `a` with every unit's in `b`."""
    total: Tensor | None = None
    for tensor, axis in ps.perm_to_axes[p]:
        of_a = a[tensor].detach().moveaxis(axis, 0)
        of_b = get_permuted_param(ps, perm, tensor, b, except_axis=axis).detach().moveaxis(axis, 0).to(of_a.device)
        product = of_a.reshape(len(of_a), -1) @ of_b.reshape(len(of_b), -1).T
        total = product if total is None else total + product
    assert total is not None  # a permutation has at least one axis
    return total


def _total(products: Tensor, order: Tensor) -> float:
    return float(products.gather(1, order[:, None]).double().sum())
