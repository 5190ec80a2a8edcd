"""Derivation for special layers: parametrizations, buffers, padding, recurrent layers, Fourier transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import mudsc_fast
from architectures import randomize
from conftest import TORCH_VERSION
from mudsc_fast import Observation, PermutationSpec, Space
from mudsc_fast.spec.infer import derive
from networks import assert_recovered, random_group_permutations

Build = Callable[[], nn.Module]
Wrap = Callable[[nn.Module], nn.Module]


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


VECTORS, IMAGES, SEQUENCES = sample(64, 6), sample(32, 3, 8, 8), sample(32, 9, 6)


def chain(wrap: Wrap) -> Build:
    """Return a function that makes three linear layers and wraps each of them."""
    return lambda: nn.Sequential(
        wrap(nn.Linear(6, 20)), nn.Tanh(), wrap(nn.Linear(20, 16)), nn.Tanh(), wrap(nn.Linear(16, 4))
    )


def convolutions(wrap: Wrap) -> Build:
    return lambda: nn.Sequential(
        wrap(nn.Conv2d(3, 12, 3)), nn.Tanh(), wrap(nn.Conv2d(12, 10, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(160, 4)
    )


def parametrized(make: Callable[[nn.Module], nn.Module]) -> Wrap:
    def wrap(layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", make(layer))
        return layer

    return wrap


class Shrink(nn.Module):
    """An elementwise parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * weight.abs().sqrt()


def pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


class FrozenBatchNorm(nn.Module):
    """A BatchNorm whose parameters and statistics are buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(width))

    def forward(self, images: Tensor) -> Tensor:
        weight, bias, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return images * scale + (bias - mean * scale)


def frozen_batch_norm(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, nn.Conv2d)
    return nn.Sequential(layer, FrozenBatchNorm(layer.out_channels))


class PaddedBlock(nn.Module):
    """A residual block whose shortcut takes every second pixel and pads new channels with zeros."""

    def __init__(self, inputs: int, outputs: int, concatenated: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.new = (outputs - inputs) // 2
        self.concatenated = concatenated

    def forward(self, images: Tensor) -> Tensor:
        kept = images[:, :, ::2, ::2]
        if self.concatenated:
            zeros = kept.new_zeros(len(kept), self.new, *kept.shape[2:])
            kept = torch.cat([zeros, kept, zeros], 1)
        else:
            kept = F.pad(kept, (0, 0, 0, 0, self.new, self.new))
        return torch.tanh(kept + self.conv2(torch.tanh(self.norm(self.conv1(images)))))


def padded_resnet(concatenated: bool) -> Build:
    return lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Tanh(),
        PaddedBlock(4, 8, concatenated),
        PaddedBlock(8, 16, concatenated),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


class Positions(nn.Module):
    """A network with a position table that is longer than its inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 24), nn.Linear(24, 3)
        self.table: Tensor
        if kind == "parameter":
            self.table = nn.Parameter(torch.zeros(1, 30, 16))
        else:
            self.register_buffer("table", sample(1, 30, 16), persistent=kind == "buffer")

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.table[:, : tokens.shape[1]]
        result: Tensor = self.last(torch.tanh(self.first(hidden)))
        return result


class Recurrent(nn.Module):
    """A recurrent layer; the network uses its outputs, its last output, or its final states."""

    def __init__(self, kind: Callable[..., nn.Module], used: str = "outputs", **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.rnn = kind(10, 12, batch_first=True, **options)
        width = (2 if options.get("bidirectional") else 1) * (options.get("proj_size") or 12)
        self.head = nn.Linear(width, 3)
        self.used = used

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, state = self.rnn(torch.tanh(self.embed(tokens)))
        state = state[0] if isinstance(state, tuple) else state
        if self.used == "last state":
            outputs = state[-1]
        elif self.used == "both states":
            outputs = torch.cat([state[-2], state[-1]], -1)
        elif self.used == "last output":
            outputs = outputs[:, -1]
        result: Tensor = self.head(outputs)
        return result


class RecurrentCell(nn.Module):
    """A recurrent cell in a loop."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = kind(6, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        state: Any = None
        for place in range(4):
            state = self.cell(tokens[:, place], state)
        result: Tensor = self.head(state[0] if isinstance(state, tuple) else state)
        return result


class Between(nn.Module):
    """Two hidden layers with a function between them, applied to the last axis or to channels."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, image: bool = False, width: int = 12) -> None:
        super().__init__()
        layer: Callable[[int, int], nn.Module] = (lambda i, o: nn.Conv2d(i, o, 1)) if image else nn.Linear
        self.first, self.second, self.last = layer(3 if image else 6, 12), layer(width, 10), layer(10, 3)
        self.between = between

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.second(self.between(self.first(value)))))
        return result


