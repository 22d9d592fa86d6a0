"""What both passes of the path in plain PyTorch share: some heads at a time, cut into blocks, in memory used again."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.block_sparse_attention.pieces import Chunk, Layout, chunks
from kernels.dropout import keep_mask

# on a CPU what is worked on should stay in the caches, elsewhere few steps are what counts: scores of one product, and
# bytes of the queries (keys, values) of the heads that are computed together
SCORES_PER_THREAD, BYTES_OF_HEADS = 2**18, 2**21
SCORES_ON_DEVICE = 2**24


class Part(NamedTuple):
    """Examples and heads that are computed together."""

    examples: slice
    heads: range

    def of(self, tensor: Tensor) -> Tensor:
        """The part's share of [B, T, H, D], a view."""
        return tensor[self.examples, :, self.heads.start : self.heads.stop]


class Work:
    """What both passes share: parts of the tensors cut into blocks, and what each row of blocks meets.

    Blocks are [B * H * N, block, D]: a part's heads and examples behind one another, zeros behind the end of the text.
    """

    def __init__(self, query, valid, dropout_seed, lists, plan_of_length, sizes, follows_length, dropout):
        self.batch, self.seq_len, self.num_heads, self.head_dim = query.shape
        self.layout = Layout(lists, plan_of_length, *sizes)
        self.block_size = self.layout.block_size
        self.num_blocks = -(-self.seq_len // self.block_size)
        self.dtype = accumulator(query.dtype)
        self.device = query.device
        self.dropout, self.dropout_seed = dropout, dropout_seed
        self.buffers: dict[str, Tensor] = {}
        valid = torch.ones(query.shape[:2], dtype=torch.bool, device=self.device) if valid is None else valid
        self.blocks_of_examples = [self.num_blocks] * self.batch
        if follows_length:
            last = (valid * torch.arange(1, self.seq_len + 1, device=self.device)).amax(dim=1)
            self.blocks_of_examples = (-(-last // self.block_size)).tolist()
        tail = self.num_blocks * self.block_size - self.seq_len
        self.valid = F.pad(valid, (0, tail)).unflatten(1, (-1, self.block_size))

    def parts(self) -> Iterator[Part]:
        """All examples and heads: several heads of one example, or several examples with all heads."""
        num_pairs = self.batch * self.num_heads
        if self.device.type == "cpu":
            num_pairs = BYTES_OF_HEADS // (self.num_blocks * self.block_size * self.head_dim * self.dtype.itemsize)
        num_heads = max(1, min(num_pairs, self.num_heads))
        num_examples = max(1, num_pairs // self.num_heads)
        for example in range(0, self.batch, num_examples):
            for head in range(0, self.num_heads, num_heads):
                heads = range(head, min(head + num_heads, self.num_heads))
                yield Part(slice(example, min(example + num_examples, self.batch)), heads)

    def chunks(self, part: Part) -> Iterator[Chunk]:
        """What is to be computed for a part, rows of which some may meet keys in several chunks."""
        on_cpu = self.device.type == "cpu"
        most = SCORES_PER_THREAD * torch.get_num_threads() if on_cpu else SCORES_ON_DEVICE
        blocks, valid = self.blocks_of_examples[part.examples], self.valid[part.examples]
        return chunks(self.layout, blocks, part.heads, valid, most)

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that every part and chunk uses again: fresh pages would cost more than what is written to them."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.buffers[name][:size].view(shape)

    def zeros(self, name: str, part: Part, width: int) -> Tensor:
        """Blocks [.., block, width] of zeros."""
        num_blocks = (part.examples.stop - part.examples.start) * len(part.heads) * self.num_blocks
        return self.buffer(name, num_blocks, self.block_size, width).zero_()

    def to_blocks(self, name: str, tensor: Tensor, part: Part) -> Tensor:
        """A part of [B, T, H, D] as blocks, in the type of the sums."""
        tokens = part.of(tensor).transpose(1, 2)
        shape = (*tokens.shape[:2], self.num_blocks * self.block_size, tensor.shape[-1])
        blocks = self.buffer(name, *shape)
        blocks[:, :, : self.seq_len] = tokens
        blocks[:, :, self.seq_len :] = 0.0
        return blocks.view(-1, self.block_size, tensor.shape[-1])

    def from_blocks(self, blocks: Tensor, tensor: Tensor, part: Part) -> None:
        """Write blocks to where they belong in [B, T, H, D]."""
        tokens = part.of(tensor).transpose(1, 2)
        tokens.copy_(blocks.view(*tokens.shape[:2], -1, tensor.shape[-1])[:, :, : self.seq_len])

    def gather(self, name: str, blocks: Tensor, numbers: Tensor) -> Tensor:
        """The blocks of these numbers [R] or [R, L], those of a row one behind the other: [R, L * block, D]."""
        gathered = self.buffer(name, numbers.numel(), *blocks.shape[1:])
        torch.index_select(blocks, 0, numbers.flatten(), out=gathered)
        return gathered.view(len(numbers), -1, blocks.shape[-1])

    def matmul(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left [R, M, K] @ right [R, K, N]."""
        return torch.bmm(left, right, out=self.buffer(name, len(left), left.shape[1], right.shape[2]))

    def hide_unseen(self, scores: Tensor, chunk: Chunk, keys_dim: int) -> Tensor:
        """Scores of a chunk, its keys along `keys_dim`, -inf at those that are not there; in place."""
        if chunk.seen is None:
            return scores
        # adding is ten times as fast as filling where the mask is
        return scores.add_(torch.where(chunk.seen, 0.0, -math.inf).to(self.dtype).unsqueeze(3 - keys_dim))

    def kept(self, chunk: Chunk, part: Part, keys_dim: int) -> Tensor:
        """What probabilities [R, block, L * block] of a chunk, or with `keys_dim` 1 transposed, are multiplied with."""
        rows, keys = (self._positions(blocks) for blocks in (chunk.rows[:, None], chunk.blocks))
        rows, keys = rows.unsqueeze(keys_dim), keys.unsqueeze(3 - keys_dim)
        pair = (chunk.rows // self.num_blocks)[:, None, None]
        example, head = part.examples.start + pair // len(part.heads), part.heads.start + pair % len(part.heads)
        kept = keep_mask(self.dropout_seed, example * self.num_heads + head, rows, keys, self.dropout)
        return kept.to(self.dtype).div_(1 - self.dropout)

    def _positions(self, blocks):
        """Of the tokens of blocks [R, L] in their texts: [R, L * block]."""
        within = torch.arange(self.block_size, device=self.device)
        return (blocks[:, :, None] % self.num_blocks * self.block_size + within).flatten(1)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and statistics: float32, float64 for inputs of that type."""
    return torch.float64 if dtype == torch.float64 else torch.float32
