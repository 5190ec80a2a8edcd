"""Evaluation of merged networks: accuracies over the classes of several tasks, losses, ensembles, barriers.

Networks whose outputs are compared with one vector per class (by cosine, as CLIP does) can be merged whole, output
layer included; ``class_vectors`` are these vectors. Without them the outputs of a network are its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mudsc_fast._checks import check_tensor
from mudsc_fast._copy import copy_module
from mudsc_fast._forward import check_batches, explain_failure, inputs_of, preserve_training_mode, to_device
from mudsc_fast._progress import progress_bar

#: Returns the outputs of a model for one batch, [B, K]. Labels are read from the batch separately.
Outputs = Callable[[nn.Module, Any], Tensor]


def joint_accuracy(
    model: nn.Module,
    data: Iterable[Any],
    class_vectors: Tensor | Sequence[Tensor] | None = None,
    *,
    forward: Outputs | None = None,
    progress: bool | None = None,
) -> float:
    """Return the accuracy among the classes of all tasks.

    Parameters
    ----------
    model
        Maps a batch to outputs [B, D], or to logits [B, K] if there are no `class_vectors`. It runs in evaluation mode
        on its own device and is left as it was.
    data
        Batches ``(inputs, labels)``, or mappings with ``"labels"``. Labels [B] are integers in [0, K).
    class_vectors
        One vector per class: a tensor [K, D], or one tensor per task, whose classes are counted one task after the
        other. The class of the largest cosine to the output is chosen.
    forward
        Returns the outputs of a model for a batch, if the model needs another call than ``model(inputs)``.
    progress
        Whether to show a progress bar; by default only in a terminal.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        If the data yields no samples, or shapes or labels do not fit.
    TypeError
        If batches have no labels, or the model's outputs are not a tensor.
    """
    return task_accuracies(model, data, class_vectors, forward=forward, progress=progress)[0]


def task_accuracies(
    model: nn.Module,
    data: Iterable[Any],
    class_vectors: Tensor | Sequence[Tensor] | None = None,
    tasks: Sequence[Sequence[int]] | None = None,
    *,
    forward: Outputs | None = None,
    progress: bool | None = None,
) -> list[float]:
    """Return for each task the accuracy on samples of its own classes, among its own classes.

    `tasks` lists the classes of each task, e.g. ``[[0, 1, 2], [3, 4]]``. By default there is one task with all classes.
    The other parameters, the range of the results and the errors are those of :func:`joint_accuracy`. A task without
    samples is an error.
    """
    vectors = _class_vectors(class_vectors)
    right = torch.zeros(1 if tasks is None else len(tasks), dtype=torch.long)
    counts = torch.zeros_like(right)
    for scores, labels in _scored_batches(model, data, vectors, forward, progress):
        for index, classes in enumerate([range(scores.shape[1])] if tasks is None else tasks):
            own = _own_classes(classes, scores.shape[1], index)
            samples = torch.isin(labels, own)
            right[index] += (own[scores[samples][:, own].argmax(1)] == labels[samples]).sum()
            counts[index] += samples.sum()
    if (counts == 0).any():
        index = int((counts == 0).nonzero()[0])
        raise ValueError(f"data must hold samples of every task, got none with the classes of tasks[{index}]")
    return (right / counts).tolist()


def cross_entropy(
    model: nn.Module,
    data: Iterable[Any],
    class_vectors: Tensor | Sequence[Tensor] | None = None,
    *,
    scale: float = 100.0,
    forward: Outputs | None = None,
    progress: bool | None = None,
) -> float:
    """Return the mean cross entropy in nats.

    With `class_vectors` the logits are `scale` times the cosines; without, they are the model's outputs, unscaled.
    Other parameters and errors are those of :func:`joint_accuracy`.
    """
    vectors = _class_vectors(class_vectors)
    factor = 1.0 if vectors is None else scale
    total, count = 0.0, 0
    for scores, labels in _scored_batches(model, data, vectors, forward, progress):
        total += float(functional.cross_entropy(factor * scores.double(), labels, reduction="sum"))
        count += len(labels)
    return total / count


class Ensemble(nn.Module):
    """The mean of the outputs of several networks, the reference for a merged network.

    Parameters
    ----------
    models
        Networks with outputs of equal shape. They are shared, not copied.
    normalize
        Whether each output vector is scaled to length 1 before averaging, for outputs that are compared by cosine.
    """

    def __init__(self, models: Sequence[nn.Module], *, normalize: bool = False) -> None:
        super().__init__()
        if not models:
            raise ValueError("models must hold at least one model, got none")
        self.models = nn.ModuleList(models)
        self.normalize = normalize

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run every network on the same inputs."""
        outputs = [_tensor_of(model(*args, **kwargs)) for model in self.models]
        if self.normalize:
            outputs = [functional.normalize(output, dim=-1) for output in outputs]
        return torch.stack(outputs).mean(0)


