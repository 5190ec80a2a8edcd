"""Similarity of units in weight space.

A unit's vector is the concatenation, over every axis of its node, of that tensor's slice at the unit, after the
tensor's other axes have been re-indexed by the current matching of their nodes (Xu et al., "Training-Free Pretrained
Model Merging", CVPR 2024, section 3). The similarity of two units is the Pearson correlation of their vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mudsc_fast.matching.apply import reindex
from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.ops.correlation import Blocks, CorrelationAccumulator
from mudsc_fast.ops.permute import UnitMap
from mudsc_fast.spec.axes import Axis, PermutationSpec, Role, Segment, TensorAxis


class WeightSimilarity:
    """Computes the weight similarity of a node under the current matching of its neighbours.

    Parameters
    ----------
    state_dicts
        The models' tensors by name, all on one device.
    spec
        The axes map.
    blocks
        Which similarity blocks to compute, as for :class:`mudsc_fast.ops.CorrelationAccumulator`.
    model_weights
        The weights with which the models will be averaged.
    """

    def __init__(
        self,
        state_dicts: Sequence[Mapping[str, Tensor]],
        spec: PermutationSpec,
        blocks: Blocks,
        model_weights: Sequence[float],
    ) -> None:
        self._state_dicts = state_dicts
        self._spec = spec
        self._blocks = blocks
        self._model_weights = model_weights
        self._units = spec.units(state_dicts[0])

    def __call__(
        self,
        node: str,
        matching: Mapping[str, NodeMatching],
        activation: Tensor | None = None,
        balance: float = 1.0,
    ) -> Tensor:
        """Return the similarity blocks of a node; nodes without a matching are taken in their own order.

        With activation similarities, they are the dual-space ones: ``balance * weight + (1 - balance) * activation``.
        """
        uses = [use for use in self._spec.uses(node) if use.axis.compared]
        device = self._state_dicts[0][uses[0].tensor].device
        accumulator = CorrelationAccumulator(
            len(self._state_dicts), self._units[node], blocks=self._blocks, device=device
        )
        for use in uses:
            features = [self._reindexed(model, use, matching) for model in range(len(self._state_dicts))]
            split = (use.axis.outer, self._units[node], use.axis.inner)
            accumulator.update(
                *(feature.unflatten(use.position, split) for feature in features), channel_axis=use.position + 1
            )
        return accumulator.finalize(other=activation, balance=balance)

    def _reindexed(self, model: int, use: TensorAxis, matching: Mapping[str, NodeMatching]) -> Tensor:
        """Return what one model's tensor holds of a node, all other axes in the order of the merged network.

        What the tensor consumes is averaged over a cluster's members and what it produces is summed: the published
        vectors use the two matrices of a cluster in the opposite way to the merge itself.
        """

        def map_of(axis: Axis) -> UnitMap | None:
            if axis.node not in matching:
                return None
            opposite: Role = "produce" if axis.role == "consume" else "consume"
            return matching[axis.node].unit_map(opposite, self._model_weights, model)

        tensor = self._state_dicts[model][use.tensor].detach()
        if use.segment.width is not None:
            tensor = tensor.narrow(use.position, use.segment.start, use.segment.width)
        layout = list(self._spec.layouts[use.tensor])
        layout[use.position] = (Segment(None),)
        return reindex([tensor], layout, map_of, [1.0])
