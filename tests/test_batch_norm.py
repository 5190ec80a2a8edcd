from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mudsc_fast
from networks import CONV_SPEC, ConvNet, make_mlp


def images(count: int = 4) -> list[torch.Tensor]:
    return list(torch.randn(count, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1)


def test_statistics_match_data() -> None:
    model = ConvNet()
    model.bn1.momentum = 0.3
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    assert mudsc_fast.reset_batch_norm(model, [(batch, 0) for batch in images()]) == 1
    with torch.no_grad():
        seen = [model.conv1(batch).transpose(0, 1).flatten(1) for batch in images()]
    mean = torch.stack([values.mean(1) for values in seen]).mean(0)
    variance = torch.stack([values.var(1) for values in seen]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.bn1.running_var, variance, rtol=1e-5, atol=1e-5)
    assert model.bn1.momentum == 0.3
    assert model.training
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, weights[name])


def test_training_modes_are_preserved() -> None:
    models = [ConvNet(seed).eval() for seed in (0, 1)]
    merged = mudsc_fast.merge(models, images(), spec=CONV_SPEC).model
    assert merged is not None
    merged.get_submodule("conv2").train()
    mudsc_fast.reset_batch_norm(merged, images())
    assert not merged.training
    assert merged.get_submodule("conv2").training


def test_data_is_not_read_without_batch_norm() -> None:
    data = iter(images())
    assert mudsc_fast.reset_batch_norm(make_mlp(), data) == 0
    assert len(list(data)) == 4


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data must yield at least one batch, got none"),
        ([torch.randn(2, 3, 8, 8), "x"], TypeError, "data must yield tensors, dicts .* got str"),
        ([torch.randn(2, 5, 8, 8)], ValueError, "channels"),
    ],
)
def test_error_leaves_model_unchanged(data: list[object], error: type[Exception], message: str) -> None:
    model = ConvNet()
    model(images()[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        mudsc_fast.reset_batch_norm(model, data)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.bn1.momentum == 0.1
    assert model.bn1.training


def small_net(norm: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), norm(6), nn.ReLU(), nn.Linear(6, 2))


def test_single_value_batches_are_skipped() -> None:
    model, data = small_net(nn.BatchNorm1d), [torch.randn(16, 8), torch.randn(16, 8)]
    expected = copy.deepcopy(model)
    assert mudsc_fast.reset_batch_norm(expected, data) == 1
    assert mudsc_fast.reset_batch_norm(model, [data[0], torch.randn(1, 8), data[1], torch.randn(1, 8)]) == 1
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    with pytest.raises(ValueError, match="layer '1' saw one in each: pass larger batches"):
        mudsc_fast.reset_batch_norm(model, [torch.randn(1, 8)])
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_averages_match_update_bn() -> None:
    model, data = small_net(nn.BatchNorm1d), [torch.randn(16, 8), torch.randn(16, 8)]
    expected = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(data, expected)
    mudsc_fast.reset_batch_norm(model, data)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_instance_norms_with_running_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    data = [torch.randn(5, 3, 7, 7), torch.randn(6, 3, 7, 7)]
    assert mudsc_fast.reset_batch_norm(model, data) == 1
    with torch.no_grad():
        seen = [model[0](batch) for batch in data]
    mean = torch.stack([values.mean((0, 2, 3)) for values in seen]).mean(0)
    variance = torch.stack([values.var((2, 3)).mean(0) for values in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert mudsc_fast.reset_batch_norm(model, [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 3, 3)]) == 1
    assert model[1].momentum == 0.1


def test_merge_result_is_rejected_with_hint() -> None:
    models = [nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(2)]
    result = mudsc_fast.merge(models)
    with pytest.raises(TypeError, match=r"got MergeResult: pass result\.model"):
        mudsc_fast.reset_batch_norm(result, [torch.randn(2, 4)])  # type: ignore[arg-type]
