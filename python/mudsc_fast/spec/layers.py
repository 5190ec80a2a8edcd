"""The layers that architectures are built of, each as its part of an axes map.

Parts add up: a builder of a family is the sum of its layers' parts, in the order of the network. A layer is given the
nodes it writes and reads (a name, an :class:`Axis`, the windows of a fused tensor, or None where an order is fixed, as
that of pixels, tokens and classes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from mudsc_fast._checks import check_choice
from mudsc_fast.spec.permutation_spec import (
    Axis,
    Entry,
    Groups,
    Observation,
    PermutationSpec,
    Role,
    Window,
    consumes,
    produces,
)

#: How a language model's output layer stands to its embedding table.
Head = Literal["separate", "tied", "absent"]


@dataclass(frozen=True)
class Part:
    """A part of a specification: arguments of :class:`PermutationSpec` that concern some of the layers."""

    axes: Mapping[str, Sequence[Entry]] = field(default_factory=dict)
    observe: Mapping[str, Sequence[Observation]] = field(default_factory=dict)
    groups: Mapping[str, Groups] = field(default_factory=dict)

    def __add__(self, other: Part) -> Part:
        return Part({**self.axes, **other.axes}, {**self.observe, **other.observe}, {**self.groups, **other.groups})

    def spec(self) -> PermutationSpec:
        """Return the specification that consists of these layers."""
        return PermutationSpec(self.axes, self.observe, self.groups)


def linear(name: str, writes: Entry, reads: Entry, *, bias: bool = True) -> Part:
    """Return the part of a linear layer or a convolution, whose weight is [outputs, inputs, ...]."""
    return Part({f"{name}.weight": (writes, reads), **({f"{name}.bias": (writes,)} if bias else {})})


def transposed_linear(name: str, writes: Entry, reads: Entry, *, bias: bool = True) -> Part:
    """Return the part of a linear layer whose weight is [inputs, outputs], as GPT-2's ``Conv1D``."""
    weight = {f"{name}.weight": (_in_role(reads, "consume"), _in_role(writes, "produce"))}
    return Part({**weight, **({f"{name}.bias": (writes,)} if bias else {})})


def norm(name: str, node: Entry, *, bias: bool = True) -> Part:
    """Return the part of a LayerNorm, GroupNorm or, without bias, RMSNorm."""
    return Part({f"{name}.weight": (node,), **({f"{name}.bias": (node,)} if bias else {})})


def batch_norm(name: str, node: str) -> Part:
    """Return the part of a BatchNorm; its running statistics follow the units and do not count in their comparison."""
    statistics = Axis(node, "produce", compared=False)
    return norm(name, node) + Part({f"{name}.running_mean": (statistics,), f"{name}.running_var": (statistics,)})


def embedding(name: str, node: str) -> Part:
    """Return the part of an embedding table [entries, units]."""
    return Part({f"{name}.weight": (None, produces(node))})


def tied_head(name: str, node: str) -> Part:
    """Return the part of an output layer that is the embedding table under a second name.

    One tensor cannot produce and consume the clusters of a zip alike: it produces them, as the table does.
    """
    return Part({f"{name}.weight": (None, Axis(node, "produce", compared=False))})


def token_head(name: str, node: str, kind: Head) -> Part:
    """Return the part of a language model's output layer: tied to the embedding table or not, or left out of files."""
    check_choice("head", kind, get_args(Head))
    observe = Part(observe={node: (Observation(name, "input", -1),)})
    if kind == "absent":
        return observe
    return observe + (tied_head(name, node) if kind == "tied" else linear(name, None, node, bias=False))


def feed_forward(node: str, first: str, second: str, stream: str, *, transposed: bool = False) -> Part:
    """Return the part of two linear layers with an elementwise function between them."""
    layer = transposed_linear if transposed else linear
    observe = Part(observe={node: (Observation(second, "input", -1),)})
    return layer(first, node, stream) + layer(second, stream, node) + observe


def gated_feed_forward(node: str, module: str, stream: str) -> Part:
    """Return the part of a gated layer without biases: ``down_proj(function(gate_proj(x)) * up_proj(x))``."""
    gate, up, down = (f"{module}.{layer}_proj" for layer in ("gate", "up", "down"))
    first = linear(gate, node, stream, bias=False) + linear(up, node, stream, bias=False)
    return first + linear(down, stream, node, bias=False)


def attention(name: str, query: str, key: str, value: str, output: str, stream: str, heads: int) -> Part:
    """Return the part of multi-head attention with a layer each for queries, keys and values.

    The products of queries and keys must stay, so both share the node ``<name>.qk``; values and what reads them share
    ``<name>.v``. Units of both move within their head, and the heads of both in one common order.
    """
    scores, values = f"{name}.qk", f"{name}.v"
    return (
        linear(query, scores, stream)
        + linear(key, scores, stream)
        + linear(value, values, stream)
        + linear(output, stream, values)
        + Part(observe={scores: (Observation(query, "output", -1), Observation(key, "output", -1))})
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
) -> Part:
    """Return the part of multi-head attention whose queries, keys and values, each `width` wide, are one layer's.

    The nodes are those of :func:`attention`. `published` gives the nodes of the published specifications, for parity:
    the heads of ``<name>.qk`` and of ``<name>.v`` are paired independently, and queries are not observed.
    """
    scores, values = f"{name}.qk", f"{name}.v"
    layer = transposed_linear if transposed else linear
    windows = [Window(scores, width), Window(scores, width), Window(values, width)]
    queries = Observation(qkv, "output", -1, 0, width)
    keys = Observation(qkv, "output", -1, width, width)
    groups = Part(groups={scores: Groups(heads), values: Groups(heads)})
    return (
        layer(qkv, windows, stream, bias=bias)
        + layer(output, stream, values)
        + Part(observe={scores: (keys,) if published else (queries, keys), values: (Observation(output, "input", -1),)})
        + (groups if published else heads_of(name, heads, scores, values))
    )


def packed_attention(name: str, module: str, stream: str, heads: int, width: int) -> Part:
    """Return the part of a ``torch.nn.MultiheadAttention``; its nodes are those of :func:`attention`."""
    scores, values = f"{name}.qk", f"{name}.v"
    windows = [Window(scores, width), Window(scores, width), Window(values, width)]
    queries, keys, mixed = (Observation(module, "projection", -1, place * width, width) for place in range(3))
    return (
        Part({f"{module}.in_proj_weight": (windows, stream), f"{module}.in_proj_bias": (windows,)})
        + linear(f"{module}.out_proj", stream, values)
        + Part(observe={scores: (queries, keys), values: (mixed,)})
        + heads_of(name, heads, scores, values)
    )


def rotary_attention(
    name: str, module: str, stream: str, heads: int, kv_heads: int, head_width: int, *, bias: bool = False
) -> Part:
    """Return the part of attention with rotary embeddings, where `heads / kv_heads` queries share a key and a value.

    Rotary embeddings tie a unit to its place in the head, so queries and keys move head by head only. Where several
    query heads read one value head, ``<name>.kv`` are the heads of keys and values, ``<name>.q`` those of queries and
    of what the output layer reads, which move only together with their key's. Where every query head has a value head
    of its own, ``<name>.qk`` are the heads of queries and keys, and the units of values, ``<name>.v``, move within
    their head.
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
        + Part(observe={observed: places})
        + heads_of(name, kv_heads, scores, values)
    )


def heads_of(name: str, heads: int, *nodes: str) -> Part:
    """Return the groups of nodes whose heads keep one common order, that of the attention layer `name`."""
    return Part(groups={node: Groups(heads, tie=name) for node in nodes})


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
