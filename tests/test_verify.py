"""A family that is recognized by the names of tensors is only used if it fits what the model computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import mudsc_fast
from architectures import randomize
from mudsc_fast._copy import copy_module
from mudsc_fast.matching.verify import keeps_outputs
from networks import random_permutations
from paper.networks import BasicBlock, ResNet20


class Rewired(ResNet20):
    """The tensors of a ResNet, but the inner channels of the first stage's blocks are added to its stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        for block in self.layer1:
            assert isinstance(block, BasicBlock)
            hidden = functional.relu(block.bn1(block.conv1(x))) + x
            x = functional.relu(block.bn2(block.conv2(hidden)) + x)
        vectors: Tensor = self.linear(self.layer3(self.layer2(x)).mean((2, 3)))
        return vectors


IMAGES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def test_family_is_verified_by_outputs() -> None:
    family = mudsc_fast.spec.resnet([3, 3, 3], names="cifar")
    plain, rewired = (randomize(network(outputs=10), 0).eval() for network in (ResNet20, Rewired))
    assert keeps_outputs(plain, family, IMAGES[0])
    assert not keeps_outputs(rewired, family, IMAGES[0])
    assert mudsc_fast.match([plain, copy_module(plain)], IMAGES).spec == family


def test_different_wiring_with_same_names_is_derived() -> None:
    model = randomize(Rewired(outputs=10), 0).eval()
    derived = mudsc_fast.PermutationSpec.from_model(model, IMAGES[0])
    other = copy_module(model)
    orders = random_permutations(derived, model, 1)
    other.load_state_dict(mudsc_fast.permute_state_dict(model.state_dict(), derived, orders))
    merged = mudsc_fast.merge([model, other], IMAGES).model
    assert merged is not None
    with torch.no_grad():
        torch.testing.assert_close(merged(IMAGES[0]), model(IMAGES[0]), rtol=1e-3, atol=1e-3)


def test_models_that_fail_on_batch_are_not_verified() -> None:
    model = ResNet20(outputs=10)
    assert keeps_outputs(model, mudsc_fast.spec.resnet([3, 3, 3], names="cifar"), {"pixels": IMAGES[0]})
