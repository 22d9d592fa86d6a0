"""Window attention with global keys, forward: one program computes BLOCK_M queries of one head (FlashAttention's form).

Queries of a residue class of the dilation go together, so that every tile of keys is dense; the tiles of a window that
no edge crosses are computed without a mask.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, on_device, valid_arguments
from kernels.tiles import load_tile, matmul, softmax_end, softmax_step, tile_offsets
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
    acc, row_max, row_sum, query, row_steps, start,
    key_tile, value_tile, key_step, value_step, valid_base, valid_step,
    num_keys, left, right, dim_mask, exponent_scale,
    MASKED: tl.constexpr, HAS_VALID: tl.constexpr, MASK_DIMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold the keys of one tile, from key `start` of the class on, into the running sums of all rows."""
    keys = start + tl.arange(0, BLOCK_N)
    there = keys < num_keys
    start = start.to(tl.int64)
    key = load_tile(key_tile + start * key_step, there, dim_mask, MASKED, MASK_DIMS)  # [BLOCK_N, BLOCK_D]
    value = load_tile(value_tile + start * value_step, there, dim_mask, MASKED, MASK_DIMS)
    scores = matmul(query, tl.trans(key), acc.dtype, PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        seen = in_window(row_steps[:, None], keys[None, :], left, right) & there[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    if HAS_VALID:
        valid = tl.load(valid_base + keys.to(tl.int64) * valid_step, mask=there, other=0)
        scores = tl.where((valid != 0)[None, :], scores, float("-inf"))
    return softmax_step(acc, row_max, row_sum, scores, value, exponent_scale, MASKED or HAS_VALID, PRECISION)


@triton.jit(
    do_not_specialize=["T", "S", "query_start", "num_row_tiles", "valid_stride_b", "valid_stride_t"],
)
def window_attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr,  # in,  [B, T, H, D], [B, S, Hkv, D] twice, any strides
    valid_ptr,                      # in,  [B, S] uint8, or None
    global_ptr, count_ptr,          # in,  [B, G] positions, [B] how many of them there are, or None
    window_ptr, dilation_ptr,       # in,  [H]
    out_ptr, lse2_ptr,              # out, [B, T, H, D] and [B, H, T], contiguous
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    T, S, query_start, num_row_tiles, exponent_scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one residue class of one head, over their windows and the global keys."""
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
    key_base = key_ptr + batch * key_stride_b + key_head * key_stride_h
    value_base = value_ptr + batch * value_stride_b + key_head * value_stride_h
    query_tile = query_base + tile_offsets(tokens, query_stride_t, dims, query_stride_d)
    query = load_tile(query_tile, row_mask, dim_mask, True, MASK_DIMS)  # [BLOCK_M, BLOCK_D]

    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)
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
            acc, row_max, row_sum = _fold_keys(
                acc, row_max, row_sum, query, row_steps, first + index * BLOCK_N,
                key_tile, value_tile, key_step, value_step, valid_base, valid_step,
                num_keys, left, right, dim_mask, exponent_scale,
                False, HAS_VALID, MASK_DIMS, PRECISION, BLOCK_N,
            )  # fmt: skip
    else:
        end = begin
    for index in range(0, num_key_tiles - (end - begin)):
        acc, row_max, row_sum = _fold_keys(
            acc, row_max, row_sum, query, row_steps, first + edge_tile(index, begin, end) * BLOCK_N,
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
            scores = tl.where(seen, matmul(query, tl.trans(key), ACC, PRECISION), float("-inf"))
            acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, value, exponent_scale, True, PRECISION)

    out, lse2 = softmax_end(acc, row_max, row_sum, exponent_scale)
    if HAS_VALID:
        # a row past the last key is real, as the newest ones behind a cache are
        places = query_start + tokens
        valid_rows = valid_ptr + batch * valid_stride_b + places.to(tl.int64) * valid_stride_t
        real_rows = tl.load(valid_rows, mask=row_mask & (places < S), other=1) != 0
        out = tl.where(real_rows[:, None], out, 0.0)
        lse2 = tl.where(real_rows, lse2, float("-inf"))
    heads_row = batch * H + head
    out_base = out_ptr + (batch * T * H + head) * D
    out_mask = row_mask[:, None] & dim_mask[None, :]
    tl.store(out_base + tile_offsets(tokens, H * D, dims, 1), out.to(out_ptr.dtype.element_ty), mask=out_mask)
    tl.store(lse2_ptr + heads_row * T + tokens, lse2, mask=row_mask)


def window_attention_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor | None,
    global_keys: GlobalKeys | None,
    pattern: WindowPattern,
    scale: float,
    query_start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, T, H, D], lse2 [B, H, T]) of query [B, T, H, D], key and value [B, S, Hkv, D], valid [B, S] or None."""
    launch = Launch(query, key, scale)
    batch, seq_len, num_heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse2 = torch.empty(batch, num_heads, seq_len, dtype=launch.accumulator, device=query.device)
    tiles = launch.tiles("window_forward", num_seen(pattern))
    longest = max(query_start + seq_len, key.shape[1])
    num_row_tiles = grid_tiles(pattern.dilation, seq_len, longest, tiles["BLOCK_M"])
    mask, *mask_strides = valid_arguments(valid)
    positions, counts, num_global = global_arguments(global_keys)
    with on_device(query):
        window_attention_fwd_kernel[(num_row_tiles * batch * num_heads,)](
            query, key, value, mask, positions, counts, *head_tables(pattern, query.device),
            out, lse2,
            *query.stride(), *key.stride(), *value.stride(), *mask_strides,
            T=seq_len, S=key.shape[1], query_start=query_start, num_row_tiles=num_row_tiles,
            H=num_heads, GROUP=launch.group, G=num_global,
            CAUSAL=pattern.causal, HAS_VALID=valid is not None,
            BLOCK_G=min(tiles["BLOCK_N"], global_block(num_global)),
            **launch.types(), **tiles,
        )  # fmt: skip
    return out, lse2
