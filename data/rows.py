"""Rows of tokens for pretraining: documents joined to full rows, or one a row in batches of like length.

What a row holds depends on (seed, epoch, its number) alone, so a run goes on where it stopped, and ranks and workers
change nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from data.errors import DataError
from data.masking import MaskedBatch, Masking, Row, mask_rows
from data.steps import DOCUMENT_STREAM, ROW_STREAM, check_counts, check_stepping, permutation, rank_rows, steps_from
from data.tokens import TokenSplit

# batches among which documents are sorted by length: more waste less padding, fewer mix better
_POOL_BATCHES = 64
# the first and the last token of a row
_FRAME = 2


class RowSource(Protocol):
    """Rows by epoch and number."""

    @property
    def seed(self) -> int:
        """With an epoch and a row's number it decides all that is random."""
        ...

    @property
    def shuffled(self) -> bool:
        """Whether every epoch has an order of its own."""
        ...

    @property
    def padded_len(self) -> int | None:
        """The length that all rows are padded to; None for the longest of a batch."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        ...

    def row(self, epoch: int, number: int) -> Row:
        """Row `number` in the order of `epoch`."""
        ...


class RowBatches:
    """Endless `MaskedBatch`es of a source from `start_step` on.

    Row r of step s is row number s * batch_size + r of the run; a rank takes its contiguous rows of the batch, so that
    all ranks together see that batch. Raises ValueError where batch_size is not a multiple of world_size.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_size: int,
        masking: Masking,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        rows = rank_rows(batch_size, rank=rank, world_size=world_size)
        check_stepping(start_step, workers)
        self.dataset = _Batches(source, batch_size, masking, rows)
        self.start_step = start_step
        self.workers = workers

    @property
    def num_rows(self) -> int:
        """Rows an epoch, over all ranks."""
        return self.dataset.source.num_rows

    def batch(self, step: int) -> MaskedBatch:
        """This rank's rows of any step."""
        return self.dataset[step]

    def rows(self, numbers: Sequence[int]) -> MaskedBatch:
        """These rows of the run, always masked alike; those of epoch 0 are below `num_rows`."""
        return self.dataset.of(numbers)

    def __iter__(self) -> Iterator[MaskedBatch]:
        yield from steps_from(self.dataset, self.start_step, self.workers)


