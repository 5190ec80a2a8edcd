"""Swin transformers with the names of timm."""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.axes import Axis, consumes, produces
from mudsc_fast.spec.families.layers import (
    PartialSpec,
    check_divides,
    check_positive,
    feed_forward,
    fused_attention,
    heads_of,
    linear,
    norm,
)
from mudsc_fast.spec.observation import Observation
from mudsc_fast.spec.permutation_spec import PermutationSpec


def swin(blocks: Sequence[int], heads: Sequence[int], width: int) -> PermutationSpec:
    """Return the specification of ``SwinTransformer`` from timm.

    The nodes are ``layers.0``, ... (the stream of each stage) and, for each block, ``layers.0.blocks.0.attn.qk`` and
    ``layers.0.blocks.0.attn.v`` (both grouped by head), ``layers.0.blocks.0.attn.heads`` (the columns of the relative
    position table, in the common order of the heads) and ``layers.0.blocks.0.mlp``.

    Heads are observed at the softmax of the attention, which is a module only if fused attention is off: call
    ``timm.layers.set_fused_attn(False)`` before the model is created.

    Parameters
    ----------
    blocks, heads
        Number of blocks and of heads in each stage, e.g. ``(2, 2, 6, 2)`` and ``(3, 6, 12, 24)`` for Swin-T.
    width
        Number of units of the first stage. Each stage has twice as many as the one before.

    Raises
    ------
    ValueError
        If `blocks` and `heads` have different lengths, a number is below 1, or the heads of a stage do not divide its
        width.
    """
    if not blocks or len(blocks) != len(heads):
        raise ValueError(f"blocks and heads must have one entry per stage, got {list(blocks)} and {list(heads)}")
    check_positive(**{f"blocks[{stage}]": count for stage, count in enumerate(blocks)})
    stream = "layers.0"
    network = linear("patch_embed.proj", stream, None) + norm("patch_embed.norm", stream)
    for stage, count in enumerate(blocks):
        check_divides(f"heads[{stage}]", heads[stage], f"the width of stage {stage}", width << stage)
        if stage > 0:
            # Four neighboring positions are concatenated into one.
            before, stream = stream, f"layers.{stage}"
            network += norm(f"{stream}.downsample.norm", Axis(before, "produce", outer=4))
            network += linear(f"{stream}.downsample.reduction", stream, consumes(before, outer=4), bias=False)
        for index in range(count):
            network += _block(f"layers.{stage}.blocks.{index}", stream, heads[stage], width << stage)
    every_position = PartialSpec(observe={stream: (Observation("norm", "output", -1),)})
    return (network + norm("norm", stream) + linear("head.fc", None, stream) + every_position).spec()


def _block(block: str, stream: str, heads: int, width: int) -> PartialSpec:
    attention, per_head = f"{block}.attn", f"{block}.attn.heads"
    return (
        norm(f"{block}.norm1", stream)
        + fused_attention(attention, f"{attention}.qkv", f"{attention}.proj", stream, heads, width)
        + PartialSpec(
            {f"{attention}.relative_position_bias_table": (None, produces(per_head))},
            {per_head: (Observation(f"{attention}.softmax", "output", 1),)},
        )
        + heads_of(attention, heads, per_head)
        + norm(f"{block}.norm2", stream)
        + feed_forward(f"{block}.mlp", f"{block}.mlp.fc1", f"{block}.mlp.fc2", stream)
    )
