"""What all samplers share: numbers keyed by seed, epoch and row, a rank's share of a batch, batches from workers."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

# streams of `random_words`: what one epoch draws apart
DOCUMENT_STREAM, ROW_STREAM, MASK_STREAM, CUT_STREAM = 0, 1, 2, 3


def random_words(seed: int, epoch: int, count: int, *, stream: int = 0, row: int = 0) -> np.ndarray:
    """`count` random uint64 that depend on these numbers alone; rows part the samples of a stream.

    They are Philox's, keyed by (seed, epoch), its counter beginning at (row, stream).
    """
    # raw words: numpy promises these across its versions, not what its generators make of them
    key, counter = np.array([seed % 2**64, epoch], np.uint64), np.array([0, 0, row, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def permutation(seed: int, epoch: int, count: int, *, stream: int = 0) -> np.ndarray:
    """The numbers below `count` in the order of an epoch, int64 [count]."""
    return np.argsort(random_words(seed, epoch, count, stream=stream), kind="stable")


def rank_rows(batch_size: int, *, rank: int, world_size: int) -> slice:
    """The contiguous rows of a batch that are a rank's. Raises ValueError where they cannot be shared evenly."""
    check_counts(batch_size=batch_size, world_size=world_size)
    if batch_size % world_size:
        raise ValueError(f"batch_size={batch_size} must be a multiple of world_size={world_size} (processes)")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie in 0..{world_size - 1} (world_size={world_size})")
    local = batch_size // world_size
    return slice(rank * local, (rank + 1) * local)


def check_counts(**counts: int) -> None:
    """Raise a ValueError that names the first count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")


def check_stepping(start_step: int, workers: int) -> None:
    """Raise a ValueError where one is negative."""
    if start_step < 0 or workers < 0:
        raise ValueError(f"start_step={start_step} and workers={workers} must not be negative")


def steps_from(dataset: Dataset, start_step: int, workers: int) -> Iterator[Any]:
    """`dataset[step]` for each step from `start_step` on, without end; in `workers` processes if there are any."""
    steps = itertools.count(start_step)
    if not workers:
        yield from map(dataset.__getitem__, steps)
        return
    loader = DataLoader(
        dataset,
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        # else the loader draws from the global generator, and dropout would depend on `workers`
        generator=torch.Generator(),
    )
    with _signals_blocked():
        batches = iter(loader)
    yield from batches


# sent to a process group they are for the training loop, which saves first and then ends its workers
_LOOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


def _ignore_signals(worker: int) -> None:
    for number in _LOOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Hold signals back while workers start: they inherit the mask, so none strikes before they ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _LOOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
