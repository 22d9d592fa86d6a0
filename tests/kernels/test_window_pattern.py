"""The pattern object against loops: which keys a query sees, how many pairs there are, how far it reaches."""

import pytest
import torch

from kernels.window_attention import WindowPattern

PATTERNS = [
    pytest.param((3,), (1,), id="plain"),
    pytest.param((0,), (1,), id="window_0"),
    pytest.param((0, 4), (5, 1), id="window_0_dilated"),
    pytest.param((2, 2, 5), (1, 3, 2), id="per_head"),
    pytest.param((50,), (1,), id="wider_than_text"),
    pytest.param((1, 40), (30, 2), id="dilation_beyond_text"),
]
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])


def sees(i: int, j: int, window: int, dilation: int, causal: bool) -> bool:
    """The definition: j is i plus a whole number of dilated steps, at most `window` of them."""
    steps = range(-window, 1 if causal else window + 1)
    return any(j == i + step * dilation for step in steps)


@SIDES
@pytest.mark.parametrize("window, dilation", PATTERNS)
@pytest.mark.parametrize("seq_len", [1, 2, 7, 23])
def test_mask_is_the_definition(window, dilation, causal, seq_len):
    mask = WindowPattern(window, dilation, causal).mask(seq_len)
    expected = [
        [[sees(i, j, w, d, causal) for j in range(seq_len)] for i in range(seq_len)]
        for w, d in zip(window, dilation, strict=True)
    ]
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


@SIDES
@pytest.mark.parametrize("window, dilation", PATTERNS)
@pytest.mark.parametrize("seq_len", [0, 1, 2, 7, 23, 64])
def test_num_pairs_counts_the_mask(window, dilation, causal, seq_len):
    pattern = WindowPattern(window, dilation, causal)
    assert pattern.num_pairs(seq_len) == pattern.mask(seq_len).sum(dim=(1, 2)).tolist()


def test_pairs_of_less_than_no_tokens():
    with pytest.raises(ValueError, match="seq_len is -1, it must be a whole number of at least 0"):
        WindowPattern.of(2, 1, num_heads=1, causal=True).num_pairs(-1)


@SIDES
@pytest.mark.parametrize("window, dilation", PATTERNS)
def test_reach_is_the_farthest_key(window, dilation, causal):
    pattern = WindowPattern(window, dilation, causal)
    seq_len = pattern.reach + 2
    last_query = pattern.mask(seq_len)[:, -1]  # [H, T]
    farthest = (seq_len - 1) - last_query.any(dim=0).nonzero().min().item()
    assert pattern.reach == farthest


@SIDES
def test_rows_of_a_longer_key_sequence(causal):
    pattern = WindowPattern((2, 3), (1, 4), causal)
    whole = pattern.mask(20)
    assert torch.equal(pattern.mask(5, key_len=20, query_start=9), whole[:, 9:14])


def test_heads_from_an_int_or_a_list():
    pattern = WindowPattern.of(7, [1, 2, 3], num_heads=3, causal=True)
    assert pattern == WindowPattern((7, 7, 7), (1, 2, 3), True)
    assert pattern.num_heads == 3
    # a key of caches, so equal patterns hash alike
    assert hash(pattern) == hash(WindowPattern.of([7] * 3, (1, 2, 3), num_heads=3, causal=1))


@pytest.mark.parametrize(
    "window, dilation, message",
    [
        pytest.param(-1, 1, "window of head 0 is -1, it must be at least 0", id="window"),
        pytest.param([4, -2], 1, "window of head 1 is -2, it must be at least 0", id="window_of_a_head"),
        pytest.param(4, 0, "dilation of head 0 is 0, it must be at least 1", id="dilation"),
        pytest.param(4, [1, -3], "dilation of head 1 is -3, it must be at least 1", id="dilation_of_a_head"),
        pytest.param([4, 4, 4], 1, "window has 3 entries for 2 heads: [4, 4, 4]", id="too_many"),
        pytest.param(4, [2], "dilation has 1 entries for 2 heads: [2]", id="too_few"),
    ],
)
def test_values_out_of_range_are_named(window, dilation, message):
    with pytest.raises(ValueError) as caught:
        WindowPattern.of(window, dilation, num_heads=2, causal=False)
    assert str(caught.value) == message
