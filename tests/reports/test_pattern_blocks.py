"""Parts and numbers of block patterns against counting token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.block_sparse_attention import BlockPattern
from reports.pattern_blocks import GLOBAL, RANDOM, SEEN, WINDOW, block_numbers, block_parts, layers_to_all
from reports.pattern_mosaic import MAX_CELLS, REPEATED, block_panels


def counts_of(pattern):
    return pattern.counts(pattern.num_blocks).numpy()


def token_counts(pattern):
    """How often each pair of tokens counts, [H, T, T]."""
    size, seq_len = pattern.block_size, pattern.seq_len
    return counts_of(pattern).repeat(size, axis=1).repeat(size, axis=2)[:, :seq_len, :seq_len]


@st.composite
def patterns(draw):
    block_size, num_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seq_len = draw(st.integers(1, 14 * block_size))
    kind = draw(st.sampled_from(["uniform", "etc", "mask"]))
    if kind == "etc":
        return BlockPattern.etc(seq_len, block_size, num_heads, draw(st.integers(0, min(3, -(-seq_len // block_size)))))
    if kind == "uniform":
        front, back, window = draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.sampled_from([0, 1, 3, 5]))
        sizes = (seq_len, block_size, num_heads, draw(st.integers(0, 3)))
        return BlockPattern.uniform(*sizes, seed=draw(st.integers(0, 9)), window=window, front=front, back=back)
    num_blocks = -(-seq_len // block_size)
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    mask = generator.integers(0, 3, (num_heads, num_blocks, num_blocks)) * generator.integers(0, 2)
    return BlockPattern.from_mask(mask, block_size, seq_len)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(patterns())
def test_numbers_equal_counts_of_tokens(pattern):
    found, tokens = block_numbers(pattern, counts_of(pattern)), token_counts(pattern)
    assert found["pairs"] == tokens.sum() == sum(pattern.num_pairs(pattern.seq_len))
    assert found["share_of_dense"] == pytest.approx(tokens.sum() / tokens.size)
    assert sorted(head for row in found["heads"] for head in row["heads"]) == list(range(pattern.num_heads))
    front, back = pattern.global_blocks(pattern.num_blocks)
    ordinary = slice(front * pattern.block_size, (pattern.num_blocks - back) * pattern.block_size)
    for row in found["heads"]:
        for head in row["heads"]:
            rows, columns = tokens[head].sum(1), tokens[head].sum(0)
            assert (row["fewest_keys"], row["most_keys"]) == (rows.min(), rows.max())
            assert row["longest_column"] == columns.max()
            assert row["repeated_pairs"] == np.maximum(tokens[head] - 1, 0).sum()
            assert sum(row["pairs_by_part"].values()) == row["pairs"] == tokens[head].sum()
            for name, of in (("column_skew", columns), ("ordinary_column_skew", columns[ordinary])):
                expected = of.max() / of.mean() if of.size and of.any() else None
                assert row[name] == (None if expected is None else pytest.approx(expected))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(patterns())
def test_parts_are_those_of_the_definition(pattern):
    num_blocks = pattern.num_blocks
    front, back = pattern.global_blocks(num_blocks)
    for head_counts in counts_of(pattern):
        parts = block_parts(pattern, head_counts)
        assert (sum(parts.values()) == head_counts).all() and all((part >= 0).all() for part in parts.values())
        for row in range(num_blocks):
            for column in range(num_blocks):
                is_global = any(block < front or block >= num_blocks - back for block in (row, column))
                near = pattern.window > 0 and abs(row - column) <= pattern.window // 2
                expected = GLOBAL if is_global else WINDOW if near else None
                for name in (GLOBAL, WINDOW):
                    found = parts[name][row, column] if name in parts else 0
                    assert found == (expected == name)


def test_published_pattern_has_the_pairs_of_its_table():
    """Every ordinary row of 4096 tokens reads 5 + r blocks, the two beside the ends 4 + r, the ends all."""
    pattern = BlockPattern.bigbird(4096, 64, 2, compat="tf")
    (row, *_) = block_numbers(pattern, counts_of(pattern))["heads"]
    assert row["pairs"] == 64 * 64 * (2 * 64 + 2 * 7 + 60 * 8)
    assert (row["fewest_keys"], row["most_keys"], row["repeated_pairs"]) == (7 * 64, 4096, 0)
    eval_pattern = BlockPattern.bigbird(4096, 64, 2, compat="hf_eval")
    found = block_numbers(eval_pattern, counts_of(eval_pattern))
    assert [row["heads"] for row in found["heads"]] == [[0, 1]]
    assert found["heads"][0]["repeated_pairs"] == 62 * 3 * 64 * 64  # block 0 again and again


def reach_by_products(seen):
    reached, layers = np.eye(len(seen), dtype=bool), 0
    while not reached.all():
        before, layers = reached, layers + 1
        reached = reached | (seen.astype(int) @ reached.astype(int) > 0)
        if (reached == before).all():
            return None
    return max(layers, 1)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.floats(0, 0.5), st.integers(0, 1000))
def test_layers_to_all_equal_products_of_masks(num_blocks, density, seed):
    seen = np.random.default_rng(seed).random((num_blocks, num_blocks)) < density
    assert layers_to_all(seen) == reach_by_products(seen)


def test_layers_of_known_graphs():
    block = np.arange(10)
    assert layers_to_all(np.ones((4, 4), bool)) == 1
    assert layers_to_all((block == 0) | (block[:, None] == 0)) == 2  # a star: one hub
    assert layers_to_all(abs(block[:, None] - block) <= 1) == 9
    assert layers_to_all(block[:, None] >= block) is None  # causal: nothing from ahead


@pytest.mark.parametrize("compat", [None, "tf", "hf_train", "hf_eval"])
def test_panels_of_a_pattern_are_its_parts(compat):
    pattern = BlockPattern.bigbird(1024, 64, 2, compat=compat)
    counts = counts_of(pattern)[1]
    panels, blocks = block_panels(pattern, counts, RANDOM)
    assert blocks == 1 and [panel.title for panel in panels] == [RANDOM, WINDOW, GLOBAL, "together"]
    together = panels[-1].shares
    assert (sum(together[name] for name in (RANDOM, WINDOW, GLOBAL)) > 0).tolist() == (counts > 0).tolist()
    assert (together[REPEATED] > 0).tolist() == (counts > 1).tolist()


def test_coarse_cells_hold_shares_of_their_blocks():
    num_blocks = 2 * MAX_CELLS + 1
    mask = np.zeros((1, num_blocks, num_blocks), bool)
    mask[0, 0, 0] = mask[0, 4, 3] = mask[0, 4, 4] = True
    pattern = BlockPattern.from_mask(mask, block_size=2)
    (panel,), blocks = block_panels(pattern, counts_of(pattern)[0], SEEN)
    assert blocks == 3 and panel.shares[SEEN].shape == (86, 86)
    assert panel.shares[SEEN][0, 0] == pytest.approx(1 / 9) and panel.shares[SEEN][1, 1] == pytest.approx(2 / 9)
    assert panel.shares[SEEN].sum() == pytest.approx(3 / 9)
