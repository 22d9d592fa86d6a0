"""The parts of blocks that are cut, put together in their order: the softmax of the forward pass, sums of gradients."""

import torch
import triton
import triton.language as tl

from kernels import tile_table
from kernels.block_sparse_attention.items import block_of_merge
from kernels.block_sparse_attention.launch import BlockLaunch, Work
from kernels.launch import valid_arguments
from kernels.tiles import softmax_end, tile_offsets

ROWS = 16  # of a program


@triton.jit
def store_rows(
    out, lse2, rows, row_mask, batch, head, T, valid_ptr, valid_stride_b, valid_stride_t, out_ptr, lse2_ptr,
    H: tl.constexpr, D: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the result [M, BLOCK_D] and lse2 [M] of rows [M]; those that are not valid are zeros."""
    if HAS_VALID:
        place = valid_ptr + batch * valid_stride_b + rows.to(tl.int64) * valid_stride_t
        real = tl.load(place, mask=row_mask, other=0) != 0
        out = tl.where(real[:, None], out, 0.0)
        lse2 = tl.where(real, lse2, float("-inf"))
    dims = tl.arange(0, BLOCK_D)
    out_tile = out_ptr + (batch * T * H + head) * D + tile_offsets(rows, H * D, dims, 1)
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & (dims < D)[None, :])
    tl.store(lse2_ptr + (batch * H + head) * T + rows, lse2, mask=row_mask)


@triton.jit(do_not_specialize=["T", "num_blocks", "num_parts", "num_merges", "valid_stride_b", "valid_stride_t"])
def block_merge_kernel(
    partial_ptr, max_ptr, sum_ptr,     # in,  [B, H, S, BLOCK_SIZE, D] and [B, H, S, BLOCK_SIZE] twice
    valid_ptr, lengths_ptr,            # in,  [B, T] uint8 and [B, 3], or None
    merges_ptr, blocks_ptr, plan_ptr,  # in,  tables
    out_ptr, lse2_ptr,                 # out, [B, T, H, D] and [B, H, T], contiguous
    valid_stride_b, valid_stride_t,
    T, num_blocks, num_parts, num_merges, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr, MANY_PLANS: tl.constexpr,
    HAS_VALID: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of a block that is cut, from the sums of its parts."""
    ROW_TILES: tl.constexpr = (BLOCK_SIZE + ROWS - 1) // ROWS
    batch, head, tile, block, has_rows, first, last = block_of_merge(
        tl.program_id(0), lengths_ptr, merges_ptr, None, blocks_ptr, plan_ptr, T, num_blocks, num_merges, 0,
        H, ROW_TILES, FRONT, BACK, WINDOW, MANY_PLANS, HAS_VALID, False,
    )  # fmt: skip
    if has_rows == 0:
        return
    places = tile * ROWS + tl.arange(0, ROWS)
    rows = block * BLOCK_SIZE + places
    row_mask = (places < BLOCK_SIZE) & (rows < T)
    dims = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (dims < D)[None, :]
    acc = tl.zeros([ROWS, BLOCK_D], ACC)
    row_max = tl.full([ROWS], float("-inf"), ACC)
    row_sum = tl.zeros([ROWS], ACC)
    for part in range(first, last):
        place = ((batch * H + head) * num_parts + part) * BLOCK_SIZE + places
        part_max = tl.load(max_ptr + place, mask=row_mask, other=float("-inf"))
        new_max = tl.maximum(row_max, part_max)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay, weight = tl.exp2(row_max - shift), tl.exp2(part_max - shift)
        partial = tl.load(partial_ptr + tile_offsets(place, D, dims, 1), mask=mask, other=0.0)
        acc = acc * decay[:, None] + partial * weight[:, None]
        row_sum = row_sum * decay + tl.load(sum_ptr + place, mask=row_mask, other=0.0) * weight
        row_max = new_max
    out, lse2 = softmax_end(acc, row_max, row_sum, 1.0)
    store_rows(
        out * keep_scale, lse2, rows, row_mask, batch, head, T, valid_ptr, valid_stride_b, valid_stride_t,
        out_ptr, lse2_ptr, H, D, HAS_VALID, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "num_blocks", "num_parts", "num_merges", "num_problems", "num_offsets"])
