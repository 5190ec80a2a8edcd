"""Statistics of normalization layers after a merge."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast._forward import Forward, check_batches, preserve_training_mode, run_on_batch
from mudsc_fast._progress import progress_bar

_TRACKING_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def reset_batch_norm(
    model: nn.Module, data: Iterable[Any], *, forward: Forward | None = None, progress: bool | None = None
) -> int:
    """Recompute the running mean and variance of every BatchNorm and InstanceNorm layer that tracks them, in place.

    The statistics of a merged network's units are not the mean of those of the networks that it was made of. They are
    computed as the averages over all batches, while earlier normalization layers use the statistics of the batch.

    Differences from :func:`torch.optim.swa_utils.update_bn`: all other layers, such as dropout, stay in evaluation
    mode; data has the form that :func:`mudsc_fast.merge` takes; a batch with one value per unit (a last batch of one
    sample) is skipped instead of raising an error; InstanceNorm is supported; and an error leaves the model unchanged.

    Parameters
    ----------
    model
        The merged network. Only running statistics and their counters change.
    data
        Batches, as for :func:`mudsc_fast.collect_statistics`. A few thousand samples are enough. All batches have the
        same weight, but a layer skips batches in which it sees only one value per unit.
    forward
        Runs the model on a batch, if the batch cannot be passed to the model directly.
    progress
        Whether to show a progress bar; by default in a terminal, if the work is long.

    Returns
    -------
    int
        The number of layers with running statistics. If it is 0, the model is unchanged and the data is not read.

    Raises
    ------
    ValueError
        If the data is empty, or a layer only saw batches with one value per unit. After any error the statistics are
        unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: pass result.model for the result of a merge"
        )
    check_batches(data)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _TRACKING_LAYERS) and module.track_running_stats
    }
    if not layers:
        return 0
    device = next(iter(model.state_dict().values())).device
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(preserve_training_mode(model))
        model.eval()
        averages = {name: stack.enter_context(_Average(layer)) for name, layer in layers.items()}
        num_batches = 0
        for batch in progress_bar(data, description="batch norm", progress=progress):
            run_on_batch(model, batch, num_batches, device, forward)
            num_batches += 1
        if num_batches == 0:
            raise ValueError("data must yield at least one batch, got none")
        for name, average in averages.items():
            if average.num_skipped and not average.num_batches:
                raise ValueError(
                    f"data must yield batches with several values for each unit, but layer {name!r} saw one in each: "
                    "pass larger batches"
                )
    return len(layers)


class _Average:
    """Lets a layer average its statistics over the batches; restores everything after an error."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer
        self.num_batches = self.num_skipped = 0

    def __enter__(self) -> _Average:
        self._before = {name: buffer.clone() for name, buffer in self._layer.named_buffers()}
        self._momentum = self._layer.momentum
        self._layer.reset_running_stats()
        self._handle = self._layer.register_forward_pre_hook(self._prepare)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._handle.remove()
        self._layer.momentum = self._momentum
        if error is not None:
            for name, buffer in self._layer.named_buffers():
                buffer.copy_(self._before[name])

    def _prepare(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        """Let the layer update its statistics in a call, unless there is only one value per unit."""
        if _values_per_unit(layer, inputs[0]) < 2:
            self.num_skipped += 1
            layer.training = False  # it normalizes by its current statistics
            return
        self.num_batches += 1
        layer.training = True
        layer.momentum = 1 / self.num_batches  # makes the running value the plain average over all batches


def _values_per_unit(layer: Any, inputs: Tensor) -> int:
    """Return the number of values over which the layer takes each mean."""
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return inputs.shape[1 - layer._get_no_batch_dim() :].numel()  # the positions of one channel of one sample
    return inputs.numel() // max(1, int(layer.num_features))
