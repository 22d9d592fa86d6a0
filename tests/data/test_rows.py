"""Rows of documents: every token once an epoch, exact resume, ranks and workers that change nothing."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.masking import IGNORED, MaskedBatch, Masking
from data.rows import DocumentRows, JoinedRows, TokenRows

# newer Pythons warn when a process with threads forks; a worker touches none of them
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CLS, PAD, SEP, MASK, VOCAB = 0, 1, 2, 3, 10_000
MASKING = Masking(mask_id=MASK, pad_id=PAD, vocab_size=VOCAB)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents in which every token is another, from 4 on."""
    ids = iter(range(4, VOCAB))
    return [list(itertools.islice(ids, length)) for length in lengths]


LENGTHS = [3, 50, 1, 17, 120, 8, 8, 31, 2, 64]
DOCUMENTS = numbered(LENGTHS)


@pytest.fixture(scope="module")
def split(make_split):
    return make_split(DOCUMENTS)


def batches_of(split, **options) -> TokenRows:
    defaults = {"seq_len": 20, "batch_size": 4, "seed": 0, "cls_id": CLS, "sep_id": SEP, "masking": MASKING}
    return TokenRows(split, **{**defaults, **options})


def first(batches: TokenRows, count: int) -> list[MaskedBatch]:
    iterator = iter(batches)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def same(one: MaskedBatch, other: MaskedBatch) -> bool:
    return all(torch.equal(one_part, vars(other)[name]) for name, one_part in one.tensors().items())


def original(batch: MaskedBatch) -> list[list[int]]:
    """The rows before masking, without padding."""
    ids = batch.input_ids.clone()
    real = batch.targets != IGNORED
    ids[real.nonzero()[:, 0], batch.positions[real]] = batch.targets[real]
    return [row[valid].tolist() for row, valid in zip(ids, batch.valid, strict=True)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(3, 30),
    st.integers(0, 2**64 - 1),
    st.integers(0, 3),
    st.booleans(),
)
def test_joined_rows_hold_every_token_once(make_split, lengths, seq_len, seed, epoch, drop_last):
    documents = numbered(lengths)
    total = sum(lengths) + len(lengths) - 1
    split = make_split(documents)
    if drop_last and total < seq_len - 2:
        with pytest.raises(DataError, match=f"needs {seq_len - 2} tokens, the split's documents joined have {total}"):
            JoinedRows(split, seq_len, seed, CLS, SEP, drop_last)
        return
    source = JoinedRows(split, seq_len, seed, CLS, SEP, drop_last)
    rows = [source.row(epoch, number).ids.tolist() for number in range(source.num_rows)]
    assert all(row[0] == CLS and row[-1] == SEP and row.count(CLS) == 1 for row in rows)
    short = [row for row in rows if len(row) != seq_len]
    assert len(short) <= (not drop_last)
    seen = Counter(itertools.chain.from_iterable(row[1:-1] for row in rows))
    tokens = set(itertools.chain.from_iterable(documents))
    assert all(seen[token] == 1 for token in seen if token != SEP)
    missing = tokens - set(seen)
    if drop_last:
        assert len(missing) <= total % (seq_len - 2)
    else:
        assert not missing and seen[SEP] == len(documents) - 1
    # a document's tokens follow one another, and a separator stands before its first and after its last
    after = {document[-1] for document in documents}
    before = {document[0] for document in documents}
    for row in rows:
        for left, right in itertools.pairwise(row[1:-1]):
            if SEP not in (left, right):
                assert right == left + 1 and left not in after
            assert left != SEP or right in before
            assert right != SEP or left in after


def test_joined_rows_by_hand(make_split):
    """Two documents can stand in two orders, so all rows can be written down."""
    split = make_split([[4, 5, 6, 7, 8], [9, 10]])
    found = set()
    for seed in range(20):
        source = JoinedRows(split, 6, seed, CLS, SEP, drop_last=True)
        found.add(tuple(sorted(tuple(source.row(0, number).ids.tolist()) for number in range(2))))
    assert found == {
        ((0, 4, 5, 6, 7, 2), (0, 8, 2, 9, 10, 2)),
        ((0, 5, 6, 7, 8, 2), (0, 9, 10, 2, 4, 2)),
    }


@pytest.mark.parametrize("join", [True, False])
def test_epochs_and_seeds_differ(split, join):
    options = {"join": join, "batch_size": 2}
    num_steps = batches_of(split, **options).num_rows // 2
    orders = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (-1, 0)]:
        batches = batches_of(split, seed=seed, **options)
        steps = range(epoch * num_steps, (epoch + 1) * num_steps)
        orders.append(str([original(batches.batch(step)) for step in steps]))
    assert len(set(orders)) == 4


def test_masks_differ_from_epoch_to_epoch_and_from_seed_to_seed(make_split):
    split = make_split(numbered([18]))
    batches = batches_of(split, batch_size=1)
    assert batches.num_rows == 1
    by_epoch = {tuple(batches.batch(step).positions[0].tolist()) for step in range(20)}
    by_seed = {tuple(batches_of(split, batch_size=1, seed=seed).batch(0).positions[0].tolist()) for seed in range(20)}
    assert len(by_epoch) > 10 and len(by_seed) > 10


