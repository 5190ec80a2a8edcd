"""Which axes of which tensors must be re-indexed together.

A *node* is a set of tensor axes that a network ties to one another: a hidden layer's output axis, its bias, and the
input axis of the next layer. A specification is one mapping, from each tensor to the nodes of its axes; everything
else is derived from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Role = Literal["produce", "consume"]
Port = Literal["input", "output"]


@dataclass(frozen=True)
class Axis:
    """One permuted axis of a tensor: the node it belongs to, and whether its units are produced or consumed there.

    The role matters where units are clustered: a cluster averages its members where they are produced and sums
    them where they are consumed.
    """

    node: str
    role: Role


@dataclass(frozen=True)
class TensorAxis:
    """A node's use of one axis of one tensor."""

    tensor: str
    axis: int
    role: Role


@dataclass(frozen=True)
class Observation:
    """Where the activations of a node's units are seen.

    Parameters
    ----------
    module
        Name of a submodule, as in ``model.get_submodule``.
    port
        ``"input"`` (the first tensor that the module is called with) or ``"output"``.
    axis
        The axis of that tensor that holds the units; None takes it from the module's type (the last one for linear
        layers and LayerNorm, axis 1 for convolutions, BatchNorm and GroupNorm).
    """

    module: str
    port: Port = "input"
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.port not in ("input", "output"):
            raise ValueError(
                f"port of the observation of {self.module!r} must be 'input' or 'output', got {self.port!r}"
            )


def produces(node: str) -> Axis:
    """Mark an axis that produces the units of `node`, e.g. the columns of an embedding table."""
    return Axis(node, "produce")


def consumes(node: str) -> Axis:
    """Mark an axis that consumes the units of `node`, e.g. the rows of a transposed weight."""
    return Axis(node, "consume")


