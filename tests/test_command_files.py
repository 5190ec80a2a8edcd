"""Merging and aligning networks in files, by the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import mudsc_fast
from architectures import Clip, ResNet, Swin, Vgg, VisionTransformer, randomize
from mudsc_fast import cli
from mudsc_fast.io import open_checkpoint
from mudsc_fast.ops._centered_products import can_round_products
from mudsc_fast.spec import PermutationSpec, bert, gpt2, llama, resnet, swin, vgg, vit, vit_huggingface
from mudsc_fast.spec.choose import choose_spec
from networks import make_mlp
from test_builders import SHAPE, TEXT

transformers.utils.logging.set_verbosity_error()

VISION: dict[str, Any] = {**SHAPE, "image_size": 8, "patch_size": 4}


def llama_model(**options: Any) -> Any:
    config = transformers.LlamaConfig(**SHAPE, **TEXT, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config)


def gpt2_model(**options: Any) -> Any:
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 12, "vocab_size": 60}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None, **options)
    )


def vit_model() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=4))


HUGGING_FACE: dict[str, Callable[[], Any]] = {
    "llama": llama_model,
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SHAPE, **TEXT, num_key_value_heads=4, tie_word_embeddings=True)
    ),
    "gpt2": gpt2_model,
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, **TEXT, num_labels=4)),
    "bert masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE, **TEXT)),
    "vit": vit_model,
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**SHAPE, **TEXT, "eos_token_id": 2}, vision_config=VISION, projection_dim=10
        )
    ),
}


def save_pair(folder: Path, build: Callable[[], Any], **options: Any) -> tuple[str, str]:
    """Save two random networks as Hugging Face directories and return their paths."""
    for index, name in enumerate(("a", "b")):
        model: Any = randomize(build(), seed=index)
        model.save_pretrained(folder / name, **options)
    return str(folder / "a"), str(folder / "b")


def save_mlps(folder: Path, suffix: str = ".safetensors", **options: Any) -> tuple[str, str]:
    paths = []
    for index, name in enumerate(("a", "b")):
        state = make_mlp(seed=index, **options).state_dict()
        path = folder / f"{name}{suffix}"
        if suffix == ".safetensors":
            safetensors.torch.save_file(state, path)
        else:
            torch.save(state, path)
        paths.append(str(path))
    return paths[0], paths[1]


def run(*arguments: str | Path) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def failure(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str | Path) -> str:
    """Run a command that must fail and leave no files behind. Return its error message."""
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert sorted(folder.iterdir()) == before
    shown = capsys.readouterr()
    assert shown.out == ""
    warnings, error, _ = shown.err.partition(f"mudsc-fast {arguments[0]}: error: ")
    assert error
    assert all(line.startswith(f"mudsc-fast {arguments[0]}: warning: ") for line in warnings.splitlines())
    assert "Traceback" not in shown.err
    return shown.err


def load(path: Path | str) -> Any:
    config = json.loads((Path(path) / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(path, dtype="auto")


def assert_states_equal(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("mode", ["align", "zip"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_directories_merge_like_loaded_models(name: str, mode: Any, tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, HUGGING_FACE[name], max_shard_size="20KB")
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    run("merge", a, b, "--output", tmp_path / "out", "--mode", mode, "--quiet", "--shard-size", "30KB")
    models = [load(a), load(b)]
    spec = choose_spec(None, models[0].state_dict(), config=json.loads((tmp_path / "a" / "config.json").read_text()))
    expected = mudsc_fast.merge([model.state_dict() for model in models], spec=spec, mode=mode)
    assert_states_equal(load(tmp_path / "out").state_dict(), expected.state_dict)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safetensors.safe_open(shard, "pt") as file:
            tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 it is no mapping
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 30_000


def bert_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(60, (8, 12), generator=generator)} for _ in range(3)]


def vit_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(8, 3, 8, 8, generator=generator)} for _ in range(3)]


@pytest.mark.parametrize(
    ("name", "data"), [("gpt2", "bert_batches"), ("bert masked", "bert_batches"), ("vit", "vit_batches")]
)
@pytest.mark.parametrize("space", ["activation", "dual"])
def test_activations_of_directories(name: str, data: str, space: Any, tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, HUGGING_FACE[name])
    where = f"{__name__}:{data}"
    run("merge", a, b, "--output", tmp_path / "out", "--space", space, "--data", where, "--quiet", "--balance", "0.3")
    models = [load(a), load(b)]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    spec = choose_spec(None, models[0].state_dict(), config=config)
    expected = mudsc_fast.merge(models, globals()[data](), spec=spec, space=space, balance=0.3)
    found = load(tmp_path / "out").state_dict()
    for key, tensor in expected.state_dict.items():
        torch.testing.assert_close(found[key], tensor)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("output", ["merged.safetensors", "merged.pt", "directory"])
def test_state_dict_files(suffix: str, output: str, tmp_path: Path) -> None:
    a, b = save_mlps(tmp_path, suffix)
    arguments = ["--shard-size", "3KB"] if output == "directory" else []
    run("merge", a, b, "--output", tmp_path / output, "--weights", "0.7,0.3", "--quiet", *arguments)
    states = [make_mlp(seed=index).state_dict() for index in (0, 1)]
    spec = mudsc_fast.spec.mlp(["fc1", "fc2", "fc3"])
    expected = mudsc_fast.merge(states, spec=spec, weights=[0.7, 0.3]).state_dict
    if output == "merged.pt":
        found = torch.load(tmp_path / output, weights_only=True)
    elif output == "merged.safetensors":
        found = safetensors.torch.load_file(tmp_path / output)
    else:
        found = open_checkpoint(tmp_path / output).tensors
        kind = "model" if suffix == ".safetensors" else "pytorch_model"
        assert len(list((tmp_path / output).glob(f"{kind}-*-of-*"))) > 1
    assert_states_equal(found, expected)


def mlp_batches() -> Any:
    generator = torch.Generator().manual_seed(4)
    yield from (torch.randn(30, 20, generator=generator) for _ in range(3))


def test_activations_of_files(tmp_path: Path) -> None:
    a, b = save_mlps(tmp_path)
    data, model = f"{__name__}:mlp_batches", "networks:make_mlp"
    run("merge", a, b, "--output", tmp_path / "out.pt", "--mode", "zip", "--data", data, "--model", model, "--quiet")
    models = [make_mlp(seed=index) for index in (0, 1)]
    expected = mudsc_fast.merge(models, mlp_batches(), spec=mudsc_fast.spec.mlp(["fc1", "fc2", "fc3"]), mode="zip")
    assert_states_equal(torch.load(tmp_path / "out.pt", weights_only=True), expected.state_dict)


@pytest.mark.skipif(not can_round_products(), reason="this torch cannot round products")
def test_precision_applies_to_both_spaces(tmp_path: Path) -> None:
    a, b = save_mlps(tmp_path)
    given = ("--data", f"{__name__}:mlp_batches", "--model", "networks:make_mlp", "--precision", "bfloat16")
    run("merge", a, b, "--output", tmp_path / "out.pt", *given)
    models = [make_mlp(seed=index) for index in (0, 1)]
    spec = mudsc_fast.spec.mlp(["fc1", "fc2", "fc3"])
    expected = mudsc_fast.merge(models, mlp_batches(), spec=spec, precision="bfloat16")
    assert_states_equal(torch.load(tmp_path / "out.pt", weights_only=True), expected.state_dict)


def test_other_files_are_copied(tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, gpt2_model)
    for name in ("tokenizer_config.json", "merges.txt", "spiece.model", "README.md", "training_args.bin"):
        (tmp_path / "a" / name).write_text("{}")
    run("merge", a, b, "--output", tmp_path / "out", "--quiet")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", "merges.txt"}
    assert copied == expected | {"spiece.model", "README.md"}
    assert (tmp_path / "out" / "README.md").read_text() != "{}"


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
def test_dtypes(stored: torch.dtype, asked: str | None, tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, lambda: llama_model().to(stored))
    run("merge", a, b, "--output", tmp_path / "out", "--quiet", *(["--dtype", asked] if asked else []))
    models = [load(path) for path in (a, b)]
    spec = llama(2, 4, 2, 8)
    expected = mudsc_fast.merge([model.state_dict() for model in models], spec=spec)
    merged = load(tmp_path / "out")
    dtype = getattr(torch, asked) if asked else stored
    assert merged.dtype == dtype
    for name, tensor in merged.state_dict().items():
        assert tensor.dtype == dtype
        near = max(torch.finfo(stored).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(tensor.float(), expected.state_dict[name].float(), rtol=near, atol=near)


def test_wider_dtype_is_not_rounded_first(tmp_path: Path) -> None:
    a, b = save_mlps(tmp_path, dtype=torch.bfloat16)
    run("merge", a, b, "--output", tmp_path / "out.safetensors", "--dtype", "float32", "--quiet")
    merged = safetensors.torch.load_file(tmp_path / "out.safetensors")
    last = [make_mlp(seed=index, dtype=torch.bfloat16).state_dict()["fc3.bias"].float() for index in (0, 1)]
    assert torch.equal(merged["fc3.bias"], (last[0] + last[1]) / 2)


def test_three_networks_with_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_mlps(tmp_path)
    report = tmp_path / "report.json"
    run("merge", a, b, b, "--output", tmp_path / "out.safetensors", "--report", report, "--max-sweeps", "4")
    shown = capsys.readouterr().out
    assert "2 nodes matched" in shown
    assert "out.safetensors" in shown
    content = json.loads(report.read_text())
    assert set(content["nodes"]) == {"fc1", "fc2"}
    for node in content["nodes"].values():
        assert node["units"] == 32
        assert -1 <= node["similarity_before"] < node["similarity"] <= 1
    assert content["bytes_in"] == [content["bytes"]] * 3
    assert content["bytes"] == sum(tensor.nbytes for tensor in make_mlp().state_dict().values())
    assert {"weight similarity", "matching", "writing"} <= set(content["seconds"])
    assert content["arguments"]["max_sweeps"] == 4
    assert 1 <= len(content["objectives"]) <= 4


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_aligned_network_gives_same_outputs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = save_pair(tmp_path, HUGGING_FACE[name])
    report = tmp_path / "report.json"
    run("align", base, other, "--output", tmp_path / "out", "--report", report)
    assert "outputs before and after differ by at most" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert {"writing", "comparing outputs"} <= set(content["seconds"])
    difference = content["difference"]
    assert difference["largest"] < 1e-4 * difference["output"]
    found, before = load(tmp_path / "out").state_dict(), load(other).state_dict()
    assert any(not torch.equal(found[key], before[key]) for key in before)
    # The plain average with the base equals the merge.
    merged = tmp_path / "merged"
    run("merge", base, other, "--output", merged, "--quiet")
    first = load(base).state_dict()
    for key, tensor in load(merged).state_dict().items():
        torch.testing.assert_close(tensor, (first[key] + found[key]) / 2)


def test_aligning_files_with_a_model(tmp_path: Path) -> None:
    a, b = save_mlps(tmp_path)
    data, model = f"{__name__}:mlp_batches", "networks:make_mlp"
    report = tmp_path / "report.json"
    run("align", a, b, "--output", tmp_path / "c.pt", "--data", data, "--model", model, "--quiet", "--report", report)
    assert json.loads(report.read_text())["difference"]["largest"] < 1e-5
    run("align", a, b, "--output", tmp_path / "d.pt", "--quiet", "--report", report)
    assert json.loads(report.read_text())["difference"] is None


def test_wrong_spec_is_detected_by_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_pair(tmp_path, vit_model)
    spec = vit_huggingface(2, 4, checkpoint_names=True)
    left = {name for name in spec.layouts if name.endswith("intermediate.dense.bias")}
    spec.without(left).save(tmp_path / "wrong.json")
    arguments = ("align", a, b, "--output", tmp_path / "out", "--spec", tmp_path / "wrong.json")
    assert "the spec does not describe this network" in failure(capsys, tmp_path, *arguments)


RECOGNISED: dict[str, tuple[Callable[[], nn.Module], str | None, Any]] = {
    "mlp": (make_mlp, None, mudsc_fast.spec.mlp(["fc1", "fc2", "fc3"])),
    "resnet": (lambda: ResNet((2, 1), (8, 16)), None, resnet((2, 1), names="cifar")),
    "resnet bottleneck": (
        lambda: ResNet((2, 1), (8, 10), shortcut="downsample", head="fc", bottleneck=True),
        None,
        resnet((2, 1), bottleneck=True),
    ),
    "resnet group norm": (
        lambda: ResNet((1, 2), (8, 16), norm_groups=4),
        "resnet:norm_groups=4",
        resnet((1, 2), names="cifar", norm_groups=4),
    ),
    "vgg": (
        lambda: Vgg([(8,), (12, 10)], 8, (24,), batch_norms=False),
        None,
        vgg((1, 2), positions=4, classifier=("classifier.0", "classifier.3")),
    ),
    "vgg batch norm": (
        lambda: Vgg([(8, 8), (12,)], 12, (24, 20), batch_norms=True),
        None,
        vgg((2, 1), batch_norms=True, positions=9),
    ),
    "vit": (VisionTransformer, "vit:num_heads=3", vit(2, 3, 24)),
    "swin": (lambda: Swin((1, 2), (2, 4), 16), None, swin((1, 2), (2, 4), 16)),
    "clip": (
        lambda: Clip((2, 3, 24), (2, 4, 32)),
        "clip_openai:vision_heads=3,text_heads=4",
        mudsc_fast.spec.clip_openai(mudsc_fast.spec.Tower(2, 3, 24), mudsc_fast.spec.Tower(2, 4, 32)),
    ),
    "llama": (llama_model, "llama:num_heads=4,num_kv_heads=2", llama(2, 4, 2, 8)),
    "gpt2": (gpt2_model, "gpt2:num_heads=4", gpt2(2, 4, 32)),
    "bert": (HUGGING_FACE["bert"], "bert:num_heads=4", bert(2, 4)),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_recognition(name: str) -> None:
    build, text, expected = RECOGNISED[name]
    assert choose_spec(text, build().state_dict()) == expected


def test_names_of_gpt2_without_its_prefix() -> None:
    state = {key.removeprefix("transformer."): value for key, value in gpt2_model().state_dict().items()}
    del state["lm_head.weight"]
    config = {"model_type": "gpt2", "n_head": 4}
    spec = choose_spec(None, state, config=config)
    assert spec.nodes == gpt2(2, 4, 32).nodes
    assert spec.units(state)["stream"] == 32


@pytest.mark.parametrize(
    ("build", "text", "message"),
    [
        (VisionTransformer, None, r"do not determine num_heads of the family vit: pass spec 'vit:num_heads=N'"),
        (VisionTransformer, "vit:num_heads=5", "not those of the family vit: width must be a multiple of num_heads"),
        (VisionTransformer, "vit:heads=3,num_heads=3", "no number 'heads'; it takes: num_heads"),
        (VisionTransformer, "vit:num_heads", r"must be NAME:number=value,..., got 'num_heads'"),
        (VisionTransformer, "swim", r"spec must name a family, .* got 'swim'; did you mean 'swin'\?"),
        (VisionTransformer, "resnet18", r"got 'resnet18'; did you mean 'resnet'\?"),
        (VisionTransformer, "rubbish", "got 'rubbish'; there are 'bert', .* 'vit_huggingface'$"),
        (VisionTransformer, "resnet", "not those of the family resnet"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3)),
            None,
            r"recognized by the tensor names \(0.weight, 0.bias",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 2)), "mlp", "expected only linear layers"),
    ],
)
def test_unrecognized_networks(build: Callable[[], nn.Module], text: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_spec(text, build().state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t6"}, "building a network of the model type 't6' by transformers failed: ValueError: "),
        ({"model_type": "t5", "architectures": ["T6"]}, "transformers has no T6, which config.json names"),
        (
            {"model_type": "whisper"},
            "WhisperModel has no .model.embed_tokens.weight.",
        ),
        ({"model_type": "phi"}, r"PhiModel has no 'model.embed_tokens.weight' \(21 of the 21 tensors in the files"),
        ({"model_type": "llama"}, "do not determine num_heads of the family llama"),
        ({"model_type": "gpt2", "n_head": 4}, "not those of the family gpt2"),
    ],
)
def test_configs_that_do_not_help(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_spec(None, llama_model().state_dict(), config=config)


def qwen3_model(**options: Any) -> Any:
    config = transformers.Qwen3Config(**SHAPE, **TEXT, num_key_value_heads=2, head_dim=8, **options)
    return transformers.Qwen3ForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_networks_without_a_builder_are_derived(tied: bool, tmp_path: Path) -> None:
    a, b = save_pair(tmp_path, lambda: qwen3_model(tie_word_embeddings=tied))
    run("merge", a, b, "--output", tmp_path / "out")
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (a, b)]
    spec = PermutationSpec.from_model(models[0], {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
    merged = mudsc_fast.merge([model.state_dict() for model in models], spec=spec, space="weight")
    assert_states_equal(load(tmp_path / "out").state_dict(), merged.state_dict)
    run("align", a, b, "--output", tmp_path / "aligned", "--spec", "derive")
    tokens = torch.randint(60, (2, 9))
    found, expected = load(tmp_path / "aligned")(tokens).logits, models[1](tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_spec_of_user_network_is_derived(tmp_path: Path) -> None:
    a, b = save_mlps(tmp_path)
    given = ("--spec", "derive", "--model", "networks:make_mlp", "--data", f"{__name__}:mlp_batches")
    run("merge", a, b, "--output", tmp_path / "out.safetensors", *given)
    models = [make_mlp(seed=index) for index in (0, 1)]
    expected = mudsc_fast.merge(models, mlp_batches(), spec=PermutationSpec.from_model(models[0], torch.zeros(1, 20)))
    assert_states_equal(safetensors.torch.load_file(tmp_path / "out.safetensors"), expected.state_dict)


def no_model() -> str:
    return "a model"


def no_batches() -> list[str]:
    return ["a batch"]


def test_deriving_needs_model_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = save_mlps(tmp_path)
    for arguments, message in (
        ((), "--spec derive needs the model and a batch to run it on"),
        (
            ("--model", f"{__name__}:no_model", "--data", f"{__name__}:mlp_batches"),
            "the model function must return a torch.nn.Module, got str",
        ),
        (
            ("--model", "networks:make_mlp", "--data", f"{__name__}:no_batches"),
            "data must yield tensors, dicts of keyword arguments, or tuples that begin with one of these, got str",
        ),
        (("--model", "networks:make_mlp"), "got no data"),
    ):
        shown = failure(capsys, tmp_path, "merge", a, b, "--output", tmp_path / "out", "--spec", "derive", *arguments)
        assert message in shown


def test_deriving_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="deriving the spec of the model type 'qwen3' needs transformers"):
        choose_spec(None, {}, config={"model_type": "qwen3"})


def test_tensor_unknown_to_builder() -> None:
    state = llama_model(attention_bias=True).state_dict()
    with pytest.raises(ValueError, match=r"does not name 2 tensors, model.layers.0.self_attn.o_proj.bias"):
        choose_spec("llama:num_heads=4,num_kv_heads=2", state)
