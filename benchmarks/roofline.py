"""What a case must compute and move at least, what this GPU can do, and the time that bounds it (docs/kernels.md)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.cases import BOTH, FORWARD
from kernels.window_attention import WindowPattern

BACKWARD = "backward"
MATMUL_SIZE = 8192
COPY_BYTES = 2**31
Clock = Callable[[Mapping], Mapping]


@dataclass(frozen=True)
class Work:
    """Operations and least bytes of each pass of one call, and where counted the bytes that must exist at its peak.

    Two products of a score forward, five backward, each 2 * head_dim operations a pair; a second computation of the
    scores in backward is not useful work. Every input is read once, every result written once.
    """

    flops: dict[str, int]
    num_bytes: dict[str, int]
    needed_bytes: dict[str, int]

    @classmethod
    def of(cls, pairs: int, *, rows: int, keys: int, head_dim: int, item_bytes: int) -> "Work":
        """From the counts over batch and heads: pairs, query rows (B * T * H), key rows (B * S * Hkv)."""
        query_bytes, key_bytes = item_bytes * head_dim * rows, item_bytes * head_dim * keys
        lse_bytes = 4 * rows
        forward = 2 * query_bytes + 2 * key_bytes + lse_bytes
        # reads query, key, value, out and its gradient, lse and the row sums; writes the gradients
        backward = 4 * query_bytes + 4 * key_bytes + 2 * lse_bytes
        return cls(
            flops={FORWARD: 4 * pairs * head_dim, BACKWARD: 10 * pairs * head_dim},
            num_bytes={FORWARD: forward, BACKWARD: backward},
            needed_bytes={FORWARD: forward, BOTH: 4 * query_bytes + 4 * key_bytes + lse_bytes},
        )

    def useful_flops(self, passes: str) -> int:
        """Operations of `passes`, forward or forward+backward."""
        return sum(self.flops[part] for part in _parts(passes))

    def bound(self, passes: str, ceilings: "Ceilings", dtype: str) -> float:
        """Seconds that no implementation can beat: of each pass the slower of arithmetic and memory."""
        flops_a_second = ceilings.flops[dtype]
        return sum(
            max(self.flops[part] / flops_a_second, self.num_bytes[part] / ceilings.bytes_a_second)
            for part in _parts(passes)
        )


def _parts(passes):
    return (FORWARD,) if passes == FORWARD else (FORWARD, BACKWARD)


def window_pairs(pattern: WindowPattern, seq_len: int, global_positions: list[int]) -> int:
    """Query-key pairs over all heads: those of the windows, and global keys where no window has them already.

    `global_positions` are distinct. With a causal pattern a global key is seen at and after its position only.
    """
    pairs = sum(pattern.num_pairs(seq_len))
    for window, dilation in zip(pattern.window, pattern.dilation, strict=True):
        for position in global_positions:
            before = 0 if pattern.causal else min(window, position // dilation)
            after = min(window, (seq_len - 1 - position) // dilation)
            rows = seq_len - position if pattern.causal else seq_len
            pairs += rows - (before + 1 + after)
    return pairs


@dataclass(frozen=True)
class Ceilings:
    """What this device was measured to do: operations a second by dtype, bytes read and written a second."""

    flops: dict[str, float]
    bytes_a_second: float

    def __str__(self) -> str:
        products = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in self.flops.items())
        return f"matrix product {products}; copy {self.bytes_a_second / 1e12:.2f} TB/s"


def measure_ceilings(
    dtypes: list[str], clock: Clock, *, device: str, size: int = MATMUL_SIZE, copy_bytes: int = COPY_BYTES
) -> Ceilings:
    """A size-cubed product of random matrices in each dtype, and a copy, timed by `clock` (seconds of each round)."""
    generator = torch.Generator(device).manual_seed(0)
    flops = {}
    for dtype in dtypes:
        left, right = (torch.randn(size, size, device=device, generator=generator) for _ in range(2))
        left, right = left.to(getattr(torch, dtype)), right.to(getattr(torch, dtype))
        flops[dtype] = 2 * size**3 / _median(clock({"product": lambda left=left, right=right: left @ right}))
    source = torch.randn(copy_bytes // 4, device=device, generator=generator)
    target = torch.empty_like(source)
    seconds = _median(clock({"copy": lambda: target.copy_(source)}))
    return Ceilings(flops, 2 * copy_bytes / seconds)


def _median(seconds: Mapping) -> float:
    (rounds,) = seconds.values()
    return float(np.median(rounds))
