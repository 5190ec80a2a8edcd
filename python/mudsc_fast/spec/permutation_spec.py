"""Which axes of which tensors must be re-indexed together.

A *node* is a set of tensor axes that a network ties to one another: a hidden layer's output axis, its bias, and the
input axis of the next layer. A specification is one mapping, from each tensor to the nodes of its axes; everything
else is derived from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mudsc_fast._files import atomic_write

Role = Literal["produce", "consume"]
Port = Literal["input", "output", "projection"]


@dataclass(frozen=True)
class Axis:
    """How one axis of a tensor holds the units of a node.

    Parameters
    ----------
    node
        The node's name.
    role
        Whether the units are produced or consumed here. It matters where units are clustered: a cluster averages its
        members where they are produced and sums them where they are consumed.
    inner
        Consecutive entries that belong to one unit and keep their order: the positions of a flattened feature map, or
        the width of an attention head that moves as a whole.
    outer
        How often the sequence of all units repeats along the axis: the positions of a feature map that was flattened
        with its channels last.
    compared
        Whether the tensor counts in the units' weight similarity. The running statistics of a norm and a tensor that
        is tied to another do not: they follow the units only.
    """

    node: str
    role: Role
    inner: int = 1
    outer: int = 1
    compared: bool = True

    def __post_init__(self) -> None:
        if self.role not in ("produce", "consume"):
            raise ValueError(f"role of node {self.node!r} must be 'produce' or 'consume', got {self.role!r}")
        if self.inner < 1 or self.outer < 1:
            raise ValueError(
                f"inner and outer of node {self.node!r} must be at least 1, got {self.inner} and {self.outer}"
            )


@dataclass(frozen=True)
class Window:
    """A run of `width` entries of a fused tensor's axis, e.g. the queries in a weight that holds queries, keys, values.

    An axis is given as the sequence of its windows, which must cover it; `axis` None keeps the order of a window.
    """

    axis: Axis | str | None
    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width of a window must be at least 1, got {self.width}")


@dataclass(frozen=True)
class Segment:
    """A part of one axis as the specification understands it: from `start`, `width` entries (None: the whole axis)."""

    axis: Axis | None
    start: int = 0
    width: int | None = None


@dataclass(frozen=True)
class TensorAxis:
    """A node's use of one axis of one tensor."""

    tensor: str
    position: int
    segment: Segment
    axis: Axis


@dataclass(frozen=True)
class Groups:
    """Units that move only with their group: attention heads, the groups of a GroupNorm.

    Parameters
    ----------
    count
        Number of groups; the units of a group are consecutive.
    tie
        Nodes whose groups must keep one common order name the same tie: the query-key and the value units of one
        attention layer, whose heads belong together.
    """

    count: int
    tie: str | None = None