def between(function: Callable[[Tensor], Tensor], **options: Any) -> Build:
    return lambda: Between(function, **options)


class FourierLayer(nn.Module):
    """A layer of a Fourier neural operator: a complex weight per frequency, stored as real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside, self.last = nn.Conv1d(6, 12, 1), nn.Conv1d(12, 12, 1), nn.Conv1d(12, 3, 1)
        self.weight = nn.Parameter(torch.zeros(12, 12, 3, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.first(tokens.transpose(1, 2))
        spectrum = torch.fft.rfft(hidden)
        mixed = torch.einsum("bif,iof->bof", spectrum[..., :3], torch.view_as_complex(self.weight))
        mixed = torch.cat([mixed, torch.zeros_like(spectrum[..., 3:])], -1)
        result: Tensor = self.last(torch.tanh(torch.fft.irfft(mixed, n=hidden.shape[-1]) + self.beside(hidden)))
        return result


def shuffled(images: Tensor) -> Tensor:
    batch, channels, *rest = images.shape
    return images.view(batch, 3, channels // 3, *rest).transpose(1, 2).reshape(batch, channels, *rest)


class Auxiliary(nn.Module):
    """A network with a second head that runs only in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.hidden, self.head = nn.Linear(6, 20), nn.Linear(20, 16), nn.Linear(16, 4)
        self.norm, self.second_hidden, self.second_head = nn.BatchNorm1d(20), nn.Linear(20, 9), nn.Linear(9, 4)

    def forward(self, values: Tensor) -> Any:
        trunk = torch.tanh(self.trunk(values))
        scores = self.head(torch.tanh(self.hidden(trunk)))
        if not self.training:
            return scores
        return scores, self.second_head(torch.tanh(self.second_hidden(self.norm(F.dropout(trunk, 0.0)))))


class Attention(nn.Module):
    """Attention whose keys and values have different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.keys, self.values = nn.Linear(6, 16), nn.Linear(6, 10), nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(16, 4, kdim=10, vdim=8, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed, _ = self.attention(self.embed(tokens), self.keys(tokens), self.values(tokens))
        result: Tensor = self.head(mixed)
        return result


class Transformer(nn.Module):
    """PyTorch's transformer encoder, called with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 1)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        result: Tensor = self.head(self.layers(self.embed(tokens), mask=mask))
        return result


class Bilinear(nn.Module):
    """A bilinear layer between two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 9)
        self.both, self.head = nn.Bilinear(8, 9, 7), nn.Linear(7, 3)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.both(self.first(values), self.second(values))))
        return result


class BagOfWords(nn.Module):
    """A sum over the embeddings of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(20, 12, mode="sum")
        self.hidden, self.head = nn.Linear(12, 9), nn.Linear(9, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.hidden(self.table(tokens))))
        return result


