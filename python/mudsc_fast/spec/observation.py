"""Where the activations of a node are observed while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mudsc_fast.spec.axes import TensorAxis

Port = Literal["input", "output", "projection", "state"]


@dataclass(frozen=True)
class Observation:
    """Where the activations of a node are observed.

    Parameters
    ----------
    module
        Name of a submodule, as in ``model.get_submodule``.
    port
        ``"input"`` (the first tensor the module is called with), ``"output"`` (the first tensor it returns), or what
        a module of PyTorch computes without a submodule: ``"projection"`` is the concatenation of the queries, keys
        and values of ``torch.nn.MultiheadAttention``, where `start` selects the input that is projected;
        ``"state"`` is the concatenation of the final hidden states of all layers and directions of
        ``torch.nn.RNN``, ``LSTM`` or ``GRU``.
    position
        The axis of that tensor that holds the units. None chooses it by the type of the module: the last axis for
        linear layers and LayerNorm, axis 1 for convolutions, BatchNorm and GroupNorm.
    start, width
        The run of entries on that axis that holds the units. By default the whole axis.
    inner, outer
        As for :class:`Axis`. The entries that belong to one unit count as additional samples.
    """

    module: str
    port: Port = "input"
    position: int | None = None
    start: int = 0
    width: int | None = None
    inner: int = 1
    outer: int = 1

    def __post_init__(self) -> None:
        if self.port not in get_args(Port):
            raise ValueError(
                f"port of the observation of {self.module!r} must be one of {', '.join(map(repr, get_args(Port)))}, "
                f"got {self.port!r}"
            )


def parse_observations(where: Observation | str | Sequence[Observation]) -> tuple[Observation, ...]:
    """Return the observations that an entry of `observe` stands for. A name stands for the input of that module."""
    if isinstance(where, str):
        return (Observation(where),)
    return (where,) if isinstance(where, Observation) else tuple(where)


def default_observations(uses: Sequence[TensorAxis]) -> tuple[Observation, ...]:
    """Return the input of the last layer that consumes a node; nothing if no layer does."""
    for use in reversed(uses):
        if use.axis.role == "consume" and "." in use.tensor:
            segment, axis = use.segment, use.axis
            module = use.tensor.rpartition(".")[0]
            return (Observation(module, "input", None, segment.start, segment.width, axis.inner, axis.outer),)
    return ()
