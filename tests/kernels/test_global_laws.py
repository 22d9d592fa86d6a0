"""Laws of global keys that need no second implementation: limits, sets without order, members of a batch, padding."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.window_attention import window_attention
from tests.kernels.global_cases import CASES, GLOBAL_SETS, build, drawn_cases, make_global_index
from tests.kernels.window import (
    IMPLEMENTATIONS,
    MASKS,
    assert_same,
    error,
    make_inputs,
    make_valid,
    run,
)

pytestmark = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])
# sets of which at least one entry is a token wherever nothing is masked
SOME = [kind for kind in GLOBAL_SETS if kind not in ("empty", "pads")]


@SIDES
@pytest.mark.parametrize(
    "seq_len, window, dilation", [(1, 0, 1), (9, 3, [1, 2, 9, 1]), (75, [0, 4, 80, 9], [1, 3, 1, 7])]
)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("kind", ["all", "shuffled"])
def test_every_key_global_is_full_attention(impl, causal, seq_len, window, dilation, key_heads, kind):
    inputs = make_inputs(seq_len, num_heads=4, key_heads=key_heads)
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs.values())
    key, value = (tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in (key, value))
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)
    index = make_global_index(kind, 2, seq_len)
    out = window_attention(**inputs, window=window, dilation=dilation, causal=causal, global_index=index, impl=impl)
    assert error(out.detach(), dense.detach()) <= 1e-12


@SIDES
@pytest.mark.parametrize("kind", SOME)
def test_a_window_over_all_knows_no_global_keys(impl, causal, kind):
    """Each is counted once: those inside the window are there already."""
    inputs, options = build((40, 40, 0, 2, 1, 40, 1, "holes", kind), causal)
    result = run(inputs, **options, impl=impl)
    assert_same(result, run(inputs, **options | {"global_index": None}, impl=impl), 1e-12)


@SIDES
@pytest.mark.parametrize("kind", ["scattered", "ragged", "shuffled"])
def test_the_order_of_the_list_is_irrelevant(impl, causal, kind):
    inputs, options = build((60, 60, 0, 2, 2, [3, 9], [1, 2], "holes", kind), causal)
    index = options["global_index"]
    permuted = options | {"global_index": index[:, torch.randperm(index.shape[1])]}
    assert_same(run(inputs, **permuted, impl=impl), run(inputs, **options, impl=impl), 1e-12)


@SIDES
def test_a_repetition_is_no_second_key(impl, causal):
    inputs, options = build((60, 60, 0, 2, 2, [3, 9], [1, 2], "holes", "scattered"), causal)
    index = options["global_index"]
    twice = options | {"global_index": torch.cat([index, index.flip(1)], dim=1).to(torch.int32)}
    assert_same(run(inputs, **twice, impl=impl), run(inputs, **options, impl=impl), 1e-12)


@SIDES
@pytest.mark.parametrize("name", ["only_pads", "rows_in_the_middle", "grouped_query_mixed", "dilation_above_rows"])
def test_only_pads_are_no_global_keys(impl, causal, name):
    inputs, options = build(CASES[name], causal)
    pads = options | {"global_index": torch.full((2, 5), -1)}
    without = options | {"global_index": None}
    assert_same(run(inputs, **pads, impl=impl), run(inputs, **without, impl=impl), 1e-12)


@SIDES
def test_a_global_token_that_is_not_valid_is_none(impl, causal):
    inputs, options = build((60, 60, 0, 2, 2, [3, 9], [1, 2], "holes", "shuffled"), causal)
    index, valid = options["global_index"], options["valid"]
    real = index.where(valid.gather(1, index), -1)
    assert_same(
        run(inputs, **options, impl=impl),
        run(inputs, **options | {"global_index": real}, impl=impl),
        1e-12,
    )


@SIDES
def test_members_of_a_batch_are_independent(impl, causal):
    """Of the numbers, masks and global tokens of their mates, and of how many those are."""
    inputs = make_inputs(70, batch=3)
    valid, index = make_valid("holes", 3, 70), make_global_index("ragged", 3, 70)
    options = {"window": 6, "dilation": [1, 2], "causal": causal, "impl": impl}
    together = window_attention(**inputs, **options, valid=valid, global_index=index).detach()
    for row in range(3):
        member = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        own = index[row : row + 1]
        own = own[:, own[0] >= 0]
        alone = window_attention(**member, **options, valid=valid[row : row + 1], global_index=own)
        assert error(together[row : row + 1], alone.detach()) <= 1e-12


@SIDES
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
def test_the_content_of_padding_is_irrelevant(impl, causal, mask):
    inputs, options = build((70, 70, 0, 2, 2, [6, 3], [1, 3], mask, "shuffled"), causal)
    hidden = ~options["valid"]
    result = run(inputs, **options, impl=impl)
    other = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    for name, tensor in other.items():
        tensor[hidden] = 100 * torch.randn_like(tensor[hidden])
        assert (result[name][hidden] == 0).all(), name
    assert (result["out"][hidden] == 0).all()
    assert_same(run(other, **options, impl=impl), result, 1e-12)


@SIDES
def test_a_padded_tail_is_a_shorter_text(impl, causal):
    inputs = make_inputs(75)
    cut = {name: tensor[:, :52] for name, tensor in inputs.items()}
    options = {"window": 8, "dilation": [1, 3], "causal": causal, "impl": impl}
    options["global_index"] = make_global_index("scattered", 2, 75)
    valid = (torch.arange(75) < 52).expand(2, -1)
    padded = window_attention(**inputs, **options, valid=valid)[:, :52]
    assert error(padded.detach(), window_attention(**cut, **options).detach()) <= 1e-12


def test_the_future_does_not_change_the_past(impl):
    """With `causal` a global token is seen from its position on."""
    inputs = make_inputs(60)
    options = {"window": 4, "dilation": [1, 3], "causal": True, "impl": impl}
    options["global_index"] = torch.tensor([[5, 30, 59], [31, 2, -1]])
    future = torch.arange(60) >= 30
    other = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    for tensor in other.values():
        tensor[:, future] = torch.randn_like(tensor[:, future])
    before, after = window_attention(**inputs, **options), window_attention(**other, **options)
    assert error(after[:, ~future], before[:, ~future].detach()) <= 1e-12
    before[:, ~future].sum().backward()
    assert all((tensor.grad[:, future] == 0).all() for tensor in inputs.values())
    # and every row from it on sees it
    inputs["value"].grad = None
    window_attention(**inputs, **options)[:, 50].sum().backward()
    assert [(inputs["value"].grad[b] != 0).all(-1).all(-1).nonzero().flatten()[:2].tolist() for b in range(2)] == [
        [5, 30],
        [2, 31],
    ]


@SIDES
def test_a_global_key_learns_from_every_row(impl, causal):
    """Values of one and a gradient of one: what a key gets is the sum of its weights over all rows that see it."""
    inputs = make_inputs(60, num_heads=4, key_heads=2)
    inputs["query"] = torch.zeros_like(inputs["query"])  # every key of a row weighs the same
    index = torch.tensor([[20], [-1]])
    options = {"window": 0, "causal": causal, "global_index": index, "impl": impl}
    grad = run(inputs, **options)["value"]
    weights = torch.randn(2, 60, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = torch.arange(60)[:, None, None] >= (20 if causal else 0)
    share = torch.where(torch.arange(60) == 20, 1.0, 0.5)[:, None, None] * seen
    expected = (weights[0] * share).sum(0).view(2, 2, 4).sum(1)
    assert error(grad[0, 20], expected) <= 1e-12
    assert error(grad[1], weights[1].view(60, 2, 2, 4).sum(2)) <= 1e-12


@SIDES
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["ragged", "all"])
def test_weights_of_a_row_add_up_to_one(impl, causal, mask, kind):
    inputs, options = build((70, 70, 0, 2, 2, 5, [1, 2], mask, kind), causal)
    inputs["value"] = torch.ones_like(inputs["value"])
    out = window_attention(**inputs, **options, impl=impl).detach()
    valid = options["valid"]
    expected = torch.ones_like(out) if valid is None else valid[:, :, None, None].expand_as(out).to(out)
    assert error(out, expected) <= 1e-12


@SIDES
def test_heads_move_with_their_windows_and_share_the_global_keys(impl, causal):
    window, dilation, order = [3, 20, 3, 0], [1, 2, 1, 3], [2, 0, 3, 1]
    inputs = make_inputs(70, num_heads=4)
    moved = {name: tensor[:, :, order] for name, tensor in inputs.items()}
    options = {"causal": causal, "global_index": make_global_index("scattered", 2, 70), "impl": impl}
    out = window_attention(**inputs, window=window, dilation=dilation, **options)
    out_moved = window_attention(
        **moved, window=[window[head] for head in order], dilation=[dilation[head] for head in order], **options
    )
    assert error(out_moved.detach(), out.detach()[:, :, order]) <= 1e-12


@SIDES
def test_rows_are_those_of_the_whole_text(impl, causal):
    inputs = make_inputs(75)
    options = {"window": [9, 4], "dilation": [1, 5], "causal": causal, "impl": impl}
    options |= {"valid": make_valid("holes", 2, 75), "global_index": make_global_index("ragged", 2, 75)}
    whole = window_attention(**inputs, **options)
    for first, last in ((0, 1), (0, 40), (31, 32), (31, 70), (74, 75)):
        rows = inputs | {"query": inputs["query"][:, first:last]}
        part = window_attention(**rows, **options, query_start=first)
        assert error(part.detach(), whole.detach()[:, first:last]) <= 1e-12


@SIDES
def test_nothing_valid_gives_zeros_everywhere(impl, causal):
    inputs, options = build((40, 40, 0, 2, 2, 5, [1, 2], "none", "shuffled"), causal, torch.float32)
    options["valid"] = torch.zeros(2, 40, dtype=torch.bool)
    assert all((tensor == 0).all() for tensor in run(inputs, **options, impl=impl).values())


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(drawn=drawn_cases(longest=60, widest=30), seed=st.integers(0, 99))
def test_any_writing_of_a_set_is_that_set(impl, drawn, seed):
    """Pads, repetitions, another order and positions off the text added to a drawn list change nothing."""
    inputs, options = build(*drawn)
    index, num_keys = options["global_index"].long(), inputs["key"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.tensor([-1, num_keys, -9]).expand(2, -1)
    rewritten = torch.cat([index, noise, index[:, :2]], dim=1)
    rewritten = rewritten[:, torch.randperm(rewritten.shape[1], generator=generator)]
    result = run(inputs, **options, impl=impl)
    assert_same(run(inputs, **options | {"global_index": rewritten}, impl=impl), result, 1e-12)
