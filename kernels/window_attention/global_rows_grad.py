"""Rows that attend to everything, backward: keys by tiles of keys, rows by parts of the keys as in the forward pass."""

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, num_splits, on_device, valid_arguments
from kernels.tiles import key_grad_step, load_lse2, load_tile, query_grad_step, tile_offsets
from kernels.window_attention.global_rows import load_places, row_tile_options, used_slots


@triton.jit(do_not_specialize=["S", "valid_stride_b", "valid_stride_t"])
def global_rows_key_grad_kernel(
    out_grad_ptr, query_ptr, key_ptr, value_ptr,  # in,  [B, G, H, D] twice, [B, S, Hkv, D] twice, any strides
    lse2_ptr, delta_ptr,                          # in,  [B, H, G], contiguous
    index_ptr, valid_ptr,                         # in,  [B, G] contiguous, [B, S] uint8 or None
    key_grad_ptr, value_grad_ptr,                 # out, [B, S, Hkv, D], contiguous
    out_grad_stride_b, out_grad_stride_g, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_g, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    S, scale, exponent_scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ALL: tl.constexpr,
):  # fmt: skip
    """One program: the gradients that all global rows give BLOCK_N keys of one key head."""
    GROUP: tl.constexpr = H // HKV
    num_key_tiles = tl.cdiv(S, BLOCK_N)
    problem = (tl.program_id(0) // num_key_tiles).to(tl.int64)
    batch, key_head = problem // HKV, problem % HKV
    keys = tl.program_id(0) % num_key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    there = keys < S
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    key_tile = key_ptr + batch * key_stride_b + key_head * key_stride_h
    key_tile += tile_offsets(keys, key_stride_t, dims, key_stride_d)
    value_tile = value_ptr + batch * value_stride_b + key_head * value_stride_h
    value_tile += tile_offsets(keys, value_stride_t, dims, value_stride_d)
    real_keys = there
    valid_base = valid_ptr + batch * valid_stride_b if HAS_VALID else None
    if HAS_VALID:
        real_keys = tl.load(valid_base + keys.to(tl.int64) * valid_stride_t, mask=there, other=0) != 0
    key = load_tile(key_tile, real_keys, dim_mask, True, MASK_DIMS)  # [BLOCK_N, BLOCK_D]
    value = load_tile(value_tile, real_keys, dim_mask, True, MASK_DIMS)

    key_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    value_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    index = index_ptr + batch * G
    num_rows = used_slots(index, valid_base, valid_stride_t, S, G, HAS_VALID, BLOCK_ALL)
    for group_head in range(0, GROUP):
        head = key_head * GROUP + group_head
        query_base = query_ptr + batch * query_stride_b + head * query_stride_h
        out_grad_base = out_grad_ptr + batch * out_grad_stride_b + head * out_grad_stride_h
        statistics = (batch * H + head) * G
        for start in range(0, num_rows, BLOCK_M):
            slots = start + tl.arange(0, BLOCK_M)
            places, real = load_places(index, slots, valid_base, valid_stride_t, S, G, HAS_VALID)
            query_tile = query_base + tile_offsets(slots, query_stride_g, dims, query_stride_d)
            out_grad_tile = out_grad_base + tile_offsets(slots, out_grad_stride_g, dims, out_grad_stride_d)
            query = load_tile(query_tile, real, dim_mask, True, MASK_DIMS)  # [BLOCK_M, BLOCK_D]
            out_grad = load_tile(out_grad_tile, real, dim_mask, True, MASK_DIMS)
            lse2 = load_lse2(lse2_ptr + statistics + slots, real)
            delta = tl.load(delta_ptr + statistics + slots, mask=real, other=0.0)
            key_grad, value_grad = key_grad_step(
                key_grad, value_grad, query, key, value, out_grad, lse2, delta,
                keys[:, None] <= places[None, :], exponent_scale, CAUSAL, PRECISION,
            )  # fmt: skip
    # a key's gradients hold its own probabilities alone: those of a key that nobody sees are cleared at the end
    key_grad = tl.where(real_keys[:, None], key_grad, 0.0)
    value_grad = tl.where(real_keys[:, None], value_grad, 0.0)
    place = (batch * S * HKV + key_head) * D + tile_offsets(keys, HKV * D, dims, 1)
    mask = there[:, None] & dim_mask[None, :]
    tl.store(key_grad_ptr + place, (key_grad * scale).to(key_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(value_grad_ptr + place, value_grad.to(value_grad_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "chunk", "num_problems", "valid_stride_b", "valid_stride_t"])
def global_rows_query_grad_kernel(
    out_grad_ptr, query_ptr, key_ptr, value_ptr,  # in,  [B, G, H, D] twice, [B, S, Hkv, D] twice, any strides
    lse2_ptr, delta_ptr,                          # in,  [B, H, G], contiguous
    index_ptr, valid_ptr,                         # in,  [B, G] contiguous, [B, S] uint8 or None
    partial_ptr,                                  # out, [splits, B, H, G, D]
    out_grad_stride_b, out_grad_stride_g, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_g, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    S, chunk, num_problems, exponent_scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: what `chunk` keys give the gradient of BLOCK_M global rows of one head."""
    problem = tl.program_id(0).to(tl.int64)
    batch, head = problem // H, problem % H
    slots = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_base = valid_ptr + batch * valid_stride_b if HAS_VALID else None
    places, real = load_places(index_ptr + batch * G, slots, valid_base, valid_stride_t, S, G, HAS_VALID)
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    query_tile = query_ptr + batch * query_stride_b + head * query_stride_h
    query_tile += tile_offsets(slots, query_stride_g, dims, query_stride_d)
    out_grad_tile = out_grad_ptr + batch * out_grad_stride_b + head * out_grad_stride_h
    out_grad_tile += tile_offsets(slots, out_grad_stride_g, dims, out_grad_stride_d)
    query = load_tile(query_tile, real, dim_mask, True, MASK_DIMS)  # [BLOCK_M, BLOCK_D]
    out_grad = load_tile(out_grad_tile, real, dim_mask, True, MASK_DIMS)
    lse2 = load_lse2(lse2_ptr + problem * G + slots, real)
    delta = tl.load(delta_ptr + problem * G + slots, mask=real, other=0.0)
    key_base = key_ptr + batch * key_stride_b + head // GROUP * key_stride_h
    value_base = value_ptr + batch * value_stride_b + head // GROUP * value_stride_h

    query_grad = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, S)
    # without a row there is nothing to add, but the zeros are read
    last = tl.where(tl.max(real.to(tl.int32), 0) == 0, first, last)
    if CAUSAL:
        last = tl.minimum(last, tl.max(tl.where(real, places, -1), 0).to(tl.int32) + 1)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        there = keys < last
        key = load_tile(
            key_base + tile_offsets(keys, key_stride_t, dims, key_stride_d), there, dim_mask, True, MASK_DIMS
        )
        value = load_tile(
            value_base + tile_offsets(keys, value_stride_t, dims, value_stride_d), there, dim_mask, True, MASK_DIMS
        )
        if HAS_VALID:
            there = there & (tl.load(valid_base + keys.to(tl.int64) * valid_stride_t, mask=there, other=0) != 0)
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= places[:, None])
        query_grad = query_grad_step(
            query_grad, query, key, value, out_grad, lse2, delta, seen, exponent_scale, True, PRECISION
        )
    place = ((tl.program_id(1).to(tl.int64) * num_problems) + problem) * G + slots
    partial = partial_ptr + tile_offsets(place, D, dims, 1)
    tl.store(partial, query_grad, mask=(slots < G)[:, None] & dim_mask[None, :])


def global_rows_grad(
    out_grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse2: torch.Tensor,
    global_index: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query_grad [B, G, H, D], key_grad, value_grad [B, S, Hkv, D]); out and lse2 as the forward pass gave them."""
    launch = Launch(query, key, scale)
    batch, num_global, num_heads, head_dim = query.shape
    num_keys, key_heads = key.shape[1:3]
    delta = (out.to(launch.accumulator) * out_grad.to(launch.accumulator)).sum(-1).transpose(1, 2).contiguous()
    key_grad = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    value_grad = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    mask, *mask_strides = valid_arguments(valid)
    inputs = (out_grad, query, key, value, lse2, delta, global_index, mask)
    all_strides = (*out_grad.stride(), *query.stride(), *key.stride(), *value.stride(), *mask_strides)
    shared = {"S": num_keys, "H": num_heads, "G": num_global, "CAUSAL": causal, "HAS_VALID": valid is not None}
    types = launch.types()
    with on_device(query):
        tiles = row_tile_options(launch, "global_rows_key_grad", num_keys, num_global)
        global_rows_key_grad_kernel[(batch * key_heads * triton.cdiv(num_keys, tiles["BLOCK_N"]),)](
            *inputs, key_grad, value_grad, *all_strides,
            scale=scale, HKV=key_heads, BLOCK_ALL=triton.next_power_of_2(num_global), **shared, **types, **tiles,
        )  # fmt: skip
        tiles = row_tile_options(launch, "global_rows_query_grad", num_keys, num_global)
        row_tiles = triton.cdiv(num_global, tiles["BLOCK_M"])
        splits, chunk = num_splits(num_keys, batch * num_heads * row_tiles, tiles["BLOCK_N"])
        shape = (splits, batch, num_heads, num_global, head_dim)
        partial = torch.empty(shape, dtype=launch.accumulator, device=query.device)
        global_rows_query_grad_kernel[(batch * num_heads, splits, row_tiles)](
            *inputs, partial, *all_strides,
            chunk=chunk, num_problems=batch * num_heads, GROUP=launch.group, **shared, **types, **tiles,
        )  # fmt: skip
    query_grad = (partial.sum(0) * scale).to(query.dtype).transpose(1, 2).contiguous()
    return query_grad, key_grad, value_grad
