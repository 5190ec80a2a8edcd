"""Whole networks merged by the published program: the same clusters, the same parameters, the same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mudsc_fast
from architectures import ResNet, VisionTransformer
from conftest import load_golden
from mudsc_fast import Mode, PermutationSpec, Space
from mudsc_fast.spec import resnet, vit

pytestmark = pytest.mark.usefixtures("one_thread")


def network(family: str) -> nn.Module:
    if family == "vit":
        return VisionTransformer()
    return ResNet((1, 1, 1), (8, 16, 32), norm_groups=4 if family == "resnet_gn" else None)


SPECS: dict[str, PermutationSpec] = {
    "resnet_bn": resnet((1, 1, 1), names="cifar"),
    "resnet_gn": resnet((1, 1, 1), names="cifar", norm_groups=4),
    "vit": vit(2, 3, 24, published=True),
}


#: Units of model 0 that are dead on the data: with which units they are paired is the solver's choice.
DEAD_UNITS = {"resnet_bn_act_align": {"layer3": 6}}


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize(("kind", "space"), [("act", "activation"), ("weight", "weight"), ("mudsc", "dual")])
@pytest.mark.parametrize("family", SPECS)
def test_golden_networks(family: str, kind: str, space: Space, mode: Mode) -> None:
    file, spec = f"{family}_{kind}_{mode}", SPECS[family]
    arrays = load_golden(file)
    golden = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "mode"}
    models = []
    for index in range(2):
        model, prefix = network(family), f"model{index}/"
        model.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
        models.append(model.eval())
    data = [golden[f"input{index}"] for index in range(3)]
    result = mudsc_fast.merge(models, spec, data, mode=mode, space=space, balance=float(golden["balance"]))
    assert result.unmatched_tensors == ()
    dead = DEAD_UNITS.get(file, {})
    for index, node in enumerate(spec.nodes):
        clusters = result.matching[node].cluster_of_unit.flatten()
        differ = clusters != golden[f"unmerge/{index}"].argmax(1)
        assert int(differ.sum()) == dead.get(node, 0), node
        if node in dead:
            similarity = mudsc_fast.activation_similarity(models, spec, data).of(node, "full")
            assert similarity[clusters[differ]].abs().max() == 0
    for name, tensor in result.state_dict.items():
        if not any(use.tensor == name for node in dead for use in spec.uses(node)):
            torch.testing.assert_close(tensor, golden[f"merged/{name}"], rtol=1e-4, atol=1e-4)
    if not dead:
        assert result.model is not None
        with torch.no_grad():
            output = result.model.eval()(golden["input0"])
        torch.testing.assert_close(output, golden["output0"], rtol=1e-4, atol=1e-4)
