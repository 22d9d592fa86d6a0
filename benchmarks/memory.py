"""What a call needs beyond what was there before: peak memory in a fresh process, the largest tensor made."""

import ctypes
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]


class LargestTensor(TorchDispatchMode):
    """Context that records in `.elements` and `.bytes` the largest storages any operation inside it returned.

    Storages are counted, not shapes: overlapping and expanded views have larger shapes than memory.
    """

    elements = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                size = leaf.untyped_storage().nbytes()
                self.bytes = max(self.bytes, size)
                self.elements = max(self.elements, size // leaf.element_size())
        return out


def extra_peak_bytes(maker: str, arguments: dict, warmup: dict, *, device: str, num_threads: int) -> int:
    """Peak memory of one call above the level before it, in bytes, measured in a process of its own.

    `maker` is "module:function"; function(**arguments) returns the call to measure. function(**warmup), a
    smaller one, runs before: libraries load and set up their buffers outside the measurement. On CPU it is
    resident memory; on CUDA what torch's allocator handed out.
    """
    order = json.dumps([maker, arguments, warmup, device, num_threads])
    command = [sys.executable, "-m", "benchmarks.memory", order]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed ({done.returncode}):\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def _measure(order: str) -> int:
    maker, arguments, warmup, device, num_threads = json.loads(order)
    torch.set_num_threads(num_threads)
    module, _, function = maker.partition(":")
    make = getattr(importlib.import_module(module), function)
    make(**warmup)()
    call = make(**arguments)
    return peak_on_gpu(call) if device != "cpu" else _peak_of_process(call)


def peak_on_gpu(call: Callable[[], object]) -> int:
    """Peak of what torch's allocator hands out during one call, above the level before it, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _peak_of_process(call: Callable[[], object]) -> int:
    # what the set-up freed and malloc still holds would hide as much of the call's needs
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # glibc's
        malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak restarts at what is resident now
        before = _status("VmRSS")
    except OSError:  # no such file: the peak since the start, which what is resident now may hide
        before = _max_resident()
        result = call()
        del result
        return _max_resident() - before
    result = call()
    del result
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _max_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
