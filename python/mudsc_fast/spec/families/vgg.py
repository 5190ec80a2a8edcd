"""Plain chains of convolutions followed by a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from mudsc_fast.spec.axes import consumes
from mudsc_fast.spec.families.layers import PartialSpec, batch_norm, check_positive, linear
from mudsc_fast.spec.permutation_spec import PermutationSpec


def vgg(
    convolutions: Sequence[int],
    *,
    batch_norms: bool = False,
    positions: int = 49,
    classifier: Sequence[str] = ("classifier.0", "classifier.3", "classifier.6"),
) -> PermutationSpec:
    """Return the specification of VGG from torchvision, or of a variant with another classifier.

    Every layer but the last is a node with the name of the layer: ``features.0``, ..., ``classifier.0``, ...

    Parameters
    ----------
    convolutions
        Number of convolutions before each pooling, e.g. ``(2, 2, 3, 3, 3)`` for VGG-16.
    batch_norms
        Whether a BatchNorm follows each convolution.
    positions
        Height times width of the feature map that is flattened for the classifier: 7 * 7 in torchvision.
    classifier
        Names of the linear layers.

    Raises
    ------
    ValueError
        If there are no stages or no linear layers, or a number is below 1.
    """
    if not convolutions or not classifier:
        raise ValueError(
            f"convolutions and classifier must not be empty, got {list(convolutions)} and {list(classifier)}"
        )
    check_positive(positions=positions, **{f"convolutions[{stage}]": n for stage, n in enumerate(convolutions)})
    network, reads, index = PartialSpec(), None, 0
    for count in convolutions:
        for _ in range(count):
            layer = f"features.{index}"
            network += linear(layer, layer, reads)
            if batch_norms:
                network += batch_norm(f"features.{index + 1}", layer)
            reads = layer
            index += 3 if batch_norms else 2  # convolution, norm, function
        index += 1  # pooling
    assert reads is not None  # there is at least one convolution
    entered = consumes(reads, inner=positions)
    for position, layer in enumerate(classifier):
        writes = layer if position < len(classifier) - 1 else None
        network += linear(layer, writes, entered)
        entered = consumes(layer)
    return network.spec()
