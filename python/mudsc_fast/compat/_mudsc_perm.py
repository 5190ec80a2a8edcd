"""The perm dictionaries of the MuDSC program: a parser, and the dictionaries of its networks.

A dictionary maps each node to a list of axes, ``[axis, tensor]`` or ``[axis, tensor, options]``. Options:

``"in"``
    The axis consumes the units. The node's activations are the input of the module of the last such tensor, with units
    on axis 1; a string names another module, a dictionary sets ``"name"``, ``"dim"``, ``"hook"`` or ``"reshape_func"``.
``"act_module"``
    A dictionary with the same keys: the activations are observed there instead; several count as more samples.
``"group"``
    ``{"num": G}``: units move within G groups, and with them.
``"split_dim"``
    ``[axis, tensor, suffixes]``: the tensor concatenates several tensors, which are named by its name and a suffix,
    e.g. ``attn.qkv.weight_q``.
``"ignore"``, ``"scaled_bn"``
    The tensor is left out of the comparison of weights; it is divided by the deviation from ``running_var`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: A node's entries as in the program's dictionaries.
Entries = list[list[Any]]
Perm = dict[int, Entries]
Reshape = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Use:
    """One axis of a tensor that a node uses."""

    axis: int
    tensor: str
    node: Hashable
    consumes: bool
    compared: bool
    scaled: bool


@dataclass(frozen=True)
class Look:
    """Where a node's activations are observed: the input ("pre") or output ("post") of a module."""

    module: str
    axis: int
    hook: str
    reshape: Reshape | None


@dataclass(frozen=True)
class Node:
    """A node of a dictionary."""

    uses: tuple[Use, ...]
    looks: tuple[Look, ...]
    groups: int


@dataclass(frozen=True)
class Network:
    """A parsed perm dictionary.

    Attributes
    ----------
    nodes
        Every node.
    uses_of
        The uses of each tensor, without duplicates.
    splits
        Axis, name and suffixes of every concatenated tensor.
    """

    nodes: Mapping[Hashable, Node]
    uses_of: Mapping[str, Sequence[Use]]
    splits: Sequence[tuple[int, str, Sequence[str]]]

    def neighbors(self, node: Hashable) -> set[Hashable]:
        """Return the nodes on other axes of the node's tensors: those on which its weight vectors depend."""
        return {
            other.node for use in self.nodes[node].uses for other in self.uses_of[use.tensor] if other.axis != use.axis
        }


def read_perm(perm: Mapping[Any, Any]) -> Network:
    """Parse a perm dictionary.

    Raises
    ------
    ValueError
        If an entry is malformed, two nodes use one axis of a tensor, or a node has several numbers of groups.
    """
    nodes: dict[Hashable, Node] = {}
    uses_of: dict[str, list[Use]] = {}
    splits: dict[str, tuple[int, str, Sequence[str]]] = {}
    for node, listed in perm.items():
        entries = [_read_entry(node, entry) for entry in (listed["weights"] if isinstance(listed, Mapping) else listed)]
        if not entries:
            raise ValueError(f"perm[{node!r}] must list at least one axis, got none")
        nodes[node] = Node(tuple(use for use, _ in entries), _looks(entries), _groups(node, entries))
        for use, options in entries:
            held = uses_of.setdefault(use.tensor, [])
            others = [other for other in held if other.axis == use.axis]
            if any(other.node != node for other in others):
                raise ValueError(f"axis {use.axis} of {use.tensor!r} is used by nodes {others[0].node!r} and {node!r}")
            if not others:
                held.append(use)
            if "split_dim" in options:
                axis, tensor, suffixes = options["split_dim"]
                splits[tensor] = (axis, tensor, tuple(suffixes))
    return Network(nodes, uses_of, tuple(splits.values()))


def _read_entry(node: Hashable, entry: Sequence[Any]) -> tuple[Use, Mapping[str, Any]]:
    if len(entry) not in (2, 3):
        raise ValueError(f"entries of perm[{node!r}] must be [axis, tensor] or [axis, tensor, options], got {entry!r}")
    options = entry[2] if len(entry) == 3 else {}
    use = Use(entry[0], entry[1], node, "in" in options, "ignore" not in options, "scaled_bn" in options)
    return use, options


def _looks(entries: Sequence[tuple[Use, Mapping[str, Any]]]) -> tuple[Look, ...]:
    named = [_look(use, options["act_module"]) for use, options in entries if "act_module" in options]
    if named:
        return tuple(named)
    consumers = [(use, options["in"]) for use, options in entries if use.consumes]
    if not consumers:
        return ()
    use, place = consumers[-1]
    return (_look(use, {"name": place} if isinstance(place, str) else place or {}),)


