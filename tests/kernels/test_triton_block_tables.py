"""Which blocks the programs of the block-sparse kernels visit, counted one by one: the pattern, each entry once.

The programs of a launch are run over a batch that holds an example of every length.
"""

import copy
import gc
import weakref

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from kernels.block_sparse_attention.items import block_of_merge, entry, work_of_program
from kernels.block_sparse_attention.launch import fit
from kernels.block_sparse_attention.lengths import block_lengths
from kernels.block_sparse_attention.tables import CHUNK, NOTHING, device_tables
from tests.kernels.block_cases import FIXED_LENGTH, KINDS, make_pattern
from tests.kernels.window import make_inputs

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")


@triton.jit
def _count(
    visits_ptr, written_ptr, filled_ptr, merged_ptr, lengths_ptr, parts_ptr, items_ptr, merges_ptr, offsets_ptr,
    blocks_ptr, plan_ptr, num_examples, N, num_parts, num_items, num_merges, H: tl.constexpr,
    FRONT: tl.constexpr, BACK: tl.constexpr, WINDOW: tl.constexpr, HAS_LISTS: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """A program of the kernels that compute, or, past the last, of those that merge; blocks are of one token."""
    program = tl.program_id(0)
    num_programs = (num_parts + num_items) * H * num_examples
    if program < num_programs:
        batch, head, _, item, _, block, has_work, first, last, extent, listed = work_of_program(
            program, lengths_ptr, plan_ptr, parts_ptr, items_ptr, offsets_ptr, blocks_ptr,
            N, N, num_parts, num_items, N + 1, H, 1, FRONT, BACK, WINDOW, True, True, BY_COLUMN,
        )  # fmt: skip
        if has_work:
            for index in range(first, last):
                other = entry(index, extent, listed, HAS_LISTS)
                place = visits_ptr + ((batch * H + head) * N + block) * N + other
                tl.store(place, tl.load(place) + 1)
            place = written_ptr + (batch * H + head) * N + block
            if item < num_parts:
                place = filled_ptr + (batch * H + head) * num_parts + item
            tl.store(place, tl.load(place) + 1)
    else:
        batch, head, _, block, has_rows, first, last = block_of_merge(
            program - num_programs, lengths_ptr, merges_ptr, offsets_ptr, blocks_ptr, plan_ptr,
            N, N, num_merges, N + 1, H, 1, FRONT, BACK, WINDOW, True, True, BY_COLUMN,
        )  # fmt: skip
        if has_rows:
            place = written_ptr + (batch * H + head) * N + block
            tl.store(place, tl.load(place) + 1)
            for part in range(first, last):
                place = merged_ptr + (batch * H + head) * num_parts + part
                tl.store(place, tl.load(place) + 1)


def count(pattern: BlockPattern, direction: str, lengths: list[int]):
    """(visits [L, H, N, N], times that a block is written [L, H, N], parts filled, parts merged [L, H, S]).

    L examples of the lengths, in blocks; the third index is the block whose program it is.
    """
    found = device_tables(pattern, CPU)
    parts, items, merges, blocks = found[:4] if direction == "row" else found[4:8]
    num_blocks, num_heads = pattern.num_blocks, pattern.num_heads
    examples = torch.tensor([[length, pattern.plan_of_length[length], length] for length in lengths]).int()
    shape = (len(lengths), num_heads)
    visits = torch.zeros(*shape, num_blocks, num_blocks, dtype=torch.int32)
    written = torch.zeros(*shape, num_blocks, dtype=torch.int32)
    filled, merged = (torch.zeros(*shape, parts.shape[2], dtype=torch.int32) for _ in range(2))
    num_programs = (parts.shape[2] + items.shape[2] + merges.shape[2]) * num_heads * len(lengths)
    _count[(num_programs,)](
        visits, written, filled, merged, examples, parts, items, merges, found.column_offsets, blocks,
        found.plan_of_length, len(lengths), num_blocks, parts.shape[2], items.shape[2], merges.shape[2],
        H=num_heads, FRONT=pattern.front, BACK=pattern.back, WINDOW=pattern.window, HAS_LISTS=len(blocks) > 0,
        BY_COLUMN=direction == "column",
    )  # fmt: skip
    return visits, written, filled, merged


def assert_counted(pattern: BlockPattern, lengths: list[int]) -> None:
    """Both directions visit what `counts` says, write every block once and merge what they cut."""
    for direction in ("row", "column"):
        for length, visits, written, filled, merged in zip(lengths, *count(pattern, direction, lengths), strict=True):
            expected = torch.zeros_like(visits)
            expected[:, :length, :length] = pattern.counts(length)
            assert visits.equal(expected if direction == "row" else expected.mT), (direction, length)
            assert (written == 1).all(), (direction, length)
            assert filled.equal(merged) and (filled <= 1).all(), (direction, length)


@pytest.mark.parametrize("kind", KINDS)
def test_each_entry_of_the_pattern_is_visited_once(kind):
    """Short examples, the longest, and some between; blocks of more entries than an item holds are among them."""
    pattern = make_pattern(kind, 19, 1, 1)
    assert_counted(pattern, [19] if kind in FIXED_LENGTH else [0, 1, 2, 3, 5, 12, 18, 19])


@pytest.mark.parametrize("kind", ["bigbird", "uniform", "counts"])
def test_heads_have_lists_of_their_own(kind):
    assert_counted(make_pattern(kind, 12, 1, 3), [3, 11, 12])


@pytest.mark.parametrize("compat", [None, "hf_eval"])
def test_columns_that_all_rows_draw_are_cut(compat):
    """The released plans draw from nine blocks, or from block 0 alone."""
    pattern = BlockPattern.bigbird(45, 1, 1, 3, compat=compat)
    merges = device_tables(pattern, CPU).column_merges[pattern.plan_of_length[45], 0]
    assert len(merges) == 2 if compat else len(merges) > 8
    assert_counted(pattern, [12, 27, 45] if compat is None else [45])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_counts_are_visited_as_often(data):
    num_blocks = data.draw(st.integers(1, 6))
    row = st.lists(st.sampled_from([0, 0, 1, 2, 30]), min_size=num_blocks, max_size=num_blocks)
    counts = torch.tensor([data.draw(row) for _ in range(num_blocks)])
    pattern = BlockPattern.from_mask(counts, 1, num_heads=1)
    assert_counted(pattern, [data.draw(st.integers(0, num_blocks)), num_blocks])


def test_no_item_has_more_entries_than_a_chunk_and_the_heaviest_come_first():
    pattern = BlockPattern.bigbird(200, 1, 2, 3)
    found, plan = device_tables(pattern, CPU), pattern.plan_of_length[200]
    for direction in ("row", "column"):
        parts, items, merges = (getattr(found, f"{direction}_{name}")[plan] for name in ("parts", "items", "merges"))
        real = parts[parts[:, :, 0] != NOTHING]
        assert (real[:, 2] - real[:, 1] == CHUNK).all() and (items[:, :, 2] <= CHUNK).all()
        sizes = [
            [int((head_parts[:, 0] == block).sum()) for block in head_merges[:, 0].tolist() if block != NOTHING]
            for head_parts, head_merges in zip(parts, merges, strict=True)
        ]
        assert all(size == sorted(size, reverse=True) and min(size) > 1 for size in sizes)


def test_a_pattern_that_is_dense_everywhere_is_not_cut():
    found = device_tables(BlockPattern.from_function(lambda row, column: True, 50, 1, 1), CPU)
    assert found.row_parts.shape[2] == found.column_parts.shape[2] == 0


def test_tables_are_made_once_and_go_with_their_pattern():
    pattern = make_pattern("bigbird", 10, 1, 1)
    found, freed = device_tables(pattern, CPU), weakref.ref(pattern)
    assert device_tables(pattern, CPU) is found
    other = device_tables(copy.deepcopy(pattern), CPU)
    assert other is not found and all(ours.equal(theirs) for ours, theirs in zip(other, found, strict=True))
    del pattern
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("follows_length", [True, False])
def test_lengths_are_those_of_the_mask(follows_length):
    valid = torch.rand(7, 2 * 33) > 0.5
    valid[0], valid[1], valid[2], valid[3, 20:] = True, False, torch.arange(66) == 65, False
    valid = valid[:, ::2]  # [7, 33]
    plan_of_length = torch.randint(5, (10,), dtype=torch.int32)
    expected = []
    for row in valid.tolist():
        last = max((place + 1 for place, real in enumerate(row) if real), default=0)
        num_blocks = -(-last // 4) if follows_length else 9
        expected.append([num_blocks, plan_of_length[num_blocks].item(), ([*row, False]).index(False)])
    assert block_lengths(valid, plan_of_length, 4, follows_length).tolist() == expected


@pytest.mark.parametrize(
    "limit, block_size, rows",
    [(64, 64, 64), (128, 64, 64), (64, 128, 64), (16, 64, 16), (64, 16, 16), (64, 17, 32), (64, 48, 64), (64, 84, 32)]
    + [(32, 64, 32), (128, 96, 32), (128, 100, 128)],
)
def test_tiles_fit_blocks(limit, block_size, rows):
    assert fit(limit, block_size) == rows


def test_a_short_text_has_tables_of_its_own():
    """One launches no programs and holds no sums for the longest text that the pattern serves."""
    pattern = BlockPattern.bigbird(4096, 16, 2, 3, 0)
    short = device_tables(pattern, CPU, 40)
    assert short.plan_of_length.shape == (65,) and device_tables(pattern, CPU, 64) is short
    assert short.column_parts.shape[2] < device_tables(pattern, CPU).column_parts.shape[2]
    assert device_tables(pattern, CPU, 129) is device_tables(pattern, CPU)
    inputs = make_inputs(600, head_dim=16, dtype=torch.float32)
    ours, expected = (block_sparse_attention(**inputs, pattern=pattern, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, expected)
