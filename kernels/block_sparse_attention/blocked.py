"""Block-sparse attention in plain PyTorch with memory linear in the length: blocks are gathered a few rows at a time.

Saved for the backward pass are inputs, output and log-sum-exp; scores are computed again there. Statistics and
products are in float32, or in float64 for inputs of that type. Which rows there are is read on the host, so the passes
are operators that a compiler takes whole.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.block_sparse_attention.lists import BlockLists
from kernels.block_sparse_attention.pattern import BlockPattern
from kernels.block_sparse_attention.pieces import Chunk, Layout, chunks
from kernels.dropout import keep_mask

# scores of one product: on a CPU what goes with them stays in the cache of a core, elsewhere few products are better
SCORES_PER_THREAD = 2**18
SCORES_ON_DEVICE = 2**24
LN_2 = math.log(2)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: BlockPattern,
    scale: float,
    valid: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """As `reference.block_sparse_attention`, in time linear in what is seen and memory linear in T."""
    return _forward(query, key, value, valid, dropout_seed, *flat(pattern), scale, dropout)[0]


def flat(pattern: BlockPattern) -> tuple[list[Tensor], list[Tensor], list[int], list[int], bool]:
    """A pattern as an operator can take it: the arguments row_offsets to follows_length of `forward`."""
    offsets, blocks = zip(*pattern.lists, strict=True)
    sizes = [pattern.block_size, pattern.front, pattern.back, pattern.window]
    return list(offsets), list(blocks), list(pattern.plan_of_length), sizes, pattern.follows_length


class _Work:
    """What both passes share: tensors cut into blocks and what each row of blocks meets.

    Blocks [B * H * N, block, D]: all heads and examples behind one another, zeros behind the end of the text.
    """

    def __init__(self, query, valid, dropout_seed, lists, plan_of_length, sizes, follows_length, dropout):
        self.batch, self.seq_len, self.num_heads, _ = query.shape
        self.layout = Layout(lists, plan_of_length, *sizes)
        self.block_size = self.layout.block_size
        self.num_blocks = -(-self.seq_len // self.block_size)
        self.dtype = _accumulator(query.dtype)
        self.device = query.device
        self.dropout, self.dropout_seed = dropout, dropout_seed
        self.buffers = {}
        valid = torch.ones(query.shape[:2], dtype=torch.bool, device=self.device) if valid is None else valid
        self.blocks_of_examples = [self.num_blocks] * self.batch
        if follows_length:
            last = (valid * torch.arange(1, self.seq_len + 1, device=self.device)).amax(dim=1)
            self.blocks_of_examples = (-(-last // self.block_size)).tolist()
        tail = self.num_blocks * self.block_size - self.seq_len
        self.valid = torch.nn.functional.pad(valid, (0, tail)).unflatten(1, (-1, self.block_size))

    def to_blocks(self, tensor: Tensor) -> Tensor:
        """A copy of [B, T, H, D] as blocks, in the type of the sums."""
        shape = (self.batch, self.num_heads, self.num_blocks * self.block_size, tensor.shape[-1])
        blocks = torch.empty(shape, dtype=self.dtype, device=self.device)
        blocks[:, :, : self.seq_len] = tensor.transpose(1, 2)
        blocks[:, :, self.seq_len :] = 0.0
        return blocks.view(-1, self.block_size, tensor.shape[-1])

    def from_blocks(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Blocks as [B, T, H, D], contiguous, in the type of `like`."""
        tokens = blocks.view(self.batch, self.num_heads, -1, blocks.shape[-1])[:, :, : self.seq_len]
        return torch.empty(like.shape, dtype=like.dtype, device=self.device).copy_(tokens.transpose(1, 2))

    def chunks(self) -> Iterator[Chunk]:
        """What is to be computed, rows of which some may meet keys in several chunks."""
        on_cpu = self.device.type == "cpu"
        most = SCORES_PER_THREAD * torch.get_num_threads() if on_cpu else SCORES_ON_DEVICE
        return chunks(self.layout, self.blocks_of_examples, self.valid, most)

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Memory that every chunk uses again: fresh pages would cost more than what is written to them."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.buffers[name][:size].view(shape)

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

    def kept(self, chunk: Chunk, keys_dim: int) -> Tensor:
        """What probabilities [R, block, L * block] of a chunk, or with `keys_dim` 1 transposed, are multiplied with."""
        rows, keys = (self._positions(blocks) for blocks in (chunk.rows[:, None], chunk.blocks))
        rows, keys = rows.unsqueeze(keys_dim), keys.unsqueeze(3 - keys_dim)
        heads = (chunk.rows // self.num_blocks)[:, None, None]
        return keep_mask(self.dropout_seed, heads, rows, keys, self.dropout).to(self.dtype).div_(1 - self.dropout)

    def _positions(self, blocks):
        """Of the tokens of blocks [R, L] in their texts: [R, L * block]."""
        within = torch.arange(self.block_size, device=self.device)
        return (blocks[:, :, None] % self.num_blocks * self.block_size + within).flatten(1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, dropout_seed: Tensor | None,
    row_offsets: list[Tensor], row_blocks: list[Tensor], plan_of_length: list[int], sizes: list[int],
    follows_length: bool, scale: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, T, H, D], and [B, H, T] the base-2 logarithm of each query's sum of exponentials."""
    lists = [BlockLists(*pair) for pair in zip(row_offsets, row_blocks, strict=True)]
    work = _Work(query, valid, dropout_seed, lists, plan_of_length, sizes, follows_length, dropout)
    queries = work.to_blocks(query).mul_(scale / LN_2)  # scores are exponents of 2
    keys, values = work.to_blocks(key), work.to_blocks(value)
    out, lse2 = torch.zeros_like(queries), queries.new_full((*queries.shape[:2], 1), -math.inf)
    for chunk in work.chunks():
        rows, blocks = chunk.rows, chunk.blocks
        queries_here, keys_here = work.gather("queries", queries, rows), work.gather("keys", keys, blocks)
        scores = work.hide_unseen(work.matmul("scores", queries_here, keys_here.transpose(1, 2)), chunk, 2)
        shift = scores.amax(dim=-1, keepdim=True)
        if chunk.seen is not None:
            shift.masked_fill_(shift == -math.inf, 0.0)
        probs = scores.sub_(shift).exp2_()
        total = probs.sum(dim=-1, keepdim=True)
        if dropout:
            probs.mul_(work.kept(chunk, 2))
        # where no key is seen both are 0
        part = work.matmul("part", probs, work.gather("values", values, blocks))
        part.div_(total.clamp(min=torch.finfo(total.dtype).tiny))
        part_lse2 = shift.add_(total.log2_())
        if chunk.continues:
            part, part_lse2 = _merged(out.index_select(0, rows), lse2.index_select(0, rows), part, part_lse2)
        out.index_copy_(0, rows, part)
        lse2.index_copy_(0, rows, part_lse2)
    del queries, keys, values
    out = work.from_blocks(out, query)
    if valid is not None:
        out.masked_fill_(~valid[:, :, None, None], 0.0)
    return out, lse2.view(*query.shape[:3:2], -1)[:, :, : query.shape[1]].contiguous()


def backward(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse2: Tensor,
    valid: Tensor | None, dropout_seed: Tensor | None,
    row_offsets: list[Tensor], row_blocks: list[Tensor], plan_of_length: list[int], sizes: list[int],
    follows_length: bool, scale: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    lists = [BlockLists(*pair) for pair in zip(row_offsets, row_blocks, strict=True)]
    work = _Work(query, valid, dropout_seed, lists, plan_of_length, sizes, follows_length, dropout)
    if valid is not None:
        out_grad = out_grad.masked_fill(~valid[:, :, None, None], 0.0)
    # for each query the sum of its probabilities times their gradients
    deltas = work.to_blocks((out_grad.to(lse2.dtype) * out).sum(dim=-1, keepdim=True))
    # a query that sees nothing has -inf, which would be subtracted from itself
    lse2 = work.to_blocks(lse2.masked_fill(lse2 == -math.inf, math.inf).transpose(1, 2)[..., None])
    queries = work.to_blocks(query).mul_(scale / LN_2)
    keys, values, out_grads = work.to_blocks(key), work.to_blocks(value), work.to_blocks(out_grad)
    query_grad, key_grad, value_grad = (torch.zeros_like(queries) for _ in range(3))
    for chunk in work.chunks():
        rows, blocks = chunk.rows, chunk.blocks
        queries_here, grads_here = work.gather("queries", queries, rows), work.gather("grads", out_grads, rows)
        keys_here, values_here = work.gather("keys", keys, blocks), work.gather("values", values, blocks)
        # transposed, so that one product of five has a transposed operand on its left, which is slower
        scores = work.hide_unseen(work.matmul("scores", keys_here, queries_here.transpose(1, 2)), chunk, 1)
        probs = scores.sub_(lse2.index_select(0, rows).transpose(1, 2)).exp2_()
        probs_grad = work.matmul("probs_grad", values_here, grads_here.transpose(1, 2))
        kept_probs = probs
        if dropout:
            kept = work.kept(chunk, 1)
            probs_grad.mul_(kept)
            kept_probs = probs * kept
        _add(value_grad, blocks, work.matmul("share", kept_probs, grads_here))
        scores_grad = probs_grad.sub_(deltas.index_select(0, rows).transpose(1, 2)).mul_(probs)
        _add(query_grad, rows, work.matmul("part", scores_grad.transpose(1, 2), keys_here))
        _add(key_grad, blocks, work.matmul("share", scores_grad, queries_here))
    del queries, keys, values, out_grads
    # the queries hold the scale already, and the change of base
    query_grad, key_grad = query_grad.mul_(scale), key_grad.mul_(LN_2)
    return work.from_blocks(query_grad, query), work.from_blocks(key_grad, key), work.from_blocks(value_grad, value)


def _accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _add(total, numbers, shares):
    """Add to the blocks of these numbers in `total`, in a fixed order where a number repeats."""
    numbers = numbers.flatten()
    shares = shares.view(len(numbers), *total.shape[1:])
    if total.device.type == "cpu":
        total.index_add_(0, numbers, shares)
    else:  # where index_add_ adds in any order
        total.index_put_((numbers,), shares, accumulate=True)


def _merged(out, lse2, part, part_lse2):
    """Output [R, block, D] and log-sum-exp [R, block, 1] over two sets of keys."""
    both = torch.logaddexp2(lse2, part_lse2)
    # where neither holds a key, -inf is subtracted from itself
    weight, part_weight = ((one - both).exp2_().nan_to_num_(nan=0.0) for one in (lse2, part_lse2))
    return out.mul_(weight).add_(part.mul_(part_weight)), both


_forward = torch.library.custom_op("longspan::block_sparse_blocked", forward, mutates_args=())
_backward = torch.library.custom_op("longspan::block_sparse_blocked_backward", backward, mutates_args=())


@_forward.register_fake
def _(query, key, value, valid, dropout_seed, *options):
    batch, seq_len, num_heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, num_heads, seq_len), dtype=_accumulator(query.dtype))


@_backward.register_fake
def _(out_grad, query, key, value, *rest):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup(ctx, inputs, output):
    query, key, value, valid, dropout_seed, *ctx.options = inputs
    out, lse2 = output
    ctx.save_for_backward(query, key, value, out, lse2, valid, dropout_seed)
    ctx.mark_non_differentiable(lse2)
    ctx.set_materialize_grads(False)


def _grads(ctx, out_grad, lse2_grad):
    offsets, blocks, *others = ctx.options
    grads = (None, None, None)
    if out_grad is not None:
        grads = _backward(out_grad, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, [None] * len(offsets), [None] * len(blocks), *[None] * len(others)


_forward.register_autograd(_grads, setup_context=_setup)
