"""The order of batches: pure, resumable, the same for any number of ranks and workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.sampler import CharBatches, ChunkOrder, max_seq_len

# newer Pythons warn when a process with threads forks; a worker touches none of them
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> np.memmap:
    """5,003 characters in the middle of a larger file, no two alike in their three-byte neighbourhood."""
    file = tmp_path_factory.mktemp("sampler") / "text"
    np.random.default_rng(0).integers(0, 256, 9_000, dtype=np.uint8).tofile(file)
    return np.memmap(file, np.uint8, "r", offset=1_234, shape=(5_003,))


def first(batches: CharBatches, count: int) -> list[torch.Tensor]:
    iterator = iter(batches)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def test_batches_are_slices_of_the_split(text):
    batches = CharBatches(text, seq_len=50, batch_size=4, seed=0)
    raw = bytes(text)
    for batch in first(batches, 30):
        assert batch.shape == (4, 51) and batch.dtype == torch.int64
        for row in batch.tolist():
            assert bytes(row) in raw


def test_same_seed_and_step_same_batch(text):
    one, two = (CharBatches(text, seq_len=50, batch_size=4, seed=7) for _ in range(2))
    two.batch(1000)  # history must not matter
    assert all(map(torch.equal, first(one, 60), first(two, 60)))
    assert torch.equal(one.batch(59), first(two, 60)[-1])
    other = CharBatches(text, seq_len=50, batch_size=4, seed=8)
    assert not torch.equal(one.batch(0), other.batch(0))


def test_resume_at_start_step(text):
    whole = first(CharBatches(text, seq_len=50, batch_size=4, seed=0), 80)
    resumed = first(CharBatches(text, seq_len=50, batch_size=4, seed=0, start_step=33), 47)
    assert all(map(torch.equal, whole[33:], resumed))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_together_see_the_batch_of_one_process(text, world_size):
    options = {"seq_len": 50, "batch_size": 6, "seed": 0}
    alone = first(CharBatches(text, **options), 40)
    ranks = [first(CharBatches(text, **options, rank=rank, world_size=world_size), 40) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch, torch.cat([batches[step] for batches in ranks]))


@pytest.mark.parametrize(("num_bytes", "seq_len"), [(5_003, 50), (101, 50), (100, 50), (51, 50), (2, 1), (64, 7)])
def test_an_epoch_covers_each_chunk_once(num_bytes, seq_len):
    order = ChunkOrder(num_bytes, seq_len, seed=3)
    for epoch in range(20):
        starts = np.sort(order.starts(epoch))
        assert len(starts) == order.num_chunks
        assert (np.diff(starts) == seq_len).all(), "chunks overlap or leave gaps"
        assert 0 <= starts[0] < seq_len
        assert starts[-1] + seq_len + 1 <= num_bytes
        # less than two sequences stay unused at the two ends
        assert num_bytes - 1 - len(starts) * seq_len < 2 * seq_len


def test_epochs_and_seeds_differ_in_offset_and_order():
    seeds = (0, 1, -1, 2**63 + 1)
    orders = [ChunkOrder(5_003, 50, seed).starts(epoch) for seed in seeds for epoch in range(8)]
    assert len({tuple(starts) for starts in orders}) == len(orders)
    assert len({int(starts.min()) for starts in orders}) > 10
    assert not any((np.diff(starts) > 0).all() for starts in orders)


def test_the_order_is_pinned():
    """Resume across versions of ours and of numpy needs these very numbers."""
    expected = [377, 177, 577, 77, 477, 877, 777, 677, 277]
    assert ChunkOrder(1_000, 100, seed=1).starts(epoch=2).tolist() == expected


def test_batches_run_across_the_border_of_epochs(text):
    batches = CharBatches(text, seq_len=1_000, batch_size=3, seed=0)
    assert batches.num_chunks == 4
    rows = [bytes(row) for batch in first(batches, 4) for row in batch.tolist()]
    for epoch in range(3):
        expected = [bytes(text[start : start + 1_001]) for start in batches.dataset.order.starts(epoch)]
        assert rows[4 * epoch : 4 * epoch + 4] == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_identical_batches(text, workers):
    options = {"seq_len": 50, "batch_size": 4, "seed": 0, "start_step": 5}
    alone = first(CharBatches(text, **options), 40)
    assert all(map(torch.equal, alone, first(CharBatches(text, **options, workers=workers), 40)))


def test_slices_and_paths_find_their_bytes_again(text, tmp_path):
    (tmp_path / "text").write_bytes(bytes(text))
    options = {"seq_len": 50, "batch_size": 2, "seed": 0}
    for split in (text[7:4_000], np.asarray(text)[7:4_000], text[2:][5:3_998]):
        copy = pickle.loads(pickle.dumps(CharBatches(split, **options).dataset))
        assert bytes(copy.text.bytes) == bytes(text[7:4_000])
    from_path = CharBatches(str(tmp_path / "text"), **options)
    assert torch.equal(from_path.batch(3), CharBatches(text, **options).batch(3))


def test_a_worker_is_sent_no_text(text):
    dataset = CharBatches(text, seq_len=50, batch_size=4, seed=0).dataset
    assert len(pickle.dumps(dataset)) < 1_000


def test_the_global_generator_is_left_alone(text):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 2):
        first(CharBatches(text, seq_len=50, batch_size=4, seed=0, workers=workers), 3)
        assert torch.equal(torch.get_rng_state(), before)


def test_signals_do_not_end_workers(text):
    batches = CharBatches(text, seq_len=50, batch_size=4, seed=0, workers=2)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    iterator = iter(batches)
    next(iterator)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    # the second worker may not have run a line of its own yet
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number, name in itertools.product(range(2), ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")):
        os.kill(workers[number].pid, getattr(signal, name))
    rest = list(itertools.islice(iterator, 30))
    assert all(worker.is_alive() for worker in workers)
    assert torch.equal(rest[-1], batches.batch(30))
    iterator.close()
    for worker in workers:
        worker.join(timeout=20)
        assert worker.exitcode == 0


def test_sequence_longer_than_the_split(text):
    assert max_seq_len(text) == 5_002
    CharBatches(text, seq_len=5_002, batch_size=1, seed=0).batch(3)
    message = r"seq_len=5003 needs 5,004 characters, the split has 5,003: .*at most 5,002"
    with pytest.raises(DataError, match=message):
        CharBatches(text, seq_len=5_003, batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "batch_size=5 must be a multiple of world_size=2"),
        ({"world_size": 2, "rank": 2}, r"rank=2 must lie in 0\.\.1"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"start_step": -1}, "start_step=-1 .* must not be negative"),
    ],
)
def test_impossible_settings(text, options, message):
    with pytest.raises(ValueError, match=message):
        CharBatches(text, **{"seq_len": 10, "batch_size": 4, "seed": 0, **options})


def test_workers_refuse_an_array_in_memory(text):
    with pytest.raises(ValueError, match="workers=2 need a memory-mapped split"):
        CharBatches(np.array(text), seq_len=10, batch_size=4, seed=0, workers=2)
    with pytest.raises(ValueError, match=r"uint8 array \[length\], got int64 \[5003\]"):
        CharBatches(np.array(text, np.int64), seq_len=10, batch_size=4, seed=0)


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match="is missing or empty"):
        CharBatches(tmp_path / "none", seq_len=10, batch_size=4, seed=0)