@dataclass(frozen=True)
class Observation:
    """Where the activations of a node's units are seen.

    Parameters
    ----------
    module
        Name of a submodule, as in ``model.get_submodule``.
    port
        ``"input"`` (the first tensor that the module is called with), ``"output"``, or ``"projection"`` (of
        ``torch.nn.MultiheadAttention``: its queries, keys and values one behind the other, projected from the input
        that it takes those at `start` from; it has no submodule that does so).
    position
        The axis of that tensor that holds the units; None takes it from the module's type (the last one for linear
        layers and LayerNorm, axis 1 for convolutions, BatchNorm and GroupNorm).
    start, width
        The part of that axis that holds the units, where it holds more; by default all of it.
    inner, outer
        As for :class:`Axis`: what belongs to one unit counts as further samples.
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
                f"port of the observation of {self.module!r} must be 'input', 'output' or 'projection', "
                f"got {self.port!r}"
            )


#: What may stand for one axis of a tensor in the axes map.
Entry = str | Axis | Sequence[Window] | None


def produces(node: str, *, inner: int = 1, outer: int = 1) -> Axis:
    """Mark an axis that produces the units of `node`, e.g. the columns of an embedding table."""
    return Axis(node, "produce", inner, outer)


def consumes(node: str, *, inner: int = 1, outer: int = 1) -> Axis:
    """Mark an axis that consumes the units of `node`, e.g. the rows of a transposed weight."""
    return Axis(node, "consume", inner, outer)


class PermutationSpec:
    """The axes map of an architecture, with the inverse map derived.

    Parameters
    ----------
    axes
        For each tensor (by its name in the state dict) one entry per axis: a node's name, an :class:`Axis`, the
        :class:`Window` s of a fused axis, or None for an axis that keeps its order. Axes behind the last entry keep
        their order too, so a convolution's kernel needs two entries. A plain name produces the node on axis 0 and
        consumes it on every other axis, as in ``torch.nn.Linear`` and convolutions; :func:`produces` and
        :func:`consumes` say otherwise.
    observe
        Where a node's activations are seen: an :class:`Observation`, several of them (their samples are stacked), or a
        module's name (its input is then observed). Without an entry it is the input of the last layer in `axes` that
        consumes the node.
    groups
        Nodes whose units move only with their group: the number of groups, or :class:`Groups`.

    Raises
    ------
    ValueError
        If no axis names a node, or `observe` or `groups` name an unknown one or do not fit.
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
        axes: Mapping[str, Sequence[Entry]],
        observe: Mapping[str, Observation | str | Sequence[Observation]] | None = None,
        groups: Mapping[str, int | Groups] | None = None,
    ) -> None:
        self._layouts = {tensor: _parse_layout(tensor, entries) for tensor, entries in axes.items()}
        uses: dict[str, list[TensorAxis]] = {}
        for tensor, layout in self._layouts.items():
            for position, segments in enumerate(layout):
                for segment in segments:
                    if segment.axis is not None:
                        use = TensorAxis(tensor, position, segment, segment.axis)
                        uses.setdefault(segment.axis.node, []).append(use)
        if not uses:
            raise ValueError("axes must name at least one node, got none")
        self._uses = {node: tuple(where) for node, where in uses.items()}
        for node, places in self._uses.items():
            if not any(use.axis.compared for use in places):
                raise ValueError(f"axes must name node {node!r} on an axis that is compared, got none")
        self._observations = {node: _default_observations(where) for node, where in self._uses.items()}
        for node, where in (observe or {}).items():
            self._check_known("observe", node)
            self._observations[node] = _parse_observations(where)
        self._groups = dict.fromkeys(self._uses, Groups(1))
        for node, grouped in (groups or {}).items():
            self._check_known("groups", node)
            self._groups[node] = grouped if isinstance(grouped, Groups) else Groups(grouped)
            if self._groups[node].count < 1:
                raise ValueError(f"groups[{node!r}] must be at least 1, got {self._groups[node].count}")
        self._bundles = self._tied_nodes()

    @classmethod
    def from_nodes(
        cls,
        nodes: Mapping[str, Iterable[tuple[str, int] | tuple[str, int, Role]]],
        observe: Mapping[str, Observation | str | Sequence[Observation]] | None = None,
        groups: Mapping[str, int | Groups] | None = None,
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
        layouts = {tensor: [entries.get(i) for i in range(max(entries) + 1)] for tensor, entries in axes.items()}
        return cls(layouts, observe, groups)

    @classmethod
    def from_model(
        cls, model: nn.Module, example_inputs: Any, *, outputs: Callable[[Any], Any] | None = None
    ) -> PermutationSpec:
        """Derive the specification of a model from what it computes.

        The model is exported (``torch.export``, on tensors without data, so that no memory of the weights' size is
        needed; its parameters may be on the meta device) and the axes of all tensors are followed through its
        operators. Units may move if nothing depends on their order; inputs and outputs keep theirs. Operators that are
        not known keep all that they read in order, and are named in a warning of the logger
        ``mudsc_fast.spec.infer``; ``mudsc_fast.spec.infer.derive`` returns them with the specification.

        Parameters
        ----------
        model
            Left as it is.
        example_inputs
            What the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            Only shapes and dtypes count.
        outputs
            Chooses among what the model returns that whose order counts. By default all tensors; of what the models
            of Hugging Face return, neither caches, hidden states nor attention, and the last features only where
            there is nothing else.

        Raises
        ------
        TypeError
            If `model` is no module or `example_inputs` of another type.
        ValueError
            If the model cannot be exported, or if none of its units may move.

        Examples
        --------
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> PermutationSpec.from_model(model, torch.randn(1, 4))
        PermutationSpec(3 tensors, nodes: 0)
        """
        from mudsc_fast.spec import infer  # it is built on this module

        return infer.derive(model, example_inputs, outputs=outputs).spec

    @property
    def layouts(self) -> Mapping[str, tuple[tuple[Segment, ...], ...]]:
        """For each tensor and each of its axes the segments of that axis, in order."""
        return self._layouts

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes, in the order in which the axes map names them first."""
        return tuple(self._uses)

    @property
    def bundles(self) -> tuple[tuple[str, ...], ...]:
        """The nodes, those whose groups keep a common order together: what is matched in one step."""
        return self._bundles

    def uses(self, node: str) -> tuple[TensorAxis, ...]:
        """Return every place of a node: the inverse of :attr:`layouts`."""
        return self._uses[node]

    def groups(self, node: str) -> Groups:
        """Return the groups of a node; one group means that its units move freely."""
        return self._groups[node]

    def without(self, tensors: Container[str]) -> PermutationSpec:
        """Return the specification that does not name some tensors; all else stays, also where nodes are observed.

        Raises
        ------
        ValueError
            If no node is left, or one only on axes that are not compared.
        """
        axes = {
            tensor: [_entry(segments) for segments in layout]
            for tensor, layout in self._layouts.items()
            if tensor not in tensors
        }
        nodes = [node for node, uses in self._uses.items() if any(use.tensor not in tensors for use in uses)]
        return PermutationSpec(
            axes,
            {node: self._observations[node] for node in nodes},
            {node: self._groups[node] for node in nodes},
        )

    def renamed(self, names: Mapping[str, str]) -> PermutationSpec:
        """Return the specification of the same nodes in which some tensors, the keys of `names`, have other names."""
        return PermutationSpec(
            {
                names.get(tensor, tensor): [_entry(segments) for segments in layout]
                for tensor, layout in self._layouts.items()
            },
            self._observations,
            self._groups,
        )

    def neighbours(self, node: str) -> tuple[str, ...]:
        """Return the nodes that share a tensor with `node`: those its weight similarity depends on.

        The node itself is among them where it has two axes of one tensor.
        """
        found: dict[str, None] = {}
        for use in self._uses[node]:
            for position, segments in enumerate(self._layouts[use.tensor]):
                for segment in segments:
                    if segment.axis is not None and position != use.position:
                        found[segment.axis.node] = None
        return tuple(found)

    def observations(self, node: str) -> tuple[Observation, ...]:
        """Return where the activations of a node are seen; nothing if the specification does not say."""
        return self._observations[node]

    def units(self, state_dict: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of units of every node, having checked the specification against the tensors.

        Raises
        ------
        ValueError
            If a tensor is missing or has too few axes, if its windows do not cover an axis, if a node has another
            number of units there than at its first use, or if its groups do not divide them.
        """
        problems = self.problems(state_dict)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ValueError(problems[0] + more)
        return {node: _units_at(uses[0], state_dict) for node, uses in self._uses.items()}

    def problems(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Return every way in which the specification does not fit the tensors, in words; none if it fits."""
        by_tensor = {
            tensor: _layout_problems(tensor, layout, state_dict.get(tensor)) for tensor, layout in self._layouts.items()
        }
        problems = [problem for found in by_tensor.values() for problem in found]
        for node, places in self._uses.items():
            uses = [use for use in places if not by_tensor[use.tensor]]
            if not uses:
                continue
            first = uses[0]
            expected = _units_at(first, state_dict)
            problems += [
                f"{_described(use)} has {_units_at(use, state_dict)} units, but node {node!r} has {expected} by "
                f"{_described(first)}"
                for use in uses
                if _units_at(use, state_dict) != expected
            ]
            if expected % self._groups[node].count:
                problems.append(
                    f"node {node!r} has {expected} units, which {self._groups[node].count} groups do not divide"
                )
        return problems

    def validate(self, model: nn.Module) -> None:
        """Check the specification against a model: its tensors, and the modules at which nodes are observed.

        Raises
        ------
        ValueError
            If the specification does not fit, with a line for each way in which it does not.
        """
        state_dict = model.state_dict()
        problems = self.problems(state_dict)
        modules = dict(model.named_modules(remove_duplicate=False))
        for node, observations in self._observations.items():
            units = None if problems else _units_at(self._uses[node][0], state_dict)
            for observation in observations:
                problems += _observation_problems(node, observation, modules.get(observation.module), units)
        if problems:
            raise ValueError("\n".join([f"spec does not fit the model in {len(problems)} places:", *problems]))

    def to_json(self) -> str:
        """Return the specification as a JSON document, a line for each tensor and node, which :meth:`from_json` reads.

        ``tensors`` is the axes map; ``groups`` and ``observe`` are as the arguments of this class. The document names
        its format and version.
        """
        from mudsc_fast.spec import document  # it is built on this module

        return document.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """Return the specification that a document of :meth:`to_json` describes.

        Raises
        ------
        ValueError
            If the text is no JSON or of another format or version, or if a field is missing, unknown, of another type
            or out of range; the field is named, with what was expected and what came.
        """
        from mudsc_fast.spec import document  # it is built on this module

        return document.from_json(text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the specification to a JSON file, which is complete or, if this fails, as it was before.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PermutationSpec:
        """Return the specification in a JSON file.

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            As :meth:`from_json`, naming the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    def describe(self) -> str:
        """Return a table of the nodes: their groups, the nodes whose groups keep the same order, and their places."""
        rows = [("node", "groups", "tied to", "places", "the first")]
        for bundle in self._bundles:
            for node in bundle:
                others = ", ".join(other for other in bundle if other != node)
                uses = self._uses[node]
                rows.append((node, str(self._groups[node].count), others, str(len(uses)), _described(uses[0])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def __eq__(self, other: object) -> bool:
        """Two specifications are equal if they map the same axes, groups and places to observe."""
        return self._content() == other._content() if isinstance(other, PermutationSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content())

    def __repr__(self) -> str:
        return f"PermutationSpec({len(self._layouts)} tensors, nodes: {_listed(self.nodes)})"

    def _content(self) -> tuple[object, ...]:
        # An axis that keeps its order may be listed or left out at the end.
        layouts = []
        for tensor, layout in self._layouts.items():
            mapped = [i for i, segments in enumerate(layout) if any(segment.axis is not None for segment in segments)]
            layouts.append((tensor, layout[: mapped[-1] + 1] if mapped else ()))
        return tuple(layouts), tuple(self._observations.items()), tuple(self._groups.items())

    def _check_known(self, argument: str, node: str) -> None:
        if node not in self._uses:
            raise ValueError(f"{argument} names the node {node!r}, which no axis has; nodes: {_listed(self.nodes)}")

    def _tied_nodes(self) -> tuple[tuple[str, ...], ...]:
        bundles: dict[str, list[str]] = {}
        for node, groups in self._groups.items():
            bundles.setdefault(f"node {node}" if groups.tie is None else f"tie {groups.tie}", []).append(node)
        for nodes in bundles.values():
            counts = {node: self._groups[node].count for node in nodes}
            if len(set(counts.values())) != 1:
                raise ValueError(f"groups that are tied must be equally many, got {counts}")
        return tuple(map(tuple, bundles.values()))


def _parse_layout(tensor: str, entries: Sequence[Entry]) -> tuple[tuple[Segment, ...], ...]:
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise TypeError(f"axes of {tensor!r} must be a sequence with an entry per axis, got {entries!r}")
    layout: list[tuple[Segment, ...]] = []
    for position, entry in enumerate(entries):
        if isinstance(entry, (list, tuple)) and entry and all(isinstance(window, Window) for window in entry):
            layout.append(_parse_windows(entry, position))
        elif entry is None or isinstance(entry, (str, Axis)):
            layout.append((Segment(_parse_axis(entry, position)),))
        else:
            raise TypeError(
                f"axis {position} of {tensor!r} must be a node's name, an Axis, a sequence of Windows or None, "
                f"got {type(entry).__name__}"
            )
    return tuple(layout)


def _parse_windows(windows: Sequence[Window], position: int) -> tuple[Segment, ...]:
    segments, start = [], 0
    for window in windows:
        segments.append(Segment(_parse_axis(window.axis, position), start, window.width))
        start += window.width
    return tuple(segments)


def _entry(segments: Sequence[Segment]) -> Entry:
    """Return what stands for an axis of these segments in an axes map."""
    windows = [Window(segment.axis, segment.width) for segment in segments if segment.width is not None]
    return windows or segments[0].axis


def _parse_axis(entry: str | Axis | None, position: int) -> Axis | None:
    return Axis(entry, "produce" if position == 0 else "consume") if isinstance(entry, str) else entry


def _parse_observations(where: Observation | str | Sequence[Observation]) -> tuple[Observation, ...]:
    if isinstance(where, str):
        return (Observation(where),)
    return (where,) if isinstance(where, Observation) else tuple(where)


def _default_observations(uses: Sequence[TensorAxis]) -> tuple[Observation, ...]:
    for use in reversed(uses):
        if use.axis.role == "consume" and "." in use.tensor:
            segment, axis = use.segment, use.axis
            module = use.tensor.rpartition(".")[0]
            return (Observation(module, "input", None, segment.start, segment.width, axis.inner, axis.outer),)
    return ()


def _layout_problems(tensor: str, layout: Sequence[Sequence[Segment]], value: Tensor | None) -> list[str]:
    if value is None:
        return [f"spec names the tensor {tensor!r}, which the models do not have"]
    shape = tuple(value.shape)
    if len(shape) < len(layout):
        return [f"spec gives {len(layout)} axes to {tensor!r}, which has {len(shape)}: shape {shape}"]
    problems = []
    for position, segments in enumerate(layout):
        covered = sum(shape[position] if segment.width is None else segment.width for segment in segments)
        if covered != shape[position]:
            problems.append(
                f"axis {position} of {tensor!r} has length {shape[position]}, but its windows cover {covered}"
            )
            continue
        for segment in segments:
            width = shape[position] if segment.width is None else segment.width
            if segment.axis is not None and width % (segment.axis.inner * segment.axis.outer):
                problems.append(
                    f"axis {position} of {tensor!r} holds {width} entries of node {segment.axis.node!r}, not a "
                    f"multiple of inner * outer = {segment.axis.inner * segment.axis.outer}"
                )
    return problems


def _observation_problems(node: str, seen: Observation, module: nn.Module | None, units: int | None) -> list[str]:
    if module is None:
        return [f"node {node!r} is observed at module {seen.module!r}, which the model does not have"]
    problems = []
    if seen.port == "projection" and getattr(module, "in_proj_weight", None) is None:
        problems.append(
            f"node {node!r} is observed at the projection of {seen.module!r}, which must be a MultiheadAttention with "
            f"one weight for queries, keys and values, got {type(module).__name__}"
        )
    if seen.width is not None and units is not None and seen.width != seen.outer * units * seen.inner:
        problems.append(
            f"node {node!r} has {units} units, but is observed at {seen.width} entries of the {seen.port} of "
            f"{seen.module!r}, {seen.outer * units * seen.inner} expected"
        )
    return problems


def _units_at(use: TensorAxis, state_dict: Mapping[str, Tensor]) -> int:
    width = use.segment.width
    length = int(state_dict[use.tensor].shape[use.position]) if width is None else width
    return length // (use.axis.inner * use.axis.outer)


def _described(use: TensorAxis) -> str:
    window = "" if use.segment.width is None else f" (entries {use.segment.start} on)"
    return f"axis {use.position} of {use.tensor!r}{window}"


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"
