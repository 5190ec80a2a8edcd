"""Matchings: their inputs, merging and aligning with them, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast import Matching, Mode, PermutationSpec
from networks import MLP_SPEC, make_mlp, random_permutations

transformers.utils.logging.set_verbosity_error()

MODES: tuple[Mode, ...] = ("align", "zip")


def batches(count: int = 2) -> list[Tensor]:
    return list(torch.randn(count, 40, 20, generator=torch.Generator().manual_seed(5)))


def pair() -> list[nn.Module]:
    return [make_mlp(seed=0), make_mlp(seed=1)]


def assert_same(found: mudsc_fast.MergeResult, expected: mudsc_fast.MergeResult) -> None:
    assert set(found.state_dict) == set(expected.state_dict)
    for name, tensor in expected.state_dict.items():
        assert torch.equal(found.state_dict[name], tensor), name


@pytest.mark.parametrize("mode", MODES)
def test_merge_is_match_then_merge(mode: Mode) -> None:
    models = pair()
    matching = mudsc_fast.match(models, batches(), spec=MLP_SPEC, mode=mode, weights=[0.3, 0.7])
    result = matching.merge(models)
    assert result.weights == (0.3, 0.7)
    assert result.matching is matching
    assert_same(result, mudsc_fast.merge(models, batches(), spec=MLP_SPEC, mode=mode, weights=[0.3, 0.7]))
    stopped = matching.merge(models, stop_at="fc1")
    expected = mudsc_fast.merge(models, batches(), spec=MLP_SPEC, mode=mode, weights=[0.3, 0.7], stop_at="fc1")
    assert_same(stopped, expected)


def test_ends_of_aligned_curve_are_models() -> None:
    models = pair()
    matching = mudsc_fast.match(models, spec=MLP_SPEC)
    inputs = batches()[0]
    first = matching.merge(models, weights=[1, 0])
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(first.state_dict[name], tensor)
    last = matching.merge(models, weights=[0, 1]).model
    assert last is not None
    torch.testing.assert_close(last(inputs), models[1](inputs))


def test_zero_weights_are_limit_of_small_weights() -> None:
    models = pair()
    matching = mudsc_fast.match(models, batches(), spec=MLP_SPEC, mode="zip", weights=[0, 1])
    end = matching.merge(models)
    near = matching.merge(models, weights=[1e-7, 1 - 1e-7])
    for name, tensor in end.state_dict.items():
        assert torch.isfinite(tensor).all()
        torch.testing.assert_close(tensor, near.state_dict[name], rtol=1e-4, atol=1e-5)


def test_permute_keeps_outputs() -> None:
    model = make_mlp(seed=2)
    permutations = random_permutations(MLP_SPEC, model, 3)
    state = mudsc_fast.permute_state_dict(model.state_dict(), MLP_SPEC, permutations)
    other = make_mlp()
    other.load_state_dict(state)
    matching = mudsc_fast.match([model, other], spec=MLP_SPEC)
    restored = matching.permute(other, 1)
    assert isinstance(restored, nn.Sequential)
    for name, tensor in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor)
        assert torch.equal(matching.permute(other.state_dict(), 1)[name], tensor)
        assert torch.equal(matching.permute(model.state_dict(), 0)[name], tensor)
        assert torch.equal(other.state_dict()[name], state[name])


def test_permute_reorders_inputs_of_task_heads() -> None:
    models = [make_mlp((20, 32, 32, 10), seed=0), make_mlp((20, 32, 32, 7), seed=1)]
    matching = mudsc_fast.match(models, spec=MLP_SPEC)
    inputs = batches()[0]
    torch.testing.assert_close(matching.permute(models[1], 1)(inputs), models[1](inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "index", "message"),
    [
        (make_mlp(seed=1), 2, r"index must be below the number of models that were matched \(2\), got 2"),
        (make_mlp(seed=1), -1, "index must be at least 0, got -1"),
        (make_mlp((20, 30, 32, 10)), 1, r"'fc1.weight' has shape \(30, 20\), expected \(32, 20\)"),
        (nn.Linear(3, 4), 1, "model must have the tensors that were matched, but has no 'fc1.weight'"),
    ],
)
def test_permute_rejects_other_models(model: nn.Module, index: int, message: str) -> None:
    matching = mudsc_fast.match(pair(), spec=MLP_SPEC)
    with pytest.raises(ValueError, match=message):
        matching.permute(model, index)


def test_permute_needs_align() -> None:
    matching = mudsc_fast.match(pair(), spec=MLP_SPEC, mode="zip")
    with pytest.raises(ValueError, match="needs a matching with mode='align', got mode='zip'"):
        matching.permute(make_mlp(seed=1), 1)
    with pytest.raises(TypeError, match="model must be a module, a state dict, or the path of a checkpoint, got int"):
        mudsc_fast.match(pair(), spec=MLP_SPEC).permute(3, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([make_mlp()] * 3, {}, "models must be the 2 models that were matched, got 3"),
        ([make_mlp((20, 32, 30, 10))] * 2, {}, r"models\[0\] must have .* 'fc2.weight' has shape \(30, 32\)"),
        (pair(), {"weights": [-0.5, 1.5]}, "weights must be at least 0 and sum to 1"),
        (pair(), {"stop_at": "fc9"}, "stop_at must name a node"),
        (pair(), {"task_heads": ()}, "node 'fc2', which was not matched: .* task_heads="),
    ],
)
def test_merge_rejects_other_models(models: Any, options: dict[str, Any], message: str) -> None:
    matching = mudsc_fast.match(pair(), spec=MLP_SPEC, task_heads=("fc2", "fc3") if "task_heads" in options else ())
    with pytest.raises(ValueError, match=message):
        matching.merge(models, **options)


@pytest.mark.parametrize("mode", MODES)
def test_saved_matching_gives_same_merge(mode: Mode, tmp_path: Path) -> None:
    models = pair()
    matching = mudsc_fast.match(models, batches(), spec=MLP_SPEC, mode=mode, balance=0.3, task_heads="fc3")
    matching.save(tmp_path / "matching.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["matching.safetensors"]
    loaded = Matching.load(tmp_path / "matching.safetensors")
    assert str(loaded) == str(matching)
    assert repr(loaded) == repr(matching)
    assert loaded.spec == MLP_SPEC
    assert (loaded.weights, loaded.balance, loaded.task_heads) == ((0.5, 0.5), 0.3, ("fc3",))
    for node in matching:
        assert loaded[node].same_clusters(matching[node])
    assert_same(loaded.merge(models), matching.merge(models))


def damaged(path: Path, change: str) -> None:
    """Change the contents of a matching's file."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change == "clusters":
        tensors["fc1"] = tensors["fc1"] + 1
    elif change == "permutation":
        tensors["fc1"][1, :2] = 0
    elif change == "models":
        tensors["fc1"] = tensors["fc1"][:1]
    elif change == "node":
        del tensors["fc1"]
    elif change == "mode":
        metadata["mode"] = json.dumps("both")
    else:
        del metadata[change]
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("clusters", "the clusters of node 'fc1' must be numbered from 0 to 31"),
        ("permutation", "the units of node 'fc1' must be permuted"),
        ("models", r"the clusters of node 'fc1' must be \[2, units\] int64, got \[1, 32\]"),
        ("node", "no entry 'fc1'"),
        ("mode", "mode must be one of .* got 'both'"),
        ("weights", "no entry 'weights'"),
        ("format", "its format is None, expected 'mudsc_fast matching 1'"),
    ],
)
def test_files_without_matching(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "matching.safetensors"
    mudsc_fast.match(pair(), spec=MLP_SPEC).save(path)
    damaged(path, change)
    with pytest.raises(ValueError, match=f"{path} must be a file of Matching.save: {message}"):
        Matching.load(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Matching.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0")
    with pytest.raises(ValueError, match=r"cut.safetensors must be a file of Matching.save"):
        Matching.load(tmp_path / "cut.safetensors")


def test_results_are_short_and_compare_by_identity() -> None:
    models = pair()
    matching = mudsc_fast.match(models, spec=MLP_SPEC)
    result = matching.merge(models)
    assert repr(matching) == "Matching(2 nodes, 2 models, mode='align', space='weight')"
    assert repr(result) == "MergeResult(model=Sequential, 6 merged tensors, 2 nodes, mode='align', 2 models)"
    assert repr(matching["fc1"]).startswith("NodeMatching('align', 2 models, 32 units, similarity ")
    assert matching == matching
    assert matching != mudsc_fast.match(models, spec=MLP_SPEC)
    assert result != matching.merge(models)
    assert len({matching, matching["fc1"], result}) == 3
    assert str(matching).splitlines()[0].split() == ["node", "units", "similarity", "before", "after"]
    assert "<td>fc1</td>" in matching._repr_html_()
    assert "<td>fc1</td>" in result._repr_html_()


def test_numpy_and_torch_numbers() -> None:
    models = pair()
    weights = [np.float32(0.25), torch.tensor(0.75)]
    options: Any = {
        "balance": torch.tensor(0.5),
        "random_state": np.int64(3),
        "max_sweeps": torch.tensor(4),
        "budget": np.float64(1),
    }
    found = mudsc_fast.merge(models, batches(), spec=MLP_SPEC, weights=weights, mode="zip", **options)
    expected = mudsc_fast.merge(
        models, batches(), spec=MLP_SPEC, weights=[0.25, 0.75], mode="zip", random_state=3, max_sweeps=4
    )
    assert_same(found, expected)
    assert all(type(weight) is float for weight in found.weights)
    for wrong in (torch.tensor([0.5]), np.bool_(True), torch.tensor(True), 1j):
        with pytest.raises(TypeError, match="balance must be a number"):
            mudsc_fast.merge(models, batches(), spec=MLP_SPEC, balance=wrong)  # type: ignore[arg-type]


def test_spec_is_derived_with_first_batch_of_generator() -> None:
    models = pair()
    seen = []

    def generator() -> Any:
        for batch in batches(3):
            seen.append(batch)
            yield batch

    derived = mudsc_fast.match(models, generator())
    assert len(seen) == 3
    given = mudsc_fast.match(models, batches(3), spec=PermutationSpec.from_model(models[0], batches()[0]))
    assert derived.spec == given.spec
    for node in given:
        assert derived[node].same_clusters(given[node])


def test_ways_to_pass_spec(tmp_path: Path) -> None:
    models = pair()
    MLP_SPEC.save(tmp_path / "spec.json")
    expected = mudsc_fast.merge(models, spec=MLP_SPEC)
    for spec in ("mlp", tmp_path / "spec.json", str(tmp_path / "spec.json")):
        assert_same(mudsc_fast.merge(models, spec=spec), expected)
    states = [model.state_dict() for model in models]
    assert_same(mudsc_fast.merge(states), expected)
    assert mudsc_fast.collect_statistics(models, batches()).spec == mudsc_fast.match(models, batches()).spec
    with pytest.raises(TypeError, match=r"spec must be a PermutationSpec, the name of a family, .* got int"):
        mudsc_fast.merge(models, spec=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no family is recognized by the tensor names .* Pass data"):
        mudsc_fast.merge([{"a.weight": torch.ones(2, 3)}] * 2)


def test_residual_connection_rules_out_spec_by_names() -> None:
    class Residual(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.fc1, self.fc2, self.fc3 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.fc1(x))
            scores: Tensor = self.fc3(torch.relu(self.fc2(hidden)) + hidden)
            return scores

    models = [Residual(0), Residual(1)]
    matching = mudsc_fast.match(models)
    assert len(matching) == 1
    inputs = torch.randn(5, 8)
    torch.testing.assert_close(matching.permute(models[1], 1)(inputs), models[1](inputs))


def test_models_in_files(tmp_path: Path) -> None:
    models = pair()
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, model in zip(paths, models, strict=True):
        safetensors.torch.save_file(model.state_dict(), path)
    expected = mudsc_fast.merge(models, spec=MLP_SPEC)
    result = mudsc_fast.merge([str(path) for path in paths], spec=MLP_SPEC)
    assert result.model is None
    assert_same(result, expected)
    assert_same(result.matching.merge(paths), expected)
    aligned = result.matching.permute(paths[1], 1)
    assert torch.equal(aligned["fc1.bias"], result.matching.permute(models[1].state_dict(), 1)["fc1.bias"])
    with pytest.raises(
        TypeError, match=r"models must be all of one kind \(modules, state dicts, paths\), got Seq.*, str"
    ):
        mudsc_fast.merge([models[0], str(paths[1])])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="models must be modules, or Hugging Face directories"):
        mudsc_fast.merge(paths, batches(), spec=MLP_SPEC)
    with pytest.raises(ValueError, match="no such file or directory"):
        mudsc_fast.merge([paths[0], tmp_path / "c.safetensors"])


def bert(seed: int) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**shape, vocab_size=20, max_position_embeddings=8, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()


def test_hugging_face_models_and_directories(tmp_path: Path) -> None:
    models = [bert(0), bert(1)]
    tokens = torch.randint(20, (4, 6))
    expected = mudsc_fast.merge(models, [{"input_ids": tokens}])
    assert expected.spec == mudsc_fast.spec.bert(1, 2)
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    result = mudsc_fast.merge(paths, [{"input_ids": tokens}])
    assert isinstance(result.model, transformers.BertForSequenceClassification)
    assert_same(result, expected)
    aligned = expected.matching.permute(models[1], 1)
    with torch.no_grad():
        torch.testing.assert_close(aligned(tokens).logits, models[1](tokens).logits, rtol=1e-4, atol=1e-5)
    assert_same(mudsc_fast.merge(paths), mudsc_fast.merge(models))


@pytest.mark.parametrize("kind", ["modules", "state dicts", "loaded"])
def test_models_in_another_order_are_refused(kind: str, tmp_path: Path) -> None:
    models: Any = pair()
    if kind == "state dicts":
        models = [model.state_dict() for model in models]
    matching = mudsc_fast.match(models, spec=MLP_SPEC)
    if kind == "loaded":
        matching.save(tmp_path / "matching.safetensors")
        matching = mudsc_fast.Matching.load(tmp_path / "matching.safetensors")
    with pytest.raises(ValueError, match=r"models\[0\] must be model 0 of those that were matched, got model 1: pass"):
        matching.merge(models[::-1])
    with pytest.raises(ValueError, match="model must be model 1 of those that were matched, got model 0"):
        matching.permute(models[0], 1)
    others = [make_mlp(seed=seed) for seed in (7, 8)]
    assert matching.merge(others).model is not None  # later checkpoints of the same training runs are accepted


def test_the_same_model_twice_can_be_merged_in_any_order() -> None:
    model = make_mlp()
    assert mudsc_fast.match([model, model], spec=MLP_SPEC).merge([model, model]).model is not None


def test_balance_without_data() -> None:
    with pytest.raises(ValueError, match=r"balance=0\.3 shares similarity.* pass data"):
        mudsc_fast.merge(pair(), spec=MLP_SPEC, balance=0.3)
    assert mudsc_fast.match(pair(), batches(), spec=MLP_SPEC).balance == 0.5


@pytest.mark.parametrize("data", [[torch.randn(1, 20)], [torch.randn(1, 20)[0]]])
def test_one_sample_is_refused(data: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="data must hold two samples or more to correlate activations, got 1"):
        mudsc_fast.match(pair(), data, spec=MLP_SPEC)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_data_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="data must vary, but the activations of every node are the same"):
        mudsc_fast.match(pair(), [torch.full((40, 20), value)], spec=MLP_SPEC)


def test_constant_nodes_and_few_samples_are_named(caplog: pytest.LogCaptureFixture) -> None:
    mudsc_fast.match(pair(), [torch.randn(3, 20)], spec=MLP_SPEC)
    assert "only 3 samples of the activations of 'fc1', 'fc2'" in caplog.text
    caplog.clear()
    models = pair()
    with torch.no_grad():
        models[1].get_parameter("fc2.weight").zero_()
    mudsc_fast.match(models, batches(), spec=MLP_SPEC)
    assert "the activations of 'fc2' are the same in all samples" in caplog.text
