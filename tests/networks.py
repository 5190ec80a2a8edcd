"""Small networks that several test files merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mudsc_fast.matching.node import NodeMatching
from mudsc_fast.spec import PermutationSpec

MLP_AXES = {
    "fc1.weight": ("fc1", None),
    "fc1.bias": ("fc1",),
    "fc2.weight": ("fc2", "fc1"),
    "fc2.bias": ("fc2",),
    "fc3.weight": (None, "fc2"),
    "fc3.bias": (None,),
}
MLP_SPEC = PermutationSpec(MLP_AXES)


def make_mlp(
    widths: Sequence[int] = (20, 32, 32, 10), seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """Return an MLP with layers fc1, fc2, fc3 and random weights."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential()
    for index in range(len(widths) - 1):
        layer = nn.Linear(widths[index], widths[index + 1], dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * widths[index] ** -0.5)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.1)
        model.add_module(f"fc{index + 1}", layer)
        if index < len(widths) - 2:
            model.add_module(f"relu{index + 1}", nn.ReLU())
    return model


class ConvNet(nn.Module):
    """Two convolutions with BatchNorm and a linear head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 9, 3)
        self.fc = nn.Linear(9, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores."""
        hidden = self.conv2(torch.relu(self.bn1(self.conv1(images))))
        scores: Tensor = self.fc(torch.relu(hidden).mean((2, 3)))
        return scores


CONV_SPEC = PermutationSpec(
    {
        "conv1.weight": ("first", None),
        "conv1.bias": ("first",),
        "bn1.weight": ("first",),
        "bn1.bias": ("first",),
        "bn1.running_mean": ("first",),
        "bn1.running_var": ("first",),
        "conv2.weight": ("second", "first"),
        "conv2.bias": ("second",),
        "fc.weight": (None, "second"),
    }
)


def random_permutations(spec: PermutationSpec, model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return a random order of the units of every node."""
    generator = torch.Generator().manual_seed(seed)
    return {node: torch.randperm(units, generator=generator) for node, units in spec.units(model.state_dict()).items()}


def random_group_permutations(spec: PermutationSpec, units: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Return a random order of every node that keeps groups together and tied groups in a common order."""
    generator = torch.Generator().manual_seed(seed)

    def random_order(count: int) -> Tensor:
        order = torch.randperm(count, generator=generator)
        return order if count == 1 or not torch.equal(order, order.sort().values) else random_order(count)

    permutations = {}
    for nodes in spec.bundles:
        order = random_order(spec.groups(nodes[0]).count)
        for node in nodes:
            size = units[node] // len(order)
            within = torch.stack([random_order(size) for _ in order])
            permutations[node] = (order[:, None] * size + within).flatten()
    return permutations


def assert_recovered(matching: Mapping[str, NodeMatching], permutations: Mapping[str, Tensor]) -> None:
    """Assert that a network was matched with its permuted copy, whose unit k is the network's unit permutation[k]."""
    for node, permutation in permutations.items():
        clusters = matching[node].cluster_of_unit
        assert torch.equal(clusters[1], clusters[0][permutation]), node
