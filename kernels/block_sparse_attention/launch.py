"""What the launches of the block-sparse kernels take beside their tensors: tables, numbers of the pattern, tiles."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kernels import dropout
from kernels.block_sparse_attention.tables import Tables
from kernels.launch import Launch

TILE_ROWS = (32, 64, 128)


class Work(NamedTuple):
    """The tables of one direction, as in `Tables`."""

    parts: torch.Tensor
    items: torch.Tensor
    merges: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True)
class BlockLaunch(Launch):
    """The launches of one call: query, key and value [B, T, H, D], the tables and the numbers of a pattern.

    valid: [B, T] bool or None. lengths: int32 [B, 3] where there is a mask, the blocks, the plan and the leading valid
    tokens of each example. seed: int64 of one element where `dropout` is not 0.
    """

    value: torch.Tensor
    valid: torch.Tensor | None
    lengths: torch.Tensor | None
    tables: Tables
    block_size: int
    front: int
    back: int
    window: int
    dropout: float
    seed: torch.Tensor | None

    @property
    def rows(self) -> Work:
        """Work by blocks of queries."""
        return Work(*self.tables[:4])

    @property
    def columns(self) -> Work:
        """Work by blocks of keys."""
        return Work(*self.tables[4:8])

    def numbers(self, work: Work) -> dict[str, Any]:
        """Lengths and constants that every kernel of a direction takes."""
        seq_len, num_heads, head_dim = self.query.shape[1:]
        return {
            "T": seq_len,
            "num_blocks": -(-seq_len // self.block_size),
            "num_parts": work.parts.shape[2],
            "H": num_heads,
            "D": head_dim,
            "BLOCK_SIZE": self.block_size,
            "FRONT": self.front,
            "BACK": self.back,
            "WINDOW": self.window,
            "MANY_PLANS": len(work.items) > 1,
            "HAS_VALID": self.valid is not None,
        }

    def attention_numbers(self, work: Work) -> dict[str, Any]:
        """Those of a kernel that computes probabilities."""
        return {
            **self.numbers(work),
            **self.types(),
            "num_items": work.items.shape[2],
            "threshold": dropout.threshold(self.dropout),
            "keep_scale": self.keep_scale,
            "HAS_LISTS": len(work.blocks) > 0,
            "DROPOUT": self.dropout > 0,
        }

    @property
    def keep_scale(self) -> float:
        """Factor of the probabilities that dropout leaves."""
        return 1 / (1 - self.dropout)

    def partial(self, work: Work, number: int, *sizes: int) -> torch.Tensor:
        """Memory [number, B, H, S, block_size, *sizes] for the sums of parts."""
        batch, _, num_heads, _ = self.query.shape
        shape = (number, batch, num_heads, work.parts.shape[2], self.block_size, *sizes)
        return torch.empty(shape, dtype=self.accumulator, device=self.query.device)

    def block_tiles(self, kernel: str) -> dict[str, Any]:
        """Tile sizes, warps and stages of a kernel, no tile taller than a block."""
        tiles = self.tiles(kernel, 1)
        fitted = {name: fit(tiles[name], self.block_size) for name in ("BLOCK_M", "BLOCK_N")}
        return {**tiles, **fitted}


def fit(limit: int, block_size: int) -> int:
    """Rows of a tile of at most `limit`: of those whose tiles cover a block with the least waste the tallest."""
    if min(limit, block_size) <= 16:
        return 16
    rows = [size for size in TILE_ROWS if size <= limit]
    return max(rows, key=lambda size: (-(-(-block_size // size) * size), size))
