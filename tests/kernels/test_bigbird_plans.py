"""BigBird's random blocks: golden values of the released code, which plan a length has, what the modes differ in.

The golden ids and sums were printed by the released functions (google-research/bigbird, bigbird/core/attention.py).
"""

import numpy as np
import pytest
import torch

from kernels.block_sparse_attention import BlockPattern
from kernels.block_sparse_attention.bigbird import new_plan, old_plan
from kernels.block_sparse_attention.lists import draw_unseen

# tokens, heads, seed, head: ids by row
GOLDEN = {
    "4096_head_0": (4096, 12, 0, 0, {1: [9, 14, 7], 2: [9, 6, 7], 3: [10, 5, 14], 15: [2, 5, 6], 16: [9, 3, 11]}),
    "4096_head_0_end": (4096, 12, 0, 0, {17: [3, 8, 11], 18: [5, 13, 4], 61: [6, 2, 7], 62: [6, 12, 5]}),
    "4096_head_1": (4096, 12, 0, 1, {1: [6, 11, 10], 2: [8, 4, 12], 3: [12, 11, 10], 62: [6, 7, 10]}),
    "4096_head_11": (4096, 12, 0, 11, {1: [7, 5, 13], 2: [7, 5, 6], 62: [3, 5, 7]}),
    "4096_seed_1": (4096, 12, 1, 0, {1: [5, 6, 7], 2: [5, 11, 4], 3: [15, 9, 7], 62: [3, 11, 13]}),
    "4096_large_head_0": (4096, 16, 23, 0, {1: [10, 4, 5], 2: [12, 11, 13]}),
    "4096_large_head_15": (4096, 16, 23, 15, {62: [3, 11, 1]}),
    "2048": (2048, 12, 0, 0, {29: [11, 2, 4], 30: [2, 4, 12]}),
    "1536_head_0": (1536, 12, 0, 0, {1: [4, 6, 7], 2: [4, 8, 5], 9: [6, 7, 2], 10: [2, 5, 8], 11: [9, 3, 7]}),
    "1536_head_0_end": (1536, 12, 0, 0, {12: [2, 7, 4], 22: [1, 4, 7]}),
    "1536_head_1": (1536, 12, 0, 1, {1: [3, 5, 4], 22: [8, 9, 6]}),
    "768": (768, 12, 0, 0, {1: [4, 6, 7], 2: [4, 8, 5], 3: [8, 1, 5], 4: [9, 2, 1], 5: [9, 7, 2], 6: [3, 1, 8]}),
    "768_end": (768, 12, 0, 0, {7: [5, 3, 2], 8: [2, 6, 3], 9: [6, 7, 2], 10: [2, 5, 8]}),
}
SUMS = {768: 1772, 1024: 3975, 1536: 4028, 2048: 8463, 3072: 13107, 4096: 17877}
SUMS_OF_SEEDS = [17877, 17798, 17750, 17895, 18067, 17685, 17754, 17756, 17871, 18092, 18115, 17680]


def ids(pattern, num_blocks, head=0):
    """Lists of an example of `num_blocks` blocks by row."""
    offsets, blocks = pattern.lists[pattern.plan_of_length[num_blocks]]
    return {row: blocks[offsets[head, row] : offsets[head, row + 1]].tolist() for row in range(num_blocks)}


def slots(pattern, num_blocks):
    """int [H, n - 2, r]: the lists of rows 1 to n - 2."""
    rows = [list(ids(pattern, num_blocks, head).values())[1:-1] for head in range(pattern.num_heads)]
    return np.array(rows)