class Siamese(nn.Module):
    """Two inputs that go through the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 10))
        self.head = nn.Linear(20, 3)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.head(torch.cat([self.shared(values[:, :3]), self.shared(values[:, 3:])], -1))
        return result


class LowRank(nn.Module):
    """A parametrization that adds a product of two matrices."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear)
        self.down = nn.Parameter(torch.zeros(3, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def scattered(tokens: Tensor) -> Tensor:
    groups = (torch.arange(tokens.shape[1]) % 3)[None, :, None].expand(tokens.shape)
    return torch.zeros(len(tokens), 3, tokens.shape[2]).scatter_add(1, groups, tokens)


def folded(images: Tensor) -> Tensor:
    return F.fold(F.unfold(images, 3, padding=1), images.shape[2:], 3, padding=1)


TRANSFORMER_NODES = {"self_attn.0": 16, "self_attn.1": 16, "linear1": 24}

#: Networks with their inputs and the units of their nodes.
NETWORKS: dict[str, tuple[Build, Tensor, dict[str, int]]] = {
    "weight norm": (chain(parametrizations.weight_norm), VECTORS, {"0": 20, "2": 16}),
    "weight norm of convolutions": (convolutions(parametrizations.weight_norm), IMAGES, {"0": 12, "2": 10}),
    "old weight norm": (chain(old_weight_norm), VECTORS, {"0": 20, "2": 16}),
    "spectral norm": (chain(parametrizations.spectral_norm), VECTORS, {"0": 20, "2": 16}),
    "spectral norm of convolutions": (convolutions(parametrizations.spectral_norm), IMAGES, {"0": 12, "2": 10}),
    "old spectral norm": (chain(nn.utils.spectral_norm), VECTORS, {"0": 20, "2": 16}),
    "elementwise parametrization": (chain(parametrized(lambda _: Shrink())), VECTORS, {"0": 20, "2": 16}),
    "pruned": (chain(pruned), VECTORS, {"0": 20, "2": 16}),
    "pruned convolutions": (convolutions(pruned), IMAGES, {"0": 12, "2": 10}),
    "frozen batch norm": (convolutions(frozen_batch_norm), IMAGES, {"0.0": 12, "2.0": 10}),
    "positions in a parameter": (lambda: Positions("parameter"), SEQUENCES, {"embed": 16, "first": 24}),
    "positions in a buffer": (lambda: Positions("buffer"), SEQUENCES, {"embed": 16, "first": 24}),
    "positions outside the state dict": (lambda: Positions("constant"), SEQUENCES, {"first": 24}),
    **{
        f"residual network with {name} shortcuts": (
            padded_resnet(concatenated),
            IMAGES,
            {"0": 4, "2.conv1": 8, "2.conv2.0": 2, "2.conv2.1": 2, "3.conv1": 16, "3.conv2.0": 4, "3.conv2.1": 4},
        )
        for name, concatenated in (("padded", False), ("concatenated", True))
    },
    **{
        f"{kind.__name__}, {used}": (partial(Recurrent, kind, used), SEQUENCES, {"embed": 10, "rnn": 12})
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for used in ("outputs", "last output", "last state")
    },
    "LSTM of two layers": (
        lambda: Recurrent(nn.LSTM, "both states", num_layers=2, bidirectional=True),
        SEQUENCES,
        {"embed": 10, "rnn.0": 12, "rnn.1": 12, "rnn.2": 12, "rnn.3": 12},
    ),
    "GRU of two layers": (
        lambda: Recurrent(nn.GRU, "last output", num_layers=2),
        SEQUENCES,
        {"embed": 10, "rnn.0": 12, "rnn.1": 12},
    ),
    "LSTM with a projection": (
        lambda: Recurrent(nn.LSTM, proj_size=5), SEQUENCES, {"embed": 10, "rnn.0": 12, "rnn.1": 5}
    ),
    "attention with other widths of keys and values": (
        Attention,
        SEQUENCES,
        {"embed": 16, "keys": 10, "values": 8, "attention.0": 16, "attention.1": 16, "attention.out_proj": 16},
    ),
    "transformer with a causal mask": (
        Transformer,
        SEQUENCES,
        {"embed": 16, **{f"layers.layers.0.{name}": n for name, n in TRANSFORMER_NODES.items()}},
    ),
    "bilinear layer": (Bilinear, VECTORS, {"first": 8, "second": 9, "both": 7}),
    "sum over embeddings": (BagOfWords, torch.arange(96).reshape(32, 3) % 20, {"table": 12, "hidden": 9}),
    "layers on a concatenation of shared layers": (Siamese, VECTORS, {"shared.0": 12, "shared.2": 10}),
    "low-rank parametrization": (
        chain(parametrized(LowRank)), VECTORS, {"0.0": 20, "0.1": 3, "2.0": 16, "2.1": 3, "4": 3}
    ),
    "checkpointed function": (
        between(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)), SEQUENCES, {"first": 12, "second": 10}
    ),
    "sorted tokens": (between(lambda x: x.sort(1).values), SEQUENCES, {"first": 12, "second": 10}),
    "largest units": (between(lambda x: x.topk(3, 2).values, width=3), SEQUENCES, {"first": 12, "second": 10}),
    "scattered tokens": (between(scattered), SEQUENCES, {"first": 12, "second": 10}),
    "patches of an image": (between(folded, image=True), IMAGES, {"first": 12, "second": 10}),
    "pixel shuffle": (between(nn.PixelShuffle(2), image=True, width=3), IMAGES, {"first": 3, "second": 10}),
    "pixel unshuffle": (between(nn.PixelUnshuffle(2), image=True, width=48), IMAGES, {"first": 12, "second": 10}),
    "rolled tokens": (between(lambda x: x.roll(2, 1)), SEQUENCES, {"first": 12, "second": 10}),
    "LSTM in two directions": (
        lambda: Recurrent(nn.LSTM, bidirectional=True), SEQUENCES, {"embed": 10, "rnn.0": 12, "rnn.1": 12}
    ),
    "GRU without biases": (lambda: Recurrent(nn.GRU, bias=False), SEQUENCES, {"embed": 10, "rnn": 12}),
    "LSTMCell": (lambda: RecurrentCell(nn.LSTMCell), SEQUENCES, {"cell": 12}),
    "GRUCell": (lambda: RecurrentCell(nn.GRUCell), SEQUENCES, {"cell": 12}),
    "RNNCell": (lambda: RecurrentCell(nn.RNNCell), SEQUENCES, {"cell": 12}),
    "Fourier transform of tokens": (
        between(lambda x: torch.fft.fft2(x, dim=(1,)).real), SEQUENCES, {"first": 12, "second": 10}
    ),
    "Fourier transform of units": (between(lambda x: torch.fft.rfft(x).abs(), width=7), SEQUENCES, {"second": 10}),
    "Fourier neural operator": (FourierLayer, SEQUENCES, {"first": 12, "beside": 12}),
    "channel shuffle": (between(shuffled, image=True), IMAGES, {"first": 4, "second": 10}),
    "native channel shuffle": (between(nn.ChannelShuffle(3), image=True), IMAGES, {"first": 4, "second": 10}),
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, PermutationSpec, Tensor]:
    if name == "Fourier transform of tokens" and TORCH_VERSION < (2, 5):
        pytest.skip("torch.export of this version of torch fails on fft2 over one axis")
    build, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = randomize(build(), seed=1)
    for key, tensor in model.state_dict().items():
        if key.endswith("mask"):
            tensor.copy_((tensor > 0).to(tensor.dtype))
    spec = PermutationSpec.from_model(model, inputs)
    spec.validate(model)
    return model, spec, inputs


def permuted(build: Build, model: nn.Module, spec: PermutationSpec) -> tuple[nn.Module, dict[str, Tensor]]:
    permutations = random_group_permutations(spec, spec.units(model.state_dict()), seed=2)
    torch.manual_seed(0)  # for constants that are not in the state dict
    copied = build().eval()
    copied.load_state_dict(mudsc_fast.permute_state_dict(model.state_dict(), spec, permutations))
    return copied, permutations


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_permuted_network_computes_the_same_function(name: str) -> None:
    build, _, expected = NETWORKS[name]
    model, spec, inputs = network(name)
    assert spec.units(model.state_dict()) == expected
    copied, _ = permuted(build, model, spec)
    values = model(inputs)
    assert values.std() > 0.01
    torch.testing.assert_close(copied(inputs), values, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("space", ["weight", "activation"])
def test_permuted_network_is_recovered(name: str, space: Space) -> None:
    build, _, _ = NETWORKS[name]
    model, spec, inputs = network(name)
    copied, permutations = permuted(build, model, spec)
    result = mudsc_fast.merge([model, copied], [inputs], spec=spec, space=space, progress=False)
    assert_recovered(result.matching, permutations)
    assert result.model is not None
    torch.testing.assert_close(result.model(inputs), model(inputs), rtol=1e-4, atol=1e-4)


def test_training_only_layers_follow_their_units() -> None:
    model = randomize(Auxiliary(), seed=1)
    spec = PermutationSpec.from_model(model, VECTORS)
    assert spec.units(model.state_dict()) == {"trunk": 20, "hidden": 16, "second_hidden": 9}
    assert {use.tensor for use in spec.uses("trunk")} >= {"second_hidden.weight", "norm.running_mean"}
    copied, _ = permuted(Auxiliary, model, spec)
    torch.testing.assert_close(copied(VECTORS), model(VECTORS))
    torch.testing.assert_close(copied.train()(VECTORS)[1], model.train()(VECTORS)[1], rtol=1e-4, atol=1e-4)


def test_unfollowable_training_only_layers_are_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"does not use in evaluation mode \('second_hidden.weight', .* a batch of two"
    ):
        PermutationSpec.from_model(Auxiliary(), VECTORS[:1])  # BatchNorm needs two samples in training mode


def test_unused_vectors_keep_their_order(caplog: pytest.LogCaptureFixture) -> None:
    model = chain(lambda layer: layer)()
    model.register_parameter("mask_token", nn.Parameter(torch.zeros(20)))
    assert "mask_token" not in PermutationSpec.from_model(model, VECTORS).layouts
    assert "the model does not use 'mask_token' with the example inputs" in caplog.text


def test_parametrization_without_permutations_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    mixed = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 7))
    model = nn.Sequential(mixed, nn.Tanh(), nn.Linear(7, 2))
    found = derive(model, VECTORS)
    assert "0.0" not in found.observe
    assert "aten.tril" in found.frozen_axes["0.2.parametrizations.weight.original"][0]
    assert "remove_parametrizations" in caplog.text


