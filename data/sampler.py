"""Training batches in an order that is a pure function of (seed, step), whatever the workers and ranks."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.errors import DataError
from data.steps import check_counts, check_stepping, random_words, rank_rows, steps_from


def max_seq_len(split: np.ndarray) -> int:
    """The longest sequence length a split can serve: one below its length, for the shifted target."""
    return len(split) - 1


class CharBatches:
    """Endless batches of one split from `start_step` on.

    Each item is an int64 tensor [local_batch, seq_len + 1]: inputs and, shifted by one, targets. An epoch
    cuts the split into non-overlapping chunks from a random offset below seq_len and permutes them; offset
    and permutation come from Philox keyed by (seed, epoch). Row r of step s is chunk number s * batch_size +
    r of the run; a rank takes its contiguous rows of the batch, so that all ranks together see that batch.

    Raises ValueError where batch_size is not a multiple of world_size, DataError where seq_len does not fit.
    """

    def __init__(
        self,
        split: np.ndarray | str | Path,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        check_counts(seq_len=seq_len)
        rows = rank_rows(batch_size, rank=rank, world_size=world_size)
        check_stepping(start_step, workers)
        text = _as_text(split)
        if seq_len > max_seq_len(text.bytes):
            raise DataError(
                f"seq_len={seq_len} needs {seq_len + 1:,} characters, the split has {len(text.bytes):,}: "
                f"seq_len may be at most {max_seq_len(text.bytes):,}, or name a longer file by data.path="
            )
        if workers and text.file is None:
            raise ValueError(f"workers={workers} need a memory-mapped split, not an array in memory")
        self.dataset = _Batches(text, seq_len, batch_size, seed, rows)
        self.start_step = start_step
        self.workers = workers

    @property
    def num_chunks(self) -> int:
        """Chunks an epoch, over all ranks."""
        return self.dataset.order.num_chunks

    def batch(self, step: int) -> torch.Tensor:
        """The batch of any step, [local_batch, seq_len + 1] int64."""
        return self.dataset[step].long()

    def __iter__(self) -> Iterator[torch.Tensor]:
        # workers send bytes, an eighth of what the model's integers take
        yield from map(torch.Tensor.long, steps_from(self.dataset, self.start_step, self.workers))


@dataclass(frozen=True)
class ChunkOrder:
    """Where the chunks of a split start, epoch by epoch."""

    num_bytes: int
    seq_len: int
    seed: int

    @property
    def num_chunks(self) -> int:
        """Chunks that any offset leaves room for: the same number in every epoch."""
        return max(1, (self.num_bytes - self.seq_len) // self.seq_len)

    def starts(self, epoch: int) -> np.ndarray:
        """First byte of each chunk in the order of `epoch`, int64 [num_chunks]."""
        words = random_words(self.seed, epoch, 1 + self.num_chunks)
        room = self.num_bytes - self.num_chunks * self.seq_len
        offset = int(words[0]) % min(self.seq_len, room)
        return offset + np.argsort(words[1:], kind="stable") * self.seq_len


class _Batches(Dataset):
    """Step -> uint8 batch. What travels to a worker is a path, two numbers and the settings."""

    def __init__(self, text: _Text, seq_len: int, batch_size: int, seed: int, rows: slice) -> None:
        self.text, self.batch_size, self.rows = text, batch_size, rows
        self.order = ChunkOrder(len(text.bytes), seq_len, seed)

    def __getitem__(self, step: int) -> torch.Tensor:
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)[self.rows]
        batch = np.empty((len(numbers), self.order.seq_len + 1), np.uint8)
        for row, number in enumerate(numbers):
            epoch, place = divmod(number, self.order.num_chunks)
            start = _epoch_starts(self.order, epoch)[place]
            batch[row] = self.text.bytes[start : start + self.order.seq_len + 1]
        return torch.from_numpy(batch)


# a batch touches one epoch, or two where it crosses the border
@functools.lru_cache(maxsize=4)
def _epoch_starts(order: ChunkOrder, epoch: int) -> np.ndarray:
    return order.starts(epoch)


class _Text:
    """The bytes of a split; pickled as (file, offset, length) and mapped anew on the other side."""

    def __init__(self, split: np.ndarray, file: str | None, offset: int) -> None:
        self.bytes, self.file, self.offset = split, file, offset

    def __getstate__(self) -> tuple:
        return (None if self.file else self.bytes, self.file, self.offset, len(self.bytes))

    def __setstate__(self, state: tuple) -> None:
        held, self.file, self.offset, length = state
        self.bytes = held if self.file is None else _map(self.file, self.offset, length)


def _as_text(split: np.ndarray | str | Path) -> _Text:
    if isinstance(split, str | Path):
        size = Path(split).stat().st_size if Path(split).is_file() else 0
        if not size:
            raise DataError(f"{split} is missing or empty: name a file that holds text")
        return _Text(_map(str(split), 0, size), str(split), 0)
    if split.dtype != np.uint8 or split.ndim != 1:
        raise ValueError(f"a split is a uint8 array [length], got {split.dtype} {list(split.shape)}")
    root = split
    while isinstance(root.base, np.ndarray):
        root = root.base
    if isinstance(root, np.memmap) and isinstance(root.base, mmap.mmap) and split.flags.c_contiguous:
        # a slice of a memory map keeps its parent's offset, so the addresses decide
        offset = root.offset + split.ctypes.data - root.ctypes.data
        return _Text(split, str(root.filename), offset)
    return _Text(split, None, 0)


def _map(file: str, offset: int, length: int) -> np.memmap:
    return np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=(length,))
