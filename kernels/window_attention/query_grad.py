"""Window attention with global keys, backward: the gradient of queries, by tiles of queries.

The probabilities are computed again from lse2; a second kernel, `key_grad`, does the same by tiles of keys.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, on_device, valid_arguments
from kernels.tiles import load_lse2, load_tile, query_grad_step, tile_offsets
from kernels.window_attention.launch import GlobalKeys, global_arguments, global_block, head_tables, num_seen
from kernels.window_attention.pattern import WindowPattern
from kernels.window_attention.ranges import (
    edge_tile,
    global_seen,
    global_tile,
    grid_tiles,
    head_pattern,
    in_window,
    key_tiles,
    rows_of_program,
)


@triton.jit
def _fold_keys(
    query_grad, query, out_grad, lse2, delta, row_steps, start,
    key_tile, value_tile, key_step, value_step, valid_base, valid_step,
    num_keys, left, right, dim_mask, exponent_scale,
    MASKED: tl.constexpr, HAS_VALID: tl.constexpr, MASK_DIMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """query_grad plus the share of one tile of keys, from key `start` of the class on."""
    keys = start + tl.arange(0, BLOCK_N)
    there = keys < num_keys
    start = start.to(tl.int64)
    key = load_tile(key_tile + start * key_step, there, dim_mask, MASKED, MASK_DIMS)  # [BLOCK_N, BLOCK_D]
    value = load_tile(value_tile + start * value_step, there, dim_mask, MASKED, MASK_DIMS)
    seen = there[None, :]
    if MASKED:
        seen = in_window(row_steps[:, None], keys[None, :], left, right) & seen
    if HAS_VALID:
        valid = tl.load(valid_base + keys.to(tl.int64) * valid_step, mask=there, other=0)
        seen = (valid != 0)[None, :] & seen
    return query_grad_step(
        query_grad, query, key, value, out_grad, lse2, delta, seen, exponent_scale, MASKED or HAS_VALID, PRECISION
    )


@triton.jit(
    do_not_specialize=["T", "S", "query_start", "num_row_tiles", "valid_stride_b", "valid_stride_t"],
)
def window_attention_query_grad_kernel(
    out_grad_ptr, query_ptr, key_ptr, value_ptr,  # in,  [B, T, H, D] twice, [B, S, Hkv, D] twice, any strides
    out_ptr, lse2_ptr,                            # in,  [B, T, H, D] and [B, H, T], contiguous
    valid_ptr, global_ptr, count_ptr,             # in,  [B, S] uint8, [B, G], [B], or None
    window_ptr, dilation_ptr,                     # in,  [H]
    query_grad_ptr, delta_ptr,                    # out, [B, T, H, D] and [B, H, T], contiguous
    out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    T, S, query_start, num_row_tiles, scale, exponent_scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_M queries of one residue class of one head, and delta = rowsum(out dout)."""
    program = tl.program_id(0)
    head = program // num_row_tiles % H
    batch = (program // num_row_tiles // H).to(tl.int64)
    left, right, dilation = head_pattern(window_ptr, dilation_ptr, head, T, S, query_start, CAUSAL)
    residue, first_row, num_rows, shift, first_key, num_keys = rows_of_program(
        program % num_row_tiles, dilation, T, S, query_start, BLOCK_M
    )
    if residue >= dilation or first_row >= num_rows:
        return
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    row_steps = shift + rows
    tokens = residue + rows * dilation
    key_head = (head // GROUP).to(tl.int64)
    query_base = query_ptr + batch * query_stride_b + head.to(tl.int64) * query_stride_h
    out_grad_base = out_grad_ptr + batch * out_grad_stride_b + head.to(tl.int64) * out_grad_stride_h
    key_base = key_ptr + batch * key_stride_b + key_head * key_stride_h
    value_base = value_ptr + batch * value_stride_b + key_head * value_stride_h
    query_tile = query_base + tile_offsets(tokens, query_stride_t, dims, query_stride_d)
    out_grad_tile = out_grad_base + tile_offsets(tokens, out_grad_stride_t, dims, out_grad_stride_d)
    out_tile = (batch * T * H + head) * D + tile_offsets(tokens, H * D, dims, 1)
    query = load_tile(query_tile, row_mask, dim_mask, True, MASK_DIMS)  # [BLOCK_M, BLOCK_D]
    out_grad = load_tile(out_grad_tile, row_mask, dim_mask, True, MASK_DIMS)
    out = load_tile(out_ptr + out_tile, row_mask, dim_mask, True, MASK_DIMS)
    delta = tl.sum(out.to(ACC) * out_grad.to(ACC), 1)
    statistics = (batch * H + head) * T + tokens
    tl.store(delta_ptr + statistics, delta, mask=row_mask)
    lse2 = load_lse2(lse2_ptr + statistics, row_mask)

    query_grad = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    key_step = dilation.to(tl.int64) * key_stride_t
    value_step = dilation.to(tl.int64) * value_stride_t
    cols = tl.arange(0, BLOCK_N)
    key_tile = key_base + first_key.to(tl.int64) * key_stride_t + tile_offsets(cols, key_step, dims, key_stride_d)
    value_tile = value_base + first_key.to(tl.int64) * value_stride_t
    value_tile += tile_offsets(cols, value_step, dims, value_stride_d)
    valid_step = valid_stride_t.to(tl.int64) * dilation if HAS_VALID else 0
    valid_base = valid_ptr + batch * valid_stride_b + first_key.to(tl.int64) * valid_stride_t if HAS_VALID else None

    last_step = shift + tl.minimum(first_row + BLOCK_M, num_rows) - 1
    first, num_key_tiles, begin, end = key_tiles(shift + first_row, last_step, left, right, num_keys, BLOCK_N)
    if SPLIT:
        for index in range(begin, end):
            query_grad = _fold_keys(
                query_grad, query, out_grad, lse2, delta, row_steps, first + index * BLOCK_N,
                key_tile, value_tile, key_step, value_step, valid_base, valid_step,
                num_keys, left, right, dim_mask, exponent_scale,
                False, HAS_VALID, MASK_DIMS, PRECISION, BLOCK_N,
            )  # fmt: skip
    else:
        end = begin
    for index in range(0, num_key_tiles - (end - begin)):
        query_grad = _fold_keys(
            query_grad, query, out_grad, lse2, delta, row_steps, first + edge_tile(index, begin, end) * BLOCK_N,
            key_tile, value_tile, key_step, value_step, valid_base, valid_step,
            num_keys, left, right, dim_mask, exponent_scale,
            True, HAS_VALID, MASK_DIMS, PRECISION, BLOCK_N,
        )  # fmt: skip
    if G > 0:
        count = tl.load(count_ptr + batch)
        for start in range(0, count, BLOCK_G):
            key, value, columns, real = global_tile(
                start, count, global_ptr + batch * G, key_base, key_stride_t, key_stride_d,
                value_base, value_stride_t, value_stride_d, dims, dim_mask, MASK_DIMS, BLOCK_G,
            )  # fmt: skip
            seen = global_seen(
                (query_start + tokens)[:, None], row_steps[:, None], columns[None, :], real[None, :],
                left, right, first_key, dilation, CAUSAL,
            )  # fmt: skip
            query_grad = query_grad_step(
                query_grad, query, key, value, out_grad, lse2, delta, seen, exponent_scale, True, PRECISION
            )
    query_grad = (query_grad * scale).to(query_grad_ptr.dtype.element_ty)
    tl.store(query_grad_ptr + out_tile, query_grad, mask=row_mask[:, None] & dim_mask[None, :])


def window_attention_query_grad(
    out_grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse2: torch.Tensor,
    valid: torch.Tensor | None,
    global_keys: GlobalKeys | None,
    pattern: WindowPattern,
    scale: float,
    query_start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query_grad [B, T, H, D], delta [B, H, T]); out and lse2 as the forward pass gave them."""
    launch = Launch(query, key, scale)
    batch, seq_len, num_heads, head_dim = query.shape
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    delta = torch.empty(lse2.shape, dtype=lse2.dtype, device=query.device)
    tiles = launch.tiles("window_query_grad", num_seen(pattern))
    longest = max(query_start + seq_len, key.shape[1])
    num_row_tiles = grid_tiles(pattern.dilation, seq_len, longest, tiles["BLOCK_M"])
    mask, *mask_strides = valid_arguments(valid)
    positions, counts, num_global = global_arguments(global_keys)
    with on_device(query):
        window_attention_query_grad_kernel[(num_row_tiles * batch * num_heads,)](
            out_grad, query, key, value, out, lse2, mask, positions, counts, *head_tables(pattern, query.device),
            query_grad, delta,
            *out_grad.stride(), *query.stride(), *key.stride(), *value.stride(), *mask_strides,
            T=seq_len, S=key.shape[1], query_start=query_start, num_row_tiles=num_row_tiles, scale=scale,
            H=num_heads, GROUP=launch.group, G=num_global,
            CAUSAL=pattern.causal, HAS_VALID=valid is not None,
            BLOCK_G=min(tiles["BLOCK_N"], global_block(num_global)),
            **launch.types(), **tiles,
        )  # fmt: skip
    return query_grad, delta
