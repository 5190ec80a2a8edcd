"""Check a spec against the outputs of a network, which must not change when the units are permuted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mudsc_fast._copy import copy_module
from mudsc_fast._forward import Forward, preserve_training_mode, run_on_batch
from mudsc_fast._huggingface import ordered_outputs
from mudsc_fast._tensors import with_metadata
from mudsc_fast.matching.apply import permute_state_dict
from mudsc_fast.spec.permutation_spec import PermutationSpec

_log = logging.getLogger(__name__)

#: Maximum difference of float32 outputs that rounding can cause, relative to the largest output.
_ROUNDING = 1e-3
#: The same for other dtypes, in units of their precision: sums of thousands of products are rounded many times.
_ROUNDING_STEPS = 16

_MAX_LISTED = 8


def check_keeps_outputs(model: nn.Module, spec: PermutationSpec, batch: Any, forward: Forward | None = None) -> None:
    """Raise a ValueError if a random order of a network's units changes its outputs on a batch.

    A handwritten spec may fit the shapes of the tensors but not the connections: a residual connection has no tensor,
    and a bias that is missing in the spec keeps its order when its weight is permuted. The error names the nodes whose
    permutation changes the outputs. If the model does not run on the batch, or its outputs differ from run to run,
    nothing is checked, and the logger ``mudsc_fast`` says so at level INFO.

    Raises
    ------
    ValueError
        If the outputs change.
    """
    if any(type(tensor.detach()) is not Tensor for tensor in model.state_dict().values() if isinstance(tensor, Tensor)):
        _log.info("the spec was not verified, because tensors of the model are spread over processes")
        return
    network = _Permutable(model, spec, batch, forward)
    if network.keeps_outputs(spec.bundles):
        return
    changing = [bundle for bundle in spec.bundles if not network.keeps_outputs([bundle])]
    nodes = [node for bundle in changing or spec.bundles for node in bundle]
    named = ", ".join(map(repr, nodes[:_MAX_LISTED])) + (", ..." if len(nodes) > _MAX_LISTED else "")
    raise ValueError(
        f"spec does not describe this model: a random order of the units of {named} ({len(nodes)} of "
        f"{len(spec.nodes)} nodes) changes the outputs on the first batch. Check for each of them that all its tensors "
        "are named (biases, norms and their running statistics), on the right axes, and that layers whose outputs are "
        "added share one node. Pass spec=None to derive the spec, or verify=False if the outputs may follow the units"
    )


def keeps_outputs(model: nn.Module, spec: PermutationSpec, batch: Any, forward: Forward | None = None) -> bool:
    """Return whether a network's outputs on a batch stay the same if its units are put in a random order.

    True if this cannot be checked because the model does not run on the batch.
    """
    return _Permutable(model, spec, batch, forward).keeps_outputs(spec.bundles)


class _Permutable:
    """A network whose outputs are compared before and after the units of some nodes are put in a random order."""

    def __init__(self, model: nn.Module, spec: PermutationSpec, batch: Any, forward: Forward | None) -> None:
        self._model, self._spec, self._batch, self._forward = model, spec, batch, forward
        self._state_dict = model.state_dict()
        self._tensors = {name: value for name, value in self._state_dict.items() if isinstance(value, Tensor)}
        self._units = spec.units(self._tensors)
        self._before: _Outputs | None = None
        self._copy: nn.Module | None = None

    def keeps_outputs(self, bundles: Iterable[Sequence[str]]) -> bool:
        permuted = permute_state_dict(self._tensors, self._spec, self._random_orders(set(bundles)))
        try:
            if self._before is None or self._copy is None:
                self._before = self._outputs(self._model)
                self._copy = copy_module(self._model)
            self._copy.load_state_dict(with_metadata({**self._state_dict, **permuted}, self._state_dict))
            if self._before.same_as(self._outputs(self._copy)):
                return True
            again = self._outputs(self._model)
        except Exception as error:
            _log.info("the spec was not verified, because the model does not run on the first batch: %s", error)
            return True
        if not self._before.same_as(again):
            _log.info("the spec was not verified, because the outputs of the model differ from run to run")
            return True
        return False

    def _random_orders(self, bundles: set[Sequence[str]]) -> dict[str, Tensor]:
        """Return an order for every node, random in some bundles. Groups move as wholes, tied ones together."""
        generator = torch.Generator().manual_seed(0)
        orders = {}
        for bundle in self._spec.bundles:
            count = self._spec.groups(bundle[0]).count
            groups = torch.randperm(count, generator=generator, device="cpu").tolist()
            for node in bundle:
                size = self._units[node] // count
                if bundle not in bundles:
                    orders[node] = torch.arange(self._units[node])
                    continue
                parts = [group * size + torch.randperm(size, generator=generator, device="cpu") for group in groups]
                orders[node] = torch.cat(parts)
        return orders

    def _outputs(self, model: nn.Module) -> _Outputs:
        device = next((tensor.device for tensor in self._tensors.values()), torch.device("cpu"))
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            with preserve_training_mode(model), torch.no_grad():
                model.eval()
                returned = run_on_batch(model, self._batch, 0, device, self._forward)
        finally:
            handle.remove()
        leaves = tree_leaves([ordered_outputs(output) for output in seen] if seen else returned)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return _Outputs(tensors, ordered=bool(seen))


@dataclass(frozen=True)
class _Outputs:
    """The outputs of a model, or the features that a part of it returns, whose order may follow the units."""

    tensors: list[Tensor]
    ordered: bool

    def same_as(self, others: _Outputs) -> bool:
        """Compare with other outputs, up to rounding. For features, the order along one axis is ignored."""
        if len(self.tensors) != len(others.tensors):
            return False
        return all(
            _close(one, two)
            or (
                not self.ordered
                and any(_close(one.sort(axis).values, two.sort(axis).values) for axis in range(1, one.ndim))
            )
            for one, two in zip(self.tensors, others.tensors, strict=True)
        )


def _close(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    share = max(_ROUNDING, _ROUNDING_STEPS * torch.finfo(one.dtype).eps)
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(two)):
        return False
    scale = float(one[finite].abs().amax()) if finite.any() else 0.0
    difference = one[finite].double() - two[finite].double()
    return bool((difference.abs() <= share * scale + 1e-12).all())