def test_report_names_cause_of_frozen_axis(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(6, 40), nn.Linear(40, 5), nn.Linear(5, 2)
            self.register_buffer("scale", torch.arange(40))
            self.register_buffer("shift", torch.zeros(40), persistent=False)

        def forward(self, values: Tensor) -> Tensor:
            hidden = self.first(values) * self.scale if self.training else self.first(values) + self.shift
            result: Tensor = self.last(torch.tanh(self.second(hidden)))
            return result

    frozen = derive(Scaled(), VECTORS).frozen_axes
    assert frozen["first.weight"] == {
        0: "it has the order of buffer 'shift', which is not in the state dict",
        1: "it has the order of input 0 of the model",
    }
    assert frozen["last.weight"] == {0: "it is an output of the model"}
    (record,) = [record for record in caplog.records if "keep the order of all their axes" in record.message]
    assert record.levelname == "WARNING"
    assert record.message.startswith("3 of 6 tensors (57 % of the parameters)")
    assert "axis 0 of 'first.weight', axis 0 of 'first.bias' (it has the order of buffer 'shift'" in record.message


def test_report_names_integers_and_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)
            self.register_buffer("mask", torch.ones(8, dtype=torch.bool))

        def forward(self, values: Tensor) -> Tensor:
            result: Tensor = self.last(self.first(values) * self.mask)
            return result

    with pytest.raises(ValueError, match=r"it has the order of buffer 'mask', which holds torch.bool"):
        PermutationSpec.from_model(Masked(), VECTORS)


