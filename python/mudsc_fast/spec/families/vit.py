"""Vision transformers with the names of timm and of Hugging Face."""

from __future__ import annotations

from mudsc_fast.spec.axes import produces
from mudsc_fast.spec.families.layers import (
    PartialSpec,
    attention,
    check_divides,
    check_positive,
    feed_forward,
    fused_attention,
    linear,
    norm,
)
from mudsc_fast.spec.permutation_spec import PermutationSpec


def vit(
    num_blocks: int,
    num_heads: int,
    width: int,
    *,
    class_token: bool = True,
    qkv_bias: bool = True,
    published: bool = False,
) -> PermutationSpec:
    """Return the specification of timm's ``VisionTransformer``.

    The nodes are ``stream`` and, for each block, ``blocks.0.attn.qk``, ``blocks.0.attn.v`` (both grouped by head) and
    ``blocks.0.mlp``.

    Parameters
    ----------
    num_blocks, num_heads, width
        Shape of the transformer, e.g. 12, 12 and 768 for ViT-B.
    class_token
        Whether there is a ``cls_token``.
    qkv_bias
        Whether the fused layer of queries, keys and values has a bias.
    published
        Use the nodes of the published MuDSC specification: the heads of ``attn.qk`` and ``attn.v`` are matched
        independently, although the function of a layer depends on their common order, and queries are not observed.

    Raises
    ------
    ValueError
        If a number is below 1 or `num_heads` does not divide `width`.
    """
    check_positive(num_blocks=num_blocks)
    check_divides("num_heads", num_heads, "width", width)
    stream = "stream"
    tokens = ["cls_token", "pos_embed"] if class_token else ["pos_embed"]
    network = PartialSpec({name: (None, None, produces(stream)) for name in tokens})
    network += linear("patch_embed.proj", stream, None)
    for index in range(num_blocks):
        block = f"blocks.{index}"
        network += norm(f"{block}.norm1", stream)
        network += fused_attention(
            f"{block}.attn",
            f"{block}.attn.qkv",
            f"{block}.attn.proj",
            stream,
            num_heads,
            width,
            bias=qkv_bias,
            published=published,
        )
        network += norm(f"{block}.norm2", stream)
        network += feed_forward(f"{block}.mlp", f"{block}.mlp.fc1", f"{block}.mlp.fc2", stream)
    return (network + norm("norm", stream) + linear("head", None, stream)).spec()


def vit_huggingface(num_layers: int, num_heads: int, *, checkpoint_names: bool = False) -> PermutationSpec:
    """Return the specification of ``ViTForImageClassification`` from Hugging Face.

    The nodes are ``stream`` and, for each layer, ``layers.0.attention.qk``, ``layers.0.attention.v`` (both grouped by
    head) and ``layers.0.mlp``.

    Parameters
    ----------
    num_layers, num_heads
        ``num_hidden_layers`` and ``num_attention_heads`` of the configuration, e.g. 12 and 12.
    checkpoint_names
        Use the names of published checkpoints and of transformers before version 5
        (``vit.encoder.layer.0.attention.attention.query``) instead of the module names since version 5
        (``vit.layers.0.attention.q_proj``).

    Raises
    ------
    ValueError
        If a number is below 1.
    """
    check_positive(num_layers=num_layers, num_heads=num_heads)
    if checkpoint_names:
        layers, query, key, value = "encoder.layer", "attention.query", "attention.key", "attention.value"
        output, first, second = "attention.output.dense", "intermediate.dense", "output.dense"
    else:
        layers, query, key, value = "layers", "q_proj", "k_proj", "v_proj"
        output, first, second = "attention.o_proj", "mlp.fc1", "mlp.fc2"
    stream = "stream"
    tokens = ("cls_token", "position_embeddings")
    network = PartialSpec({f"vit.embeddings.{name}": (None, None, produces(stream)) for name in tokens})
    network += linear("vit.embeddings.patch_embeddings.projection", stream, None)
    for index in range(num_layers):
        node, layer = f"layers.{index}", f"vit.{layers}.{index}"
        queries, keys, values = (f"{layer}.attention.{name}" for name in (query, key, value))
        network += norm(f"{layer}.layernorm_before", stream)
        network += attention(f"{node}.attention", queries, keys, values, f"{layer}.{output}", stream, num_heads)
        network += norm(f"{layer}.layernorm_after", stream)
        network += feed_forward(f"{node}.mlp", f"{layer}.{first}", f"{layer}.{second}", stream)
    return (network + norm("vit.layernorm", stream) + linear("classifier", None, stream)).spec()
