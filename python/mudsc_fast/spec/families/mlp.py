"""Chains of linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.permutation_spec import PermutationSpec


def mlp(layers: Sequence[str], *, bias: bool = True) -> PermutationSpec:
    """Return the specification of a chain of linear layers with elementwise functions between them.

    Parameters
    ----------
    layers
        Names of the ``torch.nn.Linear`` modules from input to output. The outputs of every layer but the last form a
        node with the name of the layer. The input and output of the network keep their order.
    bias
        Whether the layers have biases.

    Raises
    ------
    ValueError
        If there are fewer than two layers, or a name occurs twice.
    """
    if len(layers) < 2:
        raise ValueError(f"layers must name at least two layers, got {list(layers)}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers must be distinct, got {list(layers)}")
    axes: dict[str, tuple[str | None, ...]] = {}
    for position, layer in enumerate(layers):
        produced = layer if position < len(layers) - 1 else None
        consumed = layers[position - 1] if position > 0 else None
        axes[f"{layer}.weight"] = (produced, consumed)
        if bias:
            axes[f"{layer}.bias"] = (produced,)
    return PermutationSpec(axes)