@pytest.mark.parametrize("join", [True, False])
def test_resume_gives_the_rest_of_the_run(split, join):
    whole = first(batches_of(split, join=join), 40)
    resumed = first(batches_of(split, join=join, start_step=23), 17)
    assert all(map(same, whole[23:], resumed))
    assert same(batches_of(split, join=join).batch(39), whole[-1])


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_batch_of_one_process(split, join, world_size):
    ranks = [batches_of(split, join=join, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(15):
        whole = batches_of(split, join=join).batch(step)
        parts = [rank.batch(step) for rank in ranks]
        assert original(whole) == [row for part in parts for row in original(part)]
        if join:
            assert torch.equal(whole.input_ids, torch.cat([part.input_ids for part in parts]))
            assert torch.equal(whole.positions, torch.cat([part.positions for part in parts]))
        # masks are the rows' own, whatever they are padded to
        assert whole.targets[whole.targets != IGNORED].tolist() == [
            target for part in parts for target in part.targets[part.targets != IGNORED].tolist()
        ]


@pytest.mark.parametrize("join", [True, False])
def test_workers_give_identical_batches(split, join):
    options = {"join": join, "start_step": 5}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone, shared = (first(batches_of(split, **options, workers=workers), 12) for workers in (0, 2))
    assert all(map(same, alone, shared))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_is_sent_no_text(make_split):
    batches = batches_of(make_split(numbered([4000, 3000])), seq_len=100)
    batches.batch(0)
    assert len(pickle.dumps(batches.dataset)) < 1_500


def test_documents_are_rows_of_their_own(split):
    batches = batches_of(split, join=False, seq_len=40, batch_size=5)
    assert batches.num_rows == 10
    expected = sorted([CLS, *document[:38], SEP] for document in DOCUMENTS)
    for epoch in range(3):
        rows = [row for step in (2 * epoch, 2 * epoch + 1) for row in original(batches.batch(step))]
        assert sorted(rows) == expected


def test_batches_hold_like_lengths(make_split):
    lengths = np.random.default_rng(0).integers(1, 100, 64).tolist()
    batches = batches_of(make_split(numbered(lengths)), join=False, seq_len=102, batch_size=8)
    found = [batches.batch(step) for step in range(8)]
    sizes = [batch.valid.sum(1).tolist() for batch in found]
    assert sorted(itertools.chain.from_iterable(sizes)) == sorted(length + 2 for length in lengths)
    assert all(batch.input_ids.shape[1] == max(size) for batch, size in zip(found, sizes, strict=True))
    # one pool: sorted through, the batches do not overlap, and they come in no order of length
    spans = sorted((min(size), max(size)) for size in sizes)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    assert [max(size) for size in sizes] != sorted(max(size) for size in sizes)
    padded = sum(batch.input_ids.numel() for batch in found)
    assert padded < 1.15 * sum(map(sum, sizes))


def test_pools_are_sorted_apart(make_split):
    split = make_split(numbered(np.random.default_rng(0).integers(1, 40, 300).tolist()))
    source = DocumentRows(split, 50, 0, CLS, SEP, multiple=2, batch_size=2)
    documents = [source.row(0, number).ids[1] for number in range(source.num_rows)]
    assert len(set(documents)) == 300
    lengths = [len(source.row(0, number).ids) for number in range(300)]
    gaps = [abs(one - other) for one, other in zip(lengths[::2], lengths[1::2], strict=True)]
    assert max(gaps) <= 6 and np.mean(gaps) < 1
    # sorted as one, no two batches would overlap
    spans = sorted((min(pair), max(pair)) for pair in zip(lengths[::2], lengths[1::2], strict=True))
    assert any(left[1] > right[0] for left, right in itertools.pairwise(spans))


def test_documents_beyond_whole_batches_change_from_epoch_to_epoch(split):
    batches = batches_of(split, join=False, batch_size=4)
    assert batches.num_rows == 8
    epochs = [[row[1] for step in (2 * e, 2 * e + 1) for row in original(batches.batch(step))] for e in range(10)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set(itertools.chain.from_iterable(epochs)) == {document[0] for document in DOCUMENTS}


@pytest.mark.parametrize("join", [True, False])
def test_rows_by_number_are_those_of_the_first_epoch(split, join):
    batches = batches_of(split, join=join, drop_last=False)
    rows = [row for number in range(batches.num_rows) for row in original(batches.rows([number]))]
    assert rows == original(batches.rows(range(batches.num_rows)))
    tokens = Counter(itertools.chain.from_iterable(row[1:-1] for row in rows))
    if join:
        assert len(rows) == -(-(sum(LENGTHS) + len(LENGTHS) - 1) // 18)
        assert set(tokens) - {SEP} == set(itertools.chain.from_iterable(DOCUMENTS))
    else:
        assert len(rows) == len(DOCUMENTS)
    assert same(batches.rows([0, 1]), batches.rows([0, 1]))


def test_separators_are_not_masked(split):
    for batch in first(batches_of(split), 30):
        targets = batch.targets[batch.targets != IGNORED]
        assert not torch.isin(targets, torch.tensor([CLS, SEP, PAD, MASK])).any()
        assert ((batch.targets != IGNORED).sum(1) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "batch_size=5 must be a multiple of world_size=2"),
        ({"seq_len": 2}, "seq_len=2 must be at least 3"),
        ({"start_step": -1}, "start_step=-1 .* must not be negative"),
        ({"batch_size": 0, "join": False}, "batch_size=0 must be at least 1"),
    ],
)
def test_impossible_settings(split, options, message):
    with pytest.raises(ValueError, match=message):
        batches_of(split, **options)


def test_a_split_too_small(split):
    with pytest.raises(DataError, match="seq_len=400 needs 398 tokens, the split's documents joined have 313"):
        batches_of(split, seq_len=400)
    assert batches_of(split, seq_len=400, drop_last=False).num_rows == 1
    with pytest.raises(DataError, match="a batch of 12 rows needs as many documents, the split has 10"):
        batches_of(split, join=False, batch_size=12)
