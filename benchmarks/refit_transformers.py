"""Refit of transformers that are trained on the spot: a ViT on CIFAR-10 and a two-layer GPT on Python's own library.

    python benchmarks/refit_transformers.py vit --images images.npz --vectors vectors.npz --networks DIRECTORY
    python benchmarks/refit_transformers.py gpt --networks DIRECTORY

`vit` trains two vision transformers (patches of 8 pixels, four blocks of width 128), each on five of the ten classes
of CIFAR-10, and reports the joint accuracy on all ten classes in percent. `images` and `vectors` are those of
`bench_refit.py cifar`. `gpt` trains two GPT-2 of two layers of width 128 on bytes, one on the docstrings of Python's
standard library and one on its source code, and reports the mean cross entropy on files that neither network has read,
in nats per byte, averaged over both texts. The trained networks are kept in a directory, so that a second run only
merges them.

Every merge is measured as it is, refitted, refitted with each network's own data, and fine-tuned on the networks' mean
outputs for as long as refit takes, with each of three learning rates (the best is shown).
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from bench_refit import Case, cpu_seconds, fine_tuned, mean_output

WIDTH, HEADS = 128, 4
VIT_LAYERS, VIT_PATCH, VIT_EPOCHS = 4, 8, 4
GPT_LAYERS, GPT_LENGTH, GPT_STEPS = 2, 64, 500
#: Files of the standard library, of every ten, that neither network is trained on.
HELD_OUT_FILES = 1


class Vit(nn.Module):
    """A vision transformer that maps images of 32 pixels to vectors [B, 512]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, VIT_PATCH, VIT_PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((32 // VIT_PATCH) ** 2, WIDTH))
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, VIT_LAYERS, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 512)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to vectors."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        vectors: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return vectors


class Gpt(nn.Module):
    """GPT-2 of `transformers` on bytes; its table of tokens is tied to the last layer."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=256, n_positions=GPT_LENGTH, n_embd=WIDTH, n_layer=GPT_LAYERS, n_head=HEADS, use_cache=False
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        config.bos_token_id = config.eos_token_id = None
        self.gpt = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map bytes [B, T] to logits of the next ones [B, T, 256]."""
        logits: Tensor = self.gpt(input_ids=tokens).logits
        return logits


def trained(model: nn.Module, path: pathlib.Path, steps: int, loss_of: Callable[[nn.Module, int], Tensor]) -> nn.Module:
    """Return the model with the weights of a file, after training it if there is no such file."""
    if path.exists():
        model.load_state_dict(load_file(path), strict=False)  # tied tensors are stored once
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{path.stem}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    save_file(tensors, path)
    return model.eval()


def vit_case(images: str, vectors: str, networks: pathlib.Path) -> Case:
    """Train the two vision transformers, or read them."""
    class_vectors = functional.normalize(torch.from_numpy(np.load(vectors)["cifar10"]), dim=1)
    arrays = np.load(images)
    mean = torch.tensor([125.307, 122.961, 113.8575]).view(3, 1, 1)
    deviation = torch.tensor([51.5865, 50.847, 51.255]).view(3, 1, 1)

    def pixels(part: str, chosen: Tensor) -> Tensor:
        return (
            (torch.from_numpy(arrays_of[part][chosen.numpy()]).permute(0, 3, 1, 2).float() - mean) / deviation
        ).contiguous()

    arrays_of = {part: arrays[f"x_{part}"] for part in ("train", "test")}
    labels_of = {part: torch.from_numpy(arrays[f"y_{part}"]).long() for part in ("train", "test")}
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    halves = [order[:5].sort().values, order[5:].sort().values]
    shuffled = torch.randperm(len(labels_of["train"]), generator=torch.Generator().manual_seed(1))
    models = []
    for index, classes in enumerate(halves):
        torch.manual_seed(index)
        own = torch.nonzero(torch.isin(labels_of["train"], classes)).flatten()
        batches = [batch for _ in range(VIT_EPOCHS) for batch in own[torch.randperm(len(own))].split(250)]

        def loss_of(
            model: nn.Module, step: int, batches: Sequence[Tensor] = batches, classes: Tensor = classes
        ) -> Tensor:
            seen = pixels("train", batches[step])
            flipped = torch.rand(len(seen)) < 0.5
            seen[flipped] = seen[flipped].flip(3)
            scores = 30 * functional.normalize(model(seen), dim=1) @ class_vectors[classes].T
            return functional.cross_entropy(scores, torch.searchsorted(classes, labels_of["train"][batches[step]]))

        models.append(trained(Vit(), networks / f"vit_{index}.safetensors", len(batches), loss_of))
    tested = torch.randperm(len(labels_of["test"]), generator=torch.Generator().manual_seed(0))[:2000]
    test, labels = pixels("test", tested), labels_of["test"][tested]

    @torch.no_grad()
    def accuracy(network: Callable[[Tensor], Tensor], among: Tensor | None = None) -> float:
        scores = functional.normalize(torch.cat([network(batch) for batch in test.split(250)]), dim=1) @ class_vectors.T
        if among is None:
            return 100 * float((scores.argmax(1) == labels).double().mean())
        own = torch.isin(labels, among)
        return 100 * float((among[scores[own][:, among].argmax(1)] == labels[own]).double().mean())

    def own_batches(classes: Tensor) -> Callable[[int], list[Tensor]]:
        own = shuffled[torch.isin(labels_of["train"][shuffled], classes)]
        return lambda count: list(pixels("train", own[:count]).split(100))

    alone = [accuracy(model, classes) for model, classes in zip(models, halves, strict=True)]
    batches = list(pixels("train", shuffled[:1000]).split(100))
    return Case(models, batches, accuracy, [own_batches(classes) for classes in halves], alone)


def texts() -> tuple[list[Tensor], list[Tensor]]:
    """Return bytes to train on and held-out bytes, each of the docstrings and of the source code."""
    parts: dict[bool, tuple[list[str], list[str]]] = {True: ([], []), False: ([], [])}
    for number, path in enumerate(sorted(pathlib.Path(os.__file__).parent.glob("*.py"))):
        source = path.read_text(encoding="utf-8", errors="ignore")
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)]
        documents, code = parts[number % 10 < HELD_OUT_FILES]
        documents.append("\n".join(found))
        code.append(source)

    def as_bytes(part: Sequence[str]) -> Tensor:
        return torch.tensor(list("\n".join(part).encode()))

    return [as_bytes(part) for part in parts[False]], [as_bytes(part) for part in parts[True]]


