"""Pairs of segments: consecutive, swapped half of the time, every piece once an epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.masking import IGNORED, Masking
from data.sentence_order import SegmentPairs, SentenceOrderRows

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CLS, PAD, SEP, MASK, VOCAB = 0, 1, 2, 3, 10_000
LENGTHS = [1, 40, 13, 2, 26, 1, 14]
STARTS = np.cumsum([4, *LENGTHS])


@pytest.fixture(scope="module")
def split(make_split):
    """Documents in which every token is one more than the one before."""
    return make_split([list(range(start, start + length)) for start, length in zip(STARTS, LENGTHS, strict=False)])


def rows_of(split, **options) -> SentenceOrderRows:
    masking = Masking(mask_id=MASK, pad_id=PAD, vocab_size=VOCAB)
    defaults = {"seq_len": 16, "batch_size": 4, "seed": 0, "cls_id": CLS, "sep_id": SEP, "masking": masking}
    return SentenceOrderRows(split, **{**defaults, **options})


def segments(ids: list[int], types: list[int]) -> tuple[list[int], list[int]]:
    """The two segments of a row, after a look at its frame and types."""
    middle = ids.index(SEP)
    assert ids[0] == CLS and ids[-1] == SEP and ids.count(SEP) == 2 and ids.count(CLS) == 1
    assert types == [0] * (middle + 1) + [1] * (len(ids) - middle - 1)
    return ids[1:middle], ids[middle + 1 : -1]


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize("seq_len", [5, 16, 64])
def test_an_epoch_holds_every_piece_once(split, seq_len, epoch):
    pairs = SegmentPairs(split, seq_len, 0, CLS, SEP)
    body = seq_len - 3
    seen = []
    for number in range(pairs.num_rows):
        row = pairs.row(epoch, number)
        one, two = segments(row.ids.tolist(), row.token_type_ids.tolist())
        assert one and two
        start, end = (two, one) if row.order_label else (one, two)
        joined = start + end
        assert joined == list(range(joined[0], joined[0] + len(joined))), "the second does not follow the first"
        seen.append(joined)
    expected = []
    for start, length in zip(STARTS, LENGTHS, strict=False):
        pieces = [list(range(start + at, start + min(at + body, length))) for at in range(0, length, body)]
        expected += [piece for piece in pieces if len(piece) > 1]
    assert sorted(seen) == expected


def test_swaps_and_cuts_are_even(make_split):
    pairs = SegmentPairs(make_split([list(range(4, 9_004))]), 12, 3, CLS, SEP)
    rows = [pairs.row(epoch, number) for epoch in range(2) for number in range(pairs.num_rows)]
    swapped = np.array([row.order_label for row in rows])
    assert len(rows) == 2000 and abs(swapped.mean() - 0.5) < 0.034  # three standard deviations
    first = [len(segments(row.ids.tolist(), row.token_type_ids.tolist())[0]) for row in rows]
    counts = np.bincount(np.where(swapped, 9 - np.array(first), first))
    assert counts[0] == 0 and len(counts) == 9 and np.abs(counts[1:] / 250 - 1).max() < 0.25
    # neither tells the other
    assert abs(np.corrcoef(first, swapped)[0, 1]) < 0.07


def test_batches_agree_with_their_rows(split):
    rows = rows_of(split)
    source = SegmentPairs(split, 16, 0, CLS, SEP)
    for step in range(6):
        batch = rows.batch(step)
        assert batch.input_ids.shape == batch.token_type_ids.shape == (4, 16)
        ids = batch.input_ids.clone()
        real = batch.targets != IGNORED
        ids[real.nonzero()[:, 0], batch.positions[real]] = batch.targets[real]
        assert (batch.targets[real] > MASK).all()
        for number in range(4):
            expected = source.row(*divmod(4 * step + number, source.num_rows))
            assert ids[number][batch.valid[number]].tolist() == expected.ids.tolist()
            assert batch.token_type_ids[number][batch.valid[number]].tolist() == expected.token_type_ids.tolist()
            assert batch.order_labels[number] == expected.order_label
    assert rows.num_rows == source.num_rows == 3 + 1 + 1 + 2 + 1


def test_epochs_differ_in_order_cuts_and_swaps(split):
    source = SegmentPairs(split, 16, 0, CLS, SEP)
    epochs = [[source.row(epoch, number).ids.tolist() for number in range(source.num_rows)] for epoch in range(4)]
    assert all(sorted(one) != sorted(other) and one != other for one, other in itertools.pairwise(epochs))


@pytest.mark.parametrize("options", [{"start_step": 3}, {"start_step": 3, "workers": 2}])
def test_resume_and_workers(split, options):
    alone = rows_of(split)
    iterator = iter(rows_of(split, **options))
    taken = list(itertools.islice(iterator, 6))
    iterator.close()
    for step, batch in enumerate(taken, start=3):
        for name, part in alone.batch(step).tensors().items():
            assert torch.equal(vars(batch)[name], part), name


def test_ranks_together_see_the_batch_of_one_process(split):
    ranks = [rows_of(split, rank=rank, world_size=2) for rank in range(2)]
    for step in range(6):
        parts = [rank.batch(step) for rank in ranks]
        for name, whole in rows_of(split).batch(step).tensors().items():
            assert torch.equal(torch.cat([vars(part)[name] for part in parts]), whole), name


def test_impossible_settings(split, make_split):
    with pytest.raises(ValueError, match="seq_len=4 must be at least 5"):
        rows_of(split, seq_len=4)
    with pytest.raises(DataError, match=r"no document of the split has two tokens or more \(2 documents\)"):
        rows_of(make_split([[4], [5]]))
