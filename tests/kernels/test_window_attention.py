"""The oracle against loops, and the blocked path against the oracle: values and every gradient, float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.window_attention import blocked, window_attention
from tests.kernels.window import (
    IMPLEMENTATIONS,
    MASKS,
    assert_blocked_is_the_oracle,
    assert_same,
    by_loops,
    error,
    in_double,
    make_inputs,
    make_valid,
    num_columns,
    rms_error,
    run,
)

SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])
TERMS = pytest.mark.parametrize("relative", [False, True], ids=["content", "relative"])

# name: length, heads, key heads, head dim, window, dilation, mask
CASES = {
    "one_token": (1, 2, 2, 4, 3, 1, "none"),
    "one_token_masked": (1, 1, 1, 3, 0, 2, "one_all_masked"),
    "two_tokens": (2, 2, 2, 4, 1, 1, "none"),
    "two_tokens_dilated": (2, 2, 2, 1, 5, [1, 2], "tail"),
    "shorter_than_window": (13, 2, 2, 5, 50, 1, "holes"),
    "window_0": (130, 2, 2, 4, 0, 1, "none"),
    "window_0_dilated": (67, 2, 2, 3, [0, 2], [3, 1], "holes"),
    "odd_length": (67, 2, 2, 7, 5, 1, "none"),
    "one_block_and_one": (65, 1, 1, 4, 3, 1, "tail"),
    "whole_blocks": (256, 2, 2, 8, 32, 1, "none"),
    "many_blocks": (301, 2, 2, 3, 33, 1, "none"),
    "many_blocks_tail": (301, 2, 2, 3, 33, 1, "tail"),
    "many_blocks_holes": (467, 1, 1, 5, 21, 1, "holes"),
    "many_blocks_isolated": (300, 2, 2, 4, 6, 1, "isolated"),
    "many_blocks_all_masked": (300, 2, 2, 4, 40, 1, "one_all_masked"),
    "wide_window": (700, 1, 1, 3, 200, 1, "holes"),
    "wider_than_text": (190, 2, 2, 4, 1000, 1, "tail"),
    "one_key_short_of_text": (150, 1, 1, 4, 149, 1, "none"),
    "dilation_2": (129, 2, 2, 4, 9, 2, "holes"),
    "dilation_is_length": (12, 2, 2, 4, 2, 12, "none"),
    "dilation_beyond_text": (9, 2, 2, 4, 3, 20, "tail"),
    "dilation_leaves_rest": (611, 1, 1, 3, 30, 4, "tail"),
    "dilation_isolated": (150, 2, 2, 4, 5, 7, "isolated"),
    "mixed_heads": (131, 4, 4, 3, [4, 0, 9, 4], [1, 3, 2, 1], "none"),
    "mixed_heads_long": (403, 4, 4, 2, [40, 3, 40, 3], [1, 5, 1, 5], "holes"),
    "two_dilated_heads": (333, 4, 4, 5, 25, [3, 3, 1, 1], "tail"),
    "grouped_query": (140, 4, 2, 4, 17, 1, "holes"),
    "grouped_query_mixed": (140, 6, 3, 3, [3, 8, 8, 3, 3, 8], [1, 2, 1, 2, 1, 1], "tail"),
    "one_key_head": (90, 3, 1, 5, 6, [1, 2, 1], "none"),
    "head_dim_1": (100, 2, 2, 1, 11, 1, "holes"),
    "head_dim_33": (100, 1, 1, 33, 11, 2, "none"),
}


def build(case, causal, relative, dtype=torch.float64):
    """Inputs and options of a case."""
    seq_len, num_heads, key_heads, head_dim, window, dilation, mask = case
    columns = num_columns(window, causal) if relative else None
    inputs = make_inputs(
        seq_len, num_heads=num_heads, key_heads=key_heads, head_dim=head_dim, columns=columns, dtype=dtype
    )
    valid = make_valid(mask, 2, seq_len)
    return inputs, {"window": window, "dilation": dilation, "causal": causal, "valid": valid}


@pytest.mark.parametrize("mask", MASKS)
@TERMS
@SIDES
@pytest.mark.parametrize("key_heads", [3, 1])
def test_the_oracle_is_the_definition(mask, relative, causal, key_heads):
    window, dilation = (2, 0, 9), (1, 2, 3)
    columns = num_columns(window, causal) if relative else None
    inputs = make_inputs(8, num_heads=3, key_heads=key_heads, head_dim=2, columns=columns)
    options = {"window": window, "dilation": dilation, "causal": causal, "valid": make_valid(mask, 2, 8)}
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
    """One problem at a time, and nothing kept that can be computed again."""
    monkeypatch.setattr(blocked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(blocked, "KEEP_BYTES", 0)
    for name in ("many_blocks_holes", "mixed_heads_long", "grouped_query"):
        inputs, options = build(CASES[name], causal, relative)
        assert_blocked_is_the_oracle(inputs, options)


@st.composite
def drawn_cases(draw):
    """Lengths, heads, windows, dilations and masks that nobody thought of."""
    key_heads, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    num_heads = key_heads * repeats
    windows, dilations = st.integers(0, 90), st.integers(1, 6)
    window = draw(windows | st.lists(windows, min_size=num_heads, max_size=num_heads))
    dilation = draw(dilations | st.lists(dilations, min_size=num_heads, max_size=num_heads))
    seq_len, head_dim = draw(st.integers(1, 220)), draw(st.integers(1, 5))
    case = (seq_len, num_heads, key_heads, head_dim, window, dilation, draw(st.sampled_from(MASKS)))
    return case, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(drawn_cases())
def test_blocked_is_the_oracle_on_drawn_cases(drawn):
    inputs, options = build(*drawn)
    assert_blocked_is_the_oracle(inputs, options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "seq_len, window, dilation, causal, mask, relative",
    [
        pytest.param(5, 2, 1, True, "none", False, id="causal"),
        pytest.param(5, [1, 3], [1, 2], False, "holes", False, id="dilated_holes"),
        pytest.param(4, [2, 1], [1, 2], True, "tail", True, id="relative_causal"),
        pytest.param(4, 1, 1, False, "one_all_masked", True, id="relative_all_masked"),
    ],
)
def test_gradients_are_derivatives(impl, seq_len, window, dilation, causal, mask, relative):
    columns = num_columns(window, causal) if relative else None
    inputs = make_inputs(seq_len, head_dim=2, columns=columns)
    options = {
        "window": window,
        "dilation": dilation,
        "causal": causal,
        "valid": make_valid(mask, 2, seq_len),
    }

    def attend(*tensors):
        return window_attention(**dict(zip(inputs, tensors, strict=True)), **options, impl=impl)

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))


NUMERIC_CASES = ["odd_length", "many_blocks_holes", "wide_window", "mixed_heads_long", "grouped_query"]


@TERMS
@SIDES
@pytest.mark.parametrize("name", NUMERIC_CASES)
def test_float32_is_float64_to_rounding(name, causal, relative):
    inputs, options = build(CASES[name], causal, relative, torch.float32)
    exact = run(in_double(inputs), **options, impl="reference")
    result = run(inputs, **options, impl="blocked")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert_same(result, exact, tolerance=1e-5)


@TERMS
@SIDES
@pytest.mark.parametrize("name", NUMERIC_CASES)
def test_bfloat16_is_no_worse_than_plain_torch(name, causal, relative):
    """Twice the error that the oracle itself makes in this dtype: a bound that knows length and head dim.

    Root mean square, because the largest of some thousand roundings differs threefold between two seeds.
    """
    inputs, options = build(CASES[name], causal, relative, torch.bfloat16)
    exact = run(in_double(inputs), **options, impl="reference")
    plain = run(inputs, **options, impl="reference")
    result = run(inputs, **options, impl="blocked")
    for tensor, expected in exact.items():
        assert result[tensor].dtype == torch.bfloat16
        assert rms_error(result[tensor], expected) <= 2 * rms_error(plain[tensor], expected), tensor


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_scores_stay_finite(impl):
    inputs = {name: 200 * tensor for name, tensor in make_inputs(90, dtype=torch.float32).items()}
    options = {"window": 9, "causal": True, "valid": make_valid("holes", 2, 90)}
    assert all(torch.isfinite(tensor).all() for tensor in run(inputs, **options, impl=impl).values())


def test_scale_multiplies_the_scores():
    inputs = make_inputs(70, columns=11)
    scaled = {name: 0.3 * tensor if "query" in name else tensor for name, tensor in inputs.items()}
    for impl in ("reference", "blocked"):
        actual = window_attention(**inputs, window=10, causal=True, scale=0.3, impl=impl)
        expected = window_attention(**scaled, window=10, causal=True, scale=1.0, impl=impl)
        default = window_attention(**inputs, window=10, causal=True, impl=impl)
        assert error(actual.detach(), expected.detach()) <= 1e-12
        # head dim 4
        halved = window_attention(**inputs, window=10, causal=True, scale=0.5, impl=impl)
        assert torch.equal(default, halved)