def gpt_case(networks: pathlib.Path) -> Case:
    """Train the two language models, or read them."""
    train, held_out = texts()

    def sequences(text: Tensor, count: int, seed: int) -> Tensor:
        starts = torch.randint(len(text) - GPT_LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
        return text[starts[:, None] + torch.arange(GPT_LENGTH)]

    def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    models = []
    for index, text in enumerate(train):
        torch.manual_seed(index)

        def loss_of(model: nn.Module, step: int, text: Tensor = text) -> Tensor:
            tokens = sequences(text, 32, step)
            return cross_entropy(model(tokens), tokens)

        models.append(trained(Gpt(), networks / f"gpt_{index}.safetensors", GPT_STEPS, loss_of))
    tests = [sequences(text, 200, 0) for text in held_out]

    @torch.no_grad()
    def loss(network: Callable[[Tensor], Tensor], index: int | None = None) -> float:
        chosen = tests if index is None else [tests[index]]
        return float(torch.stack([cross_entropy(network(test), test) for test in chosen]).mean())

    def own_batches(text: Tensor) -> Callable[[int], list[Tensor]]:
        return lambda count: list(sequences(text, count, 10**6).split(20))

    own = [own_batches(text) for text in train]
    batches = [batch for pair in zip(own[0](100), own[1](100), strict=True) for batch in pair]
    return Case(models, batches, loss, own, [loss(model, index) for index, model in enumerate(models)])


def compare(case: Case, own_samples: int) -> None:
    """Measure and print all methods."""

    def show(method: str, network: Callable[[Tensor], Tensor], seconds: float | None = None) -> None:
        with torch.no_grad():
            print(
                f"{method:<30} {case.accuracy(network):7.3f} {'' if seconds is None else f'{seconds:8.2f}'}", flush=True
            )

    for index, measured in enumerate(case.alone):
        print(f"{f'network {index}, own data':<30} {measured:7.3f}")
    for index, model in enumerate(case.models):
        show(f"network {index}, all data", model)
    show("ensemble", lambda x: mean_output(case, x))
    statistics = mudsc_fast.collect_statistics(case.models, case.batches)
    modes: tuple[mudsc_fast.Mode, ...] = ("align", "zip")
    for mode in modes:
        matching = mudsc_fast.match(case.models, statistics, mode=mode, balance=0.3)
        if mode == "align":
            refit_and_show(case, "average", matching.without_matching().merge(case.models), own_samples, show)
        refit_and_show(case, f"dual {mode}", matching.merge(case.models), own_samples, show)


def refit_and_show(
    case: Case, method: str, merged: mudsc_fast.MergeResult, own_samples: int, show: Callable[..., None]
) -> None:
    """Measure one merge, refitted in several ways."""
    assert merged.model is not None
    show(method, merged.model)
    refitted, seconds = cpu_seconds(mudsc_fast.refit, merged, case.models, case.batches)
    show(f"{method}, refit", refitted.model, seconds)
    own = [iter(batches(own_samples)) for batches in case.own]
    refitted, taken = cpu_seconds(mudsc_fast.refit, merged, case.models, own)
    show(f"{method}, refit, own data", refitted.model, taken)
    show(f"{method}, fine-tuned", fine_tuned(copy.deepcopy(merged.model), case, seconds), 3 * seconds)


def main() -> None:
    """Train or read the networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("vit", "gpt"))
    parser.add_argument("--images", help=".npz of CIFAR-10 images")
    parser.add_argument("--vectors", help=".npz of class vectors")
    parser.add_argument("--networks", type=pathlib.Path, required=True, help="directory of the trained networks")
    options = parser.parse_args()
    if options.case == "vit" and not (options.images and options.vectors):
        parser.error("vit needs --images and --vectors")
    torch.set_num_threads(1)
    began = time.thread_time()
    is_vit = options.case == "vit"
    case = vit_case(options.images, options.vectors, options.networks) if is_vit else gpt_case(options.networks)
    print(f"trained or read in {time.thread_time() - began:.0f} CPU s", flush=True)
    compare(case, 500 if is_vit else 100)


if __name__ == "__main__":
    main()
