"""Unusual models, tensors and batches: shared, versioned, complex, quantized, cached, nested."""

from __future__ import annotations

import collections
import copy
import dataclasses
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast import PermutationSpec
from networks import MLP_SPEC, make_mlp, random_permutations


def permuted(model: nn.Module, spec: PermutationSpec, seed: int = 3) -> nn.Module:
    copied = copy.deepcopy(model)
    orders = random_permutations(spec, model, seed)
    copied.load_state_dict(mudsc_fast.permute_state_dict(model.state_dict(), spec, orders))
    return copied


def batches(width: int = 20) -> list[Tensor]:
    return list(torch.randn(2, 30, width, generator=torch.Generator().manual_seed(5)))


def assert_model_holds(result: mudsc_fast.MergeResult) -> nn.Module:
    assert result.model is not None
    held = result.model.state_dict()
    assert list(held) == list(result.state_dict)
    for name, tensor in result.state_dict.items():
        assert torch.equal(held[name], tensor), name
    return result.model


class LanguageModel(nn.Module):
    def __init__(self, tied: bool, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.middle = nn.Embedding(20, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.middle(self.table(tokens))))
        return scores


@pytest.mark.parametrize("tied", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("mode", ["align", "zip"])
def test_tied_and_untied_models(tied: tuple[bool, bool], mode: mudsc_fast.Mode) -> None:
    tokens = torch.randint(0, 20, (4, 5))
    models = [LanguageModel(tied[0], 0), LanguageModel(tied[1], 1)]
    spec = PermutationSpec.from_model(models[0] if tied[0] else models[1], tokens)
    result = mudsc_fast.merge(models, spec=spec, mode=mode)
    model = assert_model_holds(result)
    is_tied = model.get_parameter("head.weight") is model.get_parameter("table.weight")
    assert is_tied == all(tied)
    free = LanguageModel(False, 2)
    free.load_state_dict(result.state_dict)
    torch.testing.assert_close(model(tokens), free(tokens))
    assert models[0].head.weight.data_ptr() == models[0].table.weight.data_ptr() or not tied[0]


def test_models_with_different_ties() -> None:
    class Two(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            for name in ("a", "b", "c", "d"):
                self.register_module(name, nn.Linear(6, 6))
            self.get_submodule(second).weight = self.get_submodule(first).weight

        def forward(self, x: Tensor) -> Tensor:
            for name in ("a", "b", "c", "d"):
                x = torch.relu(self.get_submodule(name)(x))
            return x

    spec = PermutationSpec({f"{name}.bias": (name,) for name in "abc"})
    model = assert_model_holds(mudsc_fast.merge([Two("a", "b"), Two("c", "d")], spec=spec))
    assert len({id(parameter) for parameter in model.parameters()}) == 8


def test_tied_tensor_is_merged_once() -> None:
    tokens = torch.randint(0, 20, (4, 5))
    model = LanguageModel(True, 0)
    spec = PermutationSpec.from_model(model, tokens)
    other = permuted(model, spec)
    result = mudsc_fast.merge([model, other], spec=spec.without(["head.weight"]))
    torch.testing.assert_close(assert_model_holds(result)(tokens), model(tokens))
    with pytest.raises(ValueError, match=r"'table.weight' and 'head.weight' are one tensor in every model, but"):
        mudsc_fast.merge(
            [LanguageModel(True, 0)] * 2, spec=PermutationSpec({"head.weight": ("h", "k"), "table.weight": (None, "k")})
        )


class Versioned(nn.Module):
    """State dicts of version 1 store half of the weight."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return scores

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if (metadata.get("version") or 1) < 2:
            state_dict[prefix + "fc1.weight"] = state_dict[prefix + "fc1.weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


def test_modules_with_versioned_state() -> None:
    model, inputs = Versioned(), torch.randn(5, 4)
    spec = PermutationSpec.from_model(model, inputs)
    other = permuted(model, spec)
    torch.testing.assert_close(other(inputs), model(inputs))
    result = mudsc_fast.merge([model, other], spec=spec)
    torch.testing.assert_close(assert_model_holds(result)(inputs), model(inputs))
    of_states = mudsc_fast.merge([model.state_dict(), other.state_dict()], spec=spec)
    loaded = Versioned()
    loaded.load_state_dict(of_states.state_dict)
    torch.testing.assert_close(loaded(inputs), model(inputs))
    aligned = result.matching.permute(other.state_dict(), 1)
    loaded.load_state_dict(aligned)
    torch.testing.assert_close(loaded(inputs), model(inputs))
    data = [torch.randn(20, 4)]
    repaired = mudsc_fast.repair(result, [model, other], data)
    loaded.load_state_dict(repaired.state_dict)
    assert repaired.model is not None
    torch.testing.assert_close(loaded(inputs), repaired.model(inputs))
    task_states = mudsc_fast.merge([model, other], spec=spec, task_heads="fc2").task_state_dicts
    loaded.load_state_dict(task_states[1])
    torch.testing.assert_close(loaded(inputs), model(inputs))


def test_module_that_changes_loaded_tensors_is_rejected() -> None:
    class Normalizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)

        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            super()._load_from_state_dict(state_dict, prefix, *rest)
            self.register_buffer("loaded", None)

    class Changing(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            state_dict = {name: value / 2 for name, value in state_dict.items()}
            super()._load_from_state_dict(state_dict, prefix, *rest)

    models = [nn.Sequential(collections.OrderedDict(fc1=Changing(4, 8), fc2=nn.Linear(8, 2))) for _ in range(2)]
    spec = PermutationSpec({"fc1.weight": ("h", None), "fc2.weight": (None, "h")})
    with pytest.raises(ValueError, match=r"Sequential does not keep the tensors that it loads: fc1.weight, fc1.bias"):
        mudsc_fast.merge(models, spec=spec)
    assert mudsc_fast.merge([model.state_dict() for model in models], spec=spec).model is None


def test_non_tensor_entries() -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"scale": torch.ones(2), "kind": "amax"}

        def set_extra_state(self, state: Any) -> None:
            assert state["kind"] == "amax"

    models = [nn.Sequential(Counting(8, 16), nn.ReLU(), Counting(16, 3)) for _ in range(2)]
    result = mudsc_fast.merge(models, spec=mudsc_fast.spec.mlp(["0", "2"]))
    assert result.model is not None
    assert result.state_dict["0._extra_state"]["kind"] == "amax"  # type: ignore[index]
    assert result.num_shared == 16 * 8 + 16 + 3 * 16 + 3
    assert str(result)


class Spectral(nn.Module):
    """A layer with a complex weight, as in Fourier neural operators."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.fc1 = nn.Parameter(torch.randn(12, 4, generator=generator, dtype=torch.cfloat))
        self.fc2 = nn.Parameter(torch.randn(3, 12, generator=generator, dtype=torch.cfloat))
        self.gain = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x.to(torch.cfloat) @ self.fc1.T)
        return ((hidden @ self.fc2.T) * self.gain).abs()


@pytest.mark.parametrize("mode", ["align", "zip"])
def test_complex_tensors_are_matched_and_averaged(mode: mudsc_fast.Mode) -> None:
    spec = PermutationSpec({"fc1": ("hidden", None), "fc2": (None, "hidden")})
    model, inputs = Spectral(0), torch.randn(6, 4)
    other = permuted(model, spec)
    torch.testing.assert_close(other(inputs), model(inputs))
    result = mudsc_fast.merge([model, other], spec=spec, mode=mode)
    torch.testing.assert_close(assert_model_holds(result)(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    mean = mudsc_fast.merge([model, Spectral(1)], spec=spec, weights=[0.25, 0.75])
    torch.testing.assert_close(mean.state_dict["gain"], 0.25 * model.gain.detach() + 0.75 * Spectral(1).gain.detach())
    assert mean.unmatched_tensors == ("gain",)
    with torch.no_grad():
        model.fc1[2, 1] = torch.tensor(complex(0, float("nan")))
    with pytest.raises(ValueError, match=r"'fc1' of models\[0\] must be finite"):
        mudsc_fast.merge([model, other], spec=spec)


STATE = make_mlp(seed=0).state_dict()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8", "uint16", "int32"])
def test_error_names_quantized_weights(dtype: str) -> None:
    states = [{name: (t * 20).to(getattr(torch, dtype)) if t.ndim == 2 else t for name, t in STATE.items()}] * 2
    with pytest.raises(TypeError, match=f"'fc1.weight' has dtype torch.{dtype} and cannot be averaged: .* dequantized"):
        mudsc_fast.merge(states, spec=MLP_SPEC)
    order = torch.randperm(32)
    moved = mudsc_fast.permute_state_dict(states[0], MLP_SPEC, {"fc1": order})
    assert moved["fc1.weight"].dtype == getattr(torch, dtype)
    expected = states[0]["fc1.weight"].float()[order]
    assert torch.equal(moved["fc1.weight"].float(), expected)
    assert torch.equal(moved["fc2.weight"].float(), states[0]["fc2.weight"].float()[:, order])


def test_packed_weights_outside_spec_are_rejected() -> None:
    packed = [{**STATE, "extra.qweight": torch.full((4, 4), index, dtype=torch.int32)} for index in range(2)]
    with pytest.raises(TypeError, match=r"'extra.qweight' has dtype torch.int32 and cannot be averaged"):
        mudsc_fast.merge(packed, spec=MLP_SPEC)
    kept = mudsc_fast.match(packed, spec=MLP_SPEC, task_heads="extra").merge(packed).task_state_dicts[1]
    assert torch.equal(kept["extra.qweight"], packed[1]["extra.qweight"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated in torch
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"must be a tensor in every model, got a quantized tensor \(torch.qint8\)"):
        mudsc_fast.merge([{**STATE, "q": quantized}] * 2, spec=MLP_SPEC)


def test_warning_names_different_integers(caplog: pytest.LogCaptureFixture) -> None:
    tables = [{**STATE, "table": torch.arange(4) + index, "steps": torch.tensor(index)} for index in range(2)]
    with caplog.at_level(logging.WARNING):
        merged = mudsc_fast.merge(tables, spec=MLP_SPEC).state_dict
    assert torch.equal(merged["table"], tables[0]["table"])
    assert "1 tensors of integers differ between the models" in caplog.text
    assert "'table'" in caplog.text


def test_warning_names_buffers_that_copy_weights(caplog: pytest.LogCaptureFixture) -> None:
    noise = torch.Generator().manual_seed(1)
    average = {
        f"average_{name.replace('.', '_')}": t + 0.1 * t.std() * torch.randn(t.shape, generator=noise)
        for name, t in STATE.items()
    }
    with caplog.at_level(logging.WARNING):
        mudsc_fast.match([{**STATE, **average}] * 2, spec=MLP_SPEC)
    assert "3 tensors look like copies of weights" in caplog.text
    assert "'average_fc2_weight' of 'fc2.weight'" in caplog.text
    caplog.clear()
    others = {f"other_{name.replace('.', '_')}": tensor for name, tensor in make_mlp(seed=7).state_dict().items()}
    with caplog.at_level(logging.WARNING):
        mudsc_fast.match([{**STATE, **others}] * 2, spec=MLP_SPEC)
    assert not caplog.text


def test_padding_masks_of_encoders() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Linear(6, 16)
            layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scores: Tensor = self.head(self.encoder(self.embedding(x), src_key_padding_mask=mask).mean(1))
            return scores

    model = Encoder().eval()
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[:, 5:] = True
    batch = {"x": torch.randn(5, 7, 6), "mask": mask}
    spec = PermutationSpec(
        {
            "encoder.layers.0.linear1.weight": ("h", None),
            "encoder.layers.0.linear1.bias": ("h",),
            "encoder.layers.0.linear2.weight": (None, "h"),
        }
    )
    other = permuted(model, spec).eval()
    enabled = torch.backends.mha.get_fastpath_enabled()
    result = mudsc_fast.merge([model, other], [batch], spec=spec, space="activation")
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result.state_dict[name], tensor)
    assert mudsc_fast.repair(result, [model, other], [batch]).repaired_layers == ("encoder.layers.0.linear1",)


def test_same_model_twice_and_shared_submodules() -> None:
    model = make_mlp(seed=0)
    data = batches()
    sharing = nn.Sequential(collections.OrderedDict(copy.deepcopy(model).named_children()))
    sharing.fc1, sharing.relu1 = model.fc1, model.relu1
    for other in (model, sharing):
        result = mudsc_fast.merge([model, other], data, spec=MLP_SPEC)
        torch.testing.assert_close(assert_model_holds(result)(data[0]), model(data[0]))
        assert all(not module._forward_pre_hooks for module in model.modules())


def test_models_with_cached_table_can_be_trained_after_merge() -> None:
    class Cached(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.body = make_mlp(seed=seed)
            self.table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.linspace(0.5, 1, x.shape[1])
            return self.body(x * self.table)  # type: ignore[no-any-return]

    spec = PermutationSpec({f"body.{name}": [s[0].axis for s in layout] for name, layout in MLP_SPEC.layouts.items()})
    models = [Cached(0), Cached(1)]
    result = mudsc_fast.merge(models, batches(), spec=spec)
    assert result.model is not None
    for model in (*models, result.model):
        model(batches()[0]).sum().backward()


Pair = collections.namedtuple("Pair", ["image", "label"])


@dataclasses.dataclass
class Example:
    image: Tensor
    label: Tensor


class Movable:
    """A batch type with its own method `to`, as in torch_geometric and transformers."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.moved_to: list[torch.device] = []

    def to(self, device: torch.device) -> Movable:
        moved = Movable(self.image.to(device))
        moved.moved_to = [*self.moved_to, device]
        return moved


def test_custom_batch_type_is_kept() -> None:
    seen: list[Any] = []
    models, image = [make_mlp(seed=0), make_mlp(seed=1)], batches()[0]
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 20), torch.tensor([2, 2, 1]), batch_first=True)
    defaults: collections.defaultdict[str, Any] = collections.defaultdict(list, image=image)
    for batch, read in (
        (Pair(image, 3), lambda batch: batch.image),
        (Example(image, image), lambda batch: batch.image),
        (Movable(image), lambda batch: batch.image),
        (defaults, lambda batch: batch["image"]),
        ((packed, 1), lambda batch: batch[0].data),
        ([{"pair": Pair(image, "text")}], lambda batch: batch[0]["pair"].image),
    ):
        seen.clear()

        def forward(model: nn.Module, batch: Any, read: Any = read) -> None:
            seen.append(batch)
            model(read(batch))

        mudsc_fast.match(models, [batch], spec=MLP_SPEC, forward=forward, verify=False)
        assert [type(value) for value in seen] == [type(batch)] * 2
    assert seen[0][0]["pair"].label == "text"


def test_batch_errors_mention_forward() -> None:
    models, image = [make_mlp(seed=0), make_mlp(seed=1)], batches()[0]
    with pytest.raises(TypeError, match=r"got Example\. For other batches pass forward="):
        mudsc_fast.match(models, [Example(image, image)], spec=MLP_SPEC)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'image'\. .* or forward="):
        mudsc_fast.match(models, [{"image": image}], spec=MLP_SPEC)


def test_error_names_node_with_infinite_activations() -> None:
    models, data = [make_mlp(seed=0), make_mlp(seed=1)], batches()
    data[1][0, 0] = float("inf")
    with pytest.raises(ValueError, match="the activations of node 'fc1' cannot be compared: "):
        mudsc_fast.match(models, data, spec=MLP_SPEC)


def test_scripted_models_and_vmap() -> None:
    models = [make_mlp(seed=0), make_mlp(seed=1)]

    def vectorized(model: nn.Module, batch: Tensor) -> None:
        torch.vmap(model)(batch)

    with pytest.raises(ValueError, match=r"node 'fc1' is observed at 'fc2', which runs inside torch.vmap"):
        mudsc_fast.match(models, batches(), spec=MLP_SPEC, forward=vectorized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        compiled = [torch.jit.trace(model, batches()[0]) for model in models]
    with pytest.raises(
        TypeError, match=r"models\[0\] must be a module whose submodules can be observed, got a TopLevel"
    ):
        mudsc_fast.match(compiled, batches(), spec=MLP_SPEC)
    by_weights = mudsc_fast.match(compiled, spec=MLP_SPEC)
    assert by_weights["fc1"].same_clusters(mudsc_fast.match(models, spec=MLP_SPEC)["fc1"])
