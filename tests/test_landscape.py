from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mudsc_fast.plot import landscape


class Point(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


def squared_norm(model: nn.Module) -> dict[str, float]:
    return {"loss": float(sum(value.detach().square().sum() for value in model.parameters()))}


def test_three_networks_span_plane_exactly() -> None:
    models = [Point(0, 0, 1), Point(3, 0, 1), Point(1, 2, 1)]
    found = landscape(models, squared_norm, steps=9)
    np.testing.assert_allclose(found.positions, [[0, 0], [3, 0], [1, 2]], atol=1e-6)
    np.testing.assert_allclose(found.distances, 0, atol=1e-6)
    expected = found.horizontal[None] ** 2 + found.vertical[:, None] ** 2 + 1
    np.testing.assert_allclose(found.values["loss"], expected, rtol=1e-5)
    low, high = found.positions.min(0), found.positions.max(0)
    assert found.horizontal[0] < low[0]
    assert found.horizontal[-1] > high[0]
    assert found.vertical[0] < low[1]
    assert found.vertical[-1] > high[1]


def test_four_networks_are_projected_on_principal_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    models = []
    for _ in range(6):
        models.append(Point(*[0.0] * 5))
        with torch.no_grad():
            models[-1].value.copy_(torch.randn(5, generator=generator) * torch.tensor([4.0, 2.0, 0.1, 0.1, 0.1]))
    found = landscape(models, squared_norm, steps=4)
    points = torch.stack([model.value.detach() for model in models]).double()
    singular = torch.linalg.svdvals(points - points.mean(0))
    np.testing.assert_allclose(np.square(found.positions).sum(0), np.square(singular[:2].numpy()), rtol=1e-6)
    np.testing.assert_allclose(np.square(found.distances).sum(), float(singular[2:].square().sum()), rtol=1e-4)


def test_stopped_run_continues_from_cache(tmp_path: Path) -> None:
    models = [Point(0, 0), Point(1, 0), Point(0, 1)]
    cache = tmp_path / "values.npz"
    calls = 0

    def stops_early(model: nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt
        return squared_norm(model)

    with pytest.raises(KeyboardInterrupt):
        landscape(models, stops_early, steps=5, cache=cache)
    whole = landscape(models, squared_norm, steps=5)
    calls = 0

    def counted(model: nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return squared_norm(model)

    continued = landscape(models, counted, steps=5, cache=cache)
    np.testing.assert_array_equal(continued.values["loss"], whole.values["loss"])
    assert calls < whole.values["loss"].size
    with pytest.raises(ValueError, match="belongs to other networks or another grid"):
        landscape(models, squared_norm, steps=6, cache=cache)


def test_batch_norm_is_recomputed_at_each_point() -> None:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(3) for _ in range(3)]
    models = [nn.Sequential(nn.Linear(2, 3), norm) for norm in norms]
    data = [torch.randn(16, 2) for _ in range(2)]

    def mean_of_outputs(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"mean": float(model.eval()(torch.cat(data)).abs().mean(0).max())}

    with pytest.raises(ValueError, match="batch_norm_data must be given"):
        landscape(models, mean_of_outputs)
    found = landscape(models, mean_of_outputs, steps=3, batch_norm_data=data)
    # Normalized outputs keep their scale, no matter how far the point is from the networks.
    assert found.values["mean"].max() < 3
    assert all(norm.num_batches_tracked == 0 for norm in norms)


def test_picture_has_panel_per_value_and_mean() -> None:
    models = [Point(0, 0), Point(1, 0), Point(0, 1)]
    found = landscape(models, lambda model: {"a": squared_norm(model)["loss"], "b": 1.0}, steps=3)
    panels = found.plot(["first", "second", "third"], levels=3)
    assert [axes.get_title() for axes in panels] == ["a", "b", "mean"]
    with pytest.raises(ValueError, match="labels must name all 3 models, got 1"):
        found.plot(["first"])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([Point(0), Point(1)], "at least three networks"),
        ([Point(0, 0), Point(1, 1), Point(2, 2)], "lie on one line"),
        ([Point(0, 0), Point(1, 1), Point(2, 2, 2)], "'value' differs"),
    ],
)
def test_networks_that_span_no_plane_are_rejected(models: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landscape(models, squared_norm)
