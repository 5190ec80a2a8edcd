"""Merging in several processes: time, peak memory of each rank, and bytes sent.

    python benchmarks/bench_distributed.py             # four blocks of TinyLlama, one and two processes of one thread
    python benchmarks/bench_distributed.py --narrow    # the same with half the width
    python benchmarks/bench_distributed.py --billion   # 1.1 billion parameters in bfloat16, two processes
    python benchmarks/bench_distributed.py --estimate  # the table of docs/distributed.md; nothing is run

The networks are random, made on the spot in a temporary directory. Every row asserts that the matching is the one that
one process finds; the networks of a billion parameters are merged by two processes only. Two unrelated merges
are also run at once: this shows how much more work the machine does with two processes than with one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

#: Width, hidden width, heads, key and value heads, layers and tokens of the networks.
BLOCKS = (2048, 5632, 32, 4, 4, 512)
NARROW = (1024, 2816, 16, 4, 4, 512)
BILLION = (2048, 5632, 32, 4, 22, 32000)

#: Memory that each process uses before its time is taken: more than one of these merges needs.
WARM_BYTES = 2**31

#: LLaMA 3, for the table of estimates.
LARGE = {
    "8B": (4096, 14336, 32, 8, 32, 128256),
    "70B": (8192, 28672, 64, 8, 80, 128256),
    "405B": (16384, 53248, 128, 8, 126, 128256),
}

#: What the table assumes of a GPU: operations per second of products of bfloat16, bytes per second between GPUs,
#: seconds to assign 16384 units (measured on one CPU core), and sweeps that recompute everything.
RATE, BANDWIDTH, ASSIGNMENT, SWEEPS = 2e14, 5e10, 0.25, 5


def shapes_of(
    width: int, hidden: int, heads: int, kv_heads: int, layers: int, tokens: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the tensors of a LLaMA."""
    narrow = width // heads * kv_heads
    yield "model.embed_tokens.weight", (tokens, width)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (width,)
        for name, rows in (("q", width), ("k", narrow), ("v", narrow), ("o", width)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, width)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
        yield f"{prefix}.mlp.gate_proj.weight", (hidden, width)
        yield f"{prefix}.mlp.up_proj.weight", (hidden, width)
        yield f"{prefix}.mlp.down_proj.weight", (width, hidden)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (tokens, width)


def write_network(folder: Path, shape: tuple[int, int, int, int, int, int], seed: int, dtype: torch.dtype) -> int:
    """Write a directory of Hugging Face, one shard per layer or table, and return the number of parameters."""
    width, hidden, heads, kv_heads, layers, tokens = shape
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    index: dict[str, str] = {}
    entries = 0
    for name, size in shapes_of(*shape):
        part = name.rpartition(".")[0].split(".")
        shard = "model-" + "-".join(part[:3] if "layers" in part else part) + ".safetensors"
        tensor = torch.randn(size, generator=generator) * size[-1] ** -0.5 if len(size) > 1 else torch.rand(size) + 0.5
        shards.setdefault(shard, {})[name] = tensor.to(dtype)
        index[name] = shard
        entries += tensor.numel()
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": entries * dtype.itemsize}, "weight_map": index}), encoding="utf-8"
    )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": tokens,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return entries


def merge_here(folder: Path, processes: int, sweeps: int) -> None:
    """Merge in this process, one of `processes`, and write a report to FOLDER/PROCESSES.RANK.json."""
    import time

    from torch import distributed

    from mudsc_fast.io import merge_checkpoints

    torch.set_num_threads(1)
    rank = 0
    group = None
    warm_memory()
    if processes > 1:
        distributed.init_process_group("gloo")
        rank, group = distributed.get_rank(), distributed.group.WORLD
        distributed.barrier()
    reset_peak()
    began, computing = time.perf_counter(), time.process_time()
    result = merge_checkpoints(
        [folder / "a", folder / "b"], folder / f"merged-{processes}", max_sweeps=sweeps, group=group, progress=False
    )
    report = {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - computing,
        "timings": dict(result.timings),
        "peak": peak("VmHWM"),
        "clusters": {node: checksum(matched.cluster_of_unit) for node, matched in result.matching.items()},
        "distribution": None if result.distribution is None else vars(result.distribution),
    }
    (folder / f"{processes}.{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    if processes > 1:
        distributed.destroy_process_group()


def checksum(clusters: torch.Tensor) -> int:
    return int((clusters * torch.arange(1, clusters.numel() + 1).view_as(clusters)).sum())


def peak(entry: str) -> int:
    """Return a figure of this process in bytes; 0 where there is no /proc."""
    file = Path("/proc/self/status")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(entry + ":")), 0)


def warm_memory() -> None:
    """Write to as much memory as a merge needs, and free it.

    On some virtual machines the host takes free memory back. The first access then takes much longer than clearing the
    memory, and would be a large part of what the benchmark measures.
    """
    numpy.ones(WARM_BYTES, numpy.uint8)


def reset_peak() -> None:
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5", encoding="utf-8")


def run(folder: Path, processes: int, sweeps: int) -> list[dict[str, Any]]:
    """Merge in new processes of one thread each, and return their reports."""
    return run_at_once([folder], processes, sweeps)[0]


