"""What the Triton kernels share: tiles in and out, one step of each pass, and the choice of tile sizes.

Letters in trailing comments are tile sizes, M queries, N keys, D channels. Probabilities are powers of two: a score
times `scale * log2(e)` is its exponent, and `lse2` is the base-2 logarithm of a row's sum of them, -inf for a row that
sees nothing.
"""

import triton
import triton.language as tl

from kernels import dropout

LOG2_E = 1.4426950408889634
FIRST_MULTIPLIER = tl.constexpr(dropout.MULTIPLIERS[0])
SECOND_MULTIPLIER = tl.constexpr(dropout.MULTIPLIERS[1])
GOLDEN = tl.constexpr(dropout.GOLDEN)
UNUSED_BITS = tl.constexpr(32 - dropout.THRESHOLD_BITS)


@triton.jit
def tile_offsets(rows, row_stride, dims, dim_stride):
    """Offsets [rows, dims] in elements, 64 bits wide: a long sequence of many heads passes 2^31."""
    return rows.to(tl.int64)[:, None] * row_stride + dims.to(tl.int64)[None, :] * dim_stride


@triton.jit
def load_tile(pointers, row_mask, dim_mask, MASK_ROWS: tl.constexpr, MASK_DIMS: tl.constexpr):
    """A tile [rows, dims], zero where it is masked; the masks that are not asked for cost nothing."""
    if MASK_ROWS and MASK_DIMS:
        return tl.load(pointers, mask=row_mask[:, None] & dim_mask[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=row_mask[:, None], other=0.0)
    elif MASK_DIMS:
        return tl.load(pointers, mask=dim_mask[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def matmul(left, right, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """left @ right, summed in ACC."""
    return tl.dot(left, right, out_dtype=ACC, input_precision=PRECISION)


@triton.jit
def softmax_step(
    acc, row_max, row_sum, scores, value, exponent_scale, GUARD: tl.constexpr, PRECISION: tl.constexpr, kept=None
):
    """Online softmax: fold scores [M, N] and value [N, D] into acc [M, D], row_max and row_sum [M].

    GUARD: whether a row may have met no key yet, so that its maximum is still -inf. kept: [M, N], which probabilities
    dropout leaves, or None; acc is not yet divided by their share.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # subtracting -inf from itself would be nan
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) if GUARD else new_max
    shift = shift * exponent_scale
    probs = tl.exp2(scores * exponent_scale - shift[:, None])  # [M, N]
    decay = tl.exp2(row_max * exponent_scale - shift)
    weights = probs if kept is None else tl.where(kept, probs, 0.0)
    acc = acc * decay[:, None] + matmul(weights.to(value.dtype), value, acc.dtype, PRECISION)
    return acc, new_max, row_sum * decay + tl.sum(probs, 1)


@triton.jit
def softmax_end(acc, row_max, row_sum, exponent_scale):
    """(out [M, D], lse2 [M]) of the folded sums: zeros and -inf for a row without a key."""
    some = row_sum > 0
    safe_sum = tl.where(some, row_sum, 1.0)
    lse2 = tl.where(some, row_max * exponent_scale + tl.log2(safe_sum), float("-inf"))
    return acc * tl.where(some, 1.0 / safe_sum, 0.0)[:, None], lse2


@triton.jit
def load_lse2(pointers, mask):
    """lse2 [M] for the backward pass: +inf for a row that sees nothing or is not there, whose probabilities are 0."""
    lse2 = tl.load(pointers, mask=mask, other=float("inf"))
    return tl.where(lse2 == float("-inf"), float("inf"), lse2)


@triton.jit
def query_grad_step(
    query_grad, query, key, value, out_grad, lse2, delta, seen, exponent_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, kept=None, keep_scale=1.0,
):  # fmt: skip
    """query_grad [M, D], not yet times the scale, plus the share of keys [N, D]; `seen` [M, N] counts where MASKED.

    kept: [M, N], which probabilities dropout leaves, times keep_scale; or None.
    """
    scores = matmul(query, tl.trans(key), query_grad.dtype, PRECISION)  # [M, N]
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    return query_grad_of_scores(
        query_grad, scores, key, value, out_grad, lse2, delta, exponent_scale, PRECISION, kept, keep_scale
    )


@triton.jit
def query_grad_of_scores(
    query_grad, scores, key, value, out_grad, lse2, delta, exponent_scale, PRECISION: tl.constexpr, kept, keep_scale
):
    """`query_grad_step` from the scores [M, N] on, -inf where a query does not see a key."""
    probs = tl.exp2(scores * exponent_scale - lse2[:, None])
    probs_grad = matmul(out_grad, tl.trans(value), query_grad.dtype, PRECISION)  # [M, N]
    if kept is not None:
        probs_grad = tl.where(kept, probs_grad * keep_scale, 0.0)
    scores_grad = probs * (probs_grad - delta[:, None])
    return query_grad + matmul(scores_grad.to(key.dtype), key, query_grad.dtype, PRECISION)


@triton.jit
def key_grad_step(
    key_grad, value_grad, query, key, value, out_grad, lse2, delta, seen, exponent_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, kept=None, keep_scale=1.0,
):  # fmt: skip
    """key_grad, not yet times the scale, and value_grad [N, D] plus the share of queries [M, D]; `seen` is [N, M].

    kept: [N, M], which probabilities dropout leaves, times keep_scale; or None. value_grad is not yet times keep_scale.
    The scores are computed transposed: a product whose left operand is a transposed accumulator was compiled wrongly
    for sm_90 (fla-org/flash-linear-attention#826).
    """
    scores = matmul(key, tl.trans(query), key_grad.dtype, PRECISION)  # [N, M]
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    probs = tl.exp2(scores * exponent_scale - lse2[None, :])
    weights = probs if kept is None else tl.where(kept, probs, 0.0)
    value_grad += matmul(weights.to(out_grad.dtype), out_grad, key_grad.dtype, PRECISION)
    probs_grad = matmul(value, tl.trans(out_grad), key_grad.dtype, PRECISION)  # [N, M]
    if kept is not None:
        probs_grad = tl.where(kept, probs_grad * keep_scale, 0.0)
    scores_grad = probs * (probs_grad - delta[None, :])
    key_grad += matmul(scores_grad.to(query.dtype), query, key_grad.dtype, PRECISION)
    return key_grad, value_grad


@triton.jit
def keep_mask(seed, batch_head, rows, columns, threshold):
    """`dropout.keep_mask`, bit for bit: which probabilities stay, in the shape that rows and columns broadcast to.

    seed: int64. rows, columns: int32 positions, one as [M, 1], the other as [1, N]. threshold: `dropout.threshold`.
    """
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    row_key = _scramble(low ^ _scramble(tl.cast(batch_head, tl.uint32) + GOLDEN))
    column_key = _scramble(row_key ^ _scramble(high ^ _scramble(low + GOLDEN)))
    mixed = _multiply(_scramble(rows.to(tl.uint32) ^ row_key) ^ (columns.to(tl.uint32) * GOLDEN + column_key))
    return mixed >= tl.cast(threshold, tl.uint32) << UNUSED_BITS


@triton.jit
def _scramble(x):
    x = _multiply(x)
    return x ^ (x >> 15)


@triton.jit
def _multiply(x):
    x = (x ^ (x >> 16)) * FIRST_MULTIPLIER
    return (x ^ (x >> 15)) * SECOND_MULTIPLIER
