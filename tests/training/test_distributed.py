"""One process and two gloo processes give the same sums, gradients and messages."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import training
from training.distributed import Distributed, choose_device, unwrap
from training.errors import ResourceError

WORKER = """
import json, torch
from pathlib import Path
from torch import nn
from training.distributed import Distributed, unwrap
with Distributed("cpu") as group:
    torch.manual_seed(group.rank)
    total = group.all_reduce_sum(torch.tensor([1.0 + group.rank, 10.0]))
    told = group.broadcast_object({"run_dir": "runs/ä", "rank": group.rank} if group.is_main else None)
    nothing = group.broadcast_object(None)
    inner = nn.Linear(2, 1)
    model = group.wrap(inner)  # ranks start from the weights of rank 0
    with group.no_sync(model):
        model(torch.ones(1, 2) * (group.rank + 1)).sum().backward()
    alone = inner.weight.grad.tolist()
    model(torch.ones(1, 2) * (group.rank + 1)).sum().backward()
    group.barrier()
    print(json.dumps({
        "rank": group.rank, "main": group.is_main, "size": group.world_size, "total": total.tolist(),
        "told": told, "nothing": nothing, "alone": alone, "grad": inner.weight.grad.tolist(),
        "weight": inner.weight.tolist(), "same": unwrap(model) is inner,
    }))
names = [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()]
print(json.dumps([name for name in names if "gloo" in name]))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.distributed
def test_two_processes():
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=Path(training.__file__).parent.parent,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], [error for _, error in results]
    (zero, left_of_zero), (one, left_of_one) = (map(json.loads, output.splitlines()) for output, _ in results)
    assert left_of_zero == left_of_one == [], "threads that outlive their group abort the process now and then"
    assert (zero["rank"], one["rank"], zero["main"], one["main"]) == (0, 1, True, False)
    for each in (zero, one):
        assert each["size"] == 2
        assert each["total"] == [3.0, 20.0]
        assert each["told"] == {"run_dir": "runs/ä", "rank": 0}
        assert each["nothing"] is None
        assert each["weight"] == zero["weight"]
        assert each["same"]
        # the local first gradient and the second one, averaged over ranks: (1 + 1 + 2 + 2) / 2
        assert each["grad"] == [[3.0, 3.0]]
    assert (zero["alone"], one["alone"]) == ([[1.0, 1.0]], [[2.0, 2.0]])


def test_a_single_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    model = nn.Linear(2, 2)
    with Distributed("cpu") as group:
        assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
        assert group.device == torch.device("cpu")
        assert group.wrap(model) is model
        assert group.broadcast_object({"a": 1}) == {"a": 1}
        assert group.all_reduce_sum(torch.tensor(2.0)).item() == 2.0
        group.barrier()
        with group.no_sync(model):
            pass
        assert not torch.distributed.is_initialized()
    group.close()


def pretend_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("device", "count", "rank", "expected"),
    [("auto", 0, 0, "cpu"), ("auto", 2, 1, "cuda:1"), ("cuda", 1, 0, "cuda:0"), ("cpu", 2, 1, "cpu")],
)
def test_device_of_a_rank(monkeypatch, device, count, rank, expected):
    pretend_gpus(monkeypatch, count)
    assert choose_device(device, rank) == torch.device(expected)


def test_absent_devices_are_refused(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(ResourceError, match="device=cuda, but this machine has no usable CUDA GPU; use device=cpu"):
        choose_device("cuda")
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(ResourceError, match="process 2 of this machine has no GPU of its own: 2 found"):
        choose_device("auto", 2)
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        choose_device("tpu")


def test_unwrap_sees_through_compilation():
    model = nn.Linear(2, 2)
    assert unwrap(torch.compile(model, backend="eager")) is model
    assert unwrap(model) is model