@pytest.mark.parametrize("compat", ["tf", None])
@pytest.mark.parametrize("tokens, num_heads, seed, head, rows", GOLDEN.values(), ids=GOLDEN.keys())
def test_golden_ids(tokens, num_heads, seed, head, rows, compat):
    # without compat any longer pattern has them
    seq_len = tokens if compat else 8192
    found = ids(BlockPattern.bigbird(seq_len, 64, num_heads, 3, seed, compat=compat), tokens // 64, head)
    assert {row: found[row] for row in rows} == rows


def test_golden_ids_where_hugging_face_has_no_old_plan():
    found = ids(BlockPattern.bigbird(2048, compat="hf_train"), 32)
    assert {row: found[row] for row in (1, 2, 3, 29, 30)} == {
        1: [4, 6, 7],
        2: [4, 8, 5],
        3: [8, 1, 5],
        29: [8, 7, 3],
        30: [5, 3, 1],
    }


@pytest.mark.parametrize("tokens, total", SUMS.items())
def test_golden_sums(tokens, total):
    for compat in ("tf", None, *(["hf_train"] if tokens != 2048 else [])):
        pattern = BlockPattern.bigbird(tokens, compat=compat)
        assert slots(pattern, tokens // 64).sum() == total
        assert slots(pattern, tokens // 64).shape == (12, tokens // 64 - 2, 3)


@pytest.mark.parametrize("seed, total", list(enumerate(SUMS_OF_SEEDS)))
def test_golden_sums_of_seeds(seed, total):
    assert slots(BlockPattern.bigbird(4096, seed=seed), 64).sum() == total


def test_the_number_of_pairs_is_the_papers():
    assert BlockPattern.bigbird(4096).num_pairs(4096) == [2_547_712] * 12
    for tokens in (768, 1024, 5000 // 64 * 64):  # tokens * b * (7 + r) - b^2 (12 + 2 r)
        assert BlockPattern.bigbird(tokens).num_pairs(tokens) == [tokens * 64 * 10 - 64**2 * 18] * 12


def test_row_i_is_the_same_at_every_length():
    longest = old_plan(64, 64, 4, 3, seed=2)
    pattern = BlockPattern.bigbird(8192, 64, 4, 3, 2)
    for length in (16, 32, 48, 64):
        assert np.array_equal(slots(pattern, length), longest[:, 1 : length - 1])
    longest = new_plan(200, 4, 3, seed=2)
    for length in (12, 13, 31, 199):
        assert np.array_equal(new_plan(length, 4, 3, seed=2)[:, : length - 1], longest[:, : length - 1])


@pytest.mark.parametrize("block_size, num_random", [(64, 3), (128, 3), (32, 2), (256, 3), (64, 6), (48, 1)])
def test_an_example_has_the_released_pattern_of_its_own_length(block_size, num_random):
    longest = 4096 // block_size + 3
    pattern = BlockPattern.bigbird(longest * block_size, block_size, 2, num_random, 5)
    checked = 0
    for length in range(2 * num_random + 6, longest + 1):
        sizes = (length * block_size, block_size, 2, num_random, 5)
        try:
            released = BlockPattern.bigbird(*sizes, compat="tf")
        except ValueError as error:  # blocks too large for the old plan
            assert block_size == 256 and "in the first 1024 tokens" in str(error)
            continue
        assert torch.equal(pattern.counts(length), released.counts(length))
        checked += 1
    assert checked > 5


def test_lengths_of_the_plans():
    pattern = BlockPattern.bigbird(8192)
    plans = pattern.plan_of_length
    old, new = plans[64], plans[100]
    assert [length for length in range(129) if plans[length] == old] == [16, 32, 48, 64]
    assert [length for length in range(129) if plans[length] == new] == [
        length for length in range(12, 129) if length % 16 or length > 64
    ]
    assert len(set(plans[:12])) == 12 and len(pattern.lists) == 14


def test_only_what_the_length_needs_is_drawn():
    assert len(BlockPattern.bigbird(640).lists) == 11  # 0 to 10 blocks
    assert len(BlockPattern.bigbird(768).lists) == 13
    assert len(BlockPattern.bigbird(1024).lists) == 14
    assert len(BlockPattern.bigbird(4096, compat="tf").lists) == 1


def test_where_the_old_plan_draws():
    """From the first 1024 tokens; of 504 slots at 1024 tokens 38 hit the last block, which counts twice then."""
    for length, repeated in {16: 38, 32: 0, 48: 0, 64: 0}.items():
        pattern = BlockPattern.bigbird(4096)
        assert set(np.unique(slots(pattern, length))) == set(range(1, 16))
        assert (pattern.counts(length) == 2).sum() == repeated
        assert pattern.counts(length).max() <= 2


def test_where_the_new_plan_draws():
    """From blocks 1 to 2 r + 3, never from what the row sees already."""
    pattern = BlockPattern.bigbird(8192)
    assert set(np.unique(slots(pattern, 100))) == set(range(1, 10))
    for length in (12, 13, 60, 65, 128):
        assert pattern.counts(length).max() == 1


def test_the_last_rows_of_a_small_grid_repeat_their_windows():
    """With max_position_embeddings 1024 rows 13 and 14 draw from all of 1 to 14."""
    pattern = BlockPattern.bigbird(1024, compat="hf_train", max_position_embeddings=1024)
    repeated = (pattern.counts(16) > 1).sum(dim=(0, 2))
    assert repeated[:13].sum() == 0 and repeated[13] > 0 and repeated[14] > 0
    assert set(np.unique(slots(pattern, 16))) == set(range(1, 15))


def test_the_grid_of_the_old_plan_is_the_position_table_of_hugging_face():
    """Later heads draw after the rows that nobody uses."""
    shorter, longer = (
        slots(BlockPattern.bigbird(1024, compat="hf_train", max_position_embeddings=tokens), 16)
        for tokens in (4096, 8192)
    )
    assert np.array_equal(shorter[0], longer[0]) and not np.array_equal(shorter[1:], longer[1:])
    tf = BlockPattern.bigbird(1024, compat="tf", max_position_embeddings=8192)
    assert np.array_equal(slots(tf, 16), shorter)


def test_in_eval_mode_of_hugging_face_block_0_counts_more():
    counts = BlockPattern.bigbird(1024, 64, 2, 3, compat="hf_eval").counts(16)
    assert (counts[:, 1:-1, 0] == 4).all() and (counts[:, [0, -1]] == 1).all() and counts[:, :, 1:].max() == 1
    assert torch.equal(counts, BlockPattern.bigbird(1024, 64, 2, 3, seed=9, compat="hf_eval").counts(16))


@pytest.mark.parametrize("num_blocks", [9, 10, 11])
@pytest.mark.parametrize("compat", ["tf", "hf_train"])
def test_lengths_at_which_the_released_code_stops_are_named(num_blocks, compat):
    message = (
        rf"seq_len is {num_blocks} blocks of 64: with compat '{compat}' and num_random_blocks 3 the released code "
        r"stops there, as in some other lengths of up to 11 blocks, 704 tokens"
    )
    with pytest.raises(ValueError, match=message):
        BlockPattern.bigbird(num_blocks * 64 - 5, compat=compat)
    assert BlockPattern.bigbird(num_blocks * 64, compat=compat, full_when_short=True).counts(num_blocks).min() == 1


@pytest.mark.parametrize("num_random", [0, 1, 3, 5])
@pytest.mark.parametrize("global_blocks", ["ends", "front"])
def test_short_examples_draw_from_what_there_is(num_random, global_blocks):
    """r blocks that the row does not see, or all of them."""
    pattern, shorter = (
        BlockPattern.bigbird(seq_len, 64, 3, num_random, global_blocks=global_blocks) for seq_len in (4096, 1000)
    )
    without = BlockPattern.bigbird(4096, 64, 3, 0, global_blocks=global_blocks)
    for length in range(2 * num_random + 6):
        counts, fixed = pattern.counts(length), without.counts(length)
        assert length == 0 or counts.max() == 1
        added = (counts - fixed).sum(dim=2)
        assert torch.equal(added, (length - fixed.sum(dim=2)).clamp(max=num_random))
    assert torch.equal(
        counts, BlockPattern.bigbird(2048, 64, 3, num_random, global_blocks=global_blocks).counts(length)
    )


@pytest.mark.parametrize("compat", [None, "tf", "hf_train", "hf_eval"])
@pytest.mark.parametrize("num_random", [1, 3, 6])
def test_full_when_short_is_full_up_to_the_published_threshold(compat, num_random):
    """(5 + 2 r) * b tokens: 704 with 3 random blocks of 64 are full, 705 are not."""
    limit = (5 + 2 * num_random) * 64

    def counts(tokens):
        sizes = (tokens, 64, 2, num_random)
        return BlockPattern.bigbird(*sizes, compat=compat, full_when_short=True).counts(-(-tokens // 64))

    for tokens in (limit, limit - 64, 320, 128, 1):
        assert (counts(tokens) == 1).all()
    assert (counts(limit + 1) == 0).any()
    longer = BlockPattern.bigbird(4096, 64, 2, num_random, full_when_short=True)
    for length in range(1, 66):
        assert (length <= limit // 64) == bool((longer.counts(min(length, 64)) == 1).all())


def test_global_blocks_at_the_front():
    """The paper's question answering: two at the front, none at the end, the released draw for those."""
    pattern = BlockPattern.bigbird(8192, global_blocks="front")
    assert (pattern.front, pattern.back) == (2, 0)
    for length in (12, 16, 64, 100):  # no old plan
        counts = pattern.counts(length)
        assert counts.max() == 1 and (counts[:, :, :2] == 1).all() and (counts[:, :2] == 1).all()
        # two global blocks, a window of 3 or what is left of it, 3 random blocks
        expected = torch.tensor([length, length, 7, *[8] * (length - 4), 7])
        assert torch.equal(counts.sum(dim=2), expected.expand(12, -1))
        # the random ones are among the first 2 r + 5: further right there is but the window
        assert (counts[:, 20:-1, 11:].sum(dim=2) == 3).all()
    # another pattern of the same seed, other ids
    assert not torch.equal(pattern.counts(64), BlockPattern.bigbird(4096).counts(64))


def test_the_global_generator_of_numpy_is_left_alone():
    np.random.seed(3)
    before = np.random.random(3)
    np.random.seed(3)
    BlockPattern.bigbird(4096)
    BlockPattern.bigbird(1536, compat="hf_train")
    BlockPattern.uniform(4096, 64, 2, 3)
    assert np.array_equal(before, np.random.random(3))


def test_a_draw_is_uniform_without_replacement():
    """Over 4000 heads every pair of unseen blocks of a row is drawn about equally often."""
    num_blocks, row = 12, 4  # global 0, 1 and 11; window 3 to 5; unseen 2 and 6 to 10
    drawn = draw_unseen(np.random.RandomState(0), 4000, num_blocks, 2, front=2, back=1, window=3)
    assert (drawn[:, [0, 1, 11]] == -1).all()
    pairs, counts = np.unique(np.sort(drawn[:, row], axis=1), axis=0, return_counts=True)
    unseen = [2, 6, 7, 8, 9, 10]
    assert pairs.tolist() == [[a, b] for a in unseen for b in unseen if a < b]
    # 15 pairs of expectation 267: chi-square of 14 degrees, 36 is its 99.9 % point
    assert ((counts - 4000 / 15) ** 2 / (4000 / 15)).sum() < 36
    first = np.unique(drawn[:, row, 0], return_counts=True)[1]
    assert ((first - 4000 / 6) ** 2 / (4000 / 6)).sum() < 20.5
    # rows with fewer have them all
    drawn = draw_unseen(np.random.RandomState(0), 3, 7, 5, front=1, back=1, window=3)
    assert sorted(drawn[0, 1].tolist()) == [-1, -1, 3, 4, 5] and sorted(drawn[2, 3].tolist()) == [-1, -1, -1, 1, 5]
