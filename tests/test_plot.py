"""Plots: each function returns the Axes that it draws on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import nn

import mudsc_fast
from networks import MLP_SPEC, make_mlp

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def models() -> list[nn.Module]:
    return [make_mlp(seed=0), make_mlp(seed=1)]


def test_similarities_of_a_matching() -> None:
    matching = mudsc_fast.match(models(), spec=MLP_SPEC)
    axes = matching.plot()
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert heights == [matching[node].similarity_before for node in ("fc1", "fc2")] + [
        matching[node].similarity for node in ("fc1", "fc2")
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["fc1", "fc2"]
    assert matching.plot(axes) is axes


def first_entry(model: nn.Module) -> float:
    return float(model.get_parameter("fc1.weight")[0, 0].detach())


def test_interpolation_curves_end_at_models() -> None:
    a, b = models()
    result = mudsc_fast.merge([a, b], spec=MLP_SPEC)
    axes = result.plot_interpolation(first_entry, 3, progress=False)
    curves = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}  # type: ignore[arg-type]
    ends = [first_entry(a), first_entry(result.matching.permute(b, 1))]
    assert curves["matched"] == pytest.approx([ends[0], sum(ends) / 2, ends[1]], abs=1e-6)
    plain = [first_entry(a), first_entry(b)]
    assert curves["unmatched"] == pytest.approx([plain[0], sum(plain) / 2, plain[1]], abs=1e-6)
    assert np.array(axes.lines[0].get_xdata()).tolist() == [0, 0.5, 1]


def test_interpolation_of_several_values() -> None:
    result = mudsc_fast.merge(models(), spec=MLP_SPEC)
    axes = result.plot_interpolation(lambda model: {"loss": 1.0, "error": first_entry(model)}, 2, compare=False)
    assert [line.get_label() for line in axes.lines] == ["loss", "error"]


def test_merges_without_curve() -> None:
    result = mudsc_fast.merge([model.state_dict() for model in models()], spec=MLP_SPEC)
    with pytest.raises(TypeError, match="needs the merge of modules into one model"):
        result.plot_interpolation(first_entry)
    three = mudsc_fast.merge([make_mlp(seed=seed) for seed in range(3)], spec=MLP_SPEC)
    with pytest.raises(ValueError, match="needs the merge of two models, got 3"):
        three.plot_interpolation(first_entry)
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        mudsc_fast.merge(models(), spec=MLP_SPEC).plot_interpolation(first_entry, 1)


def test_plot_without_matplotlib_explains_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        mudsc_fast.match(models(), spec=MLP_SPEC).plot()


def test_identity_matching_gives_plain_average() -> None:
    a, b = models()
    plain = mudsc_fast.match([a, b], spec=MLP_SPEC, mode="zip").without_matching().merge([a, b]).state_dict
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(plain[name], (tensor + b.state_dict()[name]) / 2)
