"""Similarity of the units of several networks by their activations, as the MuDSC program measures it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import preserve_training_mode, run_on_batch
from mudsc_fast.compat._mudsc_perm import Look, Network
from mudsc_fast.compat.zipit import CovarianceMetric, compute_correlation


def activation_similarities(
    nets: Sequence[nn.Module], network: Network, batches: Iterable[Any]
) -> dict[Hashable, Tensor]:
    """Return [models * units, models * units] correlations of each node's activations over all batches."""
    unseen = [node for node, described in network.nodes.items() if not described.looks]
    if unseen:
        raise ValueError(f"perm[{unseen[0]!r}] must say where its activations are seen: by an axis with 'in'")
    device = next(iter(nets[0].state_dict().values())).device
    metrics = {node: CovarianceMetric() for node in network.nodes}
    seen: list[dict[tuple[Hashable, int], Tensor]] = [{} for _ in nets]
    samples = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for net, features in zip(nets, seen, strict=True):
            stack.enter_context(preserve_training_mode(net))
            net.eval()
            for node, described in network.nodes.items():
                for index, look in enumerate(described.looks):
                    stack.callback(_observe(net, look, features, (node, index)))
        for index, batch in enumerate(batches):
            for net in nets:
                run_on_batch(net, batch, index, device, None)
            for node, metric in metrics.items():
                looks = range(len(network.nodes[node].looks))
                stacked = [torch.stack([features[node, i].float() for i in looks], -1) for features in seen]
                count = len(stacked[0])
                metric.update(count, *(values.transpose(0, 1).flatten(1) for values in stacked))
            samples += count
    if samples == 0:
        raise ValueError("act_loader must yield at least one batch, got none")
    return {node: compute_correlation(metric.finalize(samples)) for node, metric in metrics.items()}


def _observe(
    net: nn.Module, look: Look, features: dict[tuple[Hashable, int], Tensor], key: tuple[Hashable, int]
) -> Callable[[], None]:
    """Store a module's input or output in `features`, units on axis 1; return a function that removes the hook."""
    try:
        module = net.get_submodule(look.module)
    except AttributeError:
        raise ValueError(f"perm[{key[0]!r}] is observed at {look.module!r}, which the networks do not have") from None

    def keep(values: Tensor) -> None:
        features[key] = values.movedim(look.axis, 1) if look.reshape is None else look.reshape(values)

    if look.hook == "pre":
        return module.register_forward_pre_hook(lambda _module, inputs: keep(inputs[0])).remove
    return module.register_forward_hook(lambda _module, _inputs, output: keep(output)).remove
