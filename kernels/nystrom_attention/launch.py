"""What the launches of the two softmax passes take beside their tensors."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl

from kernels import tile_table
from kernels.launch import Launch, num_splits
from kernels.nystrom_attention.landmarks import cut

_TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Tables(NamedTuple):
    """`landmarks.Segments` as kernels read them; a leading dimension is 1 where all examples are cut alike."""

    start: torch.Tensor  # [B or 1, N + 1] int64
    index: torch.Tensor  # [B or 1, T] int32
    share: torch.Tensor  # [B or 1, N]
    real: torch.Tensor | None  # [B, N] bool
    single: torch.Tensor | None  # [B] bool

    @property
    def index_stride(self) -> int:
        """Elements from one example's index to the next one's."""
        return self.index.stride(0) if len(self.index) > 1 else 0


def make_tables(tokens: torch.Tensor, num_landmarks: int, counted: torch.Tensor | None, dtype: torch.dtype) -> Tables:
    """Tables of texts like tokens [B, T, H, D], of which those counted [B, T] are in landmarks; shares in `dtype`."""
    # in every call: kept ones would be garbage to whoever reads them while the CUDA graph that made them has not run
    segments = cut(tokens.shape[1], num_landmarks, counted, dtype=dtype, device=tokens.device)
    return Tables(segments.start, segments.index.int(), segments.share, segments.real, segments.single)


class Spread(NamedTuple):
    """What tokens get through their landmarks: gradients [B, N, H, D] that are times the landmarks' shares."""

    tables: Tables
    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """One softmax attention: "keys" is that of landmarks over all tokens, "queries" that of all tokens over landmarks.

    Attributes:
        query: [B, T, H, D]; key, value: [B, S, H, D], any strides. Landmarks are float32 where tokens are half.
        valid: [B, S] bool or None, the keys that are seen.
        counted: [B, T] bool or None, the rows that are computed; the others are zeros.
    """

    name: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor | None
    counted: torch.Tensor | None
    scale: float

    @property
    def launch(self) -> Launch:
        """Launches for the tensor of tokens, which decides about tile sizes."""
        tokens = self.key if self.name == "keys" else self.query
        return Launch(tokens, tokens, self.scale)

    @property
    def num_problems(self) -> int:
        """Heads of all examples."""
        return self.query.shape[0] * self.query.shape[2]

    def tiles(self, kernel: str) -> dict[str, Any]:
        """Tile sizes of "forward", "key_grad" or "query_grad", on the side of landmarks no larger than these are."""
        tiles = self.launch.tiles(f"nystrom_{self.name}_{kernel}", self._num_landmarks)
        side = "BLOCK_M" if self.name == "keys" else "BLOCK_N"
        return {**tiles, side: min(tiles[side], tile_table.block_dim(self._num_landmarks))}

    @property
    def _num_landmarks(self):
        return self.query.shape[1] if self.name == "keys" else self.key.shape[1]

    def types(self) -> dict[str, Any]:
        """Constants of the kernels that follow from dtypes.

        Half-precision tokens meet landmarks in tf32, which holds the tokens exactly: the pseudo-inverse would multiply
        what rounding to half precision leaves.
        """
        mixed = self.query.dtype != self.key.dtype
        types = self.launch.types()
        compute = types["ACC"] if mixed else _TRITON_TYPES[self.query.dtype]
        return {**types, "COMPUTE": compute, "PRECISION": "tf32" if mixed else types["PRECISION"]}

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of query, key and value."""
        return (*self.query.stride(), *self.key.stride(), *self.value.stride())

    def sizes(self) -> dict[str, int]:
        """Rows, keys and heads as each kernel takes them."""
        batch, num_rows, num_heads, _ = self.query.shape
        return {"T": num_rows, "S": self.key.shape[1], "num_problems": batch * num_heads, "H": num_heads}

    def cut(self, length: int, block: int, other_length: int, other_block: int) -> dict[str, int]:
        """Programs of `block` of `length` rows or keys each, times parts of the other side, in tiles of other_block."""
        num_tiles = -(-length // block)
        num_parts, chunk = num_splits(other_length, self.num_problems * num_tiles, other_block)
        return {"num_tiles": num_tiles, "num_parts": num_parts, "chunk": chunk}

    def grid(self, cut: dict[str, int]) -> tuple[int]:
        """One program for each tile, part and head: the tile changes fastest."""
        return (cut["num_tiles"] * cut["num_parts"] * self.num_problems,)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory on the device of the tensors, for sums unless `dtype` says otherwise."""
        return torch.empty(shape, dtype=dtype or self.launch.accumulator, device=self.query.device)


def spread_arguments(spread: Spread | None) -> tuple:
    """(index, two gradients, stride of the index's batch, number of landmarks); None and 0 without."""
    if spread is None:
        return None, None, None, 0, 0
    return spread.tables.index, spread.first, spread.second, spread.tables.index_stride, spread.first.shape[1]
