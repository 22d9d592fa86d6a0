"""Block-sparse attention in plain PyTorch with memory linear in the length: blocks are gathered a few rows at a time.

Saved for the backward pass are inputs, output and log-sum-exp; scores are computed again there. Statistics and
products are in float32, or in float64 for inputs of that type. Which rows there are is read on the host, so the passes
are operators that a compiler takes whole.
"""

import math

import torch
from torch import Tensor

from kernels.block_sparse_attention.lists import BlockLists, constants
from kernels.block_sparse_attention.parts import Work, accumulator
from kernels.block_sparse_attention.pattern import BlockPattern

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
    return list(offsets), constants(blocks), list(pattern.plan_of_length), sizes, pattern.follows_length


def forward(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, dropout_seed: Tensor | None,
    row_offsets: list[Tensor], row_blocks: list[Tensor], plan_of_length: list[int], sizes: list[int],
    follows_length: bool, scale: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, T, H, D], and [B, T, H] the base-2 logarithm of each query's sum of exponentials."""
    lists = [BlockLists(*pair) for pair in zip(row_offsets, row_blocks, strict=True)]
    work = Work(query, valid, dropout_seed, lists, plan_of_length, sizes, follows_length, dropout)
    out = query.new_empty(query.shape)
    lse2 = query.new_empty((*query.shape[:3], 1), dtype=work.dtype)
    for part in work.parts():
        queries = work.to_blocks("all queries", query, part).mul_(scale / LN_2)  # scores are exponents of 2
        keys, values = work.to_blocks("all keys", key, part), work.to_blocks("all values", value, part)
        part_out, part_lse2 = work.zeros("out", part, work.head_dim), work.zeros("lse2", part, 1).fill_(-math.inf)
        for chunk in work.chunks(part):
            _attend(work, part, chunk, queries, keys, values, part_out, part_lse2)
        work.from_blocks(part_out, out, part)
        work.from_blocks(part_lse2, lse2, part)
    if valid is not None:
        out.masked_fill_(~valid[:, :, None, None], 0.0)
    return out, lse2.squeeze(-1)


def _attend(work, part, chunk, queries, keys, values, out, lse2):
    """The rows of a chunk: their output and log-sum-exp, merged into what earlier chunks gave."""
    rows, blocks = chunk.rows, chunk.blocks
    queries, keys = work.gather("queries", queries, rows), work.gather("keys", keys, blocks)
    scores = work.hide_unseen(work.matmul("scores", queries, keys.transpose(1, 2)), chunk, 2)
    shift = scores.amax(dim=-1, keepdim=True)
    if chunk.seen is not None:
        shift.masked_fill_(shift == -math.inf, 0.0)
    probs = scores.sub_(shift).exp2_()
    total = probs.sum(dim=-1, keepdim=True)
    if work.dropout:
        probs.mul_(work.kept(chunk, part, 2))
    # where no key is seen both are 0
    found = work.matmul("found", probs, work.gather("values", values, blocks))
    found.div_(total.clamp(min=torch.finfo(total.dtype).tiny))
    found_lse2 = shift.add_(total.log2_())
    if chunk.continues:
        found, found_lse2 = _merged(out.index_select(0, rows), lse2.index_select(0, rows), found, found_lse2)
    out.index_copy_(0, rows, found)
    lse2.index_copy_(0, rows, found_lse2)


def backward(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse2: Tensor,
    valid: Tensor | None, dropout_seed: Tensor | None,
    row_offsets: list[Tensor], row_blocks: list[Tensor], plan_of_length: list[int], sizes: list[int],
    follows_length: bool, scale: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value."""
    lists = [BlockLists(*pair) for pair in zip(row_offsets, row_blocks, strict=True)]
    work = Work(query, valid, dropout_seed, lists, plan_of_length, sizes, follows_length, dropout)
    if valid is not None:
        out_grad = out_grad.masked_fill(~valid[:, :, None, None], 0.0)
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    for part in work.parts():
        queries = work.to_blocks("all queries", query, part).mul_(scale / LN_2)
        keys, values = work.to_blocks("all keys", key, part), work.to_blocks("all values", value, part)
        out_grads, outs = work.to_blocks("out grads", out_grad, part), work.to_blocks("out", out, part)
        # for each query the sum of its probabilities times their gradients
        deltas = outs.mul_(out_grads).sum(dim=-1, keepdim=True)
        # a query that sees nothing has -inf, which would be subtracted from itself
        statistics = work.to_blocks("lse2", lse2[..., None], part)
        statistics.masked_fill_(statistics == -math.inf, math.inf)
        sums = [work.zeros(name, part, work.head_dim) for name in ("query grad", "key grad", "value grad")]
        for chunk in work.chunks(part):
            _add_grads(work, part, chunk, queries, keys, values, out_grads, statistics, deltas, *sums)
        # the queries hold the scale already, and the change of base
        for blocks, factor, grad in zip(sums, (scale, LN_2, 1.0), grads, strict=True):
            work.from_blocks(blocks.mul_(factor), grad, part)
    query_grad, key_grad, value_grad = grads
    return query_grad, key_grad, value_grad


def _add_grads(work, part, chunk, queries, keys, values, out_grads, lse2, deltas, query_grad, key_grad, value_grad):
    """What the rows of a chunk add to the gradients, all of them blocks.

    Scores are transposed, [R, L * block, block]: so one product of five has a transposed operand on its left, which is
    slower, and not two.
    """
    rows, blocks = chunk.rows, chunk.blocks
    queries, out_grads = work.gather("queries", queries, rows), work.gather("out grads of rows", out_grads, rows)
    keys, values = work.gather("keys", keys, blocks), work.gather("values", values, blocks)
    scores = work.hide_unseen(work.matmul("scores", keys, queries.transpose(1, 2)), chunk, 1)
    probs = scores.sub_(lse2.index_select(0, rows).transpose(1, 2)).exp2_()
    probs_grad = work.matmul("probs grad", values, out_grads.transpose(1, 2))
    kept_probs = probs
    if work.dropout:
        kept = work.kept(chunk, part, 1)
        probs_grad.mul_(kept)
        kept_probs = probs * kept
    _add(value_grad, blocks, work.matmul("found", kept_probs, out_grads))
    scores_grad = probs_grad.sub_(deltas.index_select(0, rows).transpose(1, 2)).mul_(probs)
    _add(query_grad, rows, work.matmul("found", scores_grad.transpose(1, 2), keys))
    _add(key_grad, blocks, work.matmul("found", scores_grad, queries))


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
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))


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
