"""What the kernels read of a pattern: for each block its work, in items of about one size, and its list of blocks.

A row sees the global blocks, its window and its list; a column is seen likewise, by the transposed lists. The first
two the kernels know by arithmetic (`items.block_of_item`), the lists are in tables. Columns of the released plans are
skewed: nine of them are on the lists of all rows. So blocks of many entries are cut into parts, each a program's
work, whose sums a second kernel adds up in their order.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from kernels.block_sparse_attention.lists import find_global, window_ends
from kernels.block_sparse_attention.pattern import BlockPattern, pattern_of

CHUNK = 16  # entries of an item; where a block has more on average, as many times that
FIELDS = 6  # of an item
NOTHING = -(2**30)  # in place of a block: a padding item


class Tables(NamedTuple):
    """int32 tensors on one device; P plans, H heads, N blocks of the longest sequence, rows and columns alike.

    An item is (block, first entry, last entry, begin, end, largest): the entries [first, last) of a block, whose list
    lies at [begin, end) of `*_blocks`, ascending up to `largest`. A negative block -1 - k is the k-th from the end of
    the example, one of the `back` global ones; its list has to be looked up. Each of the N blocks has an item, so that
    every row is written, of whatever length the example is.

    *_parts: [P, H, S, 6], items of the blocks that are cut, the heaviest first.
    *_items: [P, H, W, 6], items that are all of their block.
    *_merges: [P, H, R, 6], for each block that is cut (block, its first part, entries of a part, begin, end, largest).
    *_blocks: [entries], the lists; column_offsets: [P, H, N + 1], where those of each column begin.
    plan_of_length: [N + 1], the plan of an example of n blocks.
    """

    row_parts: torch.Tensor
    row_items: torch.Tensor
    row_merges: torch.Tensor
    row_blocks: torch.Tensor
    column_parts: torch.Tensor
    column_items: torch.Tensor
    column_merges: torch.Tensor
    column_blocks: torch.Tensor
    column_offsets: torch.Tensor
    plan_of_length: torch.Tensor


class _Plan(NamedTuple):
    """The lengths of examples that use a plan, and its lists in one direction: sizes [H, N], all blocks, list by list.

    global_sizes: [H, N], the sizes for blocks that are global: none for rows, which see everything already.
    """

    lengths: np.ndarray
    sizes: np.ndarray
    global_sizes: np.ndarray
    blocks: np.ndarray


def device_tables(pattern: BlockPattern, device: torch.device, num_blocks: int | None = None) -> Tables:
    """The tables of a pattern on a device, made at the first call and kept with the pattern.

    For texts of up to `num_blocks` blocks, by default all that the pattern serves: a short text need not pay for the
    programs and the memory of the longest. Such tables are made for lengths that halve from one to the next, and not
    under a compiler, which would compile anew for each.
    """
    if num_blocks is not None and pattern.follows_length and not torch.compiler.is_compiling():
        size = pattern.num_blocks
        while num_blocks <= size // 2:
            size //= 2
        if size < pattern.num_blocks:
            if (device, size) not in pattern.tables:
                pattern.tables[device, size] = _make(pattern.shortened(size), device)
            return pattern.tables[device, size]
    # where an earlier call has made them, the graph of one compiled layer serves the layers of all such patterns
    if device not in pattern.devices:
        if torch.compiler.is_compiling():
            _make_in_compiler(pattern.key, device)
        elif device not in pattern.tables:
            pattern.tables[device] = _make(pattern, device)
            pattern.devices.add(device)
    return pattern.tables[device]


# a compiler that meets a pattern without tables has them made on the spot, and then finds them where they belong; in
# torch 2.11 it can hand over the key alone, and what it has looked into, as `devices`, must stay as it was
@torch.compiler.assume_constant_result
def _make_in_compiler(key: str, device: torch.device) -> None:
    pattern = pattern_of(key)
    if device in pattern.tables:
        return
    # what an exporter does to tensors ends with its thread: in another one they are real
    with ThreadPoolExecutor(1) as pool:
        pattern.tables[device] = pool.submit(_make, pattern, device).result()


def _make(pattern, device):
    # tensors of inference mode could not be saved for a backward pass
    with torch.inference_mode(False):
        return Tables(*(torch.from_numpy(table).to(device) for table in _build(pattern)))


def _build(pattern) -> Iterator[np.ndarray]:
    """All tables in the order of `Tables`."""
    rows, columns = zip(*(_both_directions(pattern, plan) for plan in range(len(pattern.lists))), strict=True)
    for plans in (rows, columns):
        yield from _items(pattern, plans)
        yield _int32(np.concatenate([plan.blocks for plan in plans]))
    sizes = np.stack([plan.sizes for plan in columns])  # [P, H, N]
    ends = sizes.cumsum().reshape(sizes.shape)
    yield _int32(np.concatenate([ends[:, :, :1] - sizes[:, :, :1], ends], axis=2))
    yield _int32(np.array(pattern.plan_of_length))


def _int32(table):
    return np.ascontiguousarray(table, dtype=np.int32)


def _both_directions(pattern, index):
    """(rows, columns) of a plan, without entries that no length of example has."""
    num_blocks = pattern.num_blocks
    served = range(1, num_blocks + 1) if pattern.follows_length else [num_blocks]
    lengths = np.array([length for length in served if pattern.plan_of_length[length] == index], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    front, back = pattern.global_blocks(longest)
    offsets, entries = (table.numpy().astype(np.int64) for table in pattern.lists[index])
    sizes = np.diff(offsets)
    blocks = entries[offsets[0, 0] : offsets[-1, -1]]
    head, row = np.divmod(np.repeat(np.arange(sizes.size), sizes.ravel()), num_blocks)
    kept = (row >= front) & (row < longest - back) & (blocks < longest)
    head, row, blocks = head[kept], row[kept], blocks[kept]
    shape = (pattern.num_heads, num_blocks)

    def direction(block, other):
        """Sizes [H, N] and the lists of `block`, each ascending."""
        order = np.lexsort((other, block, head))
        sizes = np.bincount(head * num_blocks + block, minlength=shape[0] * shape[1]).reshape(shape)
        return sizes, other[order]

    by_row, row_lists = direction(row, blocks)
    by_column, column_lists = direction(blocks, row)
    return (
        _Plan(lengths, by_row, np.zeros_like(by_row), row_lists),
        _Plan(lengths, by_column, by_column, column_lists),
    )


def _items(pattern, plans):
    """(parts, items, merges) of one direction."""
    work = [_work(pattern, plan) for plan in plans]
    # on average over the blocks of its longest example, in the plan where that is most
    mean = max(
        counts.sum() / (pattern.num_heads * plan.lengths.max(initial=1))
        for plan, (_, counts) in zip(plans, work, strict=True)
    )
    chunk = CHUNK * max(1, int(np.ceil(mean / CHUNK)))
    listed = np.concatenate([plan.blocks for plan in plans])
    sizes = np.stack([plan.sizes for plan in plans])
    ends = sizes.cumsum().reshape(sizes.shape)  # [P, H, N]
    parts, items, merges = [], [], []
    for (blocks, counts), size, end in zip(work, sizes, ends, strict=True):
        for head_counts, head_size, head_end in zip(counts, size, end, strict=True):
            # columns: begin, end, largest; the list of a block that is counted from the end depends on where that is
            lists = np.stack([head_end - head_size, head_end, np.full_like(head_end, -1)], axis=1)
            lists[head_size > 0, 2] = listed[head_end[head_size > 0] - 1]
            lists = np.concatenate([np.tile([0, 0, -1], (pattern.back, 1)), lists])
            cut = np.flatnonzero(head_counts > chunk)
            cut = cut[np.argsort(-head_counts[cut], kind="stable")]
            whole = np.flatnonzero((head_counts <= chunk) & ((head_counts > 0) | (blocks >= 0)))
            number = -(-head_counts[cut] // chunk)
            start = number.cumsum() - number
            which = np.repeat(cut, number)
            entry = (np.arange(len(which)) - np.repeat(start, number)) * chunk
            for rows, index, first, last in (
                (parts, which, entry, entry + chunk),
                (items, whole, np.zeros_like(whole), np.full_like(whole, chunk)),
                (merges, cut, start, np.full_like(cut, chunk)),
            ):
                rows.append(np.column_stack([blocks[index], first, last, lists[index]]))
    return [_stack(rows, len(plans), pattern.num_heads) for rows in (parts, items, merges)]


def _work(pattern, plan):
    """(blocks [C], entries [H, C] of each) of a plan, negative blocks first: for the longest example where it differs.

    No shorter one has more entries in a block.
    """
    num_blocks, longest = pattern.num_blocks, int(plan.lengths.max(initial=0))
    front, back = pattern.global_blocks(longest)
    blocks = np.arange(num_blocks)
    near = np.zeros(num_blocks, dtype=np.int64)
    near[:longest] = np.subtract(*window_ends(longest, front, back, pattern.window)[::-1])
    ordinary = np.zeros(num_blocks, dtype=bool)
    ordinary[:longest] = ~find_global(longest, front, back)
    counts = np.where(
        ordinary, front + near + back + plan.sizes, np.where(blocks < front, longest + plan.global_sizes, 0)
    )
    from_end = []
    for place in range(pattern.back):
        lengths = plan.lengths[[place < pattern.global_blocks(int(length))[1] for length in plan.lengths]]
        from_end.append((lengths + plan.global_sizes[:, lengths - 1 - place]).max(axis=1, initial=0))
    ends = np.stack(from_end, axis=1) if from_end else np.zeros((pattern.num_heads, 0), dtype=np.int64)
    return np.concatenate([-1 - np.arange(pattern.back), blocks]), np.concatenate([ends, counts], axis=1)


def _stack(rows, num_plans, num_heads):
    """[P, H, most, 6] of the items of every plan and head, padded with NOTHING."""
    most = max(len(row) for row in rows)
    table = np.tile(np.array([NOTHING, 0, 1, 0, 0, -1], dtype=np.int32), (len(rows), most, 1))
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    return table.reshape(num_plans, num_heads, most, FIELDS)
