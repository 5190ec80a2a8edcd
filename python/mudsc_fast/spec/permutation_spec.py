"""Which axes of which tensors must be permuted together.

A *node* is a set of tensor axes that hold the same units: the output axis of a hidden layer, its bias, and the input
axis of the next layer. A specification maps each tensor to the nodes of its axes. Everything else is derived from that
map.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mudsc_fast._files import atomic_write
from mudsc_fast.spec import document
from mudsc_fast.spec.axes import Axis, Entry, Layout, Role, TensorAxis, entry_of, parse_layout
from mudsc_fast.spec.groups import Groups, tied_nodes
from mudsc_fast.spec.observation import Observation, default_observations, parse_observations
from mudsc_fast.spec.validation import count_units, observation_problems, tensor_problems


class PermutationSpec:
    """The axes map of an architecture.

    Parameters
    ----------
    axes
        For each tensor (by its name in the state dict) one entry per axis: the name of a node, an :class:`Axis`, the
        :class:`Window` s of a fused axis, or None for an axis that keeps its order. Trailing axes may be left out and
        keep their order, so a convolution kernel needs two entries. A plain name produces the node on axis 0 and
        consumes it on every other axis, as in ``torch.nn.Linear`` and convolutions. Use :func:`produces` and
        :func:`consumes` where this is not so.
    observe
        Where the activations of a node are observed: an :class:`Observation`, several of them (their samples are
        stacked), or the name of a module (whose input is observed). The default is the input of the last layer in
        `axes` that consumes the node.
    groups
        Nodes whose units move only with their group: the number of groups, or :class:`Groups`.

    Raises
    ------
    ValueError
        If no axis names a node, or `observe` or `groups` name an unknown node or do not fit.
    TypeError
        If an entry has an unsupported type.

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
        self._layouts = {tensor: parse_layout(tensor, entries) for tensor, entries in axes.items()}
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
        for node, where in self._uses.items():
            if not any(use.axis.compared for use in where):
                raise ValueError(f"axes must name node {node!r} on at least one axis that is compared, got none")
        self._observations = {node: default_observations(where) for node, where in self._uses.items()}
        for node, observed in (observe or {}).items():
            self._check_known("observe", node)
            self._observations[node] = parse_observations(observed)
        self._groups = dict.fromkeys(self._uses, Groups(1))
        for node, grouped in (groups or {}).items():
            self._check_known("groups", node)
            self._groups[node] = grouped if isinstance(grouped, Groups) else Groups(grouped)
            if self._groups[node].count < 1:
                raise ValueError(f"groups[{node!r}] must be at least 1, got {self._groups[node].count}")
        self._bundles = tied_nodes(self._groups)

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
            If two nodes name the same axis of a tensor, or an axis is negative.
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

        The model is exported with ``torch.export`` on fake tensors, so no memory of the size of the weights is needed
        and parameters may be on the meta device. The axes of all tensors are then followed through the operators of
        the graph. Units may be permuted if nothing depends on their order. Inputs and outputs keep their order.
        Operators that are not supported keep the order of everything they read. The logger ``mudsc_fast.spec.infer``
        names them in a warning; ``mudsc_fast.spec.infer.derive`` also returns them.

        Parameters
        ----------
        model
            The model. It is not modified.
        example_inputs
            What the model is called with: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            Only shapes and dtypes matter.
        outputs
            Selects the outputs whose order matters from what the model returns. By default these are all tensors.
            For Hugging Face models, caches, hidden states and attention weights are left out, and the last features
            count only if there is no other output.

        Raises
        ------
        TypeError
            If `model` is not a module or `example_inputs` has another type.
        ValueError
            If the model cannot be exported, or none of its units can be permuted.

        Examples
        --------
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> PermutationSpec.from_model(model, torch.randn(1, 4))
        PermutationSpec(3 tensors, nodes: 0)
        """
        from mudsc_fast.spec import infer  # only here, so that `import mudsc_fast` stays fast

        found = infer.derive(model, example_inputs, outputs=outputs)
        return cls(found.axes, found.observe, found.groups)

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """For each tensor and each of its axes the segments of that axis, in order."""
        return self._layouts

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes, in the order in which the axes map first names them."""
        return tuple(self._uses)

    @property
    def bundles(self) -> tuple[tuple[str, ...], ...]:
        """The nodes in bundles that are matched in one step: nodes whose groups keep a common order are together."""
        return self._bundles

    def uses(self, node: str) -> tuple[TensorAxis, ...]:
        """Return every use of a node: the inverse of :attr:`layouts`."""
        return self._uses[node]

    def groups(self, node: str) -> Groups:
        """Return the groups of a node. One group means that the units move freely."""
        return self._groups[node]

    def observations(self, node: str) -> tuple[Observation, ...]:
        """Return where the activations of a node are observed. Empty if the specification does not say."""
        return self._observations[node]

    def neighbors(self, node: str) -> tuple[str, ...]:
        """Return the nodes that share a tensor with `node`: its weight similarity depends on their matching.

        The node itself is included if it has two axes of one tensor.
        """
        found: dict[str, None] = {}
        for use in self._uses[node]:
            for position, segments in enumerate(self._layouts[use.tensor]):
                for segment in segments:
                    if segment.axis is not None and position != use.position:
                        found[segment.axis.node] = None
        return tuple(found)

    def without(self, tensors: Container[str]) -> PermutationSpec:
        """Return this specification without some tensors. Nodes are observed in the same places as before.

        Raises
        ------
        ValueError
            If no node is left, or if a node is left only on axes that are not compared.
        """
        axes = {
            tensor: [entry_of(segments) for segments in layout]
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
        """Return this specification with some tensors renamed. `names` maps old names to new ones."""
        return PermutationSpec(
            {
                names.get(tensor, tensor): [entry_of(segments) for segments in layout]
                for tensor, layout in self._layouts.items()
            },
            self._observations,
            self._groups,
        )

    def units(self, state_dict: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the number of units of every node, after checking the specification against the tensors.

        Raises
        ------
        ValueError
            If a tensor is missing or has too few axes, if its windows do not cover an axis, if two uses of a node
            have different numbers of units, or if groups do not divide the units.
        """
        problems = self.problems(state_dict)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ValueError(problems[0] + more)
        return {node: count_units(uses[0], state_dict[uses[0].tensor].shape) for node, uses in self._uses.items()}

    def problems(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Return one message for each way in which the specification does not fit the tensors; none if it fits."""
        return tensor_problems(self._layouts, self._uses, self._groups, state_dict)

    def validate(self, model: nn.Module) -> None:
        """Check the specification against a model: its tensors, and the modules where nodes are observed.

        Raises
        ------
        ValueError
            If the specification does not fit. The message lists every problem.
        """
        state_dict = model.state_dict()
        problems = self.problems(state_dict)
        modules = dict(model.named_modules(remove_duplicate=False))
        for node, observations in self._observations.items():
            first = self._uses[node][0]
            num_units = None if problems else count_units(first, state_dict[first.tensor].shape)
            for observation in observations:
                problems += observation_problems(node, observation, modules.get(observation.module), num_units)
        if problems:
            raise ValueError("\n".join([f"spec does not fit the model in {len(problems)} places:", *problems]))

    def to_json(self) -> str:
        """Return the specification as a JSON document for :meth:`from_json`, one line per tensor and node.

        ``tensors`` is the axes map; ``groups`` and ``observe`` correspond to the arguments of this class. The document
        names its format and version.
        """
        return document.to_json(self._layouts, self._observations, self._groups)

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """Return the specification in a document written by :meth:`to_json`.

        Raises
        ------
        ValueError
            If the text is not JSON or has another format or version, or if a field is missing, unknown, out of range
            or of another type. The message names the field, what was expected and what was found.
        """
        return cls(*document.from_json(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the specification to a JSON file. The file is replaced atomically.

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
            As for :meth:`from_json`. The message names the file.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    def describe(self) -> str:
        """Return a table of the nodes: their groups, the nodes tied to them, and the axes that hold their units."""
        rows = [("node", "groups", "tied to", "axes", "first axis")]
        for bundle in self._bundles:
            for node in bundle:
                others = ", ".join(other for other in bundle if other != node)
                uses = self._uses[node]
                rows.append((node, str(self._groups[node].count), others, str(len(uses)), str(uses[0])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def __eq__(self, other: object) -> bool:
        """Compare the axes map, the groups and the observations of two specifications."""
        return self._content() == other._content() if isinstance(other, PermutationSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._content())

    def __repr__(self) -> str:
        return f"PermutationSpec({len(self._layouts)} tensors, nodes: {_shorten(self.nodes)})"

    def _content(self) -> tuple[object, ...]:
        # Trailing axes that keep their order may be listed or left out.
        layouts = []
        for tensor, layout in self._layouts.items():
            mapped = [i for i, segments in enumerate(layout) if any(segment.axis is not None for segment in segments)]
            layouts.append((tensor, layout[: mapped[-1] + 1] if mapped else ()))
        return tuple(layouts), tuple(self._observations.items()), tuple(self._groups.items())

    def _check_known(self, argument: str, node: str) -> None:
        if node not in self._uses:
            raise ValueError(f"{argument} names the node {node!r}, which no axis has; nodes: {_shorten(self.nodes)}")


def _shorten(names: Sequence[str], max_names: int = 8) -> str:
    shown = ", ".join(names[:max_names])
    return shown if len(names) <= max_names else f"{shown}, ... ({len(names)} in total)"
