"""Laws of window attention that need no second implementation: limits, symmetries, padding, causality."""

import pytest
import torch
import torch.nn.functional as F

from kernels.window_attention import window_attention
from tests.kernels.window import IMPLEMENTATIONS, MASKS, assert_same, error, make_inputs, make_valid, num_columns, run

pytestmark = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])


def changed(inputs, rows):
    """The same inputs with other numbers in some rows of query, key, value and position_query."""
    other = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    for name, tensor in other.items():
        if name != "position_key":
            tensor[rows] = 100 * torch.randn_like(tensor[rows])
    return other


@SIDES
@pytest.mark.parametrize("seq_len", [1, 5, 130])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_window_over_all_is_dense_attention(impl, causal, seq_len, key_heads):
    inputs = make_inputs(seq_len, num_heads=4, key_heads=key_heads)
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs.values())
    key, value = (tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in (key, value))
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)
    for window in (seq_len - 1, seq_len, 10 * seq_len):
        out = window_attention(**inputs, window=window, causal=causal, impl=impl)
        assert error(out.detach(), dense.detach()) <= 1e-12


@SIDES
def test_a_window_of_0_copies_the_values(impl, causal):
    inputs = make_inputs(99, num_heads=4, key_heads=2)
    out = window_attention(**inputs, window=0, dilation=3, causal=causal, impl=impl)
    assert error(out.detach(), inputs["value"].detach().repeat_interleave(2, dim=2)) <= 1e-15


@SIDES
def test_members_of_a_batch_are_independent(impl, causal):
    inputs = make_inputs(150, batch=3)
    valid = make_valid("holes", 3, 150)
    options = {"window": 12, "dilation": [1, 2], "causal": causal, "impl": impl}
    together = run(inputs, **options, valid=valid)["out"]
    for row in range(3):
        member = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone = window_attention(**member, **options, valid=valid[row : row + 1])
        assert error(together[row : row + 1], alone.detach()) <= 1e-12


@SIDES
@pytest.mark.parametrize("seq_len, dilation", [(140, 2), (141, 4), (10, 7), (5, 5), (3, 8)])
def test_a_dilation_is_as_many_interleaved_problems(impl, causal, seq_len, dilation):
    inputs = make_inputs(seq_len)
    valid = make_valid("holes", 2, seq_len)
    dilated = window_attention(**inputs, window=6, dilation=dilation, causal=causal, valid=valid, impl=impl).detach()
    for first in range(min(dilation, seq_len)):
        every = {name: tensor[:, first::dilation] for name, tensor in inputs.items()}
        alone = window_attention(**every, window=6, causal=causal, valid=valid[:, first::dilation], impl=impl).detach()
        assert error(dilated[:, first::dilation], alone) <= 1e-12


@SIDES
@pytest.mark.parametrize("relative", [False, True], ids=["content", "relative"])
def test_heads_move_with_their_windows(impl, causal, relative):
    window, dilation, order = [3, 20, 3, 0], [1, 2, 1, 3], [2, 0, 3, 1]
    columns = num_columns(window, causal) if relative else None
    inputs = make_inputs(140, num_heads=4, columns=columns)
    moved = {name: tensor[order] if name == "position_key" else tensor[:, :, order] for name, tensor in inputs.items()}
    out = window_attention(**inputs, window=window, dilation=dilation, causal=causal, impl=impl)
    out_moved = window_attention(
        **moved,
        window=[window[head] for head in order],
        dilation=[dilation[head] for head in order],
        causal=causal,
        impl=impl,
    )
    assert error(out_moved.detach(), out.detach()[:, :, order]) <= 1e-12


@SIDES
@pytest.mark.parametrize("relative", [False, True], ids=["content", "relative"])
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
def test_the_content_of_padding_is_irrelevant(impl, causal, relative, mask):
    window, dilation, seq_len = [9, 4], [1, 3], 150
    valid = make_valid(mask, 2, seq_len)
    columns = num_columns(window, causal) if relative else None
    inputs = make_inputs(seq_len, columns=columns)
    options = {"window": window, "dilation": dilation, "causal": causal, "valid": valid, "impl": impl}
    result = run(inputs, **options)
    assert_same(run(changed(inputs, ~valid), **options), result)
    for name in ("out", "query", "key", "value", *(["position_query"] if relative else [])):
        assert (result[name][~valid] == 0).all(), name


@SIDES
def test_a_padded_tail_is_a_shorter_text(impl, causal):
    inputs = make_inputs(150)
    cut = {name: tensor[:, :97] for name, tensor in inputs.items()}
    valid = (torch.arange(150) < 97).expand(2, -1)
    options = {"window": 20, "dilation": [1, 3], "causal": causal, "impl": impl}
    padded = window_attention(**inputs, **options, valid=valid)[:, :97]
    assert error(padded.detach(), window_attention(**cut, **options).detach()) <= 1e-12


