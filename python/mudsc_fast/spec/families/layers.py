"""Building blocks of specifications: one function per kind of layer.

Each function returns a partial specification, and these add up: the specification of a family is the sum of its
layers, in the order of the network. A layer is given the nodes it writes and reads: a name, an :class:`Axis`, the
windows of a fused tensor, or None if the order is fixed, as for pixels, tokens and classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from mudsc_fast._checks import check_choice
from mudsc_fast.spec.axes import Axis, Entry, Role, Window, consumes, produces
from mudsc_fast.spec.groups import Groups
from mudsc_fast.spec.observation import Observation
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Whether the output layer of a language model is separate from its embedding table, tied to it, or not stored.
Head = Literal["separate", "tied", "absent"]


@dataclass(frozen=True)
class PartialSpec:
    """The arguments of :class:`PermutationSpec` for some layers of a network."""

    axes: Mapping[str, Sequence[Entry]] = field(default_factory=dict)
    observe: Mapping[str, Sequence[Observation]] = field(default_factory=dict)
    groups: Mapping[str, Groups] = field(default_factory=dict)

    def __add__(self, other: PartialSpec) -> PartialSpec:
        return PartialSpec(
            {**self.axes, **other.axes}, {**self.observe, **other.observe}, {**self.groups, **other.groups}
        )

    def spec(self) -> PermutationSpec:
        """Return the specification of a network with these layers."""
        return PermutationSpec(self.axes, self.observe, self.groups)


def linear(name: str, writes: Entry, reads: Entry, *, bias: bool = True) -> PartialSpec:
    """Return a linear layer or a convolution, with weight [outputs, inputs, ...]."""
    return PartialSpec({f"{name}.weight": (writes, reads), **({f"{name}.bias": (writes,)} if bias else {})})


def transposed_linear(name: str, writes: Entry, reads: Entry, *, bias: bool = True) -> PartialSpec:
    """Return a linear layer with weight [inputs, outputs], like ``Conv1D`` of GPT-2."""
    weight = {f"{name}.weight": (_in_role(reads, "consume"), _in_role(writes, "produce"))}
    return PartialSpec({**weight, **({f"{name}.bias": (writes,)} if bias else {})})


def norm(name: str, node: Entry, *, bias: bool = True) -> PartialSpec:
    """Return a LayerNorm, a GroupNorm or, without bias, an RMSNorm."""
    return PartialSpec({f"{name}.weight": (node,), **({f"{name}.bias": (node,)} if bias else {})})


def batch_norm(name: str, node: str) -> PartialSpec:
    """Return a BatchNorm. Its running statistics follow the units but are not compared."""
    statistics = Axis(node, "produce", compared=False)
    return norm(name, node) + PartialSpec({f"{name}.running_mean": (statistics,), f"{name}.running_var": (statistics,)})


def embedding(name: str, node: str) -> PartialSpec:
    """Return an embedding table [entries, units]."""
    return PartialSpec({f"{name}.weight": (None, produces(node))})


def tied_head(name: str, node: str) -> PartialSpec:
    """Return an output layer that is the embedding table under a second name.

    When units are clustered, one tensor cannot both average and sum them. As the table does, it produces them.
    """
    return PartialSpec({f"{name}.weight": (None, Axis(node, "produce", compared=False))})


def token_head(name: str, node: str, kind: Head) -> PartialSpec:
    """Return the output layer of a language model: separate, tied to the embedding table, or absent from the file."""
    check_choice("head", kind, get_args(Head))
    observe = PartialSpec(observe={node: (Observation(name, "input", -1),)})
    if kind == "absent":
        return observe
    return observe + (tied_head(name, node) if kind == "tied" else linear(name, None, node, bias=False))


def feed_forward(node: str, first: str, second: str, stream: str, *, transposed: bool = False) -> PartialSpec:
    """Return two linear layers with an elementwise function between them."""
    layer = transposed_linear if transposed else linear
    observe = PartialSpec(observe={node: (Observation(second, "input", -1),)})
    return layer(first, node, stream) + layer(second, stream, node) + observe


def gated_feed_forward(node: str, module: str, stream: str) -> PartialSpec:
    """Return a gated feed-forward layer without biases: ``down_proj(function(gate_proj(x)) * up_proj(x))``."""
    gate, up, down = (f"{module}.{layer}_proj" for layer in ("gate", "up", "down"))
    first = linear(gate, node, stream, bias=False) + linear(up, node, stream, bias=False)
    return first + linear(down, stream, node, bias=False)


def attention(name: str, query: str, key: str, value: str, output: str, stream: str, heads: int) -> PartialSpec:
    """Return multi-head attention with one linear layer each for queries, keys and values.

    The products of queries and keys must not change, so both share the node ``<name>.qk``. Values and the output layer
    share ``<name>.v``. Units move within their head, and the heads of both nodes keep a common order.
    """
    scores, values = f"{name}.qk", f"{name}.v"
    return (
        linear(query, scores, stream)
        + linear(key, scores, stream)
        + linear(value, values, stream)
        + linear(output, stream, values)
        + PartialSpec(observe={scores: (Observation(query, "output", -1), Observation(key, "output", -1))})
        + heads_of(name, heads, scores, values)
    )


def fused_attention(
    name: str,
    qkv: str,
    output: str,
    stream: str,
    heads: int,
    width: int,
    *,
    bias: bool = True,
    transposed: bool = False,
    published: bool = False,
) -> PartialSpec:
    """Return multi-head attention with one fused layer for queries, keys and values, each `width` wide.

    The nodes are those of :func:`attention`. With `published`, they are those of the published specifications: the
    heads of ``<name>.qk`` and ``<name>.v`` are matched independently, and queries are not observed.
    """
    scores, values = f"{name}.qk", f"{name}.v"
    layer = transposed_linear if transposed else linear
    windows = [Window(scores, width), Window(scores, width), Window(values, width)]
    queries = Observation(qkv, "output", -1, 0, width)
    keys = Observation(qkv, "output", -1, width, width)
    groups = PartialSpec(groups={scores: Groups(heads), values: Groups(heads)})
    return (
        layer(qkv, windows, stream, bias=bias)
        + layer(output, stream, values)
        + PartialSpec(
            observe={scores: (keys,) if published else (queries, keys), values: (Observation(output, "input", -1),)}
        )
        + (groups if published else heads_of(name, heads, scores, values))
    )


def packed_attention(name: str, module: str, stream: str, heads: int, width: int) -> PartialSpec:
    """Return a ``torch.nn.MultiheadAttention``. The nodes are those of :func:`attention`."""
    scores, values = f"{name}.qk", f"{name}.v"
    windows = [Window(scores, width), Window(scores, width), Window(values, width)]
    queries, keys, mixed = (Observation(module, "projection", -1, place * width, width) for place in range(3))
    return (
        PartialSpec({f"{module}.in_proj_weight": (windows, stream), f"{module}.in_proj_bias": (windows,)})
        + linear(f"{module}.out_proj", stream, values)
        + PartialSpec(observe={scores: (queries, keys), values: (mixed,)})
        + heads_of(name, heads, scores, values)
    )


def rotary_attention(
    name: str, module: str, stream: str, heads: int, kv_heads: int, head_width: int, *, bias: bool = False
) -> PartialSpec:
    """Return attention with rotary embeddings, where `heads / kv_heads` query heads share one key and value head.

    Rotary embeddings tie a unit to its position in the head, so the heads of queries and keys move as a whole. With
    grouped queries, the node ``<name>.kv`` holds the heads of keys and values, and ``<name>.q`` the heads of queries
    and of the input of the output layer; both are tied. If every query head has its own value head, ``<name>.qk``
    holds the heads of queries and keys, and the units of values, ``<name>.v``, move within their head.
    """
    query, key, value, output = (f"{module}.{layer}_proj" for layer in "qkvo")
    if kv_heads == heads:
        scores, values = f"{name}.qk", f"{name}.v"
        queries = keys = produces(scores, inner=head_width)
        written, read = produces(values), consumes(values)
        observed, seen = scores, (query, key)
    else:
        scores, values = f"{name}.q", f"{name}.kv"
        queries, read = produces(scores, inner=head_width), consumes(scores, inner=head_width)
        keys = written = produces(values, inner=head_width)
        observed, seen = values, (key, value)
    places = tuple(Observation(layer, "output", -1, inner=head_width) for layer in seen)
    return (
        linear(query, queries, stream, bias=bias)
        + linear(key, keys, stream, bias=bias)
        + linear(value, written, stream, bias=bias)
        + linear(output, stream, read, bias=False)
        + PartialSpec(observe={observed: places})
        + heads_of(name, kv_heads, scores, values)
    )


def heads_of(name: str, heads: int, *nodes: str) -> PartialSpec:
    """Return the groups of nodes whose heads keep one common order. `name` is the attention layer."""
    return PartialSpec(groups={node: Groups(heads, tie=name) for node in nodes})


def check_divides(part: str, count: int, whole: str, total: int) -> None:
    """Raise a ValueError unless `count` is at least 1 and divides `total`."""
    if count < 1 or total < 1 or total % count:
        raise ValueError(f"{whole} must be a multiple of {part}, got {total} and {count}")


def check_positive(**numbers: int) -> None:
    """Raise a ValueError unless every number is at least 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def _in_role(entry: Entry, role: Role) -> Entry:
    if isinstance(entry, str):
        return Axis(entry, role)
    if entry is None or isinstance(entry, Axis):
        return entry
    return [Window(Axis(w.axis, role) if isinstance(w.axis, str) else w.axis, w.width) for w in entry]
