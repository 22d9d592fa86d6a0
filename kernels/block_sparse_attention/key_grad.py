"""Block-sparse attention, backward: gradients of keys and values, by blocks of keys over the rows that see them.

Nothing is added up atomically, so that two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from kernels.block_sparse_attention.items import entry, work_of_program
from kernels.block_sparse_attention.launch import BlockLaunch
from kernels.block_sparse_attention.merge import block_sum
from kernels.launch import on_device, valid_arguments
from kernels.tiles import keep_mask, key_grad_step, load_lse2, load_tile, tile_offsets


@triton.jit(
    do_not_specialize=[
        "T", "num_blocks", "num_parts", "num_items", "num_offsets", "num_problems", "threshold",
        "valid_stride_b", "valid_stride_t",
    ],
)  # fmt: skip
def block_attention_key_grad_kernel(
    out_grad_ptr, query_ptr, key_ptr, value_ptr,              # in,  [B, T, H, D], any strides
    lse2_ptr, delta_ptr,                                      # in,  [B, H, T], contiguous
    valid_ptr, lengths_ptr, seed_ptr,                         # in,  [B, T] uint8, [B, 3], [1] int64, or None
    parts_ptr, items_ptr, offsets_ptr, blocks_ptr, plan_ptr,  # in,  tables
    key_grad_ptr, value_grad_ptr,                             # out, [B, T, H, D], contiguous
    partial_ptr,                                              # out, [2, B, H, S, BLOCK_SIZE, D]
    out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    T, num_blocks, num_parts, num_items, num_offsets, num_problems, threshold, keep_scale, scale, exponent_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr, HAS_LISTS: tl.constexpr, MANY_PLANS: tl.constexpr,
    HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: what one item, blocks of rows, gives BLOCK_N keys of one block of one head."""
    ROW_TILES: tl.constexpr = (BLOCK_SIZE + BLOCK_M - 1) // BLOCK_M
    KEY_TILES: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    batch, head, tile, item, _, block, has_work, first, last, extent, listed = work_of_program(
        tl.program_id(0), lengths_ptr, plan_ptr, parts_ptr, items_ptr, offsets_ptr, blocks_ptr,
        T, num_blocks, num_parts, num_items, num_offsets,
        H, KEY_TILES, FRONT, BACK, WINDOW, MANY_PLANS, HAS_VALID, True,
    )  # fmt: skip
    key_places = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = block * BLOCK_SIZE + key_places
    if (has_work == 0) | (block * BLOCK_SIZE + tile * BLOCK_N >= T):
        return

    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    key_mask = (key_places < BLOCK_SIZE) & (keys < T)
    row_places = tl.arange(0, BLOCK_M)
    key_tile = key_ptr + batch * key_stride_b + head.to(tl.int64) * key_stride_h
    key_tile += tile_offsets(keys, key_stride_t, dims, key_stride_d)
    value_tile = value_ptr + batch * value_stride_b + head.to(tl.int64) * value_stride_h
    value_tile += tile_offsets(keys, value_stride_t, dims, value_stride_d)
    query_tile = query_ptr + batch * query_stride_b + head.to(tl.int64) * query_stride_h
    query_tile += tile_offsets(row_places, query_stride_t, dims, query_stride_d)
    out_grad_tile = out_grad_ptr + batch * out_grad_stride_b + head.to(tl.int64) * out_grad_stride_h
    out_grad_tile += tile_offsets(row_places, out_grad_stride_t, dims, out_grad_stride_d)
    real = key_mask
    if HAS_VALID:
        valid_place = valid_ptr + batch * valid_stride_b + keys.to(tl.int64) * valid_stride_t
        real = tl.load(valid_place, mask=key_mask, other=0) != 0
    key = load_tile(key_tile, real, dim_mask, True, MASK_DIMS)  # [BLOCK_N, BLOCK_D]
    value = load_tile(value_tile, real, dim_mask, True, MASK_DIMS)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    statistics = (batch * H + head) * T

    key_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    value_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    row_block = entry(first, extent, listed, HAS_LISTS)
    for index in range(first * ROW_TILES, last * ROW_TILES):
        # one ahead, so that no tile waits for the table
        next_block = entry((index + 1) // ROW_TILES, extent, listed, HAS_LISTS)
        first_place = index % ROW_TILES * BLOCK_M
        start = row_block * BLOCK_SIZE + first_place
        rows = start + row_places
        there = rows < T
        if BLOCK_SIZE % BLOCK_M:
            there = there & (row_places < BLOCK_SIZE - first_place)
        query = load_tile(query_tile + start.to(tl.int64) * query_stride_t, there, dim_mask, True, MASK_DIMS)
        out_grad = load_tile(out_grad_tile + start.to(tl.int64) * out_grad_stride_t, there, dim_mask, True, MASK_DIMS)
        # rows that are not there or not valid have the probability 0 by their lse2
        lse2 = load_lse2(lse2_ptr + statistics + rows, there)
        delta = tl.load(delta_ptr + statistics + rows, mask=there, other=0.0)
        kept = None
        if DROPOUT:
            kept = keep_mask(seed, batch * H + head, rows[None, :], keys[:, None], threshold)
        key_grad, value_grad = key_grad_step(
            key_grad, value_grad, query, key, value, out_grad, lse2, delta, None, exponent_scale, False, PRECISION,
            kept, keep_scale,
        )  # fmt: skip
        row_block = next_block

    # a key's gradients hold its own probabilities alone: those of a key that nobody sees are cleared at the end
    key_grad = tl.where(real[:, None], key_grad, 0.0)
    value_grad = tl.where(real[:, None], value_grad, 0.0)
    if item < num_parts:
        place = ((batch * H + head) * num_parts + item) * BLOCK_SIZE + key_places
        mask = (key_places < BLOCK_SIZE)[:, None] & dim_mask[None, :]
        partial = partial_ptr + tile_offsets(place, D, dims, 1)
        tl.store(partial, key_grad, mask=mask)
        tl.store(partial + num_problems.to(tl.int64) * num_parts * BLOCK_SIZE * D, value_grad, mask=mask)
    else:
        if DROPOUT:
            value_grad *= keep_scale
        grad_tile = (batch * T * H + head) * D + tile_offsets(keys, H * D, dims, 1)
        mask = key_mask[:, None] & dim_mask[None, :]
        tl.store(key_grad_ptr + grad_tile, (key_grad * scale).to(key_grad_ptr.dtype.element_ty), mask=mask)
        tl.store(value_grad_ptr + grad_tile, value_grad.to(value_grad_ptr.dtype.element_ty), mask=mask)


def block_attention_key_grad(
    launch: BlockLaunch, out_grad: torch.Tensor, lse2: torch.Tensor, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(key_grad, value_grad) [B, T, H, D]; delta as `query_grad` gave it."""
    query, key, value, work = launch.query, launch.key, launch.value, launch.columns
    batch, _, num_heads, head_dim = query.shape
    key_grad, value_grad = (torch.empty(key.shape, dtype=key.dtype, device=key.device) for _ in range(2))
    partial = launch.partial(work, 2, head_dim)
    tiles = launch.block_tiles("block_key_grad")
    num_items = work.parts.shape[2] + work.items.shape[2]
    grid = (batch * num_items * triton.cdiv(launch.block_size, tiles["BLOCK_N"]) * num_heads,)
    mask, *mask_strides = valid_arguments(launch.valid)
    offsets = launch.tables.column_offsets
    with on_device(query):
        block_attention_key_grad_kernel[grid](
            out_grad, query, key, value, lse2, delta, mask, launch.lengths, launch.seed,
            work.parts, work.items, offsets, work.blocks, launch.tables.plan_of_length,
            key_grad, value_grad, partial,
            *out_grad.stride(), *query.stride(), *key.stride(), *value.stride(), *mask_strides,
            num_offsets=offsets.shape[2], num_problems=batch * num_heads, scale=launch.scale,
            **launch.attention_numbers(work), **tiles,
        )  # fmt: skip
        block_sum(launch, work, partial, [key_grad, value_grad], [launch.scale, launch.keep_scale])
    return key_grad, value_grad