def _look(use: Use, place: Mapping[str, Any]) -> Look:
    hook = place.get("hook", "pre")
    if hook not in ("pre", "post"):
        raise ValueError(f"hook of {use.tensor!r} must be 'pre' or 'post', got {hook!r}")
    reshape = place.get("reshape_func")
    if reshape is not None and reshape[0] not in _RESHAPES:
        raise ValueError(f"reshape_func of {use.tensor!r} must be one of {', '.join(_RESHAPES)}, got {reshape[0]!r}")
    return Look(
        place.get("name", use.tensor.rpartition(".")[0]),
        place.get("dim", 1),
        hook,
        None if reshape is None else _RESHAPES[reshape[0]](**reshape[1]),
    )


def _groups(node: Hashable, entries: Sequence[tuple[Use, Mapping[str, Any]]]) -> int:
    counts = {options["group"]["num"] for _, options in entries if "group" in options}
    if len(counts) > 1:
        raise ValueError(f"perm[{node!r}] must name one number of groups, got {sorted(counts)}")
    return int(counts.pop()) if counts else 1


def _units_of_heads() -> Reshape:
    """[B, heads, tokens, width] to [B, heads * width, tokens]."""
    return lambda values: values.transpose(2, 3).flatten(1, 2)


def _units_of_grouped_convolution(group: int) -> Reshape:
    """[B, group * units, ...] to [B, units, group * ...]: the units of all groups are the same."""
    return lambda values: values.unflatten(1, (group, -1)).transpose(1, 2).flatten(2)


_RESHAPES: Mapping[str, Callable[..., Reshape]] = {
    "norm_qk": _units_of_heads,
    "group_conv": _units_of_grouped_convolution,
}


def get_resnet_perm(
    block: int = 2,
    num_blocks: Sequence[int] = (3, 3, 3),
    shortcut_name: str = "shortcut",
    fc_name: str = "linear",
    pool_name: str = "avgpool",
    res_start_layer: int = 1,
    ignore_running_val: bool = True,
) -> Perm:
    """Return the nodes of a ResNet with BatchNorm.

    Parameters
    ----------
    block
        Convolutions of a block: 2, or 3 for bottlenecks.
    num_blocks
        Blocks of every stage.
    shortcut_name, fc_name, pool_name
        Names of the shortcut of a block, the classifier, and the pooling layer before it.
    res_start_layer
        The first stage, counted from 0, whose first block has a shortcut.
    ignore_running_val
        Whether running statistics are left out of the comparison of weights.
    """

    def channels(conv: str, norm: str) -> Entries:
        statistics = [[0, f"{norm}.{name}"] for name in ("running_mean", "running_var")]
        options = [{"ignore": None}] if ignore_running_val else []
        return [*_weights(conv, ("weight",)), *_weights(norm), *([*entry, *options] for entry in statistics)]

    return _resnet(block, num_blocks, shortcut_name, fc_name, pool_name, res_start_layer, channels)


def get_resnet_perm_group(
    block: int = 2,
    num_blocks: Sequence[int] = (3, 3, 3),
    shortcut_name: str = "shortcut",
    fc_name: str = "linear",
    pool_name: str = "avgpool",
    res_start_layer: int = 1,
    group_num: int = 8,
) -> Perm:
    """Return the nodes of a ResNet with GroupNorm of `group_num` groups; otherwise as :func:`get_resnet_perm`."""

    def channels(conv: str, norm: str) -> Entries:
        weight, bias = _weights(norm)
        return [*_weights(conv, ("weight",)), [*weight, {"group": {"num": group_num, "same": False}}], bias]

    return _resnet(block, num_blocks, shortcut_name, fc_name, pool_name, res_start_layer, channels)


def _resnet(
    block: int,
    num_blocks: Sequence[int],
    shortcut: str,
    head: str,
    pool: str,
    first_with_shortcut: int,
    channels: Callable[[str, str], Entries],
) -> Perm:
    stream = 0
    perm = {stream: channels("conv1", "bn1")}
    for stage, count in enumerate(num_blocks):
        for index in range(count):
            name = f"layer{stage + 1}.{index}"
            shortened = index == 0 and stage >= first_with_shortcut
            perm[stream].append(_reads(f"{name}.conv1"))
            if shortened:
                perm[stream].append(_reads(f"{name}.{shortcut}.0"))
            for number in range(1, block):
                written = channels(f"{name}.conv{number}", f"{name}.bn{number}")
                perm[len(perm)] = [*written, _reads(f"{name}.conv{number + 1}")]
            if shortened:
                stream = len(perm)
                perm[stream] = channels(f"{name}.{shortcut}.0", f"{name}.{shortcut}.1")
            perm[stream] += channels(f"{name}.conv{block}", f"{name}.bn{block}")
    perm[stream].append(_reads(head, pool))
    return perm


