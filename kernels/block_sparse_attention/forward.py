"""Block-sparse attention, forward: one program computes BLOCK_M queries of a block over the entries of one item.

A block that is one item is finished there; the sums of one that is cut into parts go to `merge`. Nearly every tile of
keys is seen as a whole and pays for no mask: the last block of a text and keys that are not valid are met by a branch.
"""

import torch
import triton
import triton.language as tl

from kernels.block_sparse_attention.items import entry, work_of_program
from kernels.block_sparse_attention.launch import BlockLaunch
from kernels.block_sparse_attention.merge import block_merge, store_rows
from kernels.launch import on_device, valid_arguments
from kernels.tiles import keep_mask, load_tile, matmul, softmax_end, softmax_step, tile_offsets


@triton.jit(
    do_not_specialize=["T", "num_blocks", "num_parts", "num_items", "threshold", "valid_stride_b", "valid_stride_t"],
)
def block_attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr,               # in,  [B, T, H, D], any strides
    valid_ptr, lengths_ptr, seed_ptr,            # in,  [B, T] uint8, [B, 3], [1] int64, or None
    parts_ptr, items_ptr, blocks_ptr, plan_ptr,  # in,  tables
    out_ptr, lse2_ptr,                           # out, [B, T, H, D] and [B, H, T], contiguous
    partial_ptr, max_ptr, sum_ptr,               # out, [B, H, S, BLOCK_SIZE, D] and [B, H, S, BLOCK_SIZE] twice
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    T, num_blocks, num_parts, num_items, threshold, keep_scale, exponent_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr, HAS_LISTS: tl.constexpr, MANY_PLANS: tl.constexpr,
    HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one block of one head over the entries of one item."""
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
    key_tile = key_ptr + batch * key_stride_b + head.to(tl.int64) * key_stride_h
    key_tile += tile_offsets(key_places, key_stride_t, dims, key_stride_d)
    value_tile = value_ptr + batch * value_stride_b + head.to(tl.int64) * value_stride_h
    value_tile += tile_offsets(key_places, value_stride_t, dims, value_stride_d)
    query = load_tile(query_tile, row_mask, dim_mask, True, MASK_DIMS)  # [BLOCK_M, BLOCK_D]
    seed = tl.load(seed_ptr) if DROPOUT else 0

    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)
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
        acc, row_max, row_sum = softmax_step(
            acc, row_max, row_sum, scores, value, exponent_scale, True, PRECISION, kept
        )
        key_block = next_block

    if item < num_parts:
        place = ((batch * H + head) * num_parts + item) * BLOCK_SIZE + row_places
        mask = row_places < BLOCK_SIZE
        tl.store(max_ptr + place, row_max * exponent_scale, mask=mask)
        tl.store(sum_ptr + place, row_sum, mask=mask)
        tl.store(partial_ptr + tile_offsets(place, D, dims, 1), acc, mask=mask[:, None] & dim_mask[None, :])
    else:
        out, lse2 = softmax_end(acc, row_max, row_sum, exponent_scale)
        if DROPOUT:
            out *= keep_scale
        store_rows(
            out, lse2, rows, row_mask, batch, head, T, valid_ptr, valid_stride_b, valid_stride_t,
            out_ptr, lse2_ptr, H, D, HAS_VALID, BLOCK_D,
        )  # fmt: skip


def block_attention_fwd(launch: BlockLaunch) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, T, H, D], lse2 [B, H, T])."""
    query, key, value, work = launch.query, launch.key, launch.value, launch.rows
    batch, seq_len, num_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse2 = torch.empty(batch, num_heads, seq_len, dtype=launch.accumulator, device=query.device)
    partial, row_max, row_sum = *launch.partial(work, 1, head_dim), *launch.partial(work, 2)
    tiles = launch.block_tiles("block_forward")
    num_items = work.parts.shape[2] + work.items.shape[2]
    grid = (batch * num_items * triton.cdiv(launch.block_size, tiles["BLOCK_M"]) * num_heads,)
    mask, *mask_strides = valid_arguments(launch.valid)
    with on_device(query):
        block_attention_fwd_kernel[grid](
            query, key, value, mask, launch.lengths, launch.seed,
            work.parts, work.items, work.blocks, launch.tables.plan_of_length,
            out, lse2, partial, row_max, row_sum,
            *query.stride(), *key.stride(), *value.stride(), *mask_strides,
            **launch.attention_numbers(work), **tiles,
        )  # fmt: skip
        block_merge(launch, partial, row_max, row_sum, out, lse2)
    return out, lse2
