"""Window attention, backward: gradients of keys and values, by tiles of keys.

Each program sums over the rows that see its keys in their windows; nothing is added up atomically, so that two runs
give the same bits. What rows make of global keys comes from `global_columns`, which overwrites it here.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, on_device, valid_arguments
from kernels.tiles import key_grad_step, load_lse2, load_tile, tile_offsets
from kernels.window_attention.launch import head_tables, num_seen
from kernels.window_attention.pattern import WindowPattern
from kernels.window_attention.ranges import (
    class_length,
    edge_tile,
    grid_tiles,
    head_pattern,
    in_window,
    row_tiles,
    tile_of_class,
)


@triton.jit
def _fold_rows(
    key_grad, value_grad, key, value, keys, start,
    query_tile, out_grad_tile, query_step, out_grad_step, lse2_base, delta_base, dilation,
    shift, num_rows, left, right, dim_mask, exponent_scale,
    MASKED: tl.constexpr, MASK_DIMS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """key_grad and value_grad plus the share of one tile of queries, from row `start` of the class on."""
    rows = start + tl.arange(0, BLOCK_M)
    there = rows < num_rows
    start = start.to(tl.int64)
    query = load_tile(query_tile + start * query_step, there, dim_mask, MASKED, MASK_DIMS)  # [BLOCK_M, BLOCK_D]
    out_grad = load_tile(out_grad_tile + start * out_grad_step, there, dim_mask, MASKED, MASK_DIMS)
    lse2 = load_lse2(lse2_base + rows * dilation, there)
    delta = tl.load(delta_base + rows * dilation, mask=there, other=0.0)
    seen = in_window((shift + rows)[None, :], keys[:, None], left, right)
    return key_grad_step(
        key_grad, value_grad, query, key, value, out_grad, lse2, delta, seen, exponent_scale, MASKED, PRECISION
    )


@triton.jit(
    do_not_specialize=["T", "S", "query_start", "num_key_tiles", "valid_stride_b", "valid_stride_t"],
)
def window_attention_key_grad_kernel(
    out_grad_ptr, query_ptr, key_ptr, value_ptr,  # in,  [B, T, H, D] twice, [B, S, Hkv, D] twice, any strides
    lse2_ptr, delta_ptr,                          # in,  [B, H, T], contiguous
    valid_ptr,                                    # in,  [B, S] uint8, or None
    window_ptr, dilation_ptr,                     # in,  [H]
    key_grad_ptr, value_grad_ptr,                 # out, [B, S, P, D], contiguous
    out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    T, S, query_start, num_key_tiles, scale, exponent_scale,
    H: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_N keys of one residue class, summed over H / P query heads of one dilation.

    P is the number of key heads, or that of query heads where those of a group differ in dilation.
    """
    program = tl.program_id(0)
    part = program // num_key_tiles % P
    batch = (program // num_key_tiles // P).to(tl.int64)
    HEADS: tl.constexpr = H // P
    _, _, dilation = head_pattern(window_ptr, dilation_ptr, part * HEADS, T, S, query_start, CAUSAL)
    first_key, first = tile_of_class(program % num_key_tiles, S, dilation, BLOCK_N)
    num_keys = class_length(S, first_key, dilation)
    if first_key >= dilation or first >= num_keys:
        return
    residue = (first_key - query_start % dilation + dilation) % dilation
    shift = (query_start + residue) // dilation
    num_rows = class_length(T, residue, dilation)

    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    keys = first + tl.arange(0, BLOCK_N)
    key_mask = keys < num_keys
    places = first_key + keys * dilation
    key_head = (part * HEADS // GROUP).to(tl.int64)
    key_tile = key_ptr + batch * key_stride_b + key_head * key_stride_h
    key_tile += tile_offsets(places, key_stride_t, dims, key_stride_d)
    value_tile = value_ptr + batch * value_stride_b + key_head * value_stride_h
    value_tile += tile_offsets(places, value_stride_t, dims, value_stride_d)
    real = key_mask
    if HAS_VALID:
        valid_place = valid_ptr + batch * valid_stride_b + places.to(tl.int64) * valid_stride_t
        real = tl.load(valid_place, mask=key_mask, other=0) != 0
    key = load_tile(key_tile, real, dim_mask, True, MASK_DIMS)  # [BLOCK_N, BLOCK_D]
    value = load_tile(value_tile, real, dim_mask, True, MASK_DIMS)

    key_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    value_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    query_step = dilation.to(tl.int64) * query_stride_t
    out_grad_step = dilation.to(tl.int64) * out_grad_stride_t
    row_offsets = tl.arange(0, BLOCK_M)
    last_key = tl.minimum(first + BLOCK_N, num_keys) - 1
    query_tile = query_ptr + batch * query_stride_b + (part * HEADS).to(tl.int64) * query_stride_h
    query_tile += residue.to(tl.int64) * query_stride_t
    query_tile += tile_offsets(row_offsets, query_step, dims, query_stride_d)
    out_grad_tile = out_grad_ptr + batch * out_grad_stride_b + (part * HEADS).to(tl.int64) * out_grad_stride_h
    out_grad_tile += residue.to(tl.int64) * out_grad_stride_t
    out_grad_tile += tile_offsets(row_offsets, out_grad_step, dims, out_grad_stride_d)
    for index_in_part in range(0, HEADS):
        head = part * HEADS + index_in_part
        left, right, _ = head_pattern(window_ptr, dilation_ptr, head, T, S, query_start, CAUSAL)
        statistics = (batch * H + head) * T + residue
        first_row, num_row_tiles, begin, end = row_tiles(first, last_key, shift, left, right, num_rows, BLOCK_M)
        if SPLIT:
            for index in range(begin, end):
                key_grad, value_grad = _fold_rows(
                    key_grad, value_grad, key, value, keys, first_row + index * BLOCK_M,
                    query_tile, out_grad_tile, query_step, out_grad_step,
                    lse2_ptr + statistics, delta_ptr + statistics, dilation,
                    shift, num_rows, left, right, dim_mask, exponent_scale,
                    False, MASK_DIMS, PRECISION, BLOCK_M,
                )  # fmt: skip
        else:
            end = begin
        for index in range(0, num_row_tiles - (end - begin)):
            key_grad, value_grad = _fold_rows(
                key_grad, value_grad, key, value, keys, first_row + edge_tile(index, begin, end) * BLOCK_M,
                query_tile, out_grad_tile, query_step, out_grad_step,
                lse2_ptr + statistics, delta_ptr + statistics, dilation,
                shift, num_rows, left, right, dim_mask, exponent_scale,
                True, MASK_DIMS, PRECISION, BLOCK_M,
            )  # fmt: skip
        query_tile += query_stride_h
        out_grad_tile += out_grad_stride_h

    if HAS_VALID:
        # a key's gradients hold its own probabilities alone: those of a key that nobody sees are cleared at the end
        key_grad = tl.where(real[:, None], key_grad, 0.0)
        value_grad = tl.where(real[:, None], value_grad, 0.0)
    grad_tile = (batch * S * P + part) * D + tile_offsets(places, P * D, dims, 1)
    grad_mask = key_mask[:, None] & dim_mask[None, :]
    tl.store(key_grad_ptr + grad_tile, (key_grad * scale).to(key_grad_ptr.dtype.element_ty), mask=grad_mask)
    tl.store(value_grad_ptr + grad_tile, value_grad.to(value_grad_ptr.dtype.element_ty), mask=grad_mask)


def window_attention_key_grad(
    out_grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    valid: torch.Tensor | None,
    pattern: WindowPattern,
    scale: float,
    query_start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(key_grad, value_grad) [B, S, Hkv, D] of what rows see in their windows; delta as `query_grad` gave it."""
    launch = Launch(query, key, scale)
    batch, seq_len, num_heads, head_dim = query.shape
    num_keys, key_heads = key.shape[1:3]
    alone = launch.group > 1 and not _share_dilation(pattern.dilation, launch.group)
    parts = num_heads if alone else key_heads
    shape = (batch, num_keys, parts, head_dim)
    # each head's own share is summed afterwards, in the type of sums
    dtype = launch.accumulator if alone else key.dtype
    key_grad = torch.empty(shape, dtype=dtype, device=key.device)
    value_grad = torch.empty(shape, dtype=dtype, device=key.device)
    tiles = launch.tiles("window_key_grad", num_seen(pattern))
    longest = max(query_start + seq_len, num_keys)
    num_key_tiles = grid_tiles(pattern.dilation, num_keys, longest, tiles["BLOCK_N"])
    mask, *mask_strides = valid_arguments(valid)
    with on_device(query):
        window_attention_key_grad_kernel[(num_key_tiles * batch * parts,)](
            out_grad, query, key, value, lse2, delta, mask, *head_tables(pattern, query.device),
            key_grad, value_grad,
            *out_grad.stride(), *query.stride(), *key.stride(), *value.stride(), *mask_strides,
            T=seq_len, S=num_keys, query_start=query_start, num_key_tiles=num_key_tiles, scale=scale,
            H=num_heads, P=parts, GROUP=launch.group,
            CAUSAL=pattern.causal, HAS_VALID=valid is not None,
            **launch.types(), **tiles,
        )  # fmt: skip
    if alone:
        key_grad, value_grad = (
            grad.unflatten(2, (key_heads, -1)).sum(3).to(key.dtype) for grad in (key_grad, value_grad)
        )
    return key_grad, value_grad


def _share_dilation(dilation, group):
    """Whether the query heads of every key head have one dilation."""
    return all(len(set(dilation[first : first + group])) == 1 for first in range(0, len(dilation), group))
