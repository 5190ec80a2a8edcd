"""Statistics of normalisation layers after a merge."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mudsc_fast._forward import Forward, preserve_training_mode, run_on_batch
from mudsc_fast._progress import progress_bar


def reset_batch_norm(
    model: nn.Module, data: Iterable[Any], *, forward: Forward | None = None, progress: bool | None = None
) -> int:
    """Recompute the running mean and variance of every BatchNorm layer, in place.

    The units of a merged network have other statistics than the mean of those of the networks it was made of. Every
    layer's statistics become the averages over all batches, as seen with the layers before it normalising by the batch.

    Parameters
    ----------
    model
        The merged network. Only running statistics and their counters change.
    data
        Batches, as for :func:`mudsc_fast.collect_statistics`; some thousand samples are enough.
    forward
        Runs the model on a batch where that is not what the model needs.
    progress
        Whether to show a progress bar; by default in a terminal, if the work is long.

    Returns
    -------
    int
        The number of layers that keep running statistics; without any, the data is not read.

    Raises
    ------
    ValueError
        If the data yields nothing. After this and any other error the statistics are what they were.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not layers:
        return 0
    device = next(iter(model.state_dict().values())).device
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    momenta = [layer.momentum for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(preserve_training_mode(model))
        model.eval()
        num_batches = 0
        try:
            for layer in layers:
                layer.train()
                layer.reset_running_stats()
                layer.momentum = None  # the plain average over all batches
            for batch in progress_bar(data, description="batch norm", progress=progress):
                run_on_batch(model, batch, device, forward)
                num_batches += 1
            if num_batches == 0:
                raise ValueError("data must yield at least one batch, got none")
        except BaseException:
            for layer, buffers in zip(layers, before, strict=True):
                for name, buffer in layer.named_buffers():
                    buffer.copy_(buffers[name])
            raise
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    return len(layers)