def run_at_once(folders: Sequence[Path], processes: int, sweeps: int) -> list[list[dict[str, Any]]]:
    """Run one merge for each folder, all at the same time, and return their reports."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        python += ["--rdzv-endpoint", "localhost:0"]
    options = ["--processes", str(processes), "--sweeps", str(sweeps)]
    commands = [[*python, str(Path(__file__).resolve()), "--folder", str(folder), *options] for folder in folders]
    merges = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for command in commands]
    for merge in merges:  # all of them, before one that failed raises an error
        merge.wait()
    for merge in merges:
        if merge.returncode != 0:
            raise subprocess.CalledProcessError(merge.returncode, merge.args)
    reports = []
    for folder in folders:
        reports.append([json.loads((folder / f"{processes}.{rank}.json").read_text()) for rank in range(processes)])
        shutil.rmtree(folder / f"merged-{processes}")
    return reports


def show(processes: int, reports: list[dict[str, Any]]) -> None:
    peaks = ", ".join(f"{report['peak'] / 1e9:.2f}" for report in reports)
    cpu = ", ".join(f"{report['cpu']:.2f}" for report in reports)
    print(f"{processes} process(es): {reports[0]['seconds']:.2f} s, CPU {cpu} s, peak memory {peaks} GB", end="")
    if reports[0]["distribution"]:
        sent = ", ".join(f"{count / 1e6:.1f}" for count in reports[0]["distribution"]["sweep_bytes"])
        work = ", ".join(f"{share:.1%}" for share in reports[0]["distribution"]["work"])
        print(f", work {work}, MB sent per sweep {sent}", end="")
    print(flush=True)


def print_estimates() -> None:
    """Print time, memory and traffic of an alignment of two networks by weights, from the packing alone."""
    from mudsc_fast.matching.owners import pack
    from mudsc_fast.spec import llama

    print("| model | GPUs | work per sweep, PFLOP | time, min | memory of a rank, GB | sent per sweep, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (width, hidden, heads, kv_heads, layers, tokens) in LARGE.items():
        spec = llama(layers, heads, kv_heads, width // heads)
        shapes = shapes_of(width, hidden, heads, kv_heads, layers, tokens)
        tensors = {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes}
        units = spec.units(tensors)
        for ranks in (1, 8, 64):
            owners = pack(spec, tensors, ranks)
            work = 2.0 * sum(units[node] ** 2 * samples for node, samples in owners.samples.items())
            sent = sum(
                8.0 * units[node] ** 2 * (sum(bool(slices[node]) for slices in owners.slices) - 1)
                for bundle in owners.spread
                for node in bundle
            )
            sent += sum(4.0 * 2 * count for count in units.values()) * (ranks if ranks > 1 else 0)
            assigned = [0.0] * ranks
            for bundle, rank in owners.owner.items():
                assigned[rank] += sum(ASSIGNMENT * (units[node] / 16384) ** 2 for node in bundle)
            seconds = SWEEPS * (work * max(owners.work) / RATE + sent / ranks / BANDWIDTH + max(assigned))
            needed = max(
                sum(tensors[tensor].numel() for tensor in owners.needed(rank) | held(owners.holder, rank))
                for rank in range(ranks)
            )
            # Both networks in bfloat16; sums, product and similarity of the widest node, and the kept sums.
            memory = 2 * 2 * needed + (8 + 4 + 4 + 4 * 8 / ranks) * max(units.values()) ** 2
            row = [
                name,
                str(ranks),
                f"{work / 1e15:.2g}",
                f"{seconds / 60:.2g}",
                f"{memory / 1e9:.0f}",
                f"{sent / 1e9:.2g}",
            ]
            print("| " + " | ".join(row) + " |", flush=True)


def held(holder: Mapping[str, int], rank: int) -> set[str]:
    return {name for name, of in holder.items() if of == rank}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--billion", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sweeps", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--processes", type=int)
    given = parser.parse_args()
    if given.estimate:
        print_estimates()
        return
    if given.processes is not None:
        merge_here(given.folder, given.processes, given.sweeps)
        return
    blocks = NARROW if given.narrow else BLOCKS
    shape, dtype = (BILLION, torch.bfloat16) if given.billion else (blocks, torch.float32)
    sweeps = given.sweeps or (1 if given.billion else 100)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = write_network(folder / "a", shape, 0, dtype)
        write_network(folder / "b", shape, 1, dtype)
        print(f"two networks of {entries / 1e6:.0f} million parameters in {dtype}, at most {sweeps} sweeps")
        if given.billion:
            show(2, run(folder, 2, sweeps))
            return
        other = folder / "other"
        other.mkdir()
        for network in ("a", "b"):
            (other / network).symlink_to(folder / network)
        seconds: dict[str, list[float]] = {"one": [], "two": [], "at once": []}
        for _ in range(given.repeats):
            alone, both = run(folder, 1, sweeps), run(folder, 2, sweeps)
            show(1, alone)
            show(2, both)
            assert both[0]["clusters"] == alone[0]["clusters"], "the matching is that of one process"
            seconds["one"].append(alone[0]["seconds"])
            seconds["two"].append(both[0]["seconds"])
            seconds["at once"].append(max(one["seconds"] for [one] in run_at_once([folder, other], 1, sweeps)))
            print(f"two merges at once: {seconds['at once'][-1]:.2f} s", flush=True)
        for name, of in (("the best", min), ("the median", statistics.median)):
            one, two, at_once = (of(values) for values in seconds.values())
            print(
                f"{name} of {given.repeats} runs: two processes are {one / two:.2f} times as fast as one; two "
                f"unrelated merges at once do {2 * one / at_once:.2f} times the work of one in the same time"
            )


if __name__ == "__main__":
    main()
