"""Shares of the networks in the targets of single samples, by how confident each network is about a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mudsc_fast._checks import check_finite, check_tensor
from mudsc_fast._forward import Forward, run_on_batch
from mudsc_fast.refitting.graph import is_layer_call
from mudsc_fast.refitting.tape import record

#: Returns the confidence of a network, given its number and its outputs for a batch: [samples].
Confidence = Callable[[int, Any], Tensor]


def confident_shares(
    confidence: Confidence,
    models: Sequence[nn.Module],
    weights: Sequence[float],
    batch: Any,
    forward: Forward | None,
) -> Tensor:
    """Return [models, samples] float64 on the CPU: each model's weight times exp(confidence), divided by their sum.

    Raises
    ------
    TypeError, ValueError
        If `confidence` does not return a finite number for each sample.
    """
    samples, scores = num_samples(batch), []
    for index, model in enumerate(models):
        device = next(iter(model.state_dict().values())).device
        score = check_tensor(
            f"confidence of model {index}", confidence(index, run_on_batch(model, batch, device, forward))
        )
        if tuple(score.shape) != (samples,):
            raise ValueError(
                f"confidence must return one number for each of the {samples} samples of a batch, got a tensor of "
                f"shape {list(score.shape)} for model {index}"
            )
        check_finite(f"confidence of model {index}", score)
        scores.append(score.detach().double().cpu())
    logs = torch.tensor(weights, dtype=torch.float64).log()[:, None] + torch.stack(scores)
    return logs.softmax(0)


def num_samples(batch: Any) -> int:
    """Return the number of entries of the first axis of a batch's first tensor; 1 if it has no axis."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return len(tensors[0]) if tensors and tensors[0].ndim else 1


def check_samples_come_first(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Check that the first axis of what each layer computes runs over the samples of a batch.

    Raises
    ------
    ValueError
        If it does not, e.g. because the first axis of the model's sequences is time.
    """
    samples = num_samples(batch)
    if samples < 2:
        return
    pair, swapped = (_chosen(batch, samples, order) for order in ([0, 1], [1, 0]))
    tape, values = record(model, pair, forward, is_layer_call)
    swapped_tape, swapped_values = record(model, swapped, forward, is_layer_call)
    if tape.signature() != swapped_tape.signature():
        raise ValueError("confidence needs a model that runs the same operators for all samples: leave confidence out")
    for call in tape.calls:
        value = call.outputs[0]
        if value is None or not is_layer_call(call):
            continue
        first, second = values[value], swapped_values[value]
        by_sample = [output.reshape(2, -1) for output in (first, second.to(first))] if len(first) % 2 == 0 else None
        # Rounding may differ: the samples are in other blocks of a product.
        tolerance = float(first.abs().amax()) * torch.finfo(first.dtype).eps ** 0.5
        if by_sample is None or not torch.allclose(by_sample[0], by_sample[1].flip(0), rtol=0, atol=tolerance):
            raise ValueError(
                "confidence needs layers whose first axis runs over the samples of a batch, but an operator "
                f"{call.name!r}, which returns shape {list(first.shape)} for two samples, mixes them: use the variant "
                "of the model that has samples first (batch_first=True), or leave confidence out"
            )


def _chosen(batch: Any, samples: int, order: list[int]) -> Any:
    """Return some samples of a batch, of every tensor whose first axis has as many entries as the batch."""

    def choose(leaf: Any) -> Any:
        return leaf[order] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples else leaf

    return pytree.tree_map(choose, batch)
