"""Exact numbers against brute force on the dense masks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.window_attention.pattern import WindowPattern
from reports.pattern_numbers import (
    block_shares,
    head_groups,
    index_label,
    layer_runs,
    pattern_numbers,
    reached_positions,
    receptive_field,
    unreached,
)


def reached_by_products(patterns, seq_len, query):
    """Which positions change the output at `query`, by boolean products of the dense masks."""
    seen = np.zeros(seq_len, bool)
    seen[query] = True
    for pattern in reversed(patterns):
        graph = pattern.mask(seq_len).any(0).numpy()  # [T, T], rows = queries
        seen = graph[seen].any(0)
    return seen


@st.composite
def stacks(draw):
    causal = draw(st.booleans())
    num_heads = draw(st.integers(1, 3))
    heads = st.tuples(*[st.integers(0, 6)] * num_heads)
    gaps = st.tuples(*[st.integers(1, 5)] * num_heads)
    layers = draw(st.lists(st.tuples(heads, gaps), min_size=1, max_size=4))
    return [WindowPattern(window, dilation, causal) for window, dilation in layers]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(stacks(), st.integers(1, 40), st.data())
def test_reached_positions_equal_products_of_masks(patterns, seq_len, data):
    query = data.draw(st.integers(0, seq_len - 1))
    expected = reached_by_products(patterns, seq_len, query)
    assert reached_positions(patterns, seq_len, query).tolist() == expected.tolist()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(stacks(), st.integers(1, 40))
def test_numbers_equal_counts_on_masks(patterns, seq_len):
    numbers = pattern_numbers(patterns, seq_len)
    masks = [pattern.mask(seq_len) for pattern in patterns]
    assert numbers["pairs"] == sum(int(mask.sum()) for mask in masks)
    dense = [WindowPattern((seq_len,) * p.num_heads, (1,) * p.num_heads, p.causal) for p in patterns]
    assert numbers["dense_pairs"] == sum(int(pattern.mask(seq_len).sum()) for pattern in dense)
    assert numbers["share_of_dense"] == pytest.approx(numbers["pairs"] / numbers["dense_pairs"])
    query = numbers["query"]
    for layer, row in enumerate(numbers["layers"]):
        for key, stack in (("gaps", patterns[layer : layer + 1]), ("dead", patterns[: layer + 1])):
            seen = reached_by_products(stack, seq_len, query)
            reach = sum(pattern.reach for pattern in stack)
            right = query if numbers["causal"] else query + reach
            inside = seen[max(query - reach, 0) : right + 1]
            assert row[key] == int((~inside).sum())


def test_receptive_field_adds_the_largest_reach_of_every_layer():
    patterns = [
        WindowPattern((4, 2), (1, 1), True),
        WindowPattern((4, 3), (1, 2), True),
        WindowPattern((0, 0), (1, 7), True),
    ]
    assert receptive_field(patterns) == [4, 10, 10]
    # the farthest position a query far from the start can see is exactly that far away
    assert 63 - int(np.argmax(reached_positions(patterns, 64, 63))) == 10


def test_dilation_alone_leaves_positions_unreached_and_a_dense_layer_below_fills_them():
    dilated = WindowPattern((4,), (3,), True)
    assert unreached([dilated], 40, 39) == 8  # of 13 positions, those at distances 0, 3, 6, 9, 12 are seen
    assert unreached([dilated, dilated], 60, 59) == 25 - 9
    assert unreached([WindowPattern((2,), (1,), True), dilated], 60, 59) == 0
    assert unreached([dilated], 6, 5) == 4  # the row is shorter than the reach: positions 0..5, 2 and 5 seen


def test_window_past_the_row_is_full_attention():
    everything = WindowPattern((10**9,), (1,), True)
    numbers = pattern_numbers([everything], 32)
    assert numbers["share_of_dense"] == 1.0 and numbers["dead"] == 0
    assert reached_positions([everything], 32, 31).all()


def test_long_rows_are_exact_and_quick():
    patterns = [WindowPattern((512, 512), (1, 4), True)] * 30
    numbers = pattern_numbers(patterns, 23_040)
    assert numbers["receptive_field"] == 30 * 2048
    assert numbers["layers"][0]["gaps"] == 2048 - 512 - (2048 - 512) // 4
    assert numbers["dead"] == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "dilation"), [(0, 1), (3, 1), (5, 3), (100, 1), (100, 7)])
@pytest.mark.parametrize("block", [1, 4, 5])
def test_block_shares_equal_pooled_mask(window, dilation, causal, block):
    num_blocks = 6
    seq_len = block * num_blocks
    # the middle of a row three times as long: no pair is cut off at an end
    pattern = WindowPattern((window,), (dilation,), causal)
    mask = pattern.mask(3 * seq_len)[0, seq_len : 2 * seq_len, seq_len : 2 * seq_len].numpy()
    pooled = mask.reshape(num_blocks, block, num_blocks, block).mean((1, 3))
    (group,) = head_groups(pattern)
    shares = block_shares(group, causal=causal, block=block, num_blocks=num_blocks)
    np.testing.assert_allclose(shares, pooled, atol=1e-12)


def test_equal_heads_and_equal_layers_are_named_once():
    pattern = WindowPattern((8, 8, 4, 8), (1, 1, 2, 1), True)
    assert [(group.heads, group.window, group.dilation) for group in head_groups(pattern)] == [
        ((0, 1, 3), 8, 1),
        ((2,), 4, 2),
    ]
    other = WindowPattern((8, 8, 4, 8), (1, 1, 1, 1), True)
    assert layer_runs([pattern, pattern, other, pattern]) == [(0, 1), (2, 2), (3, 3)]
    assert index_label("head", (0, 1, 3)) == "heads 0–1, 3"
    assert index_label("layer", (2,)) == "layer 2"


def test_paper_small_model_reaches_every_position_of_its_field():
    """Phase 1 of the small model (paper Table 12): the heads without dilation fill every gap."""
    windows = [32, 32, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512]
    gaps = [1] * 6 + [2, 2, 3, 3, 4, 4]
    patterns = [
        WindowPattern((window,) * 8, (1,) * 6 + (gap,) * 2, True) for window, gap in zip(windows, gaps, strict=True)
    ]
    fields = list(itertools.accumulate(window * gap for window, gap in zip(windows, gaps, strict=True)))
    assert receptive_field(patterns) == fields
    numbers = pattern_numbers(patterns, 2048)
    assert numbers["dead"] == 0
    assert numbers["layers"][10]["gaps"] == (2047 - 512) - (2047 // 4 - 512 // 4)