@pytest.mark.parametrize("dilation", [1, 3, [1, 4]], ids=str)
@pytest.mark.parametrize("seq_len", [2, 9, 200])
def test_the_future_does_not_change_the_past(impl, dilation, seq_len):
    inputs = make_inputs(seq_len, columns=13)
    options = {"window": 12, "dilation": dilation, "causal": True, "impl": impl}
    future = torch.arange(seq_len) >= seq_len // 2
    before = window_attention(**inputs, **options)
    after = window_attention(**changed(inputs, (slice(None), future)), **options)
    assert torch.equal(before[:, ~future], after[:, ~future])
    assert not torch.equal(before[:, future], after[:, future])
    before[:, ~future].sum().backward()
    for name in ("query", "key", "value", "position_query"):
        assert (inputs[name].grad[:, future] == 0).all(), name


@pytest.mark.parametrize("window, dilation", [(0, 1), (7, 1), (5, 4), (40, 2)])
@SIDES
def test_keys_beyond_the_window_change_nothing(impl, causal, window, dilation):
    inputs = make_inputs(250)
    row = 120
    steps = torch.arange(250) - row
    seen = (steps % dilation == 0) & (steps.abs() <= window * dilation)
    if causal:
        seen &= steps <= 0
    options = {"window": window, "dilation": dilation, "causal": causal, "impl": impl}
    before = window_attention(**inputs, **options)[:, row]
    assert torch.equal(before, window_attention(**changed(inputs, (slice(None), ~seen)), **options)[:, row])
    before.sum().backward()
    assert torch.equal((inputs["value"].grad != 0).all(dim=(0, 2, 3)), seen)


def test_read_backwards_the_result_is_backwards(impl):
    inputs = make_inputs(133)
    valid = make_valid("holes", 2, 133)
    backwards = {name: tensor.flip(1) for name, tensor in inputs.items()}
    options = {"window": [11, 30], "dilation": [2, 1], "impl": impl}
    out = window_attention(**inputs, **options, valid=valid)
    assert error(window_attention(**backwards, **options, valid=valid.flip(1)).flip(1), out.detach()) <= 1e-12


@SIDES
@pytest.mark.parametrize("mask", MASKS)
def test_weights_of_a_row_add_up_to_one(impl, causal, mask):
    inputs = make_inputs(140)
    valid = make_valid(mask, 2, 140)
    inputs["value"] = torch.ones_like(inputs["value"])
    out = window_attention(**inputs, window=9, dilation=2, causal=causal, valid=valid, impl=impl)
    expected = torch.ones_like(out) if valid is None else valid[:, :, None, None].expand_as(out).double()
    assert error(out.detach(), expected) <= 1e-14


@SIDES
@pytest.mark.parametrize("relative", [False, True], ids=["content", "relative"])
@pytest.mark.parametrize("seq_len", [1, 6, 130])
def test_nothing_valid_gives_zeros_everywhere(impl, causal, relative, seq_len):
    columns = num_columns(5, causal) if relative else None
    inputs = make_inputs(seq_len, columns=columns, dtype=torch.float32)
    valid = torch.zeros(2, seq_len, dtype=torch.bool)
    result = run(inputs, window=5, causal=causal, valid=valid, impl=impl)
    assert all((tensor == 0).all() for tensor in result.values())


def test_only_distance_matters_to_the_relative_term(impl):
    """The same text further right in a longer one gives the same rows, once the window is inside it."""
    inputs = make_inputs(90, columns=6)
    options = {"window": 5, "dilation": [1, 3], "causal": True, "impl": impl}
    shifted = {
        name: tensor if name == "position_key" else torch.cat([torch.randn_like(tensor)[:, :71], tensor], dim=1)
        for name, tensor in inputs.items()
    }
    out, out_shifted = window_attention(**inputs, **options), window_attention(**shifted, **options)
    assert error(out_shifted.detach()[:, 71 + 15 :], out.detach()[:, 15:]) <= 1e-12


def test_a_bias_on_one_distance_moves_the_weight_there(impl):
    """A huge relative score at one column makes the output the value at that dilated step."""
    inputs = {name: tensor.detach() for name, tensor in make_inputs(60, columns=5).items()}
    inputs["position_query"] = torch.ones_like(inputs["position_query"])
    inputs["position_key"] = torch.zeros_like(inputs["position_key"])
    inputs["position_key"][:, 1] = 1e4  # column 1 of a window of 4: three steps back
    out = window_attention(**inputs, window=4, dilation=[1, 2], causal=True, impl=impl)
    for head, back in enumerate((3, 6)):
        expected = inputs["value"][:, : 60 - back, head]
        assert error(out[:, back:, head], expected) <= 1e-12
