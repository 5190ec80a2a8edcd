from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast import MatchingStatistics
from networks import MLP_SPEC, make_mlp


def batches(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 20, generator=generator) for _ in range(count)]


def models() -> list[nn.Sequential]:
    return [make_mlp(seed=0), make_mlp(seed=1)]


@pytest.mark.parametrize("blocks", ["full", "cross"])
def test_similarity_is_correlation_of_hidden_units(blocks: Any) -> None:
    statistics = mudsc_fast.collect_statistics(models(), batches(), spec=MLP_SPEC, blocks=blocks)
    inputs = torch.cat(batches())
    hidden = torch.cat([model[1](model[0](inputs)).detach().T for model in models()])
    expected = torch.corrcoef(hidden.double()).nan_to_num(0.0).float()
    if blocks == "cross":
        expected = expected[None, :32, 32:]
    torch.testing.assert_close(statistics.similarity("fc1"), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        statistics.similarity("fc1", "cross"),
        expected if blocks == "cross" else expected[None, :32, 32:],
        rtol=0,
        atol=1e-5,
    )


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "statistics.pt"
    path.write_text("something else")
    statistics = mudsc_fast.collect_statistics(models(), batches(), spec=MLP_SPEC)
    statistics.save(path)
    loaded = MatchingStatistics.load(path)
    assert list(tmp_path.iterdir()) == [path]
    assert loaded.spec == MLP_SPEC
    for node in MLP_SPEC.nodes:
        assert torch.equal(loaded.similarity(node), statistics.similarity(node))
    for mode in ("align", "zip"):
        first, second = (mudsc_fast.merge(models(), data, spec=MLP_SPEC, mode=mode) for data in (statistics, loaded))
        for name, tensor in first.state_dict.items():
            assert torch.equal(tensor, second.state_dict[name])


def test_merged_statistics_match_single_pass() -> None:
    parts = [mudsc_fast.collect_statistics(models(), [batch], spec=MLP_SPEC) for batch in batches()]
    before = parts[0].similarity("fc1").clone()
    for part in parts[1:]:
        parts[0].merge(part)
    whole = mudsc_fast.collect_statistics(models(), batches(), spec=MLP_SPEC)
    assert not torch.equal(before, parts[0].similarity("fc1"))
    for node in MLP_SPEC.nodes:
        torch.testing.assert_close(parts[0].similarity(node), whole.similarity(node), rtol=0, atol=1e-6)


def test_mismatched_statistics() -> None:
    statistics = mudsc_fast.collect_statistics(models(), batches(), spec=MLP_SPEC)
    crossed = mudsc_fast.collect_statistics(models(), batches(), spec=MLP_SPEC, blocks="cross")
    with pytest.raises(ValueError, match=r"other must be of 2 models .* full blocks, got 2 models .* cross blocks"):
        statistics.merge(crossed)
    with pytest.raises(TypeError, match="other must be MatchingStatistics, got dict"):
        statistics.merge({})  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"no such file", b"\x80\x02K\x01."])
def test_files_without_statistics(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "statistics.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must be a file of MatchingStatistics\.save"):
        MatchingStatistics.load(path)
    torch.save({"format": "mudsc_fast statistics 0"}, path)
    with pytest.raises(ValueError, match="in the format 'mudsc_fast statistics 1'"):
        MatchingStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        MatchingStatistics.load(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("units"), r"statistics\.pt must be a file of .*: no entry 'units'"),
        (lambda state: state["sums"].pop("fc1"), "no entry 'fc1'"),
        (lambda state: state["sums"]["fc1"].pop("mean"), "state must have the entry 'mean'"),
        (lambda state: state.update(blocks="upper"), "blocks must be one of 'cross', 'full', got 'upper'"),
        (lambda state: state.update(spec="{"), "JSON"),
    ],
)
def test_incomplete_files(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "statistics.pt"
    mudsc_fast.collect_statistics(models(), batches(), spec=MLP_SPEC).save(path)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        MatchingStatistics.load(path)


def test_autocast_runs_the_models_in_half_precision() -> None:
    seen = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(model(batch).dtype)

    statistics = mudsc_fast.collect_statistics(
        models(), batches(), spec=MLP_SPEC, forward=forward, autocast=torch.bfloat16, verify=False
    )
    assert set(seen) == {torch.bfloat16}
    exact = mudsc_fast.collect_statistics(models(), batches(), spec=MLP_SPEC)
    for node in MLP_SPEC.nodes:
        torch.testing.assert_close(statistics.similarity(node), exact.similarity(node), rtol=0, atol=0.1)
        assert not torch.equal(statistics.similarity(node), exact.similarity(node))
    with pytest.raises(
        TypeError, match=r"autocast must be torch\.float16, torch\.bfloat16 or None, got torch\.float32"
    ):
        mudsc_fast.collect_statistics(models(), batches(), spec=MLP_SPEC, autocast=torch.float32)