class TokenRows(RowBatches):
    """Batches of documents framed as `<s> … </s>`.

    shuffle: whether documents and rows stand in an order of the epoch's, else as in the split, for evaluation.
    join: documents of an epoch, in its order, with sep_id between two, are cut to rows of exactly `seq_len` tokens
    (`JoinedRows`); else each document is a row, cut to `seq_len`, in batches of like length (`DocumentRows`).
    drop_last: leaves out what fills no row, or no batch where documents are not joined.

    Raises DataError where the split has no row.
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
        join: bool = True,
        drop_last: bool = True,
        shuffle: bool = True,
        **sharing: int,
    ) -> None:
        check_counts(seq_len=seq_len, batch_size=batch_size)
        if seq_len <= _FRAME:
            raise ValueError(f"seq_len={seq_len} must be at least {_FRAME + 1}: a token and the two of its frame")
        if join:
            source: RowSource = JoinedRows(split, seq_len, seed, cls_id, sep_id, drop_last, shuffle)
        else:
            multiple = batch_size if drop_last else 1
            source = DocumentRows(split, seq_len, seed, cls_id, sep_id, multiple, batch_size, shuffle)
        masking = replace(masking, special_ids=(*masking.special_ids, cls_id, sep_id))
        super().__init__(source, batch_size=batch_size, masking=masking, **sharing)


@dataclass(frozen=True, eq=False)
class JoinedRows:
    """Documents joined and cut to full rows, as Longformer's pretraining does: a document may go on in another row.

    Documents stand in an order of the epoch's, and so do the rows, as those of one long document would else meet in
    one batch. Every token of the split is in one row of an epoch, but those of an incomplete last row if it is dropped.
    """

    split: TokenSplit
    seq_len: int
    seed: int
    cls_id: int
    sep_id: int
    drop_last: bool
    shuffled: bool = True

    def __post_init__(self) -> None:
        if not self.num_rows:
            raise DataError(
                f"seq_len={self.seq_len} needs {self.seq_len - _FRAME:,} tokens, the split's documents joined have "
                f"{self._num_joined:,}: take a smaller seq_len, or more text by data.path="
            )

    @property
    def padded_len(self) -> int:
        """Every row is padded to this, the last of an epoch if it is not dropped."""
        return self.seq_len

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        whole, rest = divmod(self._num_joined, self.seq_len - _FRAME)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def _num_joined(self) -> int:
        return self.split.num_tokens + self.split.num_documents - 1

    def row(self, epoch: int, number: int) -> Row:
        """Row `number` in the order of `epoch`."""
        documents, ends, rows = _joined_epoch(self, epoch)
        start = int(rows[number]) * (self.seq_len - _FRAME)
        stop = min(start + self.seq_len - _FRAME, self._num_joined)
        ids = np.full(stop - start + _FRAME, self.sep_id, np.int64)
        ids[0] = self.cls_id
        # ends count the separator after each document, which is in `ids` already
        place = int(np.searchsorted(ends, start, side="right"))
        here = start
        while here < stop:
            first, last = (int(offset) for offset in self.split.offsets[documents[place] : documents[place] + 2])
            begin = last - (int(ends[place]) - 1 - here)
            count = min(last - begin, stop - here)
            ids[1 + here - start : 1 + here - start + count] = self.split.tokens[begin : begin + count]
            here, place = int(ends[place]), place + 1
        return Row(ids)


@dataclass(frozen=True, eq=False)
class DocumentRows:
    """One document a row, cut to `seq_len`; those of a batch have like lengths.

    An epoch is an order of the documents, cut to a multiple of `multiple`; among some batches at a time they are sorted
    by length, and the batches then stand in an order of their own.
    """

    split: TokenSplit
    seq_len: int
    seed: int
    cls_id: int
    sep_id: int
    multiple: int
    batch_size: int
    shuffled: bool = True
    padded_len: None = None

    def __post_init__(self) -> None:
        if not self.num_rows:
            raise DataError(
                f"a batch of {self.multiple} rows needs as many documents, the split has "
                f"{self.split.num_documents}: take a smaller train.batch_size, or more text by data.path="
            )

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return self.split.num_documents // self.multiple * self.multiple

    def row(self, epoch: int, number: int) -> Row:
        """Row `number` in the order of `epoch`."""
        document = _document_epoch(self, epoch)[number]
        first, last = (int(offset) for offset in self.split.offsets[document : document + 2])
        body = self.split.tokens[first : min(last, first + self.seq_len - _FRAME)]
        return Row(np.concatenate([[self.cls_id], body, [self.sep_id]]).astype(np.int64))


class _Batches(Dataset):
    """Step -> a rank's rows. What travels to a worker is the split's path and the settings."""

    def __init__(self, source: RowSource, batch_size: int, masking: Masking, rows: slice) -> None:
        self.source, self.batch_size, self.masking, self.rows = source, batch_size, masking, rows

    def numbers(self, step: int) -> range:
        """Which rows of the run the rank has in a step."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)[self.rows]

    def of(self, numbers: Sequence[int]) -> MaskedBatch:
        """These rows of the run."""
        places = [divmod(number, self.source.num_rows) for number in numbers]
        rows = [self.source.row(*place) for place in places]
        seed, length = self.source.seed, self.source.padded_len
        return mask_rows(rows, masking=self.masking, seed=seed, epoch_rows=places, seq_len=length)

    def __getitem__(self, step: int) -> MaskedBatch:
        return self.of(self.numbers(step))


def epoch_order(source: RowSource, epoch: int, count: int, *, stream: int) -> np.ndarray:
    """The numbers below `count` in the order in which an epoch takes them, int64 [count]."""
    return permutation(source.seed, epoch, count, stream=stream) if source.shuffled else np.arange(count)


# a batch touches one epoch, or two where it crosses the border
@functools.lru_cache(maxsize=4)
def _joined_epoch(source: JoinedRows, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents in order, where each ends (its separator counted) when they are joined, the rows in order."""
    documents = epoch_order(source, epoch, source.split.num_documents, stream=DOCUMENT_STREAM)
    ends = np.cumsum(np.diff(source.split.offsets)[documents] + 1)
    return documents, ends, epoch_order(source, epoch, source.num_rows, stream=ROW_STREAM)


@functools.lru_cache(maxsize=4)
def _document_epoch(source: DocumentRows, epoch: int) -> np.ndarray:
    """The document of each row."""
    documents = epoch_order(source, epoch, source.split.num_documents, stream=DOCUMENT_STREAM)[: source.num_rows]
    lengths = np.minimum(np.diff(source.split.offsets)[documents], source.seq_len)
    # a stable sort by pool, then by length
    by_length = documents[np.lexsort((lengths, np.arange(len(documents)) // (_POOL_BATCHES * source.batch_size)))]
    whole = len(documents) // source.batch_size
    batches = by_length[: whole * source.batch_size].reshape(whole, source.batch_size)
    order = epoch_order(source, epoch, whole, stream=ROW_STREAM)
    return np.concatenate([batches[order].ravel(), by_length[whole * source.batch_size :]])
