"""Rows for masked tokens and sentence order: two segments of one document, half of the time the wrong way round."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from data.errors import DataError
from data.masking import Masking, Row
from data.rows import RowBatches, epoch_order
from data.steps import CUT_STREAM, ROW_STREAM, check_counts, random_words
from data.tokens import TokenSplit

# [CLS], and a [SEP] after each segment
_FRAME = 3


class SentenceOrderRows(RowBatches):
    """Batches of rows `[CLS] A [SEP] B [SEP]` with `token_type_ids` and `order_labels` (ALBERT 2019, Nyströmformer).

    `SegmentPairs` says what A and B are; `shuffle` is as in `TokenRows`. Raises DataError where no document of the
    split can be cut in two.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        cls_id: int,
        sep_id: int,
        masking: Masking,
        shuffle: bool = True,
        **sharing: int,
    ) -> None:
        check_counts(seq_len=seq_len)
        if seq_len < _FRAME + 2:
            raise ValueError(f"seq_len={seq_len} must be at least {_FRAME + 2}: two tokens and three that frame them")
        pairs = SegmentPairs(split, seq_len, seed, cls_id, sep_id, shuffle)
        masking = replace(masking, special_ids=(*masking.special_ids, cls_id, sep_id))
        super().__init__(pairs, batch_size=batch_size, masking=masking, **sharing)


@dataclass(frozen=True, eq=False)
class SegmentPairs:
    """Each document in pieces of seq_len - 3 tokens, each piece cut in two segments at a random token.

    The last piece of a document is shorter, and left out if it has one token only. The segments are swapped with
    probability 0.5; the first in the row has type 0 with its frame, the second 1. Each epoch has an order of its own.
    """

    split: TokenSplit
    seq_len: int
    seed: int
    cls_id: int
    sep_id: int
    shuffled: bool = True

    def __post_init__(self) -> None:
        if not self.num_rows:
            raise DataError(
                f"no document of the split has two tokens or more ({self.split.num_documents} documents): "
                "name other text by data.path="
            )

    @property
    def padded_len(self) -> int:
        """Every row is padded to this."""
        return self.seq_len

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return int(_piece_ends(self)[-1])

    def row(self, epoch: int, number: int) -> Row:
        """Row `number` in the order of `epoch`."""
        ends, body = _piece_ends(self), self.seq_len - _FRAME
        piece = int(_piece_order(self, epoch)[number])
        document = int(np.searchsorted(ends, piece, side="right"))
        place = piece - (int(ends[document - 1]) if document else 0)
        first, last = (int(offset) for offset in self.split.offsets[document : document + 2])
        start = first + place * body
        tokens = self.split.tokens[start : min(start + body, last)]
        where, swap = random_words(self.seed, epoch, 2, stream=CUT_STREAM, row=number)
        cut = 1 + int(where) % (len(tokens) - 1)
        is_swapped = bool(swap >> np.uint64(63))
        one, two = (tokens[cut:], tokens[:cut]) if is_swapped else (tokens[:cut], tokens[cut:])
        ids = np.concatenate([[self.cls_id], one, [self.sep_id], two, [self.sep_id]]).astype(np.int64)
        types = np.arange(len(ids)) > len(one) + 1
        return Row(ids, types.astype(np.int64), int(is_swapped))


@functools.lru_cache(maxsize=4)
def _piece_ends(pairs: SegmentPairs) -> np.ndarray:
    """How many pieces there are up to the end of each document, int64 [num_documents]."""
    whole, rest = np.divmod(np.diff(pairs.split.offsets), pairs.seq_len - _FRAME)
    return np.cumsum(whole + (rest >= 2))


@functools.lru_cache(maxsize=4)
def _piece_order(pairs: SegmentPairs, epoch: int) -> np.ndarray:
    return epoch_order(pairs, epoch, pairs.num_rows, stream=ROW_STREAM)
