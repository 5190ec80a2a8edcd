"""Targets of a merged network's layers, computed by forward passes of the networks that were merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mudsc_fast.refitting.graph import Layer, undo
from mudsc_fast.refitting.network import Progress
from mudsc_fast.refitting.rows import Places, Sampler
from mudsc_fast.refitting.targets import UnitTargets


class ParentTargets:
    """Computes targets of many layers in one pass of each parent.

    The parents do not change while the merged network is fitted. Each batch advances through them as long as the
    targets of the next layers fit into half of the memory, and continues when these targets are used up.

    Parameters
    ----------
    progress
        The networks: the merged one, then its parents.
    layers
        For each batch, the layers to fit.
    targets
        For each layer, which merged output each output of the parents belongs to.
    shares
        For each batch, the parents' shares in the targets.
    samplers, places
        For each layer, the samplers of all batches, and the places to sample.
    """

    def __init__(
        self,
        progress: Progress,
        layers: Sequence[Sequence[Layer]],
        targets: Sequence[UnitTargets],
        shares: Sequence[Sequence[float]],
        samplers: Callable[[int], Sequence[Sampler]],
        places: Places,
    ) -> None:
        self._progress, self._layers, self._targets, self._shares = progress, layers, targets, shares
        self._samplers, self._places = samplers, places
        self._known: dict[tuple[int, int], Tensor] = {}
        self._weights: dict[tuple[int, tuple[float, ...]], list[Tensor | None]] = {}

    def take(self, layer: int, batch: int) -> Tensor:
        """Return [samples, outputs], the target of a layer in a batch. Each target can be taken once."""
        if (layer, batch) not in self._known:
            self._compute(layer)
        target = self._known.pop((layer, batch))
        self._progress.reserved -= target.nbytes
        return target

    def _compute(self, begin: int) -> None:
        end = begin
        free = self._progress.memory // 2
        while end < len(self._targets):
            samplers = self._samplers(end)
            empty = [self._empty(end, batch, sampler) for batch, sampler in enumerate(samplers)]
            free -= sum(target.nbytes for target in empty)
            if free < 0 and end > begin:
                break
            for batch, target in enumerate(empty):
                self._known[end, batch] = target.zero_()
                self._progress.reserved += target.nbytes
            end += 1
        for batch, layers in enumerate(self._layers):
            for parent in range(len(self._targets[begin].members)):
                observers: dict[int, list[Callable[[Tensor], None]]] = {}
                last = 0
                for index in range(begin, end):
                    if self._weights_of(index, batch)[parent] is not None:
                        add = partial(self._add, index, parent, batch)
                        observers.setdefault(layers[index].target, []).append(add)
                        last = max(last, layers[index].end)
                if observers:
                    observe = {value: partial(_call_all, functions) for value, functions in observers.items()}
                    self._run(parent + 1, batch, last, observe)
                if end == len(self._targets):
                    self._progress.networks[parent + 1].forget_recorded(batch)

    def _run(self, network: int, batch: int, end: int, observe: Mapping[int, Callable[[Tensor], None]]) -> None:
        """Call each function with its value, from the recording if possible, else computed by the calls up to `end`."""
        recorded = self._progress.networks[network].recorded(batch)
        if observe.keys() <= recorded.keys():
            for value, function in observe.items():
                function(recorded[value])
        else:
            self._progress.advance(network, batch, end, observe)

    def _empty(self, layer: int, batch: int, sampler: Sampler) -> Tensor:
        places = self._places.of(layer, batch)
        samples = sampler.num_samples
        if places is not None:
            samples = samples // sampler.num_places * len(places)
        weight = sampler.matrix()
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        return torch.empty(samples, self._targets[layer].num_outputs, dtype=dtype, device=weight.device)

    def _add(self, index: int, parent: int, batch: int, value: Tensor) -> None:
        """Add the contribution of one parent to a target."""
        layer = self._layers[batch][index]
        shapes = self._progress.networks[parent + 1].tapes[batch].shapes
        outputs = self._samplers(index)[batch].output(undo(layer.steps, shapes, value), self._places.of(index, batch))
        weights, members = self._weights_of(index, batch)[parent], self._targets[index].members[parent]
        target = self._known[index, batch]
        assert weights is not None  # only parents with weights are observed
        assert members is not None
        target.index_add_(1, members.to(target.device), outputs.to(target) * weights.to(target))

    def _weights_of(self, index: int, batch: int) -> list[Tensor | None]:
        key = (index, tuple(self._shares[batch]))
        if key not in self._weights:
            self._weights[key] = self._targets[index].weights(self._shares[batch])
        return self._weights[key]


def _call_all(functions: Sequence[Callable[[Tensor], None]], value: Tensor) -> None:
    for function in functions:
        function(value)
