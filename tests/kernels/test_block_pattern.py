"""The block pattern against loops: which blocks a row sees and how often, pairs, pictures, lengths, what is refused."""

import copy
import pickle
import time
from collections import Counter

import numpy as np
import pytest
import torch

from kernels.block_sparse_attention import BlockPattern
from kernels.block_sparse_attention.lists import BlockLists
from kernels.block_sparse_attention.pattern import pattern_of
from tests.kernels.block_cases import FIXED_LENGTH, KINDS, blocks_seen, make_pattern, random_counts, sees

LENGTHS = [pytest.param(kind, length, id=f"{kind}-{length}") for kind in KINDS for length in (29, 37, 44)]


def served(pattern):
    """Numbers of blocks that an example may have."""
    return range(pattern.num_blocks + 1) if pattern.follows_length else [pattern.num_blocks]


@pytest.mark.parametrize("kind, seq_len", LENGTHS)
def test_counts_are_the_definition(kind, seq_len):
    pattern = make_pattern(kind, seq_len, 4, 2)
    for num_blocks in served(pattern):
        counts = pattern.counts(num_blocks)
        assert counts.shape == (2, num_blocks, num_blocks) and counts.dtype == torch.int64
        for head in range(2):
            for row in range(num_blocks):
                seen = Counter(blocks_seen(pattern, num_blocks, head, row))
                assert counts[head, row].tolist() == [seen[column] for column in range(num_blocks)]


@pytest.mark.parametrize("kind, seq_len", LENGTHS)
def test_pairs_and_mask_are_those_of_the_blocks(kind, seq_len):
    pattern = make_pattern(kind, seq_len, 4, 2)
    shortest = seq_len - (seq_len - 1) % 4 if kind in FIXED_LENGTH else 0
    for length in range(shortest, seq_len + 1):
        counts = pattern.counts(-(-length // 4))
        by_token = counts.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, :length, :length]
        assert pattern.num_pairs(length) == by_token.sum(dim=(1, 2)).tolist()
        mask = pattern.mask(length)
        assert mask.dtype == torch.bool and torch.equal(mask, by_token > 0)


def test_global_blocks_of_a_short_example_are_those_at_the_front_first():
    pattern = make_pattern("uniform_wide", 44, 4, 2)  # 2 and 3
    found = [pattern.global_blocks(length) for length in range(8)]
    assert found == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (2, 3), (2, 3)]


@pytest.mark.parametrize("shape", [(7, 7), (3, 7, 7)])
def test_a_mask_is_its_pattern(shape):
    counts = random_counts(3, 7)[0] if len(shape) == 2 else random_counts(3, 7)
    assert counts.max() > 1
    for mask in (counts, counts.to(torch.uint8), counts > 0, counts.numpy(), (counts > 0).tolist()):
        pattern = BlockPattern.from_mask(mask, 16, num_heads=3)
        assert torch.equal(pattern.counts(7), torch.as_tensor(mask).long().expand(3, 7, 7))
        assert (pattern.seq_len, pattern.num_heads, pattern.block_size) == (112, 3, 16)
        # a shorter example has the corner of the matrix
        assert torch.equal(pattern.counts(4), torch.as_tensor(mask).long().expand(3, 7, 7)[:, :4, :4])
    assert BlockPattern.from_mask(counts > 0, 16, seq_len=97, num_heads=3).num_blocks == 7


def test_a_function_is_its_pattern():
    pattern = BlockPattern.from_function(sees, 90, 10, 2)
    assert pattern.counts(9).tolist() == [[[int(sees(row, column)) for column in range(9)] for row in range(9)]] * 2
    twice = BlockPattern.from_function(lambda row, column: 2 * (row == column), 90, 10, 2)
    assert torch.equal(twice.counts(9), 2 * torch.eye(9, dtype=torch.int64).expand(2, -1, -1))


def test_etc_has_its_globals_at_the_front_and_nothing_random():
    pattern = BlockPattern.etc(70, 10, 3, num_global_blocks=2)
    counts = pattern.counts(7)
    rows = torch.arange(7)
    expected = ((rows[:, None] - rows).abs() <= 1) | (rows < 2) | (rows[:, None] < 2)
    assert torch.equal(counts, expected.long().expand(3, -1, -1))
    assert [len(lists.row_blocks) for lists in pattern.lists] == [0]