def get_vit_perm(num_layer: int = 12, num_heads: int = 6, ignore_head: bool = False) -> Perm:
    """Return the nodes of timm's ``VisionTransformer``, whose attention has modules ``q_norm`` and ``k_norm``.

    Keys are observed twice and queries never, as published. `ignore_head` leaves the classes' weights out of the
    comparison.
    """
    return _vit(num_layer, num_heads, _weights("patch_embed.proj"), ignore_head)


def get_vit_clip_perm(num_layer: int = 12, num_heads: int = 12, ignore_head: bool = False) -> Perm:
    """Return the nodes of timm's vision transformers of CLIP, which start with a norm; see :func:`get_vit_perm`."""
    return _vit(num_layer, num_heads, _weights("patch_embed.proj", ("weight",)) + _weights("norm_pre"), ignore_head)


def get_swin_perm(
    depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24), ignore_head: bool = False
) -> Perm:
    """Return the nodes of timm's ``SwinTransformer``: those inside each block, and the stream of the last stage.

    The streams of the other stages are not matched, and the biases of the last stage's first norms count twice in the
    comparison, as published.

    Raises
    ------
    ValueError
        If there are fewer than two stages, or not as many numbers of heads.
    """
    if len(depths) < 2 or len(depths) != len(num_heads):
        raise ValueError(f"depths and num_heads must name two or more stages, got {depths!r} and {num_heads!r}")
    perm: Perm = {}
    stream = -1
    for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            if stage == len(depths) - 1:
                perm[stream] += _block_of_stream(block, norm1=("weight", "bias", "bias"))
            _add_block(perm, block, heads, seen=("q_norm", "k_norm"))
        if stage == len(depths) - 2:
            stream = len(perm)
            perm[stream] = _weights(f"layers.{stage}.downsample.reduction", ("weight",))
    perm[stream] += [*_weights("norm"), _head(ignore_head)]
    return perm


def _vit(num_layer: int, num_heads: int, embedding: Entries, ignore_head: bool) -> Perm:
    stream = 0
    perm: Perm = {stream: [[2, "cls_token"], [2, "pos_embed"], *embedding]}
    for index in range(num_layer):
        perm[stream] += _block_of_stream(f"blocks.{index}")
        _add_block(perm, f"blocks.{index}", num_heads, seen=("k_norm", "k_norm"))
    perm[stream] += [*_weights("norm"), _head(ignore_head)]
    return perm


def _block_of_stream(block: str, norm1: Sequence[str] = ("weight", "bias")) -> Entries:
    """Return the tensors with which a transformer block reads from its stream and writes to it."""
    return [
        *_weights(f"{block}.norm1", norm1),
        *([1, f"{block}.attn.qkv.weight_{part}", {"in": {"dim": -1}}] for part in "qkv"),
        *_weights(f"{block}.attn.proj"),
        *_weights(f"{block}.norm2"),
        _reads(f"{block}.mlp.fc1", {"dim": -1}),
        *_weights(f"{block}.mlp.fc2"),
    ]


def _add_block(perm: Perm, block: str, heads: int, seen: Sequence[str]) -> None:
    """Add a block's own nodes: queries with keys, values, and hidden units."""
    qkv, groups = f"{block}.attn.qkv", {"group": {"num": heads, "same": False}}
    looks: list[dict[str, Any]] = [
        {"act_module": {"name": f"{block}.attn.{name}", "hook": "post", "reshape_func": ("norm_qk", {})}}
        for name in seen
    ]
    splits: dict[str, dict[str, Any]] = {
        name: {"split_dim": [0, f"{qkv}.{name}", ["q", "k", "v"]]} for name in ("weight", "bias")
    }
    perm[len(perm)] = [
        [0, f"{qkv}.weight_q", {**groups, **splits["weight"], **looks[0]}],
        [0, f"{qkv}.bias_q", splits["bias"]],
        [0, f"{qkv}.weight_k", looks[1]],
        [0, f"{qkv}.bias_k"],
    ]
    values = [[0, f"{qkv}.weight_v", groups], [0, f"{qkv}.bias_v"]]
    perm[len(perm)] = [*values, _reads(f"{block}.attn.proj", {"dim": -1})]
    perm[len(perm)] = [*_weights(f"{block}.mlp.fc1"), _reads(f"{block}.mlp.fc2", {"dim": -1})]


def _weights(module: str, names: Sequence[str] = ("weight", "bias")) -> Entries:
    return [[0, f"{module}.{name}"] for name in names]


def _reads(module: str, place: Any = None) -> list[Any]:
    return [1, f"{module}.weight", {"in": place}]


def _head(ignore: bool) -> list[Any]:
    axis, tensor, options = _reads("head")
    return [axis, tensor, {**options, "ignore": None} if ignore else options]
