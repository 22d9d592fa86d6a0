"""From a mask of global tokens to their positions, and what a list of positions means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.window_attention import global_positions
from kernels.window_attention.global_tokens import canonical_index
from tests.kernels.global_cases import GLOBAL_SETS, make_global_index
from tests.kernels.window import MASKS, make_valid


def by_loops(is_global, valid, capacity):
    rows = []
    for row in range(len(is_global)):
        kept = [t for t, flag in enumerate(is_global[row].tolist()) if flag and (valid is None or valid[row, t])]
        rows.append(kept + [-1] * (capacity - len(kept)))
    return torch.tensor(rows, dtype=torch.int64).view(len(is_global), capacity)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 3), st.integers(0, 40), st.sampled_from(MASKS), st.integers(0, 9), st.integers(0, 999))
def test_positions_are_the_definition(batch, seq_len, mask, spare, seed):
    generator = torch.Generator().manual_seed(seed)
    is_global = torch.rand(batch, seq_len, generator=generator) < 0.3
    valid = make_valid(mask, batch, seq_len) if batch else None
    capacity = spare + int((is_global if valid is None else is_global & valid).sum(1).max() if batch else 0)
    actual = global_positions(is_global, valid, capacity)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, by_loops(is_global, valid, capacity))


def test_an_overflow_names_the_row_and_what_to_raise():
    is_global = torch.zeros(3, 9, dtype=torch.bool)
    is_global[1, :3] = is_global[2, 2:7] = True
    with pytest.raises(ValueError, match=r"row 1 has 3 global tokens, the capacity is 2: .*max_global_tokens .* 5"):
        global_positions(is_global, None, 2)
    assert global_positions(is_global, None, 5).tolist()[2] == [2, 3, 4, 5, 6]
    # tokens that are not valid take no place
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, :2] = valid[2] = False
    assert global_positions(is_global, valid, 2).tolist() == [[-1, -1], [2, -1], [-1, -1]]


def test_no_capacity_is_enough_for_no_global_token():
    none = torch.zeros(2, 5, dtype=torch.bool)
    assert global_positions(none, None, 0).shape == (2, 0)
    with pytest.raises(ValueError, match="row 0 has 5 global tokens, the capacity is 0"):
        global_positions(~none, None, 0)


def test_compiled_as_one_graph_an_overflow_is_an_assertion():
    torch.compiler.reset()
    compiled = torch.compile(global_positions, backend="aot_eager", fullgraph=True)
    is_global = torch.rand(2, 30) < 0.2
    valid = make_valid("holes", 2, 30)
    assert torch.equal(compiled(is_global, valid, 12), global_positions(is_global, valid, 12))
    with pytest.raises(RuntimeError, match="more global tokens than the capacity 12: raise max_global_tokens"):
        compiled(torch.ones(2, 30, dtype=torch.bool), None, 12)


def test_nothing_waits_for_the_device():
    """A tensor without data cannot be read: whoever tried would fail."""
    is_global = torch.zeros(2, 30, dtype=torch.bool, device="meta")
    assert global_positions(is_global, is_global, 7).shape == (2, 7)


@pytest.mark.parametrize(
    "is_global, valid, capacity, message",
    [
        (torch.zeros(5).bool(), None, 1, r"is_global must be bool \[B, T\], got torch.bool \(5,\)"),
        (torch.zeros(2, 5), None, 1, r"is_global must be bool \[B, T\], got torch.float32 \(2, 5\)"),
        (torch.zeros(2, 5).bool(), torch.ones(2, 4).bool(), 1, r"valid must be bool \(2, 5\) .* got .*\(2, 4\)"),
        (torch.zeros(2, 5).bool(), torch.ones(2, 5), 1, r"valid must be bool .* got torch.float32"),
        (torch.zeros(2, 5).bool(), None, -1, "capacity is -1, it must be at least 0"),
    ],
)
def test_bad_arguments_are_named(is_global, valid, capacity, message):
    with pytest.raises(ValueError, match=message):
        global_positions(is_global, valid, capacity)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", GLOBAL_SETS)
@pytest.mark.parametrize("num_keys", [1, 9, 40])
def test_a_canonical_index_holds_each_global_key_once(num_keys, kind, mask):
    index, valid = make_global_index(kind, 2, num_keys), make_valid(mask, 2, num_keys)
    canonical = canonical_index(index, num_keys, valid)
    assert canonical.shape == index.shape and canonical.dtype == torch.int64
    for row in range(2):
        meant = {j for j in index[row].tolist() if 0 <= j < num_keys and (valid is None or valid[row, j])}
        kept = canonical[row][canonical[row] != -1].tolist()
        assert kept == sorted(meant)


def test_positions_are_a_canonical_index():
    is_global = torch.rand(3, 50) < 0.2
    index = global_positions(is_global, None, 25)
    assert torch.equal(canonical_index(index, 50, None).sort(dim=1).values, index.sort(dim=1).values)
