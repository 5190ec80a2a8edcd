"""LLaMA and the families built like it, with the names of Hugging Face."""

from __future__ import annotations

from mudsc_fast.spec.families.layers import (
    Head,
    check_divides,
    check_positive,
    embedding,
    gated_feed_forward,
    norm,
    rotary_attention,
    token_head,
)
from mudsc_fast.spec.permutation_spec import PermutationSpec


def llama(
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_width: int,
    *,
    qkv_bias: bool = False,
    head: Head = "separate",
) -> PermutationSpec:
    """Return the specification of ``LlamaForCausalLM``, also for Mistral, Qwen2 and Qwen3.

    The nodes are ``stream`` and, for each layer, ``layers.0.mlp`` and the nodes of the attention. With grouped queries
    these are ``layers.0.attn.q`` (query heads) and ``layers.0.attn.kv`` (heads of keys and values), else
    ``layers.0.attn.qk`` (heads of queries and keys) and ``layers.0.attn.v`` (units of values, grouped by head). Query
    and key norms that all heads share, as in Qwen3, keep their order.

    Parameters
    ----------
    num_layers, num_heads, num_kv_heads, head_width
        ``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads`` and ``head_dim`` of the configuration
        (by default the hidden size divided by the number of heads), e.g. 32, 32, 8 and 128 for LLaMA 3 8B.
    qkv_bias
        Whether queries, keys and values have biases, as in Qwen2.
    head
        Whether ``lm_head`` is a separate tensor (``"separate"``), the embedding table itself (``"tied"``), or missing,
        as in files that do not store tied tensors twice (``"absent"``).

    Raises
    ------
    ValueError
        If a number is below 1, `num_kv_heads` does not divide `num_heads`, or `head` is unknown.
    """
    check_positive(num_layers=num_layers, head_width=head_width)
    check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
    stream = "stream"
    network = embedding("model.embed_tokens", stream)
    for index in range(num_layers):
        node, layer = f"layers.{index}", f"model.layers.{index}"
        network += norm(f"{layer}.input_layernorm", stream, bias=False)
        network += rotary_attention(
            f"{node}.attn", f"{layer}.self_attn", stream, num_heads, num_kv_heads, head_width, bias=qkv_bias
        )
        network += norm(f"{layer}.post_attention_layernorm", stream, bias=False)
        network += gated_feed_forward(f"{node}.mlp", f"{layer}.mlp", stream)
    return (network + norm("model.norm", stream, bias=False) + token_head("lm_head", stream, head)).spec()
