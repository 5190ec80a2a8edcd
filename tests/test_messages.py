"""Error messages name the argument, what was expected and given, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import mudsc_fast
from mudsc_fast._huggingface import class_of_config
from networks import MLP_AXES, MLP_SPEC, make_mlp


def pair() -> Any:
    return [make_mlp(seed=seed) for seed in range(2)]


def data(dtype: torch.dtype = torch.float32, width: int = 20) -> Any:
    return [torch.randn(40, width, dtype=dtype)]


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "models one by one": (
        lambda: mudsc_fast.merge(*pair()),
        TypeError,
        r"models must be one list of modules.* got Sequential: write merge\(\[a, b\], data\), not merge\(a, b\)",
    ),
    "data before models": (
        lambda: mudsc_fast.merge(data() * 2, pair()),
        TypeError,
        r"models must be all of one kind .*got Tensor: write the models first, merge\(\[a, b\], data\)",
    ),
    "a data loader before models": (
        lambda: mudsc_fast.match(cast(Any, torch.utils.data.DataLoader(data())), pair()),
        TypeError,
        r"models must be a sequence of modules.*got DataLoader: write the models first",
    ),
    "one batch": (
        lambda: mudsc_fast.merge(pair(), data()[0]),
        TypeError,
        r"data must be an iterable of batches.*got one Tensor: pass \[data\] if it is one batch",
    ),
    "one batch with labels": (
        lambda: mudsc_fast.merge(pair(), (data()[0], torch.zeros(40, dtype=torch.int64))),
        TypeError,
        r"data must be an iterable of batches.*got inputs and their labels: pass \[data\]",
    ),
    "one batch of keywords": (
        lambda: mudsc_fast.reset_batch_norm(nn.BatchNorm1d(20), {"input": data()[0]}),
        TypeError,
        r"data must be an iterable of batches.*got one dict: pass \[data\]",
    ),
    "a path as data": (
        lambda: mudsc_fast.merge(pair(), "data/"),
        TypeError,
        "data must be an iterable of batches, such as a list or a DataLoader, got str",
    ),
    "data in float64": (
        lambda: mudsc_fast.merge(pair(), data(torch.float64)),
        TypeError,
        r"data must hold tensors of the models' dtype torch.float32, got torch.float64",
    ),
    "data in float64 with a spec": (
        lambda: mudsc_fast.merge(pair(), data(torch.float64), spec=MLP_SPEC),
        TypeError,
        r"data must hold tensors of the models' dtype torch.float32, got torch.float64.*batch.to\(torch.float32\)",
    ),
    "data of another width": (
        lambda: mudsc_fast.merge(pair(), data(width=21)),
        ValueError,
        r"Sequential cannot run on batch 0 \(float32 \[\d+, 21\]\): RuntimeError: mat1 and mat2 shapes cannot be",
    ),
    "a dict as spec": (
        lambda: mudsc_fast.merge(pair(), spec=cast(Any, MLP_AXES)),
        TypeError,
        r"spec must be a PermutationSpec.*got dict: pass PermutationSpec\(spec\) for a dict of axes",
    ),
    "a mistyped head": (
        lambda: mudsc_fast.merge(pair(), spec=MLP_SPEC, task_heads="cf3"),
        ValueError,
        r"task_heads names 'cf3', but no tensor name begins with it; did you mean 'fc3'",
    ),
    "an unknown head": (
        lambda: mudsc_fast.merge(pair(), spec=MLP_SPEC, task_heads="classifier"),
        ValueError,
        r"no tensor name begins with it; there are 'fc1', 'fc2', 'fc3'",
    ),
    "a mistyped stop": (
        lambda: mudsc_fast.merge(pair(), spec=MLP_SPEC, stop_at="fc_2"),
        ValueError,
        r"stop_at must name a node.*got 'fc_2'; nodes: fc1, fc2; did you mean 'fc2'",
    ),
    "a mistyped node to expand": (
        lambda: mudsc_fast.merge(pair(), spec=MLP_SPEC, mode="zip", expand={"cf2": 2}),
        ValueError,
        r"expand names 'cf2', which is not a node; did you mean 'fc2'",
    ),
    "an unknown node to expand": (
        lambda: mudsc_fast.merge(pair(), spec=MLP_SPEC, mode="zip", expand={"nowhere": 2}),
        ValueError,
        r"expand names 'nowhere', which is not a node; there are 'fc1', 'fc2'$",
    ),
    "no tensors": (lambda: mudsc_fast.merge([{}, {}]), ValueError, "models must have tensors, got none"),
    "an unknown module to patch": (
        lambda: mudsc_fast.patch(only=["scipyy"]),
        ValueError,
        "only must name modules that are loaded or can be imported, got 'scipyy'",
    ),
    "an unknown submodule to patch": (
        lambda: mudsc_fast.patch(only=["torch.nonexistent"]),
        ValueError,
        "only must name modules that are loaded or can be imported, got 'torch.nonexistent'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str) -> None:
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()


RUNS: dict[str, Callable[[Any, Any], Any]] = {
    "match": mudsc_fast.match,
    "merge": mudsc_fast.merge,
    "collect_statistics": mudsc_fast.collect_statistics,
    "search_balance": lambda models, data: mudsc_fast.search_balance(models, data, score=lambda _: 0.0),
    "repair": lambda models, data: mudsc_fast.repair(mudsc_fast.merge(models, data[:1]), models, data),
    "refit": lambda models, data: mudsc_fast.refit(mudsc_fast.merge(models, data[:1]), models, data),
    "reset_batch_norm": lambda models, data: mudsc_fast.reset_batch_norm(models[0], data),
    "accuracy": lambda models, data: mudsc_fast.evaluate.joint_accuracy(
        models[0], [(x, torch.zeros(len(x)).long()) for x in data]
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_batch_of_wrong_shape(run: Callable[[Any, Any], Any]) -> None:
    models = [nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 4)) for _ in range(2)]
    message = r"Sequential cannot run on batch 1 \(float32 \[9, 21\]\): .*shapes cannot be multiplied .*\. Pass batches"
    with pytest.raises(ValueError, match=message) as caught:
        run(models, [*data(), torch.randn(9, 21)])
    assert type(caught.value.__cause__) is RuntimeError


def test_batch_that_forward_cannot_use() -> None:
    batch = {"image": data()[0], "names": ["a"] * 40}
    message = (
        r"on batch 0 \(\{'image': float32 \[40, 20\], 'names': \(str, .*, \.\.\.\)\}\): KeyError: 'pixels'\. Change"
    )
    with pytest.raises(ValueError, match=message):
        mudsc_fast.match(pair(), [batch], spec=MLP_SPEC, forward=lambda model, batch: model(batch["pixels"]))


def test_forward_may_raise_anything() -> None:
    def forward(_model: nn.Module, _batch: Any) -> Any:
        raise ZeroDivisionError("no pixels")

    with pytest.raises(ValueError, match=r"on batch 0 \(float32 \[40, 20\]\): ZeroDivisionError: no pixels\. Change"):
        mudsc_fast.match(pair(), data(), spec=MLP_SPEC, forward=forward)


def test_transformers_with_a_broken_dependency() -> None:
    class Transformers:
        def __getattr__(self, name: str) -> None:
            raise ModuleNotFoundError(f"Could not import module {name!r}") from RuntimeError("no torchvision::nms")

    message = "transformers cannot import BertModel, which config.json names: RuntimeError: no torchvision::nms. Check"
    with pytest.raises(ValueError, match=message):
        class_of_config(Transformers(), {"architectures": ["BertModel"]})


def test_matching_save_rejects_bad_paths(tmp_path: Path) -> None:
    matching = mudsc_fast.match(pair(), spec=MLP_SPEC)
    with pytest.raises(ValueError, match=r"path must end in .safetensors.*matching.pt"):
        matching.save(tmp_path / "matching.pt")
    with pytest.raises(FileNotFoundError, match=r"the directory '.*none' does not exist: create it first"):
        matching.save(tmp_path / "none" / "matching.safetensors")
    assert not list(tmp_path.iterdir())


def test_report_names_tensors_outside_spec() -> None:
    report = str(mudsc_fast.merge(pair(), data()))
    assert "averaged in their own order (not in the spec): fc3.bias" in report


def test_reset_batch_norm_without_batch_norm_does_nothing() -> None:
    model = make_mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert mudsc_fast.reset_batch_norm(model, data()) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
