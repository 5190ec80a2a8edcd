"""Whole networks merged by the published program: clusters, parameters and outputs are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mudsc_fast
from architectures import ResNet, VisionTransformer
from conftest import load_golden
from mudsc_fast import Mode, PermutationSpec, Space
from mudsc_fast.spec import resnet, vit


def network(family: str) -> nn.Module:
    if family == "vit":
        return VisionTransformer()
    return ResNet((1, 1, 1), (8, 16, 32), norm_groups=4 if family == "resnet_gn" else None)


SPECS: dict[str, PermutationSpec] = {
    "resnet_bn": resnet((1, 1, 1), names="cifar"),
    "resnet_gn": resnet((1, 1, 1), names="cifar", norm_groups=4),
    "vit": vit(2, 3, 24, published=True),
}


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize(("kind", "space"), [("act", "activation"), ("weight", "weight"), ("mudsc", "dual")])
@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_golden_networks(backend: str, family: str, kind: str, space: Space, mode: Mode) -> None:
    arrays = load_golden(f"{family}_{kind}_{mode}")
    golden = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "mode"}
    spec, models = SPECS[family], []
    for index in range(2):
        model, prefix = network(family), f"model{index}/"
        model.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
        models.append(model.eval())
    data = [golden[f"input{index}"] for index in range(3)]
    with mudsc_fast.use_backend(backend):
        balance, verify = float(golden["balance"]), family != "vit"  # heads of queries and values are independent
        result = mudsc_fast.merge(models, data, spec=spec, mode=mode, space=space, balance=balance, verify=verify)
    assert result.unmatched_tensors == ()
    for index, node in enumerate(spec.nodes):
        clusters = golden[f"unmerge/{index}"].argmax(1)
        assert torch.equal(result.matching[node].cluster_of_unit.flatten(), clusters), node
    for name, tensor in result.state_dict.items():
        torch.testing.assert_close(tensor, golden[f"merged/{name}"], rtol=1e-4, atol=1e-4)
    assert result.model is not None
    with torch.no_grad():
        output = result.model.eval()(golden["input0"])
    torch.testing.assert_close(output, golden["output0"], rtol=1e-4, atol=1e-4)