class PermutationSpec:
    """The axes map of an architecture, with the inverse map derived.

    Parameters
    ----------
    axes
        For each tensor (by its name in the state dict) one entry per axis: a node's name, an :class:`Axis`, or None
        for an axis that keeps its order. Axes behind the last entry keep their order too, so a convolution's kernel
        needs two entries. A plain name produces the node on axis 0 and consumes it on every other axis, as in
        ``torch.nn.Linear`` and convolutions; :func:`produces` and :func:`consumes` say otherwise.
    observe
        Where a node's activations are seen, as an :class:`Observation` or a module's name (its input is then
        observed). Without an entry it is the input of the last layer in `axes` that consumes the node.

    Raises
    ------
    ValueError
        If no axis names a node, or `observe` names an unknown one.
    TypeError
        If an entry is of another type.

    Examples
    --------
    >>> spec = PermutationSpec({
    ...     "fc1.weight": ("hidden", None), "fc1.bias": ("hidden",),
    ...     "fc2.weight": (None, "hidden"), "fc2.bias": (None,),
    ... })
    >>> spec.nodes
    ('hidden',)
    """

    def __init__(
        self,
        axes: Mapping[str, Sequence[str | Axis | None]],
        observe: Mapping[str, Observation | str] | None = None,
    ) -> None:
        self._axes = {tensor: _parse_axes(tensor, entries) for tensor, entries in axes.items()}
        uses: dict[str, list[TensorAxis]] = {}
        for tensor, entries in self._axes.items():
            for position, entry in enumerate(entries):
                if entry is not None:
                    uses.setdefault(entry.node, []).append(TensorAxis(tensor, position, entry.role))
        if not uses:
            raise ValueError("axes must name at least one node, got none")
        self._uses = {node: tuple(where) for node, where in uses.items()}
        self._observations = {node: _default_observation(where) for node, where in self._uses.items()}
        for node, observation in (observe or {}).items():
            if node not in self._uses:
                raise ValueError(f"observe names the node {node!r}, which no axis has; nodes: {_listed(self.nodes)}")
            self._observations[node] = Observation(observation) if isinstance(observation, str) else observation

    @classmethod
    def from_nodes(
        cls,
        nodes: Mapping[str, Iterable[tuple[str, int] | tuple[str, int, Role]]],
        observe: Mapping[str, Observation | str] | None = None,
    ) -> PermutationSpec:
        """Build a specification from the inverse map: for each node its (tensor, axis[, role]) triples.

        Raises
        ------
        ValueError
            If one axis of a tensor is covered twice.
        """
        axes: dict[str, dict[int, str | Axis]] = {}
        for node, uses in nodes.items():
            for use in uses:
                tensor, position = use[0], use[1]
                if position < 0:
                    raise ValueError(f"axis of {tensor!r} at node {node!r} must not be negative, got {position}")
                entries = axes.setdefault(tensor, {})
                if position in entries:
                    earlier = entries[position]
                    other = earlier.node if isinstance(earlier, Axis) else earlier
                    raise ValueError(
                        f"axis {position} of {tensor!r} is covered twice: by node {other!r} and by node {node!r}"
                    )
                entries[position] = Axis(node, use[2]) if len(use) == 3 else node
        return cls(
            {tensor: [entries.get(i) for i in range(max(entries) + 1)] for tensor, entries in axes.items()},
            observe,
        )

    @property
    def axes(self) -> Mapping[str, tuple[Axis | None, ...]]:
        """For each tensor its axes' nodes and roles."""
        return self._axes

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes, in the order in which the axes map names them first."""
        return tuple(self._uses)

    def uses(self, node: str) -> tuple[TensorAxis, ...]:
        """Return every (tensor, axis, role) of a node: the inverse of :attr:`axes`."""
        return self._uses[node]

    def neighbours(self, node: str) -> tuple[str, ...]:
        """Return the nodes that share a tensor with `node`: those its weight similarity depends on.

        The node itself is among them where it has two axes of one tensor.
        """
        found: dict[str, None] = {}
        for use in self._uses[node]:
            for position, entry in enumerate(self._axes[use.tensor]):
                if entry is not None and position != use.axis:
                    found[entry.node] = None
        return tuple(found)

    def observation(self, node: str) -> Observation | None:
        """Return where the activations of a node are seen, or None if the specification does not say."""
        return self._observations[node]

    def units(self, state_dict: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of units of every node, having checked the specification against the tensors.

        Raises
        ------
        ValueError
            If a tensor is missing, has too few axes, or is of another length on an axis than the node's first use.
        """
        units: dict[str, int] = {}
        for node, uses in self._uses.items():
            for use in uses:
                if use.tensor not in state_dict:
                    raise ValueError(f"spec names the tensor {use.tensor!r}, which the models do not have")
                shape = tuple(state_dict[use.tensor].shape)
                if len(shape) < len(self._axes[use.tensor]):
                    raise ValueError(
                        f"spec gives {len(self._axes[use.tensor])} axes to {use.tensor!r}, "
                        f"which has {len(shape)}: shape {shape}"
                    )
                first = uses[0]
                expected = units.setdefault(node, shape[use.axis])
                if shape[use.axis] != expected:
                    raise ValueError(
                        f"axis {use.axis} of {use.tensor!r} has length {shape[use.axis]}, but node {node!r} has "
                        f"{expected} units by axis {first.axis} of {first.tensor!r}"
                    )
        return units

    def __eq__(self, other: object) -> bool:
        """Two specifications are equal if they map the same axes and observe the same places."""
        if not isinstance(other, PermutationSpec):
            return NotImplemented
        return self._axes == other._axes and self._observations == other._observations

    def __hash__(self) -> int:
        return hash((tuple(self._axes.items()), tuple(self._observations.items())))

    def __repr__(self) -> str:
        return f"PermutationSpec({len(self._axes)} tensors, nodes: {_listed(self.nodes)})"


def _parse_axes(tensor: str, entries: Sequence[str | Axis | None]) -> tuple[Axis | None, ...]:
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise TypeError(f"axes of {tensor!r} must be a sequence with an entry per axis, got {entries!r}")
    parsed: list[Axis | None] = []
    for position, entry in enumerate(entries):
        if entry is None or isinstance(entry, Axis):
            parsed.append(entry)
        elif isinstance(entry, str):
            parsed.append(Axis(entry, "produce" if position == 0 else "consume"))
        else:
            raise TypeError(
                f"axis {position} of {tensor!r} must be a node's name, an Axis or None, got {type(entry).__name__}"
            )
    return tuple(parsed)


def _default_observation(uses: Sequence[TensorAxis]) -> Observation | None:
    for use in reversed(uses):
        if use.role == "consume" and "." in use.tensor:
            return Observation(use.tensor.rpartition(".")[0])
    return None


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"
