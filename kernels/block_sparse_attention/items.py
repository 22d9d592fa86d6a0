"""Which blocks a program of the block-sparse kernels visits: its item of the tables, and the entries of a block.

The entries of a block are counted: first the global blocks at the front of the example (all of them, where the block is
global itself), then the window, then the global blocks at the end, then the list, as far as it lies in the example.
"""

import triton
import triton.language as tl

from kernels.block_sparse_attention import tables

FIELDS = tl.constexpr(tables.FIELDS)


@triton.jit
def work_of_program(
    program, lengths_ptr, plan_ptr, parts_ptr, items_ptr, offsets_ptr, blocks_ptr,
    T, num_blocks, num_parts, num_items, num_offsets,
    H: tl.constexpr, TILES: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr,
    MANY_PLANS: tl.constexpr, HAS_VALID: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """(batch, head, tile, item, num_open, block, has_work, first, last, extent, listed) of a program.

    Its work are the entries [first, last) of a block. Programs count heads first, which lie side by side in memory,
    then the TILES tiles of a block, then items, of which the first `num_parts` are parts, then examples. num_open as in
    `example_of`, the rest as in `block_of_item`.
    """
    head, tile, item, batch = _indices(program, num_parts + num_items, H, TILES)
    length, plan, num_open = example_of(lengths_ptr, plan_ptr, batch, T, num_blocks, HAS_VALID, MANY_PLANS)
    table = (plan * H + head).to(tl.int64)
    place = items_ptr + (table * num_items + item - num_parts) * FIELDS
    if item < num_parts:
        place = parts_ptr + (table * num_parts + item) * FIELDS
    block, has_rows, first, last, extent, listed = block_of_item(
        place, offsets_ptr + table * num_offsets if BY_COLUMN else None, blocks_ptr, length,
        FRONT, BACK, WINDOW, BY_COLUMN,
    )  # fmt: skip
    last = tl.minimum(last, extent[0])
    has_work = has_rows & ((item >= num_parts) | (first < last))
    return batch, head, tile, item, num_open, block, has_work, first, last, extent, listed


@triton.jit
def block_of_merge(
    program, lengths_ptr, merges_ptr, offsets_ptr, blocks_ptr, plan_ptr, T, num_blocks, num_merges, num_offsets,
    H: tl.constexpr, TILES: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr,
    MANY_PLANS: tl.constexpr, HAS_VALID: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """(batch, head, tile, block, has_rows, first, last) of a program that merges the parts [first, last) of a block."""
    head, tile, merge, batch = _indices(program, num_merges, H, TILES)
    length, plan, _ = example_of(lengths_ptr, plan_ptr, batch, T, num_blocks, HAS_VALID, MANY_PLANS)
    table = (plan * H + head).to(tl.int64)
    block, has_rows, first, chunk, extent, _ = block_of_item(
        merges_ptr + (table * num_merges + merge) * FIELDS,
        offsets_ptr + table * num_offsets if BY_COLUMN else None, blocks_ptr, length, FRONT, BACK, WINDOW, BY_COLUMN,
    )  # fmt: skip
    return batch, head, tile, block, has_rows, first, first + tl.cdiv(extent[0], chunk)


@triton.jit
def _indices(program, num_items, H: tl.constexpr, TILES: tl.constexpr):
    """(head, tile, item, batch) of a program."""
    rest = program // (H * TILES)
    return program % H, program // H % TILES, rest % num_items, (rest // num_items).to(tl.int64)


@triton.jit
def example_of(lengths_ptr, plan_ptr, batch, T, num_blocks, HAS_VALID: tl.constexpr, MANY_PLANS: tl.constexpr):
    """(blocks, plan, tokens before the first that is not valid) of an example."""
    if HAS_VALID:
        place = lengths_ptr + batch * 3
        return tl.load(place), tl.load(place + 1), tl.load(place + 2)
    return num_blocks, tl.load(plan_ptr + num_blocks) if MANY_PLANS else 0, T


@triton.jit
def block_of_item(
    place, offsets_ptr, blocks_ptr, length,
    FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """(block, has_rows, first, last, extent, listed) of the item at a place, in an example of `length` blocks.

    has_rows: whether the block has rows to write: those past the end have, without entries; the last `BACK` ones have
    not, as their items are those that count from the end. extent: (entries, num_front, near, num_near, num_known,
    length) for `entry`; listed: where the block's list begins. A column's list holds rows, of which the global ones
    are no part; a row's list holds columns.
    """
    block, first, last = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    begin, end, largest = tl.load(place + 3), tl.load(place + 4), tl.load(place + 5)
    front = tl.minimum(length, FRONT)
    back_begin = length - tl.minimum(length - front, BACK)
    from_end = block < 0
    block = tl.where(from_end, block + length, block)
    has_rows = tl.where(from_end, block >= back_begin, (block < back_begin) | (block >= length))
    if BY_COLUMN:
        # the list of a block that is counted from the end depends on where that is
        looked_up = from_end & has_rows
        begin = tl.where(looked_up, tl.load(offsets_ptr + block, mask=looked_up, other=0), begin)
        end = tl.where(looked_up, tl.load(offsets_ptr + block + 1, mask=looked_up, other=0), end)
        last_listed = tl.load(blocks_ptr + end - 1, mask=looked_up & (begin < end), other=-1)
        largest = tl.where(looked_up, last_listed, largest)
    end = list_end(blocks_ptr, begin, end, largest, back_begin if BY_COLUMN else length)

    is_global = (block < front) | (block >= back_begin)
    near = tl.maximum(block - WINDOW // 2, front)
    num_near = tl.minimum(block + WINDOW // 2 + 1, back_begin) - near if WINDOW else 0
    num_near = tl.where(is_global, 0, num_near)
    num_front = tl.where(is_global, length, front)
    num_known = tl.where(is_global, length, front + num_near + length - back_begin)
    entries = tl.where(block < length, num_known + end - begin, 0)
    return block, has_rows, first, last, (entries, num_front, near, num_near, num_known, length), blocks_ptr + begin


@triton.jit
def list_end(blocks_ptr, begin, end, largest, limit):
    """Where the entries below `limit` of an ascending list end."""
    if largest >= limit:
        while begin < end:
            middle = (begin + end) // 2
            is_below = tl.load(blocks_ptr + middle) < limit
            begin = tl.where(is_below, middle + 1, begin)
            end = tl.where(is_below, end, middle)
    return end


@triton.jit
def entry(j, extent, listed, HAS_LISTS: tl.constexpr):
    """The block of entry j; past the last one anything."""
    entries, num_front, near, num_near, num_known, length = extent
    shift = tl.where(j < num_front, 0, tl.where(j < num_front + num_near, near - num_front, length - num_known))
    if HAS_LISTS:
        block = tl.load(listed + (j - num_known), mask=(j >= num_known) & (j < entries), other=0)
        return tl.where(j < num_known, j + shift, block)
    return j + shift
