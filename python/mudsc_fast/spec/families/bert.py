"""BERT with the tensor names of Hugging Face."""

from __future__ import annotations

from typing import Literal

from mudsc_fast._checks import check_choice
from mudsc_fast.spec.families.layers import (
    attention,
    check_positive,
    embedding,
    feed_forward,
    linear,
    norm,
    tied_head,
)
from mudsc_fast.spec.permutation_spec import PermutationSpec


def bert(
    num_layers: int, num_heads: int, *, head: Literal["classifier", "masked_lm"] = "classifier"
) -> PermutationSpec:
    """Return the specification of ``BertForSequenceClassification`` or ``BertForMaskedLM``.

    The nodes are ``stream`` and, for each layer, ``layer.0.attention.qk``, ``layer.0.attention.v`` (both grouped by
    head) and ``layer.0.mlp``. A classifier also has ``pooler``. The hidden layer in the head of a masked language model
    belongs to ``stream``, because its output layer is the embedding table.

    Parameters
    ----------
    num_layers, num_heads
        ``num_hidden_layers`` and ``num_attention_heads`` of the configuration, e.g. 12 and 12.
    head
        What follows the encoder: pooler and classifier, or the head of a masked language model.

    Raises
    ------
    ValueError
        If a number is below 1 or `head` is unknown.
    """
    check_positive(num_layers=num_layers, num_heads=num_heads)
    check_choice("head", head, ("classifier", "masked_lm"))
    stream = "stream"
    network = norm("bert.embeddings.LayerNorm", stream)
    for table in ("word", "position", "token_type"):
        network += embedding(f"bert.embeddings.{table}_embeddings", stream)
    for index in range(num_layers):
        node, layer = f"layer.{index}", f"bert.encoder.layer.{index}"
        query, key, value = (f"{layer}.attention.self.{name}" for name in ("query", "key", "value"))
        output = f"{layer}.attention.output"
        network += attention(f"{node}.attention", query, key, value, f"{output}.dense", stream, num_heads)
        network += norm(f"{output}.LayerNorm", stream)
        network += feed_forward(f"{node}.mlp", f"{layer}.intermediate.dense", f"{layer}.output.dense", stream)
        network += norm(f"{layer}.output.LayerNorm", stream)
    if head == "classifier":
        network += linear("bert.pooler.dense", "pooler", stream) + linear("classifier", None, "pooler")
    else:
        transform = "cls.predictions.transform"
        network += linear(f"{transform}.dense", stream, stream) + norm(f"{transform}.LayerNorm", stream)
        network += tied_head("cls.predictions.decoder", stream)
    return network.spec()