@dataclass(frozen=True)
class Interpolation:
    """A quantity along the straight line between two networks.

    Attributes
    ----------
    shares
        Share of the second network at each point, from 0 to 1.
    values
        The quantity at each point.
    """

    shares: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The largest amount by which a value exceeds the straight line between the ends. For losses, the barrier.

        Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020.
        """
        first, last = self.values[0], self.values[-1]
        return max(
            value - ((1 - share) * first + share * last) for share, value in zip(self.shares, self.values, strict=True)
        )


def interpolate(
    first: nn.Module,
    second: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    steps: int = 11,
    progress: bool | None = None,
) -> Interpolation:
    """Evaluate networks on the straight line between two networks with equal tensors.

    Parameters
    ----------
    first, second
        Networks of one architecture. To measure a matching, let the second be in the order of the first
        (:meth:`mudsc_fast.Matching.permute`). Neither is modified.
    evaluate
        Returns the value of a network, usually its loss. Networks with BatchNorm need their running statistics
        recomputed here (:func:`mudsc_fast.reset_batch_norm`).
    steps
        Number of points, both ends included; at least 2.
    progress
        Whether to show a progress bar; by default only in a terminal.

    Raises
    ------
    ValueError
        If `steps` is below 2, or the networks differ in tensors or shapes.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    ends = [model.state_dict() for model in (first, second)]
    for name in ends[0].keys() | ends[1].keys():
        shapes = [tuple(end[name].shape) if name in end else None for end in ends]
        if shapes[0] != shapes[1]:
            raise ValueError(f"both models must have the same tensors: {name!r} has shapes {shapes[0]} and {shapes[1]}")
    point = copy_module(first)
    shares = tuple(step / (steps - 1) for step in range(steps))
    values = []
    for share in progress_bar(shares, description="interpolation", progress=progress):
        mixed = {
            name: torch.lerp(tensor, ends[1][name].to(tensor), share)
            if tensor.is_floating_point()
            else (tensor if share <= 0.5 else ends[1][name])
            for name, tensor in ends[0].items()
        }
        point.load_state_dict(mixed)
        values.append(float(evaluate(point)))
    return Interpolation(shares, tuple(values))


def _scored_batches(
    model: nn.Module,
    data: Iterable[Any],
    vectors: Tensor | None,
    forward: Outputs | None,
    progress: bool | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scores [B, K] and labels [B] of every batch, on the CPU."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: pass result.model for the result of a merge"
        )
    check_batches(data)
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    directions = None if vectors is None else functional.normalize(vectors.to(device), dim=1)
    empty = True
    with preserve_training_mode(model), torch.no_grad():
        model.eval()
        for index, batch in enumerate(progress_bar(data, description="evaluation", progress=progress)):
            labels = _labels_of(batch)
            moved = to_device(batch, device)
            content = moved if forward is not None else inputs_of(moved)
            with explain_failure(model, content, index, forward):
                result = _call(model, content) if forward is None else forward(model, content)
            outputs = _tensor_of(result)
            scores = outputs if directions is None else _cosines(outputs, directions)
            if scores.ndim != 2 or len(scores) != len(labels):
                raise ValueError(
                    f"the model must return one row per label, got outputs of shape {tuple(outputs.shape)} "
                    f"for {len(labels)} labels"
                )
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
                raise ValueError(
                    f"labels must be in [0, {scores.shape[1]}), got {int(labels.min())} to {int(labels.max())}"
                )
            empty = empty and not len(labels)
            yield scores.float().cpu(), labels.cpu()
    if empty:
        raise ValueError("data must yield at least one sample, got none")


def _call(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> object:
    if isinstance(inputs, Mapping):
        return model(**{name: value for name, value in inputs.items() if name != "labels"})
    return model(inputs)


def _cosines(outputs: Tensor, directions: Tensor) -> Tensor:
    if outputs.ndim != 2 or outputs.shape[1] != directions.shape[1]:
        raise ValueError(
            f"the model must return vectors of the length of class_vectors, {directions.shape[1]}, "
            f"got shape {tuple(outputs.shape)}"
        )
    return functional.normalize(outputs.to(directions), dim=1) @ directions.T


def _tensor_of(outputs: object) -> Tensor:
    """Return the outputs, or what Hugging Face's models call logits."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return a tensor, or an object with `logits`, got {type(outputs).__name__}: "
            "pass forward= to return the tensor"
        )
    return logits


def _labels_of(batch: Any) -> Tensor:
    labels = None
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    if labels is None:
        raise TypeError(
            "data must yield (inputs, labels) or mappings with 'labels', "
            f"got {type(batch).__name__}" + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers of shape [B], got {labels.dtype} of shape {tuple(labels.shape)}")
    return labels


def _class_vectors(class_vectors: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    if class_vectors is None:
        return None
    parts = [class_vectors] if isinstance(class_vectors, Tensor) else list(class_vectors)
    if not parts:
        raise ValueError("class_vectors must hold at least one tensor, got none")
    for index, part in enumerate(parts):
        if check_tensor(f"class_vectors[{index}]", part).ndim != 2 or part.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"class_vectors must have shape [classes, {parts[0].shape[-1]}] for every task, "
                f"got {tuple(part.shape)} at {index}"
            )
    return torch.cat([part.float() for part in parts])


def _own_classes(classes: Iterable[int], num_classes: int, index: int) -> Tensor:
    own = torch.tensor([int(label) for label in classes], dtype=torch.long)
    if not len(own) or int(own.min()) < 0 or int(own.max()) >= num_classes:
        raise ValueError(f"tasks[{index}] must name classes in [0, {num_classes}), got {own.tolist()}")
    return own
