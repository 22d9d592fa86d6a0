"""BigBird's block-sparse self-attention as a module (arXiv 2007.14062, section 2)."""

from typing import Literal

import torch

from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from models.attention.base import SelfAttention

FULL_ATTENTION_BLOCKS = (5, 2)  # and of each random block: modeling_big_bird.py, BigBirdModel.forward
EVERYTHING = "every block"


class BlockSparseAttention(SelfAttention):
    """Global blocks, a window of blocks and random ones: [B, T, M] -> [B, T, M].

    Args:
        dim: width M; num_heads must divide it.
        layer: this layer's index, the seed of its random blocks as in the released models; num_layers: unused.
        max_positions: the longest text in tokens.
        block_size, num_random_blocks: as in `BlockPattern.bigbird`.
        bias: of the query, key and value projections; the output projection always has one.
        compat: "hf": in training what Hugging Face's model computes in train(), in evaluation what it computes in
            eval(), for the padded length, and full attention for short texts (in that call alone: theirs stays with
            it). It is another pattern for every length: torch.compile compiles each anew, after a call in eager mode
            of that length, and torch.export takes no dynamic length. None: each example's own pattern, the same in
            both modes and at all lengths.
        impl: path of `kernels.block_sparse_attention.block_sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        layer: int,
        *,
        num_layers: int,
        max_positions: int,
        block_size: int = 64,
        num_random_blocks: int = 3,
        bias: bool = True,
        compat: Literal["hf"] | None = None,
        impl: Literal["auto", "triton", "blocked", "reference"] = "auto",
    ):
        super().__init__(dim, num_heads, bias=bias, out_bias=True)
        self.layer, self.max_positions = layer, max_positions
        self.block_size, self.num_random_blocks = block_size, num_random_blocks
        self.compat, self.impl = compat, impl
        self._patterns: dict[tuple[str | None, int], BlockPattern] = {}
        if compat is None:  # a compiler cannot follow how it is made
            self.pattern(max_positions)

    def pattern(self, seq_len: int) -> BlockPattern:
        """The pattern of a text of `seq_len` tokens, padding included."""
        if self.compat is None:
            return self._kept(None, self.max_positions)
        if isinstance(seq_len, torch.SymInt):
            raise ValueError(f"compat={self.compat!r} has another pattern for each length: export one, or compat=None")
        at_once, each = FULL_ATTENTION_BLOCKS
        if seq_len <= (at_once + each * self.num_random_blocks) * self.block_size:
            mode = EVERYTHING
        else:
            mode = "hf_train" if self.training else "hf_eval"
        return self._kept(mode, -(-seq_len // self.block_size) * self.block_size)

    def _kept(self, mode, seq_len) -> BlockPattern:
        if (mode, seq_len) not in self._patterns:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"compat={self.compat!r} has another pattern for each length and mode, and a compiler cannot make "
                    "them: call the model once in eager mode with a text of this length, or take compat=None"
                )
            sizes = (seq_len, self.block_size, self.num_heads)
            if mode == EVERYTHING:
                pattern = BlockPattern.from_function(lambda row, column: True, *sizes)
            else:
                pattern = BlockPattern.bigbird(*sizes, self.num_random_blocks, self.layer, compat=mode,
                                               max_position_embeddings=self.max_positions)  # fmt: skip
            self._patterns[mode, seq_len] = pattern
        return self._patterns[mode, seq_len]

    def forward(
        self, x: torch.Tensor, *, valid: torch.Tensor | None = None, global_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [B, T, M], valid [B, T] bool (True = real) -> [B, T, M]; global are blocks, not tokens."""
        query, key, value = self.project(x)
        out = block_sparse_attention(query, key, value, self.pattern(x.shape[1]), valid=valid, impl=self.impl)
        return self.merge(out)