def test_unread_entries_keep_their_order() -> None:
    _, spec, _ = network("positions in a parameter")
    assert [segment.axis for segment in spec.layouts["table"][1]] == [None]


def test_nodes_are_observed_at_activations() -> None:
    for name in ("weight norm", "spectral norm", "elementwise parametrization", "pruned"):
        _, spec, _ = network(name)
        assert spec.observations("0") == (Observation("2", "input", -1),)


def test_model_caches_are_restored() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)
            self.scale: Tensor | None = None
            self.tables: dict[str, Tensor] = {}

        def forward(self, values: Tensor) -> Tensor:
            self.scale = torch.full((1,), 2.0)
            self.tables["ones"] = torch.ones(8)
            result: Tensor = self.last(self.first(values) * self.scale)
            return result

    model = Caching()
    PermutationSpec.from_model(model, VECTORS)
    assert model.scale is None
    assert model.tables == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_and_transformed_code_is_rejected() -> None:
    model = chain(lambda layer: layer)()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module in Python, got RecursiveScriptModule"):
        PermutationSpec.from_model(torch.jit.script(model), VECTORS)
    with pytest.raises(TypeError, match=r"'0' is compiled with TorchScript"):
        PermutationSpec.from_model(nn.Sequential(torch.jit.script(model)), VECTORS)
    with pytest.raises(RuntimeError, match=r"inside torch.vmap, .* outside of the transformed function"):
        torch.vmap(lambda values: PermutationSpec.from_model(model, values))(sample(2, 3, 6))
    with pytest.raises(RuntimeError, match=r"while torch.jit or torch.compile traces"):
        torch.jit.trace(lambda values: PermutationSpec.from_model(model, values), sample(3, 6))


def test_spec_of_untied_model_is_rejected_for_tied_model() -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.table, self.hidden = nn.Embedding(20, 12), nn.Linear(12, 12)
            self.head = nn.Linear(12, 20, bias=False)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            result: Tensor = self.head(torch.tanh(self.hidden(self.table(tokens))))
            return result

    tokens = torch.arange(60).reshape(20, 3) % 20
    tied, free = (randomize(Tied(tied), seed=1) for tied in (True, False))
    of_tied, of_free = (PermutationSpec.from_model(model, tokens) for model in (tied, free))
    assert of_tied.units(tied.state_dict()) == {"table": 12}
    assert of_free.units(free.state_dict()) == {"table": 12, "hidden": 12}
    for model in (tied, free):  # tied tensors are permuted alike, so this specification fits both models
        copied = copy.deepcopy(model)
        permutations = random_group_permutations(of_tied, of_tied.units(model.state_dict()), seed=2)
        copied.load_state_dict(mudsc_fast.permute_state_dict(model.state_dict(), of_tied, permutations))
        torch.testing.assert_close(copied(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    permutations = random_group_permutations(of_free, of_free.units(tied.state_dict()), seed=2)
    with pytest.raises(ValueError, match=r"'table.weight' and 'head.weight' are one tensor .* axes differently"):
        mudsc_fast.permute_state_dict(tied.state_dict(), of_free, permutations)
