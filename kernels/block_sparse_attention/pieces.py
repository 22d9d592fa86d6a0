"""The work of the path in plain PyTorch, planned on the host: which blocks of keys each block of queries meets, when.

A row is one block of queries of one head of one example. Rows that see many blocks are cut into pieces; pieces of about
one length make a chunk, whose scores are one product.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from kernels.block_sparse_attention.lists import BlockLists, find_global, global_ends, window_ends

PIECE_KEYS = 1024  # of one row at a time, so that a row that sees everything needs no memory for all of its scores


@dataclass(frozen=True)
class Layout:
    """What is global, near and listed, as in `BlockPattern`: `block_size` in tokens, the others in blocks."""

    lists: Sequence[BlockLists]
    plan_of_length: Sequence[int]
    block_size: int
    front: int
    back: int
    window: int
    _known: dict = field(default_factory=dict, init=False)

    def seen(self, num_blocks: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """What an example of n blocks sees: the numbers [H, n] of blocks of each row, and for each head those blocks,
        row after row.
        """
        if num_blocks not in self._known:
            self._known[num_blocks] = self._find_seen(num_blocks)
        return self._known[num_blocks]

    def _find_seen(self, num_blocks):
        front, back = global_ends(num_blocks, self.front, self.back)
        blocks, is_global = np.arange(num_blocks), find_global(num_blocks, front, back)
        # what all heads share: every block for a global row, else the global ones and the window
        first, last = window_ends(num_blocks, front, back, self.window)
        near = np.where(is_global, 0, last - first)
        always = np.where(is_global[:, None], True, is_global).nonzero()
        shared_rows = np.concatenate([always[0], np.repeat(blocks, near)])
        shared = np.concatenate([always[1], _ranges(first, near)])
        # what each head lists for the others
        lists = self.lists[self.plan_of_length[num_blocks]]
        offsets, listed = lists.row_offsets.numpy(), lists.row_blocks.numpy()
        counts, seen = [], []
        for starts, ends in zip(offsets[:, :num_blocks], offsets[:, 1 : num_blocks + 1], strict=True):
            lengths = np.where(is_global, 0, ends - starts)
            own, own_rows = listed[_ranges(starts, lengths)], np.repeat(blocks, lengths)
            kept = own < num_blocks
            rows = np.concatenate([shared_rows, own_rows[kept]])
            counts.append(np.bincount(rows, minlength=num_blocks))
            seen.append(np.concatenate([shared, own[kept]])[np.argsort(rows, kind="stable")])
        return np.stack(counts), seen


class Chunk(NamedTuple):
    """Pieces that are computed together, R of them with up to L blocks; no row is in a chunk twice.

    Blocks are counted through: block i of head h of example b is (b * H + h) * N + i.
    """

    rows: torch.Tensor  # [R]
    blocks: torch.Tensor  # [R, L]
    seen: torch.Tensor | None  # bool [R, L * block_size], None where all keys of the blocks are there
    continues: bool  # whether an earlier chunk held other pieces of these rows


def chunks(
    layout: Layout, blocks_of_examples: Sequence[int], heads: range, valid: torch.Tensor, max_scores: int
) -> Iterator[Chunk]:
    """All pieces of some examples and heads, in chunks of about `max_scores` scores, the first of all rows first.

    blocks_of_examples: each example's number of blocks. valid: bool [B, N, block_size] of real keys, on the device of
    the tensors. Examples and heads are counted from the first one given.
    """
    num_blocks, block_size = valid.shape[1:]
    is_whole = valid.all(dim=2).cpu().numpy().ravel()
    rows, lengths, starts, seen = _rows(layout, blocks_of_examples, heads, num_blocks)
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
    ends, begin = np.searchsorted(piece, piece, side="right"), 0
    while begin < len(rows):
        longest = lengths[begin]
        end = min(ends[begin], begin + max(1, max_scores // (longest * block_size**2)))
        part, column = slice(begin, end), np.arange(longest)
        inside = column < lengths[part, None]
        blocks = seen[np.where(inside, starts[part, None] + column, starts[part, None])]  # [R, L]
        of_example = blocks // (len(heads) * num_blocks) * num_blocks + blocks % num_blocks  # whatever the head
        seen_keys = None
        if not (inside.all() and is_whole[of_example].all()):
            seen_keys = valid.view(-1, block_size)[_tensor(of_example, valid)] & _tensor(inside, valid)[:, :, None]
            seen_keys = seen_keys.flatten(1)
        yield Chunk(_tensor(rows[part], valid), _tensor(blocks, valid), seen_keys, bool(piece[begin]))
        begin = end


def _rows(layout, blocks_of_examples, heads, num_blocks):
    """Rows that see something: their numbers, how many blocks they see, where these start, and all these blocks."""
    parts = [(np.zeros(0, dtype=np.int64),) * 3]
    for length in sorted(set(blocks_of_examples)):
        examples = np.flatnonzero(np.array(blocks_of_examples) == length)
        counts, seen = layout.seen(length)
        counts, seen = counts[heads.start : heads.stop], seen[heads.start : heads.stop]
        first = (examples[:, None] * len(heads) + np.arange(len(heads))) * num_blocks  # of the heads of each example
        rows = first[:, :, None] + np.arange(length)
        seen = np.repeat(first, counts.sum(axis=1), axis=1) + np.concatenate(seen)
        parts.append((rows.ravel(), np.tile(counts.ravel(), len(examples)), seen.ravel()))
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
