"""Lists of key blocks for every head and row of blocks: how they are stored, from what they are made, a fair draw."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

MAX_ENTRIES = 2**31 - 1  # offsets are int32


class BlockLists(NamedTuple):
    """CSR over (head, row): `row_blocks[row_offsets[h, i] : row_offsets[h, i + 1]]` are the key blocks of row i.

    row_offsets: int32 [H, N + 1] on the CPU, into row_blocks: int32 [entries]. A block may repeat.
    """

    row_offsets: torch.Tensor
    row_blocks: torch.Tensor


def lists_of_slots(slots: np.ndarray, num_blocks: int) -> BlockLists:
    """The entries of slots [H, rows, r] that are not negative, in their order; rows past the last one have none."""
    num_heads, num_rows, _ = slots.shape
    kept = slots >= 0
    lengths = np.zeros((num_heads, num_blocks), dtype=np.int64)
    lengths[:, :num_rows] = kept.sum(axis=2)
    return _pack(lengths, slots[kept])


def lists_of_counts(counts: np.ndarray) -> BlockLists:
    """Block j of row i as often as counts [H, N, N] say, in ascending order."""
    head, row, block = counts.nonzero()
    return _pack(counts.sum(axis=2), np.repeat(block, counts[head, row, block]))


def no_lists(num_heads: int, num_blocks: int) -> BlockLists:
    """Nothing for every row."""
    return _pack(np.zeros((num_heads, num_blocks), dtype=np.int64), np.zeros(0))


def first_rows(lists: BlockLists, num_blocks: int) -> BlockLists:
    """The lists of the first `num_blocks` rows, without entries past them."""
    offsets, entries = (table.numpy().astype(np.int64) for table in lists)
    sizes = np.diff(offsets)
    row = np.repeat(np.arange(sizes.size) % sizes.shape[1], sizes.ravel())
    head = np.repeat(np.arange(sizes.size) // sizes.shape[1], sizes.ravel())
    kept = (row < num_blocks) & (entries < num_blocks)
    places = head[kept] * num_blocks + row[kept]
    return _pack(np.bincount(places, minlength=len(sizes) * num_blocks).reshape(-1, num_blocks), entries[kept])


def _pack(lengths, blocks):
    """From the lengths [H, N] of the rows and all their blocks, head by head and row by row."""
    num_heads, num_blocks = lengths.shape
    ends = np.concatenate([[0], lengths.ravel().cumsum()])
    if ends[-1] > MAX_ENTRIES:
        raise ValueError(f"a pattern of {ends[-1]:,} listed blocks is too large, the limit is {MAX_ENTRIES:,}")
    places = np.arange(num_heads)[:, None] * num_blocks + np.arange(num_blocks + 1)
    return BlockLists(torch.from_numpy(ends[places].astype(np.int32)), torch.from_numpy(blocks.astype(np.int32)))


def constants(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors as an operator's arguments; those without an element anew, as torch.export.save stops at one."""
    return [
        tensor if tensor.numel() else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor in tensors
    ]


def global_ends(num_blocks: int, front: int, back: int) -> tuple[int, int]:
    """How many blocks at the start and at the end of an example of n blocks are global: at most n, the front first."""
    front = min(front, num_blocks)
    return front, min(back, num_blocks - front)


def find_global(num_blocks: int, front: int, back: int) -> np.ndarray:
    """bool [n]: which blocks of an example of n are global, of which `front + back <= n` are."""
    blocks = np.arange(num_blocks)
    return (blocks < front) | (blocks >= num_blocks - back)


def window_ends(
    num_blocks: int, front: int, back: int, window: int, num_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1, each [rows], of the blocks that are in a row's window and not global.

    In an example of n = `num_blocks`, of which `front + back <= n` are global. Rows: the blocks, or `num_rows`.
    """
    rows, half = np.arange(num_blocks if num_rows is None else num_rows), (window - 1) // 2
    ends = (rows - half, rows + half + 1) if window else (rows, rows)
    first, last = (np.clip(end, front, num_blocks - back) for end in ends)
    return first, last


def draw_unseen(
    random: np.random.RandomState,
    num_heads: int,
    num_blocks: int,
    num_random: int,
    front: int,
    back: int,
    window: int,
    num_rows: int | None = None,
) -> np.ndarray:
    """Slots int64 [H, rows, r]: r blocks for each row that are neither global nor in its window.

    In an example as for `window_ends`. Without replacement, every set of them as likely as every other; -1 where a row
    has fewer, and in global rows. Rows past the example, if `num_rows` is larger, are those of longer ones, in which
    none of its rows at the end is global.
    """
    num_rows = num_blocks if num_rows is None else num_rows
    near_first, near_last = window_ends(num_blocks, front, back, window, num_rows)
    num_unseen = num_blocks - front - back - (near_last - near_first)  # [rows]
    num_unseen[:front] = 0
    if num_rows == num_blocks:
        num_unseen[num_blocks - back :] = 0
    # ranks among what a row does not see; a drawn rank steps over the earlier ones, lowest first
    ranks = np.full((num_heads, num_rows, num_random), num_blocks)
    for slot in range(num_random):
        left = num_unseen - slot
        rank = (random.random_sample((num_heads, num_rows)) * np.maximum(left, 1)).astype(np.int64)
        for earlier in np.moveaxis(np.sort(ranks[:, :, :slot], axis=2), 2, 0):
            rank += rank >= earlier
        ranks[:, :, slot] = np.where(left > 0, rank, num_blocks)
    blocks = front + ranks
    blocks += np.where(blocks >= near_first[:, None], (near_last - near_first)[:, None], 0)
    return np.where(ranks < num_blocks, blocks, -1)


def unseen(num_blocks: int, front: int, back: int, window: int) -> np.ndarray:
    """bool [n, n]: whether row i is ordinary and block j neither global nor in its window; `front + back <= n`."""
    blocks, ordinary = np.arange(num_blocks), ~find_global(num_blocks, front, back)
    first, last = window_ends(num_blocks, front, back, window)
    near = (blocks >= first[:, None]) & (blocks < last[:, None])
    return ordinary & ordinary[:, None] & ~near
