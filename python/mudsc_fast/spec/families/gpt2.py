"""GPT-2 with the names of Hugging Face."""

from __future__ import annotations

from mudsc_fast.spec.families.layers import (
    Head,
    check_divides,
    check_positive,
    embedding,
    feed_forward,
    fused_attention,
    norm,
    token_head,
)
from mudsc_fast.spec.permutation_spec import PermutationSpec


def gpt2(num_layers: int, num_heads: int, width: int, *, head: Head = "tied") -> PermutationSpec:
    """Return the specification of ``GPT2LMHeadModel``.

    The nodes are ``stream`` and, for each layer, ``h.0.attn.qk``, ``h.0.attn.v`` (both grouped by head) and
    ``h.0.mlp``.

    Parameters
    ----------
    num_layers, num_heads, width
        ``n_layer``, ``n_head`` and ``n_embd`` of the configuration, e.g. 12, 12 and 768.
    head
        Whether ``lm_head`` is the embedding table itself (``"tied"``), a separate tensor (``"separate"``), or missing,
        as in files that do not store tied tensors twice (``"absent"``).

    Raises
    ------
    ValueError
        If a number is below 1, `num_heads` does not divide `width`, or `head` is unknown.
    """
    check_positive(num_layers=num_layers)
    check_divides("num_heads", num_heads, "width", width)
    stream = "stream"
    network = embedding("transformer.wte", stream) + embedding("transformer.wpe", stream)
    for index in range(num_layers):
        node, layer = f"h.{index}", f"transformer.h.{index}"
        network += norm(f"{layer}.ln_1", stream)
        network += fused_attention(
            f"{node}.attn",
            f"{layer}.attn.c_attn",
            f"{layer}.attn.c_proj",
            stream,
            num_heads,
            width,
            transposed=True,
        )
        network += norm(f"{layer}.ln_2", stream)
        network += feed_forward(f"{node}.mlp", f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj", stream, transposed=True)
    return (network + norm("transformer.ln_f", stream) + token_head("lm_head", stream, head)).spec()
