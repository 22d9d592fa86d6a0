"""Block-sparse attention on a CPU, against transformers' BigBirdBlockSparseAttention, dense SDPA and FlexAttention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import flex, peers
from benchmarks.cases import BIGBIRD, BOTH, DENSE, FLEX, FORWARD, Shape, random_tensors
from benchmarks.tables import Mechanism, Peer
from kernels.block_sparse_attention import BlockPattern, block_sparse_attention


@dataclass(frozen=True)
class BlockShape(Shape):
    """BigBird's pattern: blocks of `block_size` tokens, so many random ones in each row of blocks."""

    block_size: int = 64
    num_random_blocks: int = 3

    @property
    def pattern(self) -> BlockPattern:
        """The published one for this length, seed 0."""
        return BlockPattern.bigbird(self.seq_len, self.block_size, self.num_heads, self.num_random_blocks)


class BlockSparseSelfAttention(torch.nn.Module):
    """Query, key and value projections around block-sparse attention, with parameters named as in transformers."""

    def __init__(self, dim: int, num_heads: int, pattern: BlockPattern, impl: str = "auto"):
        super().__init__()
        self.heads, self.pattern, self.impl = (num_heads, dim // num_heads), pattern, impl
        self.query, self.key, self.value = (torch.nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        query, key, value = (project(x).unflatten(-1, self.heads) for project in (self.query, self.key, self.value))
        return block_sparse_attention(query, key, value, self.pattern, impl=self.impl).flatten(2)


def make_module(contender: str, shape: BlockShape) -> torch.nn.Module:
    """Either side of the module table, with the same seeded weights."""
    torch.manual_seed(0)
    ours = BlockSparseSelfAttention(shape.dim, shape.num_heads, shape.pattern)
    if contender != BIGBIRD:
        return ours
    sizes = (shape.dim, shape.num_heads, shape.batch, shape.seq_len, shape.block_size, shape.num_random_blocks)
    theirs = peers.bigbird_self_attention(*sizes)
    theirs.attention.load_state_dict(ours.state_dict())
    return theirs


def attention(shape: BlockShape) -> Callable:
    """Ours; the pattern is made here, once."""
    return partial(block_sparse_attention, pattern=shape.pattern)


def _flex(shape):
    attend = flex.attention(flex.pattern_mask(shape.pattern, shape.seq_len, shape.device, shape.block_size))
    sizes = (shape.batch, shape.seq_len, shape.num_heads, shape.head_dim)
    with flex.compile_settings(), torch.no_grad():
        attend(*random_tensors(3, sizes, shape, requires_grad=False))
    return attend


MECHANISM = Mechanism(
    name="block_sparse",
    shape=BlockShape(),
    quick=BlockShape(seq_len=512, num_heads=2, head_dim=16, block_size=16),
    quick_lengths=(512, 1024, 2048),
    module=make_module,
    module_peer=BIGBIRD,
    attention=attention,
    peers={
        DENSE: Peer(lambda shape: peers.dense_attention, is_same=False, note="sees every key"),
        FLEX: Peer(_flex, passes=(FORWARD,), why_not_both="no backward on CPU"),
    },
    min_ratio={FORWARD: 3.0, BOTH: 2.0},
    max_memory_ratio=1 / 3,
    is_open=False,
)
