"""Devices that several processes compute on and send from, and how often the host waits for a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.overrides import TorchFunctionMode

import mudsc_fast
from mudsc_fast.command import torchrun
from mudsc_fast.distributed import Ranks, ranks
from mudsc_fast.matching import sharing
from mudsc_fast.ops._dispatch import use_backend
from networks import MLP_SPEC, make_mlp
from processes import run_processes
from test_device_work import Waits
from test_distributed import llama_spec, llama_tensors

try:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
except ImportError:
    has_dtensors = False
else:
    has_dtensors = True

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")


@pytest.mark.parametrize(
    ("backends", "expected"),
    [
        ("cpu:gloo,cuda:gloo", {"cpu"}),
        ("cuda:nccl", {"cuda"}),
        ("cpu:gloo,cuda:nccl", {"cpu", "cuda"}),
        ("cpu:mpi,cuda:mpi", {"cpu", "cuda"}),
    ],
)
def test_tensors_are_sent_from_devices_with_a_backend(
    backends: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = ranks._devices_sent_from(backends)
    assert direct == expected
    alone = Ranks()
    alone._direct = direct
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    gpu, cpu = torch.device("cuda", 3), torch.device("cpu")
    assert alone._wire_device(gpu) == (gpu if "cuda" in direct else cpu)
    assert alone._wire_device("cpu") == (cpu if "cpu" in direct else torch.device("cuda", 1))


def test_group_bound_to_a_gpu_sends_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class BoundGroup:
        bound_device_id = torch.device("cuda", 2)

    entered = []

    class EnteredDevice:
        def __init__(self, device: torch.device) -> None:
            entered.append(device)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    alone = Ranks()
    alone._direct, alone._group = {"cuda"}, BoundGroup()  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "device", EnteredDevice)
    assert alone._wire_device("cpu") == torch.device("cuda", 2)
    with alone._on_own_gpu():
        assert entered == [torch.device("cuda", 2)]
    alone._direct = {"cpu", "cuda"}
    with alone._on_own_gpu():  # the CPU backend sends objects
        assert len(entered) == 1


def choose_device(text: str, gpus: int, monkeypatch: pytest.MonkeyPatch, local: tuple[int, int] | None = None) -> Any:
    """Return the device that `--device` chooses. `local` is the local rank and the local world size under torchrun."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if local is not None:
        started = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        started |= {"LOCAL_RANK": str(local[0]), "LOCAL_WORLD_SIZE": str(local[1])}
        for name, value in started.items():
            monkeypatch.setenv(name, value)
    return torchrun.device(text)


