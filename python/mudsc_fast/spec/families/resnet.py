"""Residual convolutional networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mudsc_fast._checks import check_choice
from mudsc_fast.spec.families.layers import PartialSpec, batch_norm, check_positive, linear, norm
from mudsc_fast.spec.groups import Groups
from mudsc_fast.spec.observation import Observation
from mudsc_fast.spec.permutation_spec import PermutationSpec

#: Names of the down-sampling shortcut and of the last layer.
_NAMES = {"torchvision": ("downsample", "fc"), "cifar": ("shortcut", "linear")}


def resnet(
    blocks: Sequence[int],
    *,
    bottleneck: bool = False,
    names: Literal["torchvision", "cifar"] = "torchvision",
    norm_groups: int | None = None,
) -> PermutationSpec:
    """Return the specification of a ResNet.

    The nodes are ``stem`` (also the residual stream of the first stage, unless that has a projection shortcut),
    ``layer2``, ... (the residual streams of the other stages) and ``layer1.0.conv1``, ... (the outputs of a
    convolution inside a block).

    Parameters
    ----------
    blocks
        Number of blocks in each stage, e.g. ``(2, 2, 2, 2)`` for ResNet-18 and ``(3, 4, 6, 3)`` for ResNet-50.
    bottleneck
        Whether blocks have three convolutions, as in ResNet-50 and larger, instead of two.
    names
        Module names: those of torchvision (``downsample.0``, ``fc``) or those common for CIFAR networks
        (``shortcut.0``, ``linear``). Both start with ``conv1`` and ``bn1`` and have blocks ``layer1.0`` and so on.
    norm_groups
        Number of groups of every GroupNorm; by default the norms are BatchNorms.

    Raises
    ------
    ValueError
        If there are no stages, a number is below 1, or `names` is unknown.
    """
    if not blocks:
        raise ValueError("blocks must name the blocks of at least one stage, got none")
    check_positive(**{f"blocks[{stage}]": count for stage, count in enumerate(blocks)})
    check_choice("names", names, tuple(_NAMES))
    if norm_groups is not None:
        check_positive(norm_groups=norm_groups)
    shortcut, head = _NAMES[names]

    def convolution(conv: str, norm_name: str, writes: str, reads: str | None) -> PartialSpec:
        normalized = batch_norm(norm_name, writes) if norm_groups is None else norm(norm_name, writes)
        return linear(conv, writes, reads, bias=False) + normalized

    stream = "stem"
    network = convolution("conv1", "bn1", stream, None)
    for stage, count in enumerate(blocks, start=1):
        for index in range(count):
            block = f"layer{stage}.{index}"
            entered = stream
            if index == 0 and (stage > 1 or bottleneck):
                stream = f"layer{stage}"
            reads = entered
            for number in range(1, 3 if bottleneck else 2):
                network += convolution(f"{block}.conv{number}", f"{block}.bn{number}", f"{block}.conv{number}", reads)
                reads = f"{block}.conv{number}"
            last = 3 if bottleneck else 2
            network += convolution(f"{block}.conv{last}", f"{block}.bn{last}", stream, reads)
            if stream != entered:
                network += convolution(f"{block}.{shortcut}.0", f"{block}.{shortcut}.1", stream, entered)
    # Observed before the pooling, so that every position of the feature map is a sample, not only their mean.
    last_stage = Observation(f"layer{len(blocks)}", "output", 1)
    network += linear(head, None, stream) + PartialSpec(observe={stream: (last_stage,)})
    spec = network.spec()
    if norm_groups is None:
        return spec
    return (network + PartialSpec(groups={node: Groups(norm_groups) for node in spec.nodes})).spec()
