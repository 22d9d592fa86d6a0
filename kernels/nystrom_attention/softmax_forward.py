"""Softmax attention of some rows over some keys, forward, with the keys cut into parts.

Both passes of Nyström attention are this: a few landmarks over all tokens, where the parts keep a GPU at work, and all
tokens over a few landmarks.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import on_device, valid_arguments
from kernels.nystrom_attention.launch import Pass
from kernels.tiles import load_tile, matmul, softmax_end, softmax_step, tile_offsets

MERGED_ROWS = 16  # rows of a program that merges parts


@triton.jit(
    do_not_specialize=[
        "valid_stride_b", "valid_stride_t", "counted_stride_b", "counted_stride_t",
        "T", "S", "num_problems", "chunk", "num_tiles", "num_parts",
    ],
)  # fmt: skip
def softmax_fwd_kernel(
    query_ptr, key_ptr, value_ptr,  # in,  [B, T, H, D], [B, S, H, D] twice, any strides
    valid_ptr, counted_ptr,         # in,  [B, S] and [B, T] uint8, or None
    out_ptr, lse2_ptr,              # out, [parts, B, T, H, D] and [parts, B, H, T], contiguous
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t, counted_stride_b, counted_stride_t,
    T, S, num_problems, chunk, num_tiles, num_parts, exponent_scale,
    H: tl.constexpr, D: tl.constexpr, HAS_VALID: tl.constexpr, HAS_COUNTED: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head over `chunk` keys, normalised, with the logarithm of their sums."""
    program = tl.program_id(0)
    part = (program // num_tiles % num_parts).to(tl.int64)
    problem = (program // num_tiles // num_parts).to(tl.int64)
    batch, head = problem // H, problem % H
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    rows = program % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < T
    query_tile = query_ptr + batch * query_stride_b + head * query_stride_h
    query_tile += tile_offsets(rows, query_stride_t, dims, query_stride_d)
    query = load_tile(query_tile, row_mask, dim_mask, True, MASK_DIMS).to(COMPUTE)  # [BLOCK_M, BLOCK_D]
    key_base = key_ptr + batch * key_stride_b + head * key_stride_h
    value_base = value_ptr + batch * value_stride_b + head * value_stride_h

    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)
    first = part.to(tl.int32) * chunk
    last = tl.minimum(first + chunk, S)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys < last
        key_tile = key_base + tile_offsets(keys, key_stride_t, dims, key_stride_d)
        value_tile = value_base + tile_offsets(keys, value_stride_t, dims, value_stride_d)
        key = load_tile(key_tile, seen, dim_mask, True, MASK_DIMS).to(COMPUTE)  # [BLOCK_N, BLOCK_D]
        value = load_tile(value_tile, seen, dim_mask, True, MASK_DIMS).to(COMPUTE)
        if HAS_VALID:
            valid = valid_ptr + batch * valid_stride_b + keys.to(tl.int64) * valid_stride_t
            seen = seen & (tl.load(valid, mask=seen, other=0) != 0)
        scores = matmul(query, tl.trans(key), ACC, PRECISION)  # [BLOCK_M, BLOCK_N]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        # a part holds a key at its front, but it may be one that nobody sees
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, value, exponent_scale, HAS_VALID, PRECISION)

    out, lse2 = softmax_end(acc, row_max, row_sum, exponent_scale)
    if HAS_COUNTED:
        counted = counted_ptr + batch * counted_stride_b + rows.to(tl.int64) * counted_stride_t
        there = tl.load(counted, mask=row_mask, other=0) != 0
        out = tl.where(there[:, None], out, 0.0)
        lse2 = tl.where(there, lse2, float("-inf"))
    place = part * num_problems + problem  # of a head in [parts, B, H]
    out_tile = ((place - head) * T + head) * D + tile_offsets(rows, H * D, dims, 1)
    tl.store(out_ptr + out_tile, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask[None, :])
    tl.store(lse2_ptr + place * T + rows, lse2, mask=row_mask)