def block_sum_kernel(
    partial_ptr,                                    # in,  [1 or 2, B, H, S, BLOCK_SIZE, D]
    lengths_ptr,                                    # in,  [B, 3], or None
    merges_ptr, offsets_ptr, blocks_ptr, plan_ptr,  # in,  tables
    first_ptr, second_ptr,                          # out, [B, T, H, D], contiguous; the second or None
    T, num_blocks, num_parts, num_merges, num_offsets, num_problems, first_scale, second_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr, MANY_PLANS: tl.constexpr,
    HAS_VALID: tl.constexpr, BY_COLUMN: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of ROWS rows or columns of a block that is cut, summed over its parts."""
    ROW_TILES: tl.constexpr = (BLOCK_SIZE + ROWS - 1) // ROWS
    batch, head, tile, block, has_rows, first, last = block_of_merge(
        tl.program_id(0), lengths_ptr, merges_ptr, offsets_ptr, blocks_ptr, plan_ptr,
        T, num_blocks, num_merges, num_offsets,
        H, ROW_TILES, FRONT, BACK, WINDOW, MANY_PLANS, HAS_VALID, BY_COLUMN,
    )  # fmt: skip
    if has_rows == 0:
        return
    places = tile * ROWS + tl.arange(0, ROWS)
    rows = block * BLOCK_SIZE + places
    row_mask = (places < BLOCK_SIZE) & (rows < T)
    dims = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (dims < D)[None, :]
    acc = tl.zeros([ROWS, BLOCK_D], ACC)
    problem = tl.program_id(1).to(tl.int64) * num_problems + batch * H + head
    for part in range(first, last):
        place = (problem * num_parts + part) * BLOCK_SIZE + places
        acc += tl.load(partial_ptr + tile_offsets(place, D, dims, 1), mask=mask, other=0.0)
    out_tile = (batch * T * H + head) * D + tile_offsets(rows, H * D, dims, 1)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + out_tile, (acc * first_scale).to(first_ptr.dtype.element_ty), mask=mask)
    elif BY_COLUMN:
        tl.store(second_ptr + out_tile, (acc * second_scale).to(second_ptr.dtype.element_ty), mask=mask)


def block_merge(
    launch: BlockLaunch,
    partial: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    out: torch.Tensor,
    lse2: torch.Tensor,
) -> None:
    """Write the rows of the blocks that are cut into out [B, T, H, D] and lse2 [B, H, T].

    partial: [B, H, S, b, D]; row_max and row_sum: [B, H, S, b]. The exponents are of two.
    """
    work = launch.rows
    if not partial.numel():
        return
    mask, *mask_strides = valid_arguments(launch.valid)
    block_merge_kernel[(_num_programs(launch, work),)](
        partial, row_max, row_sum, mask, launch.lengths, work.merges, work.blocks, launch.tables.plan_of_length,
        out, lse2, *mask_strides, keep_scale=launch.keep_scale, **_numbers(launch, work),
    )  # fmt: skip


def block_sum(
    launch: BlockLaunch, work: Work, partial: torch.Tensor, grads: list[torch.Tensor], scales: list[float]
) -> None:
    """Write the rows (or columns) of the blocks that are cut into grads, [B, T, H, D] each, times their scale.

    partial: [len(grads), B, H, S, b, D]; two gradients for the work of columns, one for that of rows.
    """
    if not partial.numel():
        return
    offsets = launch.tables.column_offsets
    first, second = (*grads, None)[:2]
    block_sum_kernel[(_num_programs(launch, work), len(grads))](
        partial, launch.lengths, work.merges, offsets, work.blocks, launch.tables.plan_of_length, first, second,
        num_offsets=offsets.shape[2], num_problems=partial.shape[1] * partial.shape[2],
        first_scale=scales[0], second_scale=scales[-1], BY_COLUMN=len(grads) == 2, **_numbers(launch, work),
    )  # fmt: skip


def _num_programs(launch, work):
    batch, _, num_heads, _ = launch.query.shape
    return batch * work.merges.shape[2] * triton.cdiv(launch.block_size, ROWS) * num_heads


def _numbers(launch, work):
    block_d = tile_table.block_dim(launch.query.shape[-1])
    numbers = {"num_merges": work.merges.shape[2], "ACC": launch.types()["ACC"], "ROWS": ROWS, "BLOCK_D": block_d}
    return {**launch.numbers(work), **numbers}
