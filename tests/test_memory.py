"""Peak memory of a merge, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch import nn

import mudsc_fast

torch.set_num_threads(1)
WIDTH, LAYERS = 1024, 6
names = [f"fc{layer}" for layer in range(LAYERS)]


def status(entry):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry + ":"))


def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(module for _ in names for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    )


def named(model):
    layers = zip(names, model[::2], strict=True)
    return {f"{name}.{kind}": getattr(layer, kind).detach() for name, layer in layers for kind in ("weight", "bias")}


def merge(states):
    return mudsc_fast.merge(states, spec=mudsc_fast.spec.mlp(names), mode=sys.argv[1], max_sweeps=2)


merge([{name: tensor[..., :32].contiguous() if tensor.ndim == 1 else tensor[:32, :32].contiguous()
        for name, tensor in named(make(seed)).items()} for seed in (0, 1)])
states = [named(make(seed)) for seed in (0, 1)]
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
result = merge(states)
similarity = 4 * WIDTH**2 * (4 if sys.argv[1] == "zip" else 1)
output = sum(tensor.nbytes for tensor in result.state_dict.values())
print((status("VmHWM") - before - output) / similarity)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a process's peak memory")
@pytest.mark.parametrize(("mode", "most"), [("align", 22.0), ("zip", 15.0)])
def test_memory_is_bounded_by_largest_similarity(mode: str, most: float) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < most