@triton.jit(do_not_specialize=["T", "num_problems", "num_tiles", "num_parts"])
def softmax_merge_kernel(
    partial_ptr, partial_lse2_ptr,  # in,  [parts, B, T, H, D] and [parts, B, H, T], contiguous
    out_ptr, lse2_ptr,              # out, [B, T, H, D] and [B, H, T], contiguous
    T, num_problems, num_tiles, num_parts,
    H: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one head, averaged over the parts with the weights of their sums."""
    program = tl.program_id(0)
    problem = (program // num_tiles).to(tl.int64)
    head = problem % H
    dims = tl.arange(0, BLOCK_D)
    rows = program % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < T
    mask = row_mask[:, None] & (dims < D)[None, :]
    largest = tl.full([BLOCK_M], float("-inf"), ACC)
    for part in range(0, num_parts):
        lse2 = tl.load(partial_lse2_ptr + (part * num_problems + problem) * T + rows, mask=row_mask, other=0.0)
        largest = tl.maximum(largest, lse2)
    # subtracting -inf from itself would be nan
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    for part in range(0, num_parts):
        place = part * num_problems + problem
        weight = tl.exp2(tl.load(partial_lse2_ptr + place * T + rows, mask=row_mask, other=0.0) - shift)
        partial = partial_ptr + ((place - head) * T + head) * D + tile_offsets(rows, H * D, dims, 1)
        acc += tl.load(partial, mask=mask, other=0.0) * weight[:, None]
        total += weight
    some = total > 0
    safe_total = tl.where(some, total, 1.0)
    out = acc * (1.0 / safe_total)[:, None]
    out_tile = ((problem - head) * T + head) * D + tile_offsets(rows, H * D, dims, 1)
    tl.store(out_ptr + out_tile, out.to(out_ptr.dtype.element_ty), mask=mask)
    lse2 = tl.where(some, shift + tl.log2(safe_total), float("-inf"))
    tl.store(lse2_ptr + problem * T + rows, lse2, mask=row_mask)


def softmax_fwd(inputs: Pass, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, T, H, D] in `dtype`, lse2 [B, H, T]) of one pass."""
    batch, num_rows, num_heads, head_dim = inputs.query.shape
    tiles = inputs.tiles("forward")
    cut = inputs.cut(num_rows, tiles["BLOCK_M"], inputs.key.shape[1], tiles["BLOCK_N"])
    num_parts = cut["num_parts"]
    out = inputs.empty(batch, num_rows, num_heads, head_dim, dtype=dtype)
    lse2 = inputs.empty(batch, num_heads, num_rows)
    partial, partial_lse2 = out, lse2
    if num_parts > 1:
        partial, partial_lse2 = inputs.empty(num_parts, *out.shape), inputs.empty(num_parts, *lse2.shape)
    valid, *valid_strides = valid_arguments(inputs.valid)
    counted, *counted_strides = valid_arguments(inputs.counted)
    types = inputs.types()
    with on_device(inputs.query):
        softmax_fwd_kernel[inputs.grid(cut)](
            inputs.query, inputs.key, inputs.value, valid, counted, partial, partial_lse2,
            *inputs.strides, *valid_strides, *counted_strides,
            HAS_VALID=inputs.valid is not None, HAS_COUNTED=inputs.counted is not None,
            **inputs.sizes(), **cut, **types, **tiles,
        )  # fmt: skip
        if num_parts > 1:
            num_tiles = triton.cdiv(num_rows, MERGED_ROWS)
            softmax_merge_kernel[(num_tiles * inputs.num_problems,)](
                partial, partial_lse2, out, lse2,
                T=num_rows, num_problems=inputs.num_problems, num_tiles=num_tiles, num_parts=num_parts,
                H=num_heads, D=head_dim, ACC=types["ACC"], BLOCK_M=MERGED_ROWS, BLOCK_D=tiles["BLOCK_D"],
            )  # fmt: skip
    return out, lse2
