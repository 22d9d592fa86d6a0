"""Softmax attention of some rows over some keys, backward: gradients of the rows, with the keys cut into parts.

Where the rows are landmarks the parts' sums are added up in order. Where they are tokens, each also gets its share of
what came in through its landmark.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import on_device, valid_arguments
from kernels.nystrom_attention.key_grad import load_spread
from kernels.nystrom_attention.launch import Pass, Spread, spread_arguments
from kernels.tiles import load_lse2, load_tile, query_grad_step, tile_offsets


@triton.jit(
    do_not_specialize=[
        "valid_stride_b", "valid_stride_t", "index_stride_b",
        "T", "S", "num_problems", "chunk", "num_tiles", "num_parts", "num_landmarks",
    ],
)  # fmt: skip
def softmax_query_grad_kernel(
    out_grad_ptr,                   # in,  [B, T, H, D], any strides
    query_ptr, key_ptr, value_ptr,  # in,  [B, T, H, D], [B, S, H, D] twice, any strides
    valid_ptr,                      # in,  [B, S] uint8, or None
    lse2_ptr, delta_ptr,            # in,  [B, H, T], contiguous
    index_ptr, spread_ptr,          # in,  [B or 1, T] int32 and [B, N, H, D], contiguous, or None
    query_grad_ptr,                 # out, [parts, B, T, H, D], contiguous
    out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t, index_stride_b,
    T, S, num_problems, chunk, num_tiles, num_parts, num_landmarks, scale, exponent_scale,
    H: tl.constexpr, D: tl.constexpr, HAS_VALID: tl.constexpr, SPREAD: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: what `chunk` keys give the gradient of BLOCK_M rows of one head."""
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
    out_grad_tile = out_grad_ptr + batch * out_grad_stride_b + head * out_grad_stride_h
    out_grad_tile += tile_offsets(rows, out_grad_stride_t, dims, out_grad_stride_d)
    query = load_tile(query_tile, row_mask, dim_mask, True, MASK_DIMS).to(COMPUTE)  # [BLOCK_M, BLOCK_D]
    out_grad = load_tile(out_grad_tile, row_mask, dim_mask, True, MASK_DIMS).to(COMPUTE)
    lse2 = load_lse2(lse2_ptr + problem * T + rows, row_mask)
    delta = tl.load(delta_ptr + problem * T + rows, mask=row_mask, other=0.0)
    key_base = key_ptr + batch * key_stride_b + head * key_stride_h
    value_base = value_ptr + batch * value_stride_b + head * value_stride_h

    query_grad = tl.zeros([BLOCK_M, BLOCK_D], ACC)
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
        query_grad = query_grad_step(
            query_grad, query, key, value, out_grad, lse2, delta, seen[None, :], exponent_scale, True, PRECISION
        )
    query_grad *= scale
    if SPREAD:  # noqa: SIM102 - decided when the kernel is compiled, the other when it runs
        if part == 0:  # once, whatever the number of parts
            query_grad += load_spread(
                spread_ptr, index_ptr, index_stride_b, batch, head, rows, row_mask, dims, dim_mask, num_landmarks, H, D
            )
    place = part * num_problems + problem
    grad_tile = ((place - head) * T + head) * D + tile_offsets(rows, H * D, dims, 1)
    mask = row_mask[:, None] & dim_mask[None, :]
    tl.store(query_grad_ptr + grad_tile, query_grad.to(query_grad_ptr.dtype.element_ty), mask=mask)


def softmax_query_grad(
    inputs: Pass, out_grad: torch.Tensor, lse2: torch.Tensor, delta: torch.Tensor, spread: Spread | None = None
) -> torch.Tensor:
    """query_grad [B, T, H, D] in the dtype of query; lse2 and delta [B, H, T].

    The spread gives tokens that are rows the gradients of their landmarks.
    """
    query = inputs.query
    tiles = inputs.tiles("query_grad")
    cut = inputs.cut(query.shape[1], tiles["BLOCK_M"], inputs.key.shape[1], tiles["BLOCK_N"])
    num_parts = cut["num_parts"]
    parts = inputs.empty(num_parts, *query.shape, dtype=query.dtype if num_parts == 1 else None)
    valid, *valid_strides = valid_arguments(inputs.valid)
    index, query_spread, _, index_stride, num_landmarks = spread_arguments(spread)
    with on_device(inputs.query):
        softmax_query_grad_kernel[inputs.grid(cut)](
            out_grad, query, inputs.key, inputs.value, valid, lse2, delta, index, query_spread, parts,
            *out_grad.stride(), *inputs.strides, *valid_strides, index_stride, num_landmarks=num_landmarks,
            scale=inputs.scale, HAS_VALID=inputs.valid is not None, SPREAD=spread is not None,
            **inputs.sizes(), **cut, **inputs.types(), **tiles,
        )  # fmt: skip
    return parts[0] if num_parts == 1 else parts.sum(0).to(query.dtype)
