"""Cells and numbers of windows with global tokens against dense masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.window_attention import WindowPattern
from reports.pattern_blocks import GLOBAL, WINDOW
from reports.pattern_numbers import head_groups
from reports.pattern_windows import window_cells, window_numbers


def dense(pattern, seq_len, global_positions):
    """[H, T, T] of what is seen, and [T, T] of what global tokens see to."""
    seen = pattern.mask(seq_len).numpy()
    spread = np.zeros((seq_len, seq_len), bool)
    spread[:, global_positions] = spread[global_positions] = True
    spread = np.tril(spread) if pattern.causal else spread
    return seen | spread, spread


@st.composite
def cases(draw):
    num_heads = draw(st.integers(1, 3))
    windows = draw(st.tuples(*[st.integers(0, 9)] * num_heads))
    dilations = draw(st.tuples(*[st.integers(1, 4)] * num_heads))
    seq_len = draw(st.integers(1, 40))
    global_positions = sorted(draw(st.sets(st.integers(0, seq_len - 1), max_size=4)))
    return WindowPattern(windows, dilations, draw(st.booleans())), seq_len, global_positions


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(cases())
def test_numbers_equal_counts_on_masks(case):
    pattern, seq_len, global_positions = case
    found = window_numbers(pattern, seq_len, global_positions)
    seen, spread = dense(*case)
    everything = np.tri(seq_len, dtype=bool) if pattern.causal else np.ones((seq_len, seq_len), bool)
    assert found["pairs"] == seen.sum()
    assert found["share_of_dense"] == pytest.approx(seen.sum() / (len(seen) * everything.sum()))
    ordinary = np.setdiff1d(np.arange(seq_len), global_positions)
    for row in found["heads"]:
        for head in row["heads"]:
            rows, columns = seen[head].sum(1), seen[head].sum(0)
            assert row["pairs"] == seen[head].sum()
            assert row["pairs_by_part"] == {WINDOW: (seen[head] & ~spread).sum(), GLOBAL: spread.sum()}
            assert (row["fewest_keys"], row["most_keys"]) == (rows.min(), rows.max())
            assert row["longest_column"] == columns.max()
            assert row["column_skew"] == pytest.approx(columns.max() / columns.mean())
            assert row["longest_ordinary_column"] == columns[ordinary].max(initial=0)
    layers = found["layers_to_all"]
    if layers is not None:
        graph = seen.any(0).astype(int) + np.eye(seq_len, dtype=int)
        assert (np.linalg.matrix_power(graph, layers) > 0).all()
        assert layers == 1 or not any(head.all() for head in seen)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(cases())
def test_cells_of_one_pair_are_the_mask(case):
    pattern, seq_len, global_positions = case
    seen, spread = dense(*case)
    for group in head_groups(pattern):
        cells = window_cells(group, seq_len, global_positions, causal=pattern.causal, cell=1)
        assert ((cells[WINDOW] > 0) == (seen[group.heads[0]] & ~spread)).all()
        assert ((cells[GLOBAL] > 0) == spread).all() if GLOBAL in cells else not spread.any()


@pytest.mark.parametrize("causal", [False, True])
def test_global_tokens_show_in_coarse_cells(causal):
    pattern = WindowPattern((3,), (1,), causal)
    (group,) = head_groups(pattern)
    cells = window_cells(group, 90, [50], causal=causal, cell=4)
    assert cells[GLOBAL].shape == (23, 23)
    expected = np.zeros((23, 23), bool)
    expected[12] = expected[:, 12] = True
    assert ((cells[GLOBAL] == 1) == (np.tril(expected) if causal else expected)).all()
    assert not (cells[WINDOW][expected if not causal else np.tril(expected)]).any()
    assert cells[WINDOW][0, 0] > cells[WINDOW][1, 0] > 0


def test_long_rows_are_quick():
    pattern = WindowPattern((512, 512), (1, 4), True)
    found = window_numbers(pattern, 2**20, [0, 2**19])
    assert found["heads"][0]["pairs"] == sum(
        min(row, 512) + 1 + (row > 512) + (row >= 2**19 + 513) for row in range(2**20)
    ) + (2**19 - 513)
