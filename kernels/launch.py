"""What every launch of a kernel needs beside its tensors: tile sizes, types, the device, how work is cut up."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from kernels import tile_table
from kernels.tiles import LOG2_E

PROGRAMS = 528  # two programs on each multiprocessor of an H100, twice over
MIN_TILES = 2
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Launch:
    """The launches of one call: `query` [B, T, H, D] and `key` [B, S, Hkv, D] give device, dtype and head dim."""

    query: torch.Tensor
    key: torch.Tensor
    scale: float

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def accumulator(self) -> torch.dtype:
        """Type of sums and statistics: float32, float64 for inputs of that type."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def types(self) -> dict[str, Any]:
        """Constants of the kernel that follow from dtype and head dim, and the factor of its exponents."""
        double = self.query.dtype == torch.float64
        return {
            "exponent_scale": self.scale * LOG2_E,
            "D": self.query.shape[-1],
            "ACC": tl.float64 if double else tl.float32,
            "PRECISION": precision(self.query.dtype),
        }

    def tiles(self, kernel: str, num_seen: int) -> dict[str, Any]:
        """Tile sizes, warps and stages of a kernel by name; `num_seen`: keys that a query sees."""
        return tile_table.choose(
            kernel,
            arch=tile_table.architecture(self.query.device),
            element_size=self.query.element_size(),
            head_dim=self.query.shape[-1],
            num_seen=num_seen,
            limit=tile_table.shared_limit(self.query.device),
        )


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on the current device: make it that of a tensor."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are rounded: as torch is set for its own on CUDA, by its old or its new interface."""
    exact = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def valid_arguments(valid: torch.Tensor | None) -> tuple:
    """(bytes, strides of batch and key) of a mask [B, S]; None and zeros without one."""
    return (None, 0, 0) if valid is None else (valid.view(torch.uint8), *valid.stride())


def num_splits(length: int, num_programs: int, block: int) -> tuple[int, int]:
    """(parts, tokens of a part) to cut `length` tokens into, so that PROGRAMS programs run where each would be one.

    The same on every GPU, so that the order of sums is; a part holds whole tiles, about MIN_TILES of them or more.
    """
    num_tiles = -(-length // block)
    parts = max(1, min(PROGRAMS // num_programs, num_tiles // MIN_TILES))
    chunk = -(-num_tiles // parts) * block
    return -(-length // chunk), chunk


def interpreted_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """bfloat16 as float32 where the interpreter runs, whose arithmetic on bfloat16 is wrong; else as they are."""
    if not tile_table.INTERPRETED:
        return tensors
    return tuple(tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in tensors)


# asked once when a call is compiled: what a GPU is does not change
@torch.compiler.assume_constant_result
def device_lacks(device: torch.device, element_size: int, head_dim: int, kernels: tuple[str, ...]) -> str | None:
    """What a GPU is too small or too old for, as a clause; None if for nothing."""
    properties = torch.cuda.get_device_properties(device)
    found = (properties.major, properties.minor)
    if found < MIN_CAPABILITY:
        return f"the kernels need compute capability 8.0, {properties.name} has {found[0]}.{found[1]}"
    arch = f"sm_{found[0]}{found[1]}"
    needed = tile_table.needed_shared_memory(arch, element_size, head_dim, kernels)
    if needed > properties.shared_memory_per_block_optin:
        return (
            f"the kernels need {needed:,} bytes of shared memory for heads of {head_dim} channels, {properties.name} "
            f"has {properties.shared_memory_per_block_optin:,}"
        )
    return None
