"""Tile sizes of the kernels: a table shipped as data, one row a kernel, architecture, element size and head dim.

`python -m benchmarks.compile` shows what each row costs in registers and shared memory, `python -m benchmarks.tune`
measures candidates on a GPU and writes the rows anew.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

# set before Triton is imported, then every kernel runs in Python on CPU tensors
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FILE = Path(__file__).with_name("tiles.json")
BLOCK_DIMS = (16, 32, 64, 128, 256)  # channels of a tile: those of a head, padded
MAX_HEAD_DIM = BLOCK_DIMS[-1]
# what the kernels take from a row; the rest of it says where it comes from
OPTIONS = ("BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages")
WINDOW_KERNELS = (
    "window_forward",
    "window_query_grad",
    "window_key_grad",
)  # those with a loop for the tiles that no edge crosses
# bytes of shared memory that one program may have
SHARED_LIMITS = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
_target: ContextVar[str | None] = ContextVar("target", default=None)
_trials: ContextVar[dict[str, dict[str, Any]]] = ContextVar("trials")


@contextlib.contextmanager
def target(arch: str) -> Iterator[None]:
    """Choose tiles for an architecture ("sm_90") in here, whatever device the tensors are on."""
    token = _target.set(arch)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def trial(kernel: str, options: dict[str, Any]) -> Iterator[None]:
    """Launch a kernel with these options in here instead of what the table says."""
    token = _trials.set({**_trials.get({}), kernel: options})
    try:
        yield
    finally:
        _trials.reset(token)


def architecture(device: torch.device) -> str:
    """ "interpreter", or "sm_XY" of a CUDA device or of the enclosing `target`."""
    chosen = _target.get()
    if chosen is not None:
        return chosen
    return "interpreter" if INTERPRETED else _on_device(device)[0]


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may have on a CUDA device, or on the enclosing `target`."""
    if _target.get() is None and not INTERPRETED:
        return _on_device(device)[1]
    return limit_of(_target.get() or "sm_80")


def limit_of(arch: str) -> int:
    """Bytes of shared memory that one program may have on an architecture, or on the newest known one before it."""
    return SHARED_LIMITS[max((version for version in SHARED_LIMITS if version <= _version(arch)), default=80)]


@lru_cache
def _on_device(device):
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}", properties.shared_memory_per_block_optin


def choose(
    kernel: str, *, arch: str, element_size: int, head_dim: int, num_seen: int, limit: int | None = None
) -> dict[str, Any]:
    """Tile sizes, num_warps and num_stages of a kernel for a head dim whose queries see `num_seen` keys.

    The row is that of the newest architecture in the table which is not newer than `arch` and takes at most `limit`
    bytes of shared memory. Raises ValueError where the table holds no row: a head dim above MAX_HEAD_DIM, an older
    architecture.
    """
    if kernel in _trials.get({}):
        return {**_trials.get()[kernel], "BLOCK_D": block_dim(head_dim)}
    return dict(_options(kernel, arch, element_size, head_dim, num_seen, limit))


@lru_cache(maxsize=4096)
def _options(kernel, arch, element_size, head_dim, num_seen, limit):
    block_d = block_dim(head_dim)
    if arch == "interpreter":
        split = {"SPLIT": True} if kernel in WINDOW_KERNELS else {}
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": block_d, **split}
    for row in rows_for(kernel, arch, element_size, block_d):
        if num_seen <= (row["max_seen"] or num_seen) and (limit is None or row["shared_bytes"] <= limit):
            return {**{name: row[name] for name in OPTIONS if name in row}, "BLOCK_D": block_d}
    raise ValueError(f"no tile sizes of {kernel} for {arch}, head dim {head_dim} and {element_size}-byte elements")


def rows_for(
    kernel: str, arch: str, element_size: int, block_d: int, table: list[dict[str, Any]] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a kernel that an architecture can take, the one to prefer first, of a table or of the shipped one."""
    place = (kernel, element_size, block_d)
    for row in rows() if table is None else table:
        if (row["kernel"], row["element_size"], row["block_d"]) == place and _version(row["arch"]) <= _version(arch):
            yield row


def block_dim(head_dim: int) -> int:
    """Channels of a tile: the power of two, at least 16, that holds a head."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def rows() -> list[dict[str, Any]]:
    """The table, newest architecture first, narrow windows before wide ones."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def table_text(table: list[dict[str, Any]]) -> str:
    """A table as its file holds it, a row a line."""
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in table) + "\n]\n"


@lru_cache
def needed_shared_memory(arch: str, element_size: int, head_dim: int, kernels: tuple[str, ...]) -> int:
    """Bytes of shared memory without which one of these kernels has no tiles, from the ahead-of-time report."""
    found = [rows_for(kernel, arch, element_size, block_dim(head_dim)) for kernel in kernels]
    least = (min((row["shared_bytes"] for row in few if not row["max_seen"]), default=0) for few in found)
    return max(least, default=0)


def _version(arch):
    return int(arch.removeprefix("sm_"))
