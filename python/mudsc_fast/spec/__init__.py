"""Specifications: which axes of a network's tensors belong together. One file per architecture family."""

from mudsc_fast.spec.axes import (
    Axis,
    Groups,
    Observation,
    PermutationSpec,
    Segment,
    TensorAxis,
    Window,
    consumes,
    produces,
)
from mudsc_fast.spec.mlp import mlp

__all__ = [
    "Axis",
    "Groups",
    "Observation",
    "PermutationSpec",
    "Segment",
    "TensorAxis",
    "Window",
    "consumes",
    "mlp",
    "produces",
]
