"""Softmax attention of some rows over some keys, backward: gradients of keys and values, with the rows cut into parts.

Where the keys are landmarks every token is a row of theirs, and the parts' sums are added up in order. Where they are
tokens, each also gets its share of what came in through its landmark.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import on_device, valid_arguments
from kernels.nystrom_attention.launch import Pass, Spread, spread_arguments
from kernels.tiles import key_grad_step, load_lse2, load_tile, tile_offsets


@triton.jit
def load_spread(
    grad_ptr, index_ptr, index_stride_b, batch, head, tokens, token_mask, dims, dim_mask, num_landmarks,
    H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What tokens [M] get through their landmarks, [M, D], of grad [B, N, H, D]; zero for a token that is in none."""
    landmarks = tl.load(index_ptr + batch * index_stride_b + tokens, mask=token_mask, other=-1)
    tile = grad_ptr + (batch * num_landmarks * H + head) * D + tile_offsets(landmarks, H * D, dims, 1)
    return load_tile(tile, landmarks >= 0, dim_mask, True, True)


@triton.jit(
    do_not_specialize=[
        "valid_stride_b", "valid_stride_t", "counted_stride_b", "counted_stride_t", "index_stride_b",
        "T", "S", "num_problems", "chunk", "num_tiles", "num_parts", "num_landmarks",
    ],
)  # fmt: skip
def softmax_key_grad_kernel(
    out_grad_ptr, out_ptr,          # in,  [B, T, H, D], any strides, and contiguous or None
    query_ptr, key_ptr, value_ptr,  # in,  [B, T, H, D], [B, S, H, D] twice, any strides
    valid_ptr,                      # in,  [B, S] uint8, or None
    lse2_ptr, delta_ptr,            # in,  [B, H, T], contiguous; delta is an output where `out` is given
    index_ptr, key_spread_ptr, value_spread_ptr,  # in, [B or 1, S] int32, [B, N, H, D] twice, contiguous, or None
    key_grad_ptr, value_grad_ptr,   # out, [parts, B, S, H, D], contiguous
    out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t, index_stride_b,
    T, S, num_problems, chunk, num_tiles, num_parts, num_landmarks, scale, exponent_scale,
    H: tl.constexpr, D: tl.constexpr, HAS_VALID: tl.constexpr, HAS_OUT: tl.constexpr,
    SPREAD_KEY: tl.constexpr, SPREAD_VALUE: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: what `chunk` rows give the gradients of BLOCK_N keys of one head."""
    program = tl.program_id(0)
    tile = program % num_tiles
    part = (program // num_tiles % num_parts).to(tl.int64)
    problem = (program // num_tiles // num_parts).to(tl.int64)
    batch, head = problem // H, problem % H
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = keys < S
    seen = there
    if HAS_VALID:
        valid = valid_ptr + batch * valid_stride_b + keys.to(tl.int64) * valid_stride_t
        seen = tl.load(valid, mask=there, other=0) != 0
    key_tile = key_ptr + batch * key_stride_b + head * key_stride_h
    key_tile += tile_offsets(keys, key_stride_t, dims, key_stride_d)
    value_tile = value_ptr + batch * value_stride_b + head * value_stride_h
    value_tile += tile_offsets(keys, value_stride_t, dims, value_stride_d)
    key = load_tile(key_tile, seen, dim_mask, True, MASK_DIMS).to(COMPUTE)  # [BLOCK_N, BLOCK_D]
    value = load_tile(value_tile, seen, dim_mask, True, MASK_DIMS).to(COMPUTE)
    query_base = query_ptr + batch * query_stride_b + head * query_stride_h
    out_grad_base = out_grad_ptr + batch * out_grad_stride_b + head * out_grad_stride_h
    out_base = (batch * T * H + head) * D

    key_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    value_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    first = part.to(tl.int32) * chunk
    last = tl.minimum(first + chunk, T)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_mask = rows < last
        query_tile = query_base + tile_offsets(rows, query_stride_t, dims, query_stride_d)
        out_grad_tile = out_grad_base + tile_offsets(rows, out_grad_stride_t, dims, out_grad_stride_d)
        query = load_tile(query_tile, row_mask, dim_mask, True, MASK_DIMS).to(COMPUTE)  # [BLOCK_M, BLOCK_D]
        out_grad = load_tile(out_grad_tile, row_mask, dim_mask, True, MASK_DIMS).to(COMPUTE)
        statistics = problem * T + rows
        lse2 = load_lse2(lse2_ptr + statistics, row_mask)
        if HAS_OUT:
            out_tile = out_ptr + out_base + tile_offsets(rows, H * D, dims, 1)
            out = load_tile(out_tile, row_mask, dim_mask, True, MASK_DIMS)
            delta = tl.sum(out.to(ACC) * out_grad.to(ACC), 1)
            if tile == 0:
                tl.store(delta_ptr + statistics, delta, mask=row_mask)
        else:
            delta = tl.load(delta_ptr + statistics, mask=row_mask, other=0.0)
        key_grad, value_grad = key_grad_step(
            key_grad, value_grad, query, key, value, out_grad, lse2, delta,
            None, exponent_scale, False, PRECISION,
        )  # fmt: skip

    # a key's gradients hold its own probabilities alone: those of a key that nobody sees are cleared at the end
    key_grad = tl.where(seen[:, None], key_grad * scale, 0.0)
    value_grad = tl.where(seen[:, None], value_grad, 0.0)
    if part == 0:  # once, whatever the number of parts
        if SPREAD_KEY:
            key_grad += load_spread(
                key_spread_ptr, index_ptr, index_stride_b, batch, head, keys, there, dims, dim_mask,
                num_landmarks, H, D,
            )  # fmt: skip
        if SPREAD_VALUE:
            value_grad += load_spread(
                value_spread_ptr, index_ptr, index_stride_b, batch, head, keys, there, dims, dim_mask,
                num_landmarks, H, D,
            )  # fmt: skip
    place = part * num_problems + problem
    grad_tile = ((place - head) * S + head) * D + tile_offsets(keys, H * D, dims, 1)
    mask = there[:, None] & dim_mask[None, :]
    tl.store(key_grad_ptr + grad_tile, key_grad.to(key_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(value_grad_ptr + grad_tile, value_grad.to(value_grad_ptr.dtype.element_ty), mask=mask)


def softmax_key_grad(
    inputs: Pass,
    out_grad: torch.Tensor,
    lse2: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    spread: Spread | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(key_grad, value_grad [B, S, H, D] in the dtypes of key and value, delta [B, H, T]).

    out_grad [B, T, H, D], lse2 [B, H, T]; delta = rowsum(out * out_grad) is given, or computed here of `out`. The
    spread gives tokens that are keys the gradients of keys and values of their landmarks.
    """
    num_keys = inputs.key.shape[1]
    tiles = inputs.tiles("key_grad")
    cut = inputs.cut(num_keys, tiles["BLOCK_N"], inputs.query.shape[1], tiles["BLOCK_M"])
    dtypes = [inputs.key.dtype, inputs.value.dtype]
    if cut["num_parts"] > 1:
        parts = [inputs.empty(cut["num_parts"], *inputs.key.shape) for _ in dtypes]
    else:
        parts = [inputs.empty(1, *inputs.key.shape, dtype=dtype) for dtype in dtypes]
    if delta is None:
        delta = inputs.empty(*lse2.shape)
    valid, *valid_strides = valid_arguments(inputs.valid)
    index, key_spread, value_spread, index_stride, num_landmarks = spread_arguments(spread)
    with on_device(inputs.query):
        softmax_key_grad_kernel[inputs.grid(cut)](
            out_grad, out, inputs.query, inputs.key, inputs.value, valid, lse2, delta,
            index, key_spread, value_spread, *parts,
            *out_grad.stride(), *inputs.strides, *valid_strides, index_stride, num_landmarks=num_landmarks,
            scale=inputs.scale, HAS_VALID=inputs.valid is not None, HAS_OUT=out is not None,
            SPREAD_KEY=key_spread is not None, SPREAD_VALUE=value_spread is not None,
            **inputs.sizes(), **cut, **inputs.types(), **tiles,
        )  # fmt: skip
    if cut["num_parts"] > 1:
        key_grad, value_grad = (grad.sum(0).to(dtype) for grad, dtype in zip(parts, dtypes, strict=True))
    else:
        key_grad, value_grad = (grad[0] for grad in parts)
    return key_grad, value_grad, delta
