"""Masks: how many, what stands in their place, what is never touched, and batches of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.masking import IGNORED, MaskedBatch, Masking, Row, mask_rows, mask_tokens
from data.steps import MASK_STREAM, random_words

VOCAB, PAD, MASK, CLS, SEP = 50, 3, 49, 0, 20
MASKING = Masking(mask_id=MASK, pad_id=PAD, vocab_size=VOCAB, special_ids=(CLS, SEP))
ORDINARY = sorted(set(range(VOCAB)) - {PAD, MASK, CLS, SEP})
# even ids begin words
WORDS = Masking(MASK, PAD, VOCAB, (CLS, SEP), word_start=np.arange(VOCAB) % 2 == 0)


def mask(ids, masking=MASKING, *, seed=0, epoch=0, row=0):
    ids = np.asarray(ids)
    return mask_tokens(ids, draws=random_words(seed, epoch, 3 * len(ids), stream=MASK_STREAM, row=row), masking=masking)


def random_row(length: int, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(seed).choice(ORDINARY, length)
    ids[0], ids[-1], ids[length // 2] = CLS, SEP, SEP
    return ids


def words_of(ids) -> list[list[int]]:
    """The positions of each word, by walking along."""
    words: list[list[int]] = []
    for place, number in enumerate(ids):
        if number not in (CLS, SEP, PAD, MASK):
            if number % 2 == 0 or not words or words[-1][-1] != place - 1:
                words.append([])
            words[-1].append(place)
    return words


rows = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=80)


@given(rows, st.integers(0, 2**64 - 1), st.sampled_from([MASKING, WORDS]))
def test_laws_of_any_row(ids, seed, masking):
    before = np.array(ids)
    masked, positions, targets = mask(before, masking, seed=seed)
    assert before.tolist() == ids, "the row handed in must stay"
    restored = masked.copy()
    restored[positions] = targets
    assert restored.tolist() == ids
    assert (np.diff(positions) > 0).all()
    maskable = sum(number in ORDINARY for number in ids)
    assert all(number in ORDINARY for number in targets)
    assert all(number in ORDINARY or number == MASK for number in masked[positions])
    full = max(1, round(0.15 * maskable)) if maskable else 0
    assert len(positions) <= full
    if masking is MASKING:
        assert len(positions) == full
    else:
        chosen = set(positions.tolist())
        if full and full < min(map(len, words_of(ids))):  # no word fits: the start of one
            assert len(positions) == full and any(word[:full] == positions.tolist() for word in words_of(ids))
            return
        assert all(chosen.issuperset(word) or chosen.isdisjoint(word) for word in words_of(ids))
        # what is free at the end would hold no other word
        left = [len(word) for word in words_of(ids) if chosen.isdisjoint(word)]
        assert not left or full - len(positions) < min(left)


def test_shares_of_mask_random_and_kept():
    counts = {"mask": 0, "kept": 0, "random": 0}
    total = 0
    drawn = np.zeros(VOCAB)
    for row in range(100):
        ids = random_row(512, seed=row)
        masked, positions, targets = mask(ids, row=row)
        assert len(positions) == round(0.15 * 509)
        total += len(positions)
        counts["mask"] += (masked[positions] == MASK).sum()
        counts["kept"] += (masked[positions] == targets).sum()
        others = masked[positions][(masked[positions] != MASK) & (masked[positions] != targets)]
        counts["random"] += len(others)
        np.add.at(drawn, others, 1)
    # three standard deviations of 7,600 draws are 0.014 and 0.010; one of 46 random ids is the old one
    assert counts["mask"] / total == pytest.approx(0.8, abs=0.014)
    assert counts["kept"] / total == pytest.approx(0.1 + 0.1 / 46, abs=0.0105)
    assert counts["random"] / total == pytest.approx(0.1 * 45 / 46, abs=0.0105)
    assert sorted(np.flatnonzero(drawn)) == ORDINARY, "every ordinary id is drawn, no special one"


@pytest.mark.parametrize("masking", [MASKING, WORDS], ids=["tokens", "words"])
def test_every_place_is_masked_as_often(masking):
    ids = random_row(64)
    counts = np.zeros(64)
    for row in range(2000):
        counts[mask(ids, masking, row=row)[1]] += 1
    ordinary = np.isin(ids, ORDINARY)
    assert counts[~ordinary].sum() == 0
    # nine of 61; words passed over for their length make long ones a little rarer
    expected = 2000 * 9 / 61
    assert np.abs(counts[ordinary] / expected - 1).max() < (0.25 if masking is MASKING else 0.5)


@pytest.mark.parametrize(("keep", "random", "expected"), [(1.0, 0.0, "kept"), (0.0, 1.0, "random"), (0.0, 0.0, "mask")])
def test_shares_at_their_ends(keep, random, expected):
    ids = random_row(512)
    masked, positions, targets = mask(ids, Masking(MASK, PAD, VOCAB, (CLS, SEP), keep=keep, random=random))
    found = masked[positions]
    if expected == "kept":
        assert (found == targets).all()
    elif expected == "mask":
        assert (found == MASK).all()
    else:
        assert np.isin(found, ORDINARY).all() and (found != targets).mean() > 0.9


def test_rate_one_masks_all():
    ids = random_row(40)
    for word_start in (None, WORDS.word_start):
        masking = Masking(MASK, PAD, VOCAB, (CLS, SEP), rate=1.0, word_start=word_start)
        assert mask(ids, masking)[1].tolist() == np.flatnonzero(np.isin(ids, ORDINARY)).tolist()


def test_masks_depend_on_seed_epoch_and_row_alone():
    ids = random_row(256)
    keys = [{}, {"seed": 1}, {"epoch": 1}, {"row": 1}, {"row": 2**40}]
    found = [mask(ids, **key)[1].tolist() for key in keys]
    assert found == [mask(ids, **key)[1].tolist() for key in keys]
    assert len(set(map(tuple, found))) == len(keys)


def test_the_masks_are_pinned():
    """Resume across versions of ours and of numpy needs these very numbers."""
    masked, positions, _ = mask(np.arange(1, 49), seed=1, epoch=2, row=3)
    assert positions.tolist() == [6, 11, 25, 26, 29, 31, 36]
    assert masked[positions].tolist() == [7, 38, 26, MASK, MASK, MASK, MASK]


def batch_of(lengths, *, seq_len=None, pairs=False, masking=MASKING) -> tuple[MaskedBatch, list[Row]]:
    rows = [Row(random_row(length, seed=length)) for length in lengths]
    if pairs:
        rows = [Row(row.ids, np.arange(len(row.ids)) % 2, number % 2) for number, row in enumerate(rows)]
    places = [(0, number) for number in range(len(rows))]
    return mask_rows(rows, masking=masking, seed=0, epoch_rows=places, seq_len=seq_len), rows


@pytest.mark.parametrize("seq_len", [None, 70])
@pytest.mark.parametrize("pairs", [False, True])
def test_rows_become_a_rectangle(seq_len, pairs):
    batch, rows = batch_of([40, 64, 9], seq_len=seq_len, pairs=pairs)
    length = seq_len or 64
    assert batch.input_ids.shape == batch.valid.shape == (3, length) and len(batch) == 3
    assert batch.positions.shape == batch.targets.shape == (3, round(0.15 * length))
    assert batch.input_ids.dtype == batch.positions.dtype == batch.targets.dtype == torch.int64
    for number, row in enumerate(rows):
        size = len(row.ids)
        assert batch.valid[number].tolist() == [True] * size + [False] * (length - size)
        assert (batch.input_ids[number, size:] == PAD).all()
        masked, positions, targets = mask(row.ids, row=number)
        assert batch.input_ids[number, :size].tolist() == masked.tolist()
        real = batch.targets[number] != IGNORED
        assert real.tolist() == [True] * len(positions) + [False] * (batch.positions.shape[1] - len(positions))
        assert batch.positions[number, real].tolist() == positions.tolist()
        assert batch.targets[number, real].tolist() == targets.tolist()
    assert (batch.positions >= 0).all(), "a gather takes no negative place"
    if pairs:
        assert batch.order_labels.tolist() == [0, 1, 0]
        assert batch.token_type_ids[2].tolist() == [0, 1] * 4 + [0] * (length - 8)
    else:
        assert batch.order_labels is None and batch.token_type_ids is None


@pytest.mark.parametrize("pairs", [False, True])
def test_split_and_to(pairs):
    batch, _ = batch_of([40, 64, 9, 12, 30], pairs=pairs)
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    for name, whole in batch.tensors().items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
    assert len(batch.tensors()) == (6 if pairs else 4)
    assert [part.num_targets for part in parts] == [int((part.targets != -100).sum()) for part in parts]
    assert sum(part.num_targets for part in parts) == batch.num_targets > 0
    moved = batch.to("meta", non_blocking=True)
    assert moved.num_targets == batch.num_targets
    assert moved.targets.device.type == "meta" and moved.targets.shape == batch.targets.shape
    assert (moved.order_labels is None) is not pairs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_id": 50}, r"special ids \[0, 3, 50\] must lie in 0..49"),
        ({"vocab_size": 4, "mask_id": 1, "special_ids": (0, 2)}, "vocab_size=4 leaves no ordinary id beside 4"),
        ({"rate": 0.0}, "rate=0.0 must lie above 0"),
        ({"keep": 0.6, "random": 0.6}, "keep=0.6 and random=0.6 must be shares"),
        ({"word_start": np.ones(7, bool)}, r"word_start must be \[50\] \(vocab_size\), got \[7\]"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Masking(**{"mask_id": MASK, "pad_id": PAD, "vocab_size": VOCAB, "special_ids": (0,), **options})


def test_a_word_longer_than_the_share_is_hidden_in_part():
    starts = np.zeros(50, bool)
    masking = Masking(mask_id=1, pad_id=0, vocab_size=50, word_start=starts)
    ids = np.arange(10, 30)  # one word of 20 tokens, of which 3 are to be hidden
    _, positions, targets = mask_tokens(ids, draws=random_words(0, 0, 60), masking=masking)
    assert positions.tolist() == [0, 1, 2] and targets.tolist() == [10, 11, 12]