@pytest.mark.parametrize("window, front, back", [(3, 1, 1), (0, 0, 0), (5, 2, 3), (1, 0, 1)])
@pytest.mark.parametrize("num_blocks", [1, 2, 9, 64, 150])
def test_uniform_rows_have_their_random_blocks(window, front, back, num_blocks):
    """At every length r blocks that a row does not see otherwise, of those that the nearest shorter draw knows."""
    sizes = (num_blocks * 4, 4, 2)
    pattern = BlockPattern.uniform(*sizes, 3, 5, window=window, front=front, back=back)
    without = BlockPattern.uniform(*sizes, 0, 5, window=window, front=front, back=back)
    for length in {*range(1, min(num_blocks, 20) + 1), num_blocks // 2, num_blocks - 1, num_blocks} - {0}:
        counts, fixed = pattern.counts(length), without.counts(length)
        assert counts.max() <= 1
        added = (counts - fixed).sum(dim=2)
        unseen = length - fixed.sum(dim=2)
        if num_blocks <= 64 or length == num_blocks:
            assert torch.equal(added, unseen.clamp(max=3))
        else:  # what a shorter draw knew, which may be fewer where all are few
            assert (added <= unseen.clamp(max=3)).all() and (added >= (unseen * 5 // 6 - 1).clamp(0, 3)).all()


def test_uniform_covers_the_whole_sequence():
    pattern = BlockPattern.uniform(128 * 64, 64, 12, 3)
    assert len(pattern.lists) <= 64
    for length in (128, 100, 75, 40):
        random = pattern.counts(length) - BlockPattern.uniform(128 * 64, 64, 12, 0).counts(length)
        by_column = random.sum(dim=(0, 1)).float()
        hit = by_column.nonzero().flatten()
        # 36 hits a column on average; past the draw none, less than a sixth of the text
        assert hit[0] == 1 and hit[-1] >= length * 5 // 6 - 2
        assert by_column[1:-1].max() < 80 and by_column[1 : length * 5 // 6].min() > 10


def test_what_differs_and_what_does_not():
    first, again = (BlockPattern.uniform(400, 4, 4, 2, seed=3) for _ in range(2))
    assert torch.equal(first.counts(100), again.counts(100))
    assert not torch.equal(first.counts(100), BlockPattern.uniform(400, 4, 4, 2, seed=4).counts(100))
    assert not torch.equal(first.counts(100)[0], first.counts(100)[1])
    # a key of tables that are kept, by identity
    assert first != again and len({first, again}) == 2


def test_the_published_plans_are_skewed():
    """Nine columns have the random blocks of all 256 rows: lists of very different length, as kernels meet them."""
    pattern = BlockPattern.bigbird(16384)
    per_column = np.bincount(pattern.lists[pattern.plan_of_length[256]].row_blocks, minlength=256) / 12
    assert (per_column[10:] == 0).all() and (per_column[1:10] > 70).all()


def test_a_long_pattern_is_built_fast():
    start = time.perf_counter()
    pattern = BlockPattern.bigbird(65536, 64, 12)
    assert pattern.num_blocks == 1024 and time.perf_counter() - start < 5
    BlockPattern.uniform(65536, 64, 12, 3)
    assert pattern.num_pairs(65536) and time.perf_counter() - start < 15


SIZES = {"seq_len": 40, "block_size": 4, "num_heads": 2}
RANDOM = SIZES | {"num_random_blocks": 1}
ANY = torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "builder, options, message",
    [
        ("bigbird", {"seq_len": 0}, "seq_len is 0, it must be a whole number of at least 1"),
        ("bigbird", {"block_size": 0}, "block_size is 0, it must be a whole number of at least 1"),
        ("bigbird", {"block_size": 6.5}, "block_size is 6.5, it must be a whole number"),
        ("bigbird", {"num_heads": -1}, "num_heads is -1, it must be a whole number of at least 1"),
        ("bigbird", {"num_random_blocks": -1}, "num_random_blocks is -1, it must be a whole number of at least 0"),
        ("bigbird", {"seed": -1}, "seed is -1, it must be a whole number of at least 0"),
        ("bigbird", {"seed": 2**32}, "seed is 4294967296, it must be at most 4294967295"),
        ("bigbird", {"compat": "hf"}, "compat is 'hf', it must be one of 'tf', 'hf_train', 'hf_eval'"),
        ("bigbird", {"global_blocks": "middle"}, "global_blocks is 'middle', it must be one of 'ends', 'front'"),
        ("bigbird", {"compat": "tf", "global_blocks": "front"}, "compat is 'tf', global_blocks must be 'ends'"),
        (
            "bigbird",
            {"seq_len": 2049, "block_size": 64, "compat": "hf_train", "max_position_embeddings": 0},
            "max_position_embeddings is 0, it must be a whole number of at least 1",
        ),
        (
            "bigbird",
            {"seq_len": 3072, "block_size": 64, "compat": "hf_train", "max_position_embeddings": 2048},
            "max_position_embeddings is 2048, with compat 'hf_train' it must be at least the 3072 tokens",
        ),
        (
            "bigbird",
            {"seq_len": 3072, "block_size": 256, "compat": "tf"},
            "seq_len is 12 blocks of 256: .* as its old plan has too few blocks to draw from in the first 1024 tokens",
        ),
        ("bigbird", {"seq_len": 12, "compat": "hf_eval"}, "seq_len is 3 blocks of 4: .* it needs 4 blocks, 16 tokens"),
        (
            "bigbird",
            {"seq_len": 28, "compat": "tf"},
            "seq_len is 7 blocks of 4: .* of up to 7 blocks, 28 tokens",
        ),
        ("etc", {"num_global_blocks": -2}, "num_global_blocks is -2, it must be a whole number of at least 0"),
        ("etc", {"num_global_blocks": 2, "block_size": 0}, "block_size is 0"),
        ("uniform", {"num_random_blocks": -1}, "num_random_blocks is -1, it must be a whole number of at least 0"),
        (
            "uniform",
            {"window": 2},
            r"window is 2 blocks, it must be odd \(the row's own and as many on each side\) or 0",
        ),
        ("uniform", {"window": -1}, "window is -1, it must be a whole number of at least 0"),
        ("uniform", {"front": -1}, "front is -1, it must be a whole number of at least 0"),
        ("uniform", {"back": 1.0}, "back is 1.0, it must be a whole number of at least 0"),
        ("uniform", {"seed": True}, "seed is True, it must be a whole number"),
        ("from_mask", {"mask": ANY}, r"num_heads must be given for a mask \[N, N\]"),
        ("from_mask", {"mask": ANY.float(), "num_heads": 2}, "mask must be bool or integer .*, got float32"),
        ("from_mask", {"mask": ANY[:2], "num_heads": 2}, r"mask must be \[N, N\] or \[H, N, N\] .*, got \(2, 3\)"),
        ("from_mask", {"mask": ANY[:0, :0], "num_heads": 2}, r"mask must be \[N, N\] .*, got \(0, 0\)"),
        ("from_mask", {"mask": ANY[0], "num_heads": 2}, r"mask must be \[N, N\] .*, got \(3,\)"),
        ("from_mask", {"mask": ANY.expand(4, 3, 3), "num_heads": 2}, r"mask \(4, 3, 3\) is of 4 heads, num_heads is 2"),
        ("from_mask", {"mask": -ANY.long(), "num_heads": 2}, "mask holds -1, a block counts 0 times or more"),
        ("from_mask", {"mask": ANY, "num_heads": 0}, "num_heads is 0, it must be a whole number of at least 1"),
        ("from_mask", {"mask": ANY, "num_heads": 2, "seq_len": 8}, "mask is of 3 blocks, seq_len 8 has 2 of 4"),
        ("from_mask", {"mask": ANY, "num_heads": 2, "block_size": 0}, "block_size is 0"),
        ("from_function", {"seq_len": -3}, "seq_len is -3, it must be a whole number of at least 1"),
    ],
)
def test_bad_arguments_of_the_builders_are_named(builder, options, message):
    defaults = {
        "bigbird": RANDOM,
        "etc": SIZES,
        "uniform": RANDOM,
        "from_mask": {"block_size": 4},
        "from_function": SIZES | {"function": sees},
    }
    with pytest.raises(ValueError, match=message):
        getattr(BlockPattern, builder)(**defaults[builder] | options)


def lists(offsets, blocks, dtype=torch.int32):
    return BlockLists(torch.tensor(offsets, dtype=dtype), torch.tensor(blocks, dtype=dtype))


NONE = lists([[0, 0, 0], [0, 0, 0]], [])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 4}, "window is 4 blocks, it must be odd"),
        ({"front": -1}, "front is -1"),
        ({"plan_of_length": (0, 0)}, "plan_of_length has 2 entries, it must have one for each of 0 to 2 blocks"),
        ({"plan_of_length": (0, 0, 1)}, "plan_of_length must hold indices of the 1 plans in lists"),
        ({"lists": ()}, "plan_of_length must hold indices of the 0 plans in lists"),
        ({"lists": (lists([[0, 0, 0]], []),)}, r"row_offsets of plan 0 must be \(2, 3\) .* got \(1, 3\) and \(0,\)"),
        (
            {"lists": (lists([[0, 1, 2], [2, 2, 3]], [0, 1]),)},
            "row_offsets of plan 0 must rise from 0 to the 2 ",
        ),
        ({"lists": (lists([[0, 2, 1], [1, 2, 2]], [0, 1]),)}, "row_offsets of plan 0 must rise from 0"),
        ({"lists": (lists([[0, 1, 1], [2, 2, 2]], [0, 1]),)}, "row_offsets of plan 0 must rise from 0"),
        ({"lists": (NONE, lists([[0, 1, 1], [1, 1, 1]], [2]))}, "row_blocks of plan 1 must lie in 0 … 1"),
        ({"lists": (lists([[0, 1, 1], [1, 1, 1]], [-1]),)}, "row_blocks of plan 0 must lie in 0 … 1"),
        ({"lists": (lists([[0, 0, 0]] * 2, [], torch.int64),)}, "lists of plan 0 must be int32 on the CPU"),
    ],
)
def test_bad_patterns_are_refused(options, message):
    fields = {"seq_len": 8, "block_size": 4, "num_heads": 2, "front": 1, "back": 1, "window": 3, "lists": (NONE,)}
    assert BlockPattern(**fields, plan_of_length=(0, 0, 0)).counts(2).sum() == 8
    with pytest.raises(ValueError, match=message):
        BlockPattern(**fields | {"plan_of_length": (0, 0, 0)} | options)


