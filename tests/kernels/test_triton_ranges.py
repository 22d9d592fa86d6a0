"""Which pairs the loops of the kernels visit, counted one by one: each pair of the pattern once, no other."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.window_attention.pattern import WindowPattern
from kernels.window_attention.ranges import (
    class_length,
    edge_tile,
    grid_tiles,
    head_pattern,
    in_window,
    key_tiles,
    row_tiles,
    tile_of_class,
)

pytestmark = pytest.mark.interpreter


@triton.jit
def _count_by_rows(
    count_ptr, plain_ptr, window_ptr, dilation_ptr, T, S, query_start, num_tiles,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    left, right, dilation = head_pattern(window_ptr, dilation_ptr, 0, T, S, query_start, CAUSAL)
    residue, first_row = tile_of_class(tl.program_id(0), T, dilation, BLOCK_M)
    num_rows = class_length(T, residue, dilation)
    if residue >= dilation or first_row >= num_rows:
        return
    shift, first_key = (query_start + residue) // dilation, (query_start + residue) % dilation
    num_keys = class_length(S, first_key, dilation)
    rows = first_row + tl.arange(0, BLOCK_M)
    last_step = shift + tl.minimum(first_row + BLOCK_M, num_rows) - 1
    first, num_key_tiles, begin, end = key_tiles(shift + first_row, last_step, left, right, num_keys, BLOCK_N)
    for index in range(0, num_key_tiles):
        inner = index >= num_key_tiles - (end - begin)
        tile = tl.where(inner, begin + index - (num_key_tiles - (end - begin)), edge_tile(index, begin, end))
        keys = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = in_window((shift + rows)[:, None], keys[None, :], left, right) & (keys < num_keys)[None, :]
        seen = tl.where(inner, 1, seen.to(tl.int32)) * (rows < num_rows)[:, None].to(tl.int32) > 0
        place = count_ptr + (residue + rows * dilation)[:, None] * S + (first_key + keys * dilation)[None, :]
        tl.store(place, tl.load(place, mask=seen, other=0) + 1, mask=seen)
        tl.store(plain_ptr, tl.load(plain_ptr) + inner.to(tl.int32))


@triton.jit
def _count_by_keys(
    count_ptr, plain_ptr, window_ptr, dilation_ptr, T, S, query_start, num_tiles,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    left, right, dilation = head_pattern(window_ptr, dilation_ptr, 0, T, S, query_start, CAUSAL)
    first_key, first = tile_of_class(tl.program_id(0), S, dilation, BLOCK_N)
    num_keys = class_length(S, first_key, dilation)
    if first_key >= dilation or first >= num_keys:
        return
    residue = (first_key - query_start % dilation + dilation) % dilation
    shift = (query_start + residue) // dilation
    num_rows = class_length(T, residue, dilation)
    keys = first + tl.arange(0, BLOCK_N)
    last_key = tl.minimum(first + BLOCK_N, num_keys) - 1
    first_row, num_row_tiles, begin, end = row_tiles(first, last_key, shift, left, right, num_rows, BLOCK_M)
    for index in range(0, num_row_tiles):
        inner = index >= num_row_tiles - (end - begin)
        tile = tl.where(inner, begin + index - (num_row_tiles - (end - begin)), edge_tile(index, begin, end))
        rows = first_row + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        seen = in_window((shift + rows)[:, None], keys[None, :], left, right) & (rows < num_rows)[:, None]
        seen = tl.where(inner, 1, seen.to(tl.int32)) * (keys < num_keys)[None, :].to(tl.int32) > 0
        place = count_ptr + (residue + rows * dilation)[:, None] * S + (first_key + keys * dilation)[None, :]
        tl.store(place, tl.load(place, mask=seen, other=0) + 1, mask=seen)
        tl.store(plain_ptr, tl.load(plain_ptr) + inner.to(tl.int32))


def count(kernel, seq_len, key_len, query_start, window, dilation, causal, block):
    """(visits [T, S], number of tiles computed without a mask)."""
    visits = torch.zeros(seq_len, key_len, dtype=torch.int32)
    plain = torch.zeros(1, dtype=torch.int32)
    tables = (torch.tensor([entry], dtype=torch.int32) for entry in (window, dilation))
    length = seq_len if kernel is _count_by_rows else key_len
    num_tiles = grid_tiles((dilation,), length, max(query_start + seq_len, key_len), block)
    kernel[(num_tiles,)](
        visits, plain, *tables, seq_len, key_len, query_start, num_tiles, CAUSAL=causal, BLOCK_M=block, BLOCK_N=block
    )
    return visits, plain.item()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seq_len=st.integers(1, 40),
    key_len=st.integers(1, 40),
    query_start=st.sampled_from([0, 0, 1, 3, 17, 50]),
    window=st.sampled_from([0, 1, 3, 4, 5, 11, 60]),
    dilation=st.sampled_from([1, 2, 3, 7, 39, 100]),
    causal=st.booleans(),
    kernel=st.sampled_from([_count_by_rows, _count_by_keys]),
)
def test_each_pair_of_the_pattern_is_visited_once(seq_len, key_len, query_start, window, dilation, causal, kernel):
    pattern = WindowPattern.of(window, dilation, num_heads=1, causal=causal)
    expected = pattern.mask(seq_len, key_len=key_len, query_start=query_start)[0].int()
    visits, _ = count(kernel, seq_len, key_len, query_start, window, dilation, causal, block=4)
    assert visits.equal(expected)


@pytest.mark.parametrize("kernel", [_count_by_rows, _count_by_keys])
def test_tiles_that_no_edge_crosses_need_no_mask(kernel):
    """20 keys on each side and tiles of 4: of the 11 tiles around a tile of rows, 9 are inside the window."""
    _, plain = count(kernel, 120, 120, 0, 20, 1, False, block=4)
    assert plain >= 9 * (120 - 40) // 4