def test_each_process_gets_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu", 0, monkeypatch) == torch.device("cpu")
    assert choose_device("cuda", 2, monkeypatch) == torch.device("cuda", 0)
    assert choose_device("cuda:1", 2, monkeypatch) == torch.device("cuda", 1)
    assert choose_device("cuda", 4, monkeypatch, (3, 4)) == torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("text", "gpus", "local", "message"),
    [
        ("gpu", 1, None, r"--device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("cuda:x", 1, None, r"--device must be cpu, cuda or cuda:N"),
        ("cuda", 0, None, r"finds no GPU on this machine: leave out --device"),
        ("cuda:2", 2, None, r"the GPUs of this machine are cuda:0 to cuda:1"),
        ("cuda:1", 2, (0, 2), r"processes cannot share a GPU: pass --device cuda"),
        ("cuda", 2, (0, 4), r"started 4 processes on this machine, which has 2 GPUs: .* \(--nproc-per-node 2\)"),
    ],
)
def test_invalid_devices_are_errors(
    text: str, gpus: int, local: tuple[int, int] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_device(text, gpus, monkeypatch, local)


class MarkHostTensors(TorchFunctionMode):
    """Marks the tensors that would be on the host if the inputs were on a GPU, although all are on the CPU here.

    These are the tensors that code puts on ``"cpu"`` by name, and those computed from them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "to" and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            on_host = args[1] == "cpu" and isinstance(args[1], str)
        elif "device" in kwargs:
            on_host = isinstance(kwargs["device"], str) and kwargs["device"] == "cpu"
        elif name in ("copy_", "__setitem__"):
            on_host = is_on_host(args[0])
        else:
            on_host = name == "cpu" or any(map(is_on_host, tensors_in([*args, *kwargs.values()])))
        for tensor in tensors_in([result]):
            tensor._is_on_host = on_host  # type: ignore[attr-defined]
        return result


def is_on_host(tensor: Tensor) -> bool:
    return getattr(tensor, "_is_on_host", False)


def tensors_in(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


def test_host_tensors_are_marked() -> None:
    device = torch.device("cpu")
    with MarkHostTensors():
        ours = torch.zeros(3, device=device)
        assert not is_on_host(ours + torch.ones(3, device=device))
        assert is_on_host(torch.ones(3, device="cpu"))
        assert is_on_host(torch.cat([torch.ones(3, device="cpu")]).view(3, 1))
        assert is_on_host(ours.cpu())
        assert not is_on_host(ours.cpu().to(device))
        ours[0] = torch.ones((), device="cpu")
        assert not is_on_host(ours)


def count_waits_and_sends(rank: int, folder: Path) -> None:
    """Match in two processes, and write how often the host waits and which tensors are sent from the host."""
    sharing._MIN_MOVED_SAMPLES["cpu"] = sharing._MIN_SAMPLES_OF_ROWS = 1  # share small nodes, too
    sent: list[tuple[str, bool]] = []

    def watch(name: str) -> None:
        call = getattr(distributed, name)

        def watched(tensor: Tensor, *arguments: Any, **more: Any) -> Any:
            sent.append((name, is_on_host(tensor)))
            return call(tensor, *arguments, **more)

        setattr(distributed, name, watched)

    for name in ("all_reduce", "reduce", "broadcast", "send", "recv", "isend", "irecv"):
        watch(name)
    found = {}
    for case in CASES:
        with Waits() as waits:
            sweeps = run_case(case, rank)
        sent.clear()
        # CPU kernels put their results on "cpu" by name; the reference backend does not.
        with use_backend("reference"), MarkHostTensors():
            run_case(case, rank)
        found[case] = {"sweeps": sweeps, "waits": waits.calls.total(), "sent": list(sent)}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


#: Modules by weights and activations; state dicts with grouped units by weights; and the same, sharded.
CASES = ("align", "zip", "groups align", "groups zip", *(("sharded align", "sharded zip") if has_dtensors else ()))


def run_case(case: str, rank: int | None = None) -> int:
    """Match or merge two networks in all processes or, without a rank, in this one; return the number of sweeps."""
    kind, _, mode = case.rpartition(" ")
    group = None if rank is None else distributed.group.WORLD
    options: dict[str, Any] = {"mode": mode, "group": group}
    if not kind:
        data = [torch.randn(16, 20, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        own = data if rank is None else data[rank::2]
        models = [make_mlp(seed=seed) for seed in (0, 1)]
        return len(mudsc_fast.match(models, own, spec=MLP_SPEC, balance=0.5, verify=False, **options).objectives)
    states = [llama_tensors(seed, layers=1) for seed in (0, 1)]
    if kind == "sharded" and rank is not None:
        mesh = init_device_mesh("cpu", (2,))
        states = [
            {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}
            for tensors in states
        ]
    merged = mudsc_fast.merge(states, spec=llama_spec(layers=1), **options)
    return len(merged.objectives)


@pytest.mark.slow
def test_processes_send_from_the_device_and_rarely_wait_for_it(tmp_path: Path) -> None:
    assert run_processes(count_waits_and_sends, 2, tmp_path) == [0, 0]
    for case in CASES:
        with Waits() as alone:
            sweeps = run_case(case)
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))[case]
            assert found["sweeps"] == sweeps
            used = {name for name, _ in found["sent"]}
            assert used > {"all_reduce"}
            assert ("broadcast" in used) == ("sharded" in case)
            assert not [name for name, on_host in found["sent"] if on_host]
            # A sweep has a few waves. In each, ranks agree that all succeeded, divide the work, and read the results.
            assert found["waits"] <= alone.calls.total() + 15 * sweeps, case