def test_a_copy_is_a_pattern_of_its_own():
    """Whatever is kept for a pattern is found by its key, which no other has."""
    pattern = make_pattern("uniform", 44, 4, 2)
    for other in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert other != pattern and other.key != pattern.key
        assert pattern_of(pattern.key) is pattern and pattern_of(other.key) is other
        assert torch.equal(other.counts(9), pattern.counts(9)) and other.plan_of_length == pattern.plan_of_length


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "counts"])
def test_a_pattern_is_the_same_under_another_default_device(kind):
    """Models are built on the meta device to be counted."""
    pattern = make_pattern(kind, 44, 4, 2)
    with torch.device("meta"):
        again = make_pattern(kind, 44, 4, 2)
        assert torch.equal(again.counts(11), pattern.counts(11)) and again.num_pairs(44) == pattern.num_pairs(44)


def test_lengths_that_a_pattern_does_not_serve_are_named():
    pattern, fixed = BlockPattern.bigbird(40, 4, 2), BlockPattern.bigbird(47, 4, 2, compat="tf")
    with pytest.raises(ValueError, match="the sequence has 41 tokens, the pattern is made for at most 40"):
        pattern.num_pairs(41)
    with pytest.raises(ValueError, match="seq_len is -1, it must be a whole number of at least 0"):
        pattern.num_pairs(-1)
    with pytest.raises(ValueError, match="num_global_blocks is 5, the 15 tokens of seq_len have 4 blocks of 4"):
        BlockPattern.etc(15, 4, 2, num_global_blocks=5)
    with pytest.raises(ValueError, match="num_blocks is 11, the pattern is made for 0 to 10 blocks"):
        pattern.counts(11)
    with pytest.raises(ValueError, match="44 tokens, that is 11 blocks; this pattern, .* for 12 blocks of 4 alone"):
        fixed.mask(44)
    with pytest.raises(ValueError, match="num_blocks is 11, the pattern is made for 12 to 12 blocks"):
        fixed.counts(11)
    assert fixed.mask(45).shape == (2, 45, 45)


@pytest.mark.parametrize("name", ["bigbird", "uniform", "etc"])
def test_shortened_it_is_the_same_for_short_examples(name):
    options = {"num_global_blocks": 2} if name == "etc" else {"num_random_blocks": 2, "seed": 3}
    pattern = getattr(BlockPattern, name)(seq_len=160, block_size=4, num_heads=2, **options)
    short = pattern.shortened(20)
    assert short.num_blocks == 20 and short.lists[0].row_offsets.shape == (2, 21)
    for num_blocks in range(21):
        assert torch.equal(short.counts(num_blocks), pattern.counts(num_blocks))


def test_a_function_that_gives_no_counts():
    with pytest.raises(ValueError, match="mask must be bool or integer"):
        BlockPattern.from_function(lambda row, column: 0.5, 64, 16, 2)


def test_it_is_printed_in_a_line():
    assert len(repr(BlockPattern.bigbird(4096, 64, 4))) < 200
