"""The towers of CLIP with the names of OpenAI and of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass

from mudsc_fast.spec.axes import consumes, produces
from mudsc_fast.spec.families.layers import (
    PartialSpec,
    attention,
    check_divides,
    check_positive,
    embedding,
    feed_forward,
    linear,
    norm,
    packed_attention,
)
from mudsc_fast.spec.observation import Observation
from mudsc_fast.spec.permutation_spec import PermutationSpec


@dataclass(frozen=True)
class Tower:
    """The shape of a transformer: 12, 12 and 768 for the images of ViT-B, and 12, 8 and 512 for its texts.

    Raises
    ------
    ValueError
        If a number is below 1 or `num_heads` does not divide `width`.
    """

    num_layers: int
    num_heads: int
    width: int

    def __post_init__(self) -> None:
        check_positive(num_layers=self.num_layers)
        check_divides("num_heads", self.num_heads, "width", self.width)


def clip_openai(vision: Tower | None = None, text: Tower | None = None) -> PermutationSpec:
    """Return the specification of ``CLIP`` from OpenAI or open_clip, with a vision transformer.

    The nodes are, for ``visual`` and for ``text``, ``visual.stream`` and for each block ``visual.0.attn.qk``,
    ``visual.0.attn.v`` (both grouped by head) and ``visual.0.mlp``. The joint embedding space of
    images and texts keeps its order.

    Parameters
    ----------
    vision, text
        The towers to match. A tower that is not given keeps its order and may be missing from the tensors.

    Raises
    ------
    ValueError
        If neither tower is given.
    """
    _check_towers(vision, text)
    network = PartialSpec()
    if vision is not None:
        stream = "visual.stream"
        network += PartialSpec({"visual.class_embedding": (produces(stream),)})
        network += PartialSpec({"visual.positional_embedding": (None, produces(stream))})
        network += linear("visual.conv1", stream, None, bias=False) + norm("visual.ln_pre", stream)
        network += _openai_blocks("visual", "visual.transformer.resblocks", vision)
        network += norm("visual.ln_post", stream) + PartialSpec(
            {"visual.proj": (consumes(stream), None)}, {stream: (Observation("visual.ln_post", "output", -1),)}
        )
    if text is not None:
        stream = "text.stream"
        network += embedding("token_embedding", stream)
        network += PartialSpec({"positional_embedding": (None, produces(stream))})
        network += _openai_blocks("text", "transformer.resblocks", text)
        network += norm("ln_final", stream) + PartialSpec(
            {"text_projection": (consumes(stream), None)}, {stream: (Observation("ln_final", "output", -1),)}
        )
    return network.spec()


def clip_huggingface(vision: Tower | None = None, text: Tower | None = None) -> PermutationSpec:
    """Return the specification of ``CLIPModel`` from Hugging Face, or of one tower ``WithProjection``.

    The nodes are, for ``vision`` and for ``text``, ``vision.stream`` and for each layer ``vision.0.attn.qk``,
    ``vision.0.attn.v`` (both grouped by head) and ``vision.0.mlp``. The joint embedding space of
    images and texts keeps its order.

    Parameters
    ----------
    vision, text
        The towers to match. A tower that is not given keeps its order and may be missing from the tensors.

    Raises
    ------
    ValueError
        If neither tower is given.
    """
    _check_towers(vision, text)
    network = PartialSpec()
    if vision is not None:
        stream, embeddings = "vision.stream", "vision_model.embeddings"
        network += PartialSpec({f"{embeddings}.class_embedding": (produces(stream),)})
        network += linear(f"{embeddings}.patch_embedding", stream, None, bias=False)
        network += embedding(f"{embeddings}.position_embedding", stream)
        network += norm("vision_model.pre_layrnorm", stream)  # sic
        network += _huggingface_layers("vision", vision)
        network += norm("vision_model.post_layernorm", stream)
        network += linear("visual_projection", None, stream, bias=False)
    if text is not None:
        stream, embeddings = "text.stream", "text_model.embeddings"
        network += embedding(f"{embeddings}.token_embedding", stream)
        network += embedding(f"{embeddings}.position_embedding", stream)
        network += _huggingface_layers("text", text)
        network += norm("text_model.final_layer_norm", stream)
        network += linear("text_projection", None, stream, bias=False)
    return network.spec()


def _openai_blocks(tower: str, modules: str, shape: Tower) -> PartialSpec:
    stream, blocks = f"{tower}.stream", PartialSpec()
    for index in range(shape.num_layers):
        node, block = f"{tower}.{index}", f"{modules}.{index}"
        blocks += norm(f"{block}.ln_1", stream)
        blocks += packed_attention(f"{node}.attn", f"{block}.attn", stream, shape.num_heads, shape.width)
        blocks += norm(f"{block}.ln_2", stream)
        blocks += feed_forward(f"{node}.mlp", f"{block}.mlp.c_fc", f"{block}.mlp.c_proj", stream)
    return blocks


def _huggingface_layers(tower: str, shape: Tower) -> PartialSpec:
    stream, layers = f"{tower}.stream", PartialSpec()
    for index in range(shape.num_layers):
        node, layer = f"{tower}.{index}", f"{tower}_model.encoder.layers.{index}"
        query, key, value, output = (f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
        layers += norm(f"{layer}.layer_norm1", stream)
        layers += attention(f"{node}.attn", query, key, value, output, stream, shape.num_heads)
        layers += norm(f"{layer}.layer_norm2", stream)
        layers += feed_forward(f"{node}.mlp", f"{layer}.mlp.fc1", f"{layer}.mlp.fc2", stream)
    return layers


def _check_towers(vision: Tower | None, text: Tower | None) -> None:
    if vision is None and text is None:
        raise ValueError("vision or text must be given, got None for both")
