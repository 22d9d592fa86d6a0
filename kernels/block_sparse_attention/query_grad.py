"""Block-sparse attention, backward: the gradient of queries, by blocks of queries as in the forward pass.

The probabilities are computed again from lse2; a second kernel, `key_grad`, does the same by blocks of keys.
"""

import torch
import triton
import triton.language as tl

from kernels.block_sparse_attention.items import entry, work_of_program
from kernels.block_sparse_attention.launch import BlockLaunch
from kernels.block_sparse_attention.merge import block_sum
from kernels.launch import on_device, valid_arguments
from kernels.tiles import keep_mask, load_lse2, load_tile, matmul, query_grad_of_scores, tile_offsets


@triton.jit(
    do_not_specialize=["T", "num_blocks", "num_parts", "num_items", "threshold", "valid_stride_b", "valid_stride_t"],
)
def block_attention_query_grad_kernel(
    out_grad_ptr, query_ptr, key_ptr, value_ptr,  # in,  [B, T, H, D], any strides
    out_ptr, lse2_ptr,                            # in,  [B, T, H, D] and [B, H, T], contiguous
    valid_ptr, lengths_ptr, seed_ptr,             # in,  [B, T] uint8, [B, 3], [1] int64, or None
    parts_ptr, items_ptr, blocks_ptr, plan_ptr,   # in,  tables
    query_grad_ptr, delta_ptr,                    # out, [B, T, H, D] and [B, H, T], contiguous
    partial_ptr,                                  # out, [B, H, S, BLOCK_SIZE, D]
    out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    T, num_blocks, num_parts, num_items, threshold, keep_scale, scale, exponent_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr, HAS_LISTS: tl.constexpr, MANY_PLANS: tl.constexpr,
    HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: what one item gives BLOCK_M queries of one block, and delta = rowsum(out dout)."""
    ROW_TILES: tl.constexpr = (BLOCK_SIZE + BLOCK_M - 1) // BLOCK_M
    KEY_TILES: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    batch, head, row_tile, item, num_open, block, has_work, first, last, extent, listed = work_of_program(
        tl.program_id(0), lengths_ptr, plan_ptr, parts_ptr, items_ptr, None, blocks_ptr,
        T, num_blocks, num_parts, num_items, 0,
        H, ROW_TILES, FRONT, BACK, WINDOW, MANY_PLANS, HAS_VALID, False,
    )  # fmt: skip
    row_places = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = block * BLOCK_SIZE + row_places
    if (has_work == 0) | (block * BLOCK_SIZE + row_tile * BLOCK_M >= T):
        return

    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    row_mask = (row_places < BLOCK_SIZE) & (rows < T)
    key_places = tl.arange(0, BLOCK_N)
    query_tile = query_ptr + batch * query_stride_b + head.to(tl.int64) * query_stride_h
    query_tile += tile_offsets(rows, query_stride_t, dims, query_stride_d)
    out_grad_tile = out_grad_ptr + batch * out_grad_stride_b + head.to(tl.int64) * out_grad_stride_h
    out_grad_tile += tile_offsets(rows, out_grad_stride_t, dims, out_grad_stride_d)
    out_tile = (batch * T * H + head) * D + tile_offsets(rows, H * D, dims, 1)
    key_tile = key_ptr + batch * key_stride_b + head.to(tl.int64) * key_stride_h
    key_tile += tile_offsets(key_places, key_stride_t, dims, key_stride_d)
    value_tile = value_ptr + batch * value_stride_b + head.to(tl.int64) * value_stride_h
    value_tile += tile_offsets(key_places, value_stride_t, dims, value_stride_d)
    query = load_tile(query_tile, row_mask, dim_mask, True, MASK_DIMS)  # [BLOCK_M, BLOCK_D]
    out_grad = load_tile(out_grad_tile, row_mask, dim_mask, True, MASK_DIMS)
    out = load_tile(out_ptr + out_tile, row_mask, dim_mask, True, MASK_DIMS)
    delta = tl.sum(out.to(ACC) * out_grad.to(ACC), 1)
    statistics = (batch * H + head) * T + rows
    if first == 0:
        tl.store(delta_ptr + statistics, delta, mask=row_mask)
    lse2 = load_lse2(lse2_ptr + statistics, row_mask)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    query_grad = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    key_block = entry(first, extent, listed, HAS_LISTS)
    for index in range(first * KEY_TILES, last * KEY_TILES):
        # one ahead, so that no tile waits for the table
        next_block = entry((index + 1) // KEY_TILES, extent, listed, HAS_LISTS)
        first_place = index % KEY_TILES * BLOCK_N
        start = key_block * BLOCK_SIZE + first_place
        keys = start + key_places
        there = keys < T
        if BLOCK_SIZE % BLOCK_N:
            there = there & (key_places < BLOCK_SIZE - first_place)
        key = load_tile(key_tile + start.to(tl.int64) * key_stride_t, there, dim_mask, True, MASK_DIMS)
        value = load_tile(value_tile + start.to(tl.int64) * value_stride_t, there, dim_mask, True, MASK_DIMS)
        scores = matmul(query, tl.trans(key), ACC, PRECISION)  # [BLOCK_M, BLOCK_N]
        if (start + BLOCK_N > num_open) | (first_place + BLOCK_N > BLOCK_SIZE):
            seen = there
            if HAS_VALID:
                valid_place = valid_ptr + batch * valid_stride_b + keys.to(tl.int64) * valid_stride_t
                seen = seen & (tl.load(valid_place, mask=there, other=0) != 0)
            scores = tl.where(seen[None, :], scores, float("-inf"))
        kept = None
        if DROPOUT:
            kept = keep_mask(seed, batch * H + head, rows[:, None], keys[None, :], threshold)
        query_grad = query_grad_of_scores(
            query_grad, scores, key, value, out_grad, lse2, delta, exponent_scale, PRECISION, kept, keep_scale
        )
        key_block = next_block

    if item < num_parts:
        place = ((batch * H + head) * num_parts + item) * BLOCK_SIZE + row_places
        mask = (row_places < BLOCK_SIZE)[:, None] & dim_mask[None, :]
        tl.store(partial_ptr + tile_offsets(place, D, dims, 1), query_grad, mask=mask)
    else:
        scaled = (query_grad * scale).to(query_grad_ptr.dtype.element_ty)
        tl.store(query_grad_ptr + out_tile, scaled, mask=row_mask[:, None] & dim_mask[None, :])


def block_attention_query_grad(
    launch: BlockLaunch, out_grad: torch.Tensor, out: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query_grad [B, T, H, D], delta [B, H, T]); out and lse2 as the forward pass gave them."""
    query, key, value, work = launch.query, launch.key, launch.value, launch.rows
    batch, _, num_heads, head_dim = query.shape
    query_grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    delta = torch.empty(lse2.shape, dtype=lse2.dtype, device=query.device)
    partial = launch.partial(work, 1, head_dim)
    tiles = launch.block_tiles("block_query_grad")
    num_items = work.parts.shape[2] + work.items.shape[2]
    grid = (batch * num_items * triton.cdiv(launch.block_size, tiles["BLOCK_M"]) * num_heads,)
    mask, *mask_strides = valid_arguments(launch.valid)
    with on_device(query):
        block_attention_query_grad_kernel[grid](
            out_grad, query, key, value, out, lse2, mask, launch.lengths, launch.seed,
            work.parts, work.items, work.blocks, launch.tables.plan_of_length,
            query_grad, delta, partial,
            *out_grad.stride(), *query.stride(), *key.stride(), *value.stride(), *mask_strides,
            scale=launch.scale, **launch.attention_numbers(work), **tiles,
        )  # fmt: skip
        block_sum(launch, work, partial, [query_grad], [launch.scale])
    return query_grad, delta
