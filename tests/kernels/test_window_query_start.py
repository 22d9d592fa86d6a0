"""T rows among S keys, as behind a cache: the oracle against loops, the blocked path against it, cost without S."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.memory import LargestTensor
from kernels.window_attention import blocked, window_attention
from tests.kernels.window import (
    IMPLEMENTATIONS,
    MASKS,
    assert_blocked_is_the_oracle,
    by_loops,
    error,
    make_inputs,
    make_valid,
    num_columns,
)

SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])
TERMS = pytest.mark.parametrize("relative", [False, True], ids=["content", "relative"])

# name: rows, keys, query_start, heads, key heads, window, dilation, mask
CASES = {
    "one_row_at_the_end": (1, 40, 39, 2, 2, 5, 1, "none"),
    "one_row_at_the_end_dilated": (1, 40, 39, 2, 2, [5, 3], [3, 7], "holes"),
    "one_row_at_the_start": (1, 40, 0, 2, 2, 5, 2, "none"),
    "one_row_in_the_middle": (1, 301, 150, 2, 2, [20, 6], [1, 5], "holes"),
    "one_row_one_key": (1, 1, 0, 2, 2, 3, 2, "none"),
    "rows_at_the_start": (7, 61, 0, 2, 2, 4, [1, 3], "none"),
    "rows_in_the_middle": (23, 101, 37, 2, 2, 9, 1, "tail"),
    "rows_at_the_end": (23, 101, 78, 4, 2, [9, 30, 9, 2], [1, 2, 4, 11], "holes"),
    "many_rows_at_the_end": (300, 411, 111, 2, 2, 40, 1, "none"),
    "many_rows_at_the_end_masked": (301, 411, 110, 2, 1, [40, 13], [1, 3], "holes"),
    "many_rows_isolated": (301, 700, 200, 2, 2, 30, [2, 5], "isolated"),
    "many_rows_all_masked": (200, 333, 100, 2, 2, 30, [1, 4], "one_all_masked"),
    "keys_beyond_any_reach": (5, 500, 300, 2, 2, 4, [1, 3], "tail"),
    "window_over_all": (11, 90, 50, 2, 2, 1000, [1, 2], "none"),
    "window_0": (9, 50, 20, 2, 2, 0, [1, 4], "holes"),
    "dilation_above_rows": (3, 100, 60, 2, 2, 6, [20, 13], "none"),
    "dilation_above_rows_masked": (5, 100, 93, 2, 2, 6, [20, 13], "holes"),
    "dilation_above_all": (4, 30, 20, 2, 2, 3, [1000, 31], "none"),
    "rows_run_past_the_keys": (20, 30, 20, 2, 2, 6, [1, 3], "none"),
    "rows_run_past_the_keys_masked": (20, 30, 20, 2, 2, 6, [1, 3], "holes"),
    "rows_run_far_past_the_keys": (300, 90, 60, 2, 2, 12, [1, 2], "tail"),
    "rows_past_the_keys": (4, 30, 33, 2, 2, 5, [1, 2], "none"),
    "rows_beyond_every_window": (4, 30, 90, 2, 2, 5, [1, 2], "none"),
    "one_row_past_the_keys_dilated": (1, 8, 9, 2, 2, 1, [1, 5], "none"),
    "more_rows_than_keys": (140, 60, 0, 2, 2, 33, [1, 4], "tail"),
}


def build(case, causal, relative):
    """Inputs and options of a case."""
    seq_len, key_len, start, num_heads, key_heads, window, dilation, mask = case
    columns = num_columns(window, causal) if relative else None
    inputs = make_inputs(
        seq_len, key_len=key_len, num_heads=num_heads, key_heads=key_heads, head_dim=3, columns=columns
    )
    options = {"window": window, "dilation": dilation, "causal": causal, "query_start": start}
    return inputs, {**options, "valid": make_valid(mask, 2, key_len)}


@TERMS
@SIDES
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("start", [0, 4, 9, 12], ids=["start", "middle", "end", "past_the_end"])
def test_the_oracle_is_the_definition(start, mask, causal, relative):
    case = (3, 12, start, 3, 1, [2, 0, 4], [1, 2, 3], mask)
    inputs, options = build(case, causal, relative)
    expected = by_loops(**inputs, **options)
    actual = window_attention(**inputs, **options, impl="reference")
    assert error(actual.detach(), expected.detach()) <= 1e-12


@TERMS
@SIDES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_blocked_is_the_oracle(case, causal, relative):
    inputs, options = build(case, causal, relative)
    assert_blocked_is_the_oracle(inputs, options)


@TERMS
@SIDES
def test_blocked_is_the_oracle_in_small_chunks(monkeypatch, causal, relative):
    monkeypatch.setattr(blocked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(blocked, "KEEP_BYTES", 0)
    for name in ("many_rows_at_the_end_masked", "rows_run_past_the_keys_masked", "dilation_above_rows"):
        inputs, options = build(CASES[name], causal, relative)
        assert_blocked_is_the_oracle(inputs, options)


@st.composite
def drawn_cases(draw):
    """Rows, keys, starts, windows, dilations and masks that nobody thought of."""
    key_heads, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    num_heads = key_heads * repeats
    windows, dilations = st.integers(0, 60), st.integers(1, 9)
    window = draw(windows | st.lists(windows, min_size=num_heads, max_size=num_heads))
    dilation = draw(dilations | st.lists(dilations, min_size=num_heads, max_size=num_heads))
    sizes = (draw(st.integers(1, 120)), draw(st.integers(1, 200)), draw(st.integers(0, 220)))
    case = (*sizes, num_heads, key_heads, window, dilation, draw(st.sampled_from(MASKS)))
    return case, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(drawn_cases())
def test_blocked_is_the_oracle_on_drawn_cases(drawn):
    inputs, options = build(*drawn)
    assert_blocked_is_the_oracle(inputs, options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@SIDES
@TERMS
def test_rows_are_those_of_the_whole_text(impl, causal, relative):
    window, dilation = [9, 4], [1, 5]
    inputs = make_inputs(150, columns=num_columns(window, causal) if relative else None)
    options = {"window": window, "dilation": dilation, "causal": causal, "impl": impl}
    valid = make_valid("holes", 2, 150)
    whole = window_attention(**inputs, **options, valid=valid)
    for first, last in ((0, 1), (0, 40), (61, 62), (61, 130), (149, 150), (0, 150)):
        rows = {name: tensor[:, first:last] if name.endswith("query") else tensor for name, tensor in inputs.items()}
        part = window_attention(**rows, **options, valid=valid, query_start=first)
        assert error(part.detach(), whole.detach()[:, first:last]) <= 1e-12


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_derivatives(impl):
    inputs = make_inputs(3, key_len=7, head_dim=2, columns=3)
    valid = make_valid("holes", 2, 7)

    def attend(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return window_attention(
            **named, window=[2, 1], dilation=[1, 2], causal=True, valid=valid, query_start=3, impl=impl
        )

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))


@SIDES
@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_no_rows_give_an_empty_result(impl, causal):
    out = window_attention(**make_inputs(0, key_len=9), window=3, causal=causal, query_start=9, impl=impl)
    assert out.shape == (2, 0, 2, 4)


@SIDES
def test_keys_out_of_reach_are_never_read(causal):
    """Not a number in one of them would show."""
    inputs = {name: tensor.detach() for name, tensor in make_inputs(4, key_len=200).items()}
    options = {"window": [5, 2], "dilation": [1, 3], "causal": causal, "query_start": 100, "impl": "blocked"}
    expected = window_attention(**inputs, **options)
    for name in ("key", "value"):
        inputs[name][:, : 100 - 6] = torch.nan
        inputs[name][:, 104 + (0 if causal else 6) :] = torch.nan
    assert torch.equal(window_attention(**inputs, **options), expected)


@SIDES
@TERMS
@pytest.mark.parametrize("seq_len", [1, 3, 300])
@pytest.mark.parametrize("dilation", [1, 7])
def test_what_is_made_does_not_grow_with_the_keys(seq_len, dilation, causal, relative):
    largest = []
    for key_len in (5_000, 50_000):
        columns = num_columns(30, causal) if relative else None
        inputs = make_inputs(seq_len, key_len=1, columns=columns, dtype=torch.float32)
        inputs = {name: tensor.detach() for name, tensor in inputs.items()}
        for name in ("key", "value"):
            # one key seen many times: a view of them has next to no memory behind it, unlike a copy, which two heads
            # out of three force wherever batch and heads are folded
            inputs[name] = torch.randn(2, 1, 3, 4)[:, :, :2].expand(-1, key_len, -1, -1)
        with LargestTensor() as seen:
            start = key_len - 2_000  # the further in, the more keys lie before it
            window_attention(**inputs, window=30, dilation=dilation, causal=causal, query_start=start, impl="blocked")
        largest.append(seen.bytes)
    assert largest[0] == largest[1]
    # the 31 or 61 keys of each row and head, a few times
    assert largest[0] < 2 * 4 * 8 * max(seq_len, 64) * 61 * 4
