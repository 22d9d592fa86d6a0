"""Triton kernels compiled ahead of time for a GPU that need not be there, and what their machine code holds.

A launch takes the way it takes on a GPU, through `JITFunction.run` with its specialisation of arguments, and stops
before the kernel would start. Only a process that launches nothing else may compile: the driver is replaced.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from kernels.tile_table import limit_of

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, REGISTER_UNIT = 65536, 8  # 32-bit registers of a multiprocessor, and what a thread's share is rounded to
MAX_THREADS, MAX_CTAS = 2048, 32
SHARED_SYSTEM_BYTES = 1024  # that each program takes beside its own
# an instruction of `cuobjdump -sass`: address, perhaps a predicate, name with its modifiers
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
RESOURCE = re.compile(r"\b(REG|STACK):(\d+)")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; instructions are counted as they stand in the code, not as they run."""

    registers: int  # of a thread
    stack_bytes: int  # of a thread: above zero where registers spill
    spill_stores: int  # STL
    spill_loads: int  # LDL
    shared_bytes: int
    hgmma: int  # wgmma of sm_90
    hmma: int  # mma of every architecture
    tcgen05: int  # of sm_100
    num_instructions: int


@dataclass(frozen=True)
class Compiled:
    """A launch that was compiled: the kernel's name, its arguments by keyword and what it takes."""

    kernel: str
    arguments: dict[str, Any]
    resources: Resources


class _AbsentGpu:
    """The part of a Triton driver that compilation asks for; the number of the device is the architecture's."""

    def __init__(self, version: int):
        self.version = version

    def get_current_device(self) -> int:
        return self.version

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.version, 32)


def compile_launches(call: Callable[[], object], arch: str, *, wanted: str) -> list[Compiled]:
    """Compile for `arch` ("sm_90") what `call` would launch of kernels named `wanted`, and launch nothing."""
    compiled = []
    compile_or_launch = triton.JITFunction.run

    def run(kernel, *args, grid, warmup, **options):
        if kernel.__name__ == wanted:
            binary = compile_or_launch(kernel, *args, grid=grid, warmup=True, **options)
            assert binary is not None, "a hook of Triton's compiler has refused the kernel"
            compiled.append(Compiled(wanted, options, resources(binary.asm["cubin"], binary.metadata.shared)))

    gpu: Any = _AbsentGpu(int(arch.removeprefix("sm_")))
    driver.set_active(gpu)
    with mock.patch.object(triton.JITFunction, "run", run):
        call()
    return compiled


def resources(cubin: bytes, shared_bytes: int) -> Resources:
    """Read a compiled kernel back with the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (_dump(flag, file.name) for flag in ("--dump-resource-usage", "-sass"))
    return parse(usage, sass, shared_bytes)


def _dump(flag, file):
    done = subprocess.run([BINARIES / "cuobjdump", flag, file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {flag}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def parse(usage: str, sass: str, shared_bytes: int) -> Resources:
    """Resources from the texts of `cuobjdump --dump-resource-usage` and `cuobjdump -sass` of one kernel."""
    found = dict(RESOURCE.findall(usage))
    if set(found) != {"REG", "STACK"}:
        raise ValueError(f"no REG and STACK in the resource usage: {usage!r}")
    names = [name.partition(".")[0] for name in INSTRUCTION.findall(sass)]
    if not names:
        raise ValueError("no instruction in the disassembly")
    return Resources(
        registers=int(found["REG"]),
        stack_bytes=int(found["STACK"]),
        spill_stores=names.count("STL"),
        spill_loads=names.count("LDL"),
        shared_bytes=shared_bytes,
        hgmma=names.count("HGMMA"),
        hmma=names.count("HMMA"),
        tcgen05=sum(name.startswith("UTC") and name.endswith("MMA") for name in names),
        num_instructions=len(names),
    )


def ctas_per_multiprocessor(arch: str, *, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that a multiprocessor holds at once; 0 where not even one fits."""
    registers = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        REGISTERS // (registers * 32 * num_warps),
        (limit_of(arch) + SHARED_SYSTEM_BYTES) // (shared_bytes + SHARED_SYSTEM_BYTES),
        MAX_THREADS // (32 * num_warps),
        MAX_CTAS,
    )
