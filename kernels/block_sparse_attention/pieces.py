"""The work of the path in plain PyTorch, planned on the host: which blocks of keys each block of queries meets, when.

A row is one block of queries of one head of one example. Rows that see many blocks are cut into pieces; pieces of about
one length make a chunk, whose scores are one product.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from kernels.block_sparse_attention.lists import BlockLists, window_ends

PIECE_KEYS = 1024  # of one row at a time, so that a row that sees everything needs no memory for all of its scores


class Layout(NamedTuple):
    """What is global, near and listed, as in `BlockPattern`; block sizes in tokens, `window` in blocks."""

    lists: Sequence[BlockLists]
    plan_of_length: Sequence[int]
    block_size: int
    front: int
    back: int
    window: int

    def seen(self, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """What an example of n blocks sees: (numbers [H * n] of blocks of each row, those blocks, row after row)."""
        front = min(self.front, num_blocks)
        back = min(self.back, num_blocks - front)
        blocks = np.arange(num_blocks)
        is_global = (blocks < front) | (blocks >= num_blocks - back)
        offsets, listed = (tensor.numpy() for tensor in self.lists[self.plan_of_length[num_blocks]])
        num_heads = len(offsets)
        # what all heads share: every block for a global row, else the global ones and the window
        first, last = window_ends(num_blocks, front, back, self.window)
        near = np.where(is_global, 0, last - first)
        always = np.where(is_global[:, None], True, is_global).nonzero()
        shared_rows = np.concatenate([always[0], np.repeat(blocks, near)])
        shared_blocks = np.concatenate([always[1], _ranges(first, near)])
        # what each head lists for the others
        counts = np.where(is_global, 0, offsets[:, 1 : num_blocks + 1] - offsets[:, :num_blocks]).ravel()
        listed = listed[_ranges(offsets[:, :num_blocks].ravel(), counts)]
        listed_rows = np.repeat(np.arange(num_heads * num_blocks), counts)[listed < num_blocks]
        of_heads = np.arange(num_heads)[:, None] * num_blocks
        rows = np.concatenate([(of_heads + shared_rows).ravel(), listed_rows])
        seen = np.concatenate([np.tile(shared_blocks, num_heads), listed[listed < num_blocks]])
        return np.bincount(rows, minlength=num_heads * num_blocks), seen[np.argsort(rows, kind="stable")]


class Chunk(NamedTuple):
    """Pieces that are computed together, R of them with up to L blocks; no row is in a chunk twice.

    Blocks of all heads and examples are counted through: block i of head h of example b is (b * H + h) * N + i.
    """

    rows: torch.Tensor  # [R]
    blocks: torch.Tensor  # [R, L]
    seen: torch.Tensor | None  # bool [R, L * block_size], None where all keys of the blocks are there
    continues: bool  # whether an earlier chunk held other pieces of these rows


def chunks(layout: Layout, blocks_of_examples: Sequence[int], valid: torch.Tensor, max_scores: int) -> Iterator[Chunk]:
    """All pieces of a batch, in chunks of about `max_scores` scores, the first pieces of all rows first.

    blocks_of_examples: each example's number of blocks. valid: bool [B, N, block_size] of real keys, on the device of
    the tensors.
    """
    num_blocks, block_size = valid.shape[1:]
    is_whole = valid.all(dim=2).cpu().numpy().ravel()
    rows, lengths, starts, seen = _rows(layout, blocks_of_examples, num_blocks)
    # cut the rows
    most = max(1, PIECE_KEYS // block_size)
    num_pieces = -(-lengths // most)
    piece = _ranges(np.zeros_like(num_pieces), num_pieces)
    rows, starts = (np.repeat(values, num_pieces) for values in (rows, starts))
    lengths = np.minimum(np.repeat(lengths, num_pieces) - piece * most, most)
    starts = starts + piece * most
    # by length, as the shorter ones of a chunk are padded
    order = np.lexsort((-lengths, piece))
    rows, lengths, starts, piece = (values[order] for values in (rows, lengths, starts, piece))
    ends = np.searchsorted(piece, piece, side="right")
    begin, num_heads = 0, len(layout.lists[0].row_offsets)
    while begin < len(rows):
        longest = lengths[begin]
        end = min(ends[begin], begin + max(1, max_scores // (longest * block_size**2)))
        part, column = slice(begin, end), np.arange(longest)
        inside = column < lengths[part, None]
        blocks = seen[np.where(inside, starts[part, None] + column, starts[part, None])]  # [R, L]
        key_blocks = blocks // (num_heads * num_blocks) * num_blocks + blocks % num_blocks  # without the head
        seen_keys = None
        if not (inside.all() and is_whole[key_blocks].all()):
            seen_keys = valid.view(-1, block_size)[_tensor(key_blocks, valid)] & _tensor(inside, valid)[:, :, None]
            seen_keys = seen_keys.flatten(1)
        yield Chunk(_tensor(rows[part], valid), _tensor(blocks, valid), seen_keys, bool(piece[begin]))
        begin = end


def _rows(layout, blocks_of_examples, num_blocks):
    """Rows that see something: their numbers, how many blocks they see, where these start, and all these blocks."""
    num_heads = len(layout.lists[0].row_offsets)
    parts = []
    for length in sorted(set(blocks_of_examples)):
        examples = np.flatnonzero(np.array(blocks_of_examples) == length)
        counts, seen = layout.seen(length)
        first = (examples[:, None] * num_heads + np.arange(num_heads)) * num_blocks  # of the heads of each example
        rows = (first[:, :, None] + np.arange(length)).ravel()
        of_head = counts.reshape(num_heads, length).sum(axis=1)
        seen = (np.repeat(first, of_head, axis=1) + seen).ravel()
        parts.append((rows, np.tile(counts, len(examples)), seen))
    rows, lengths, seen = (np.concatenate(part) for part in zip(*parts, strict=True))
    starts = lengths.cumsum() - lengths
    some = lengths > 0
    return rows[some], lengths[some], starts[some], seen


def _ranges(starts, counts):
    """start, start + 1 … of each start, as many as its count, one after another."""
    ends = counts.cumsum()
    total = ends[-1] if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)


def _tensor(array, like):
    return torch.from_numpy(array).to(like.device)
