"""Random networks: permutations that the derived specification allows do not change the outputs."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mudsc_fast
from conftest import TORCH_VERSION
from networks import random_group_permutations


class Network(nn.Module):
    """A sequence of a few random layers; some also read the output of an earlier one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.weights = nn.ParameterDict()
        self(torch.zeros(3, 4, 6))  # creates the parameters
        generator = torch.Generator().manual_seed(seed)
        for weight in self.weights.values():
            values = torch.randn(weight.shape, generator=generator)
            weight.data = values * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1 + 0.5 * values
        self.double().requires_grad_(False)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            self.weights[name] = nn.Parameter(torch.zeros(shape))
        weight: Tensor = self.weights[name]
        return weight

    def forward(self, values: Tensor) -> Tensor:
        choice = random.Random(self.seed)
        written = [F.linear(values, self.weight("first", 24, 6))]
        for index in range(choice.randint(4, 14)):
            hidden = choice.choice(written[-3:])
            layer = choice.choice(LAYERS)
            if hidden.shape[-1] % 12 == 0:  # a length that all layers can divide
                written.append(layer(self, f"{index}", hidden, choice, written))
            else:
                written.append(F.linear(hidden, self.weight(f"{index}", 24, hidden.shape[-1])))
        beside = F.gelu(F.linear(values, self.weight("beside", 5, 6)))  # so that at least one node can be permuted
        total = F.linear(beside, self.weight("last5", 3, 5))
        total = total + F.linear(written[-1], self.weight("last", 3, written[-1].shape[-1]))
        for hidden in choice.sample(written, 2):
            total = total + F.linear(hidden, self.weight(f"last{hidden.shape[-1]}", 3, hidden.shape[-1]))
        return total


Layer = Callable[[Network, str, Tensor, random.Random, list[Tensor]], Tensor]


def heads(hidden: Tensor, count: int) -> Tensor:
    result: Tensor = hidden.unflatten(-1, (count, hidden.shape[-1] // count))
    return result


def linear(net: Network, name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    return F.gelu(F.linear(hidden, net.weight(name, choice.choice([12, 24, 36]), hidden.shape[-1])))


def shared_linear(net: Network, _name: str, hidden: Tensor, _choice: random.Random, _: list[Tensor]) -> Tensor:
    return torch.tanh(F.linear(hidden, net.weight(f"shared{hidden.shape[-1]}", 24, hidden.shape[-1])))


def scaled(net: Network, name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    width = hidden.shape[-1]
    count = choice.choice([1, 2, 3])
    scale = net.weight(name, width // count)
    return F.layer_norm(heads(hidden, count), [width // count], scale).flatten(2) * net.weight(f"{name}s", width)


def group_norm(net: Network, name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    scale = net.weight(name, hidden.shape[-1])
    return F.group_norm(hidden.transpose(1, 2), choice.choice([2, 3, 4]), scale).transpose(1, 2)


def attention(net: Network, name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    width, count = hidden.shape[-1], choice.choice([2, 4])
    fused = F.linear(hidden, net.weight(name, 3 * width, width))
    if choice.random() < 0.4:
        query, key, value = fused.view(3, 4, 3, count, -1).permute(2, 0, 3, 1, 4)
    elif choice.random() < 0.6:
        query, key, value = (heads(part, count).transpose(1, 2) for part in fused.chunk(3, -1))
    else:
        query, key, value = heads(fused, count).transpose(1, 2).chunk(3, -1)
    mixed: Tensor = (query @ key.transpose(-1, -2)).softmax(-1) @ value
    return mixed.transpose(1, 2).reshape(hidden.shape)


def grouped_attention(net: Network, name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    sizes = {"q": (24, 4), "k": (12, 2), "v": (12, 2)}
    query, key, value = (
        heads(F.linear(hidden, net.weight(f"{name}{part}", size, hidden.shape[-1])), count).transpose(1, 2)
        for part, (size, count) in sizes.items()
    )
    if choice.random() < 0.5 or TORCH_VERSION < (2, 5):  # torch 2.4 has no enable_gqa
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).flatten(2)


def convolution(net: Network, name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    groups = choice.choice([1, 2, 4, hidden.shape[-1]])
    outputs = 12 if groups <= 4 else groups
    weight = net.weight(name, outputs, hidden.shape[-1] // groups, 3)
    return F.conv1d(hidden.transpose(1, 2), weight, padding=1, groups=groups).transpose(1, 2)


def cut(_net: Network, _name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    place = choice.choice([2, 6, 8])
    parts = [torch.tanh(hidden[..., :place]), hidden[..., place:]]
    return choice.choice([torch.cat(parts, -1), parts[1], heads(hidden, 2)[:, :, 1], F.glu(hidden, -1)])


def joined(_net: Network, _name: str, hidden: Tensor, choice: random.Random, written: list[Tensor]) -> Tensor:
    other = choice.choice(written)
    return hidden + other if hidden.shape == other.shape else torch.cat([hidden, other], -1)


def turned(_net: Network, _name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    count = choice.choice([2, 3, 4])
    first, second = hidden.chunk(2, -1)
    return choice.choice(
        [
            heads(hidden, count).transpose(2, 3).flatten(2),
            torch.stack([first, torch.tanh(second)], -1).flatten(2),
            hidden + torch.cat([-second, first], -1) * torch.linspace(0, 1, hidden.shape[-1]),
            hidden.repeat_interleave(2, -1),
            heads(hidden, count).mean(choice.choice([2, 3])),
        ]
    )


def ordered(_net: Network, _name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    return choice.choice([hidden.flip(-1), hidden.roll(1, -1), hidden.cumsum(-1) / 4, hidden.sort(-1).values])


def mixed(net: Network, name: str, hidden: Tensor, choice: random.Random, _: list[Tensor]) -> Tensor:
    count = choice.choice([2, 3])
    split = heads(hidden, count)
    per_head = torch.einsum("blad,ade->blae", split, net.weight(name, count, hidden.shape[-1] // count, 6)).flatten(2)
    scores = torch.einsum("blhd,bmhd->blhm", split, torch.tanh(split)).flatten(2) / hidden.shape[-1]
    return choice.choice([per_head, scores, F.linear(split, net.weight(f"{name}h", 4, split.shape[-1])).flatten(2)])


LAYERS: list[Layer] = [
    linear,
    linear,
    shared_linear,
    scaled,
    group_norm,
    attention,
    grouped_attention,
    convolution,
    cut,
    joined,
    turned,
    ordered,
    mixed,
]


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_permuted_random_networks_keep_their_function(first: int) -> None:
    moved = 0
    for seed in range(first, first + 10):
        network = Network(seed)
        values = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        spec = mudsc_fast.PermutationSpec.from_model(network, values)
        spec.validate(network)
        state = network.state_dict()
        permutations = random_group_permutations(spec, spec.units(state), seed)
        copied = copy.deepcopy(network)
        copied.load_state_dict(mudsc_fast.permute_state_dict(state, spec, permutations))
        torch.testing.assert_close(copied(values), network(values), rtol=1e-8, atol=1e-8, msg=f"seed {seed}")
        moved += len(permutations)
    assert moved >= 20
