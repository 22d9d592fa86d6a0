"""Rows of the global tokens over all keys: oracle against loops, blocked against the oracle, laws, how it runs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from benchmarks.memory import LargestTensor
from kernels.window_attention import global_rows_attention, window_attention
from tests.kernels.global_cases import (
    GLOBAL_SETS,
    ROW_CASES,
    build_rows,
    drawn_row_cases,
    make_global_index,
    rows_by_loops,
)
from tests.kernels.window import (
    IMPLEMENTATIONS,
    MASKS,
    assert_same,
    error,
    in_double,
    make_inputs,
    make_valid,
    rms_error,
    run,
)

SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])
PATHS = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def run_rows(inputs, **options):
    """Result and gradients of every input."""
    return run(inputs, function=global_rows_attention, **options)


@SIDES
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", GLOBAL_SETS)
def test_the_oracle_is_the_definition(kind, mask, causal):
    inputs, options = build_rows((9, 4, 2, 3, mask, kind), causal)
    actual = global_rows_attention(**inputs, **options, impl="reference")
    assert error(actual.detach(), rows_by_loops(**inputs, **options).detach()) <= 1e-12


@SIDES
@pytest.mark.parametrize("case", ROW_CASES.values(), ids=ROW_CASES.keys())
def test_blocked_is_the_oracle(case, causal):
    inputs, options = build_rows(case, causal)
    assert_same(run_rows(inputs, **options, impl="blocked"), run_rows(inputs, **options, impl="reference"))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(drawn_row_cases())
def test_blocked_is_the_oracle_on_drawn_cases(drawn):
    inputs, options = build_rows(*drawn)
    assert_same(run_rows(inputs, **options, impl="blocked"), run_rows(inputs, **options, impl="reference"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@SIDES
def test_gradients_are_derivatives(impl, causal):
    inputs, options = build_rows((6, 2, 1, 2, "holes", "ragged"), causal)

    def attend(*tensors):
        return global_rows_attention(**dict(zip(inputs, tensors, strict=True)), **options, impl=impl)

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))


@SIDES
@pytest.mark.parametrize("name", ["middle", "scattered", "grouped_query", "every_token"])
def test_low_precision_is_no_worse_than_plain_torch(name, causal):
    """float32 to 1e-5; bfloat16 to twice the error that the oracle itself makes in it."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs, options = build_rows(ROW_CASES[name], causal, dtype)
        exact = run_rows(in_double(inputs), **options, impl="reference")
        result = run_rows(inputs, **options, impl="blocked")
        assert {tensor.dtype for tensor in result.values()} == {dtype}
        if dtype == torch.float32:
            assert_same(result, exact, tolerance=1e-5)
            continue
        plain = run_rows(inputs, **options, impl="reference")
        for tensor, expected in exact.items():
            assert rms_error(result[tensor], expected) <= 2 * rms_error(plain[tensor], expected), tensor


@PATHS
@SIDES
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_rows_of_every_token_are_dense_attention(impl, causal, key_heads):
    inputs = make_inputs(70, num_heads=4, key_heads=key_heads)
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs.values())
    key, value = (tensor.repeat_interleave(4 // key_heads, dim=1) for tensor in (key, value))
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)
    out = global_rows_attention(*inputs.values(), global_index=torch.arange(70).expand(2, -1), causal=causal, impl=impl)
    assert error(out.detach(), dense.detach()) <= 1e-12


@PATHS
@SIDES
def test_a_window_over_all_gives_the_same_rows(impl, causal):
    inputs = make_inputs(60)
    options = {"valid": make_valid("holes", 2, 60), "causal": causal, "impl": impl}
    index = make_global_index("shuffled", 2, 60)
    whole = window_attention(**inputs, window=60, **options)
    rows = torch.take_along_dim(inputs["query"], index[:, :, None, None], dim=1)
    out = global_rows_attention(rows, inputs["key"], inputs["value"], global_index=index, **options)
    expected = torch.take_along_dim(whole, index[:, :, None, None], dim=1)
    assert error(out.detach(), expected.detach()) <= 1e-12


@PATHS
def test_the_last_token_sees_as_much_with_causal_as_without(impl):
    case = (75, 4, 2, 3, "none", "last")
    inputs, options = build_rows(case, causal=True)
    assert_same(
        run_rows(inputs, **options, impl=impl),
        run_rows(inputs, **options | {"causal": False}, impl=impl),
        1e-12,
    )


@PATHS
@SIDES
def test_the_first_token_sees_itself_alone_with_causal(impl, causal):
    inputs, options = build_rows((75, 2, 2, 3, "none", "first"), causal)
    out = global_rows_attention(**inputs, **options, impl=impl)
    assert (error(out.detach(), inputs["value"][:, :1].detach()) <= 1e-12) == causal


@PATHS
@SIDES
@pytest.mark.parametrize("kind", ["ragged", "out_of_range", "pads"])
@pytest.mark.parametrize("mask", ["none", "holes", "one_all_masked"])
def test_rows_at_no_token_are_zeros_without_gradient(impl, causal, kind, mask):
    inputs, options = build_rows((50, 2, 2, 3, mask, kind), causal)
    result = run_rows(inputs, **options, impl=impl)
    index, valid = options["global_index"], options["valid"]
    dead = (index < 0) | (index >= 50)
    if valid is not None:
        dead = dead | ~valid.gather(1, index.long().clamp(0, 49))
    assert dead.any() and (result["out"][dead] == 0).all() and (result["query_global"][dead] == 0).all()
    assert (result["out"][~dead] != 0).all()
    # the keys learn from the other rows alone
    other = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    other["query_global"][dead] = 100.0
    assert_same(run_rows(other, **options, impl=impl), result, 1e-12)


@SIDES
@pytest.mark.parametrize("mask", MASKS)
def test_no_softmax_is_taken_of_nothing(monkeypatch, causal, mask):
    """What a fused attention gives for a row without a key differs from device to device."""
    plain, masks = F.scaled_dot_product_attention, []

    def noted(*tensors, attn_mask, **options):
        masks.append(attn_mask)
        return plain(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    inputs, options = build_rows((50, 2, 2, 3, mask, "out_of_range"), causal)
    global_rows_attention(**inputs, **options, impl="blocked")
    assert [mask is None or mask.any(dim=-1).all().item() for mask in masks] == [True]


@PATHS
@SIDES
def test_rows_are_computed_each_on_its_own(impl, causal):
    """In another order, or with a position repeated, every row is what it was."""
    inputs, options = build_rows((60, 2, 2, 3, "holes", "shuffled"), causal)
    options["impl"] = impl
    out = global_rows_attention(**inputs, **options)
    order = torch.randperm(60).repeat(2)
    query, index = inputs.pop("query_global")[:, order], options.pop("global_index")[:, order]
    moved = global_rows_attention(query, **inputs, global_index=index, **options)
    assert error(moved.detach(), out[:, order].detach()) <= 1e-12


@PATHS
@SIDES
def test_members_of_a_batch_are_independent(impl, causal):
    inputs, options = build_rows((60, 2, 2, 3, "holes", "ragged"), causal)
    together = global_rows_attention(**inputs, **options, impl=impl)
    index, valid = options["global_index"], options["valid"]
    for row in range(2):
        member = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        own = {"global_index": index[row : row + 1], "valid": valid[row : row + 1], "causal": causal}
        alone = global_rows_attention(**member, **own, impl=impl)
        assert error(together[row : row + 1].detach(), alone.detach()) <= 1e-12


@PATHS
@SIDES
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
def test_the_content_of_padding_is_irrelevant(impl, causal, mask):
    inputs, options = build_rows((60, 2, 2, 3, mask, "scattered"), causal)
    result = run_rows(inputs, **options, impl=impl)
    hidden = ~options["valid"]
    other = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    for name in ("key", "value"):
        other[name][hidden] = 100.0
        assert (result[name][hidden] == 0).all()
    assert_same(run_rows(other, **options, impl=impl), result, 1e-12)


def test_no_key_and_no_row_give_what_there_is():
    inputs, options = build_rows((5, 2, 2, 3, "none", "pads"), causal=False)
    for impl in ("auto", "blocked", "reference"):
        none = {name: tensor[:, :0] if name != "query_global" else tensor for name, tensor in inputs.items()}
        out = global_rows_attention(**none, **options, impl=impl)
        assert out.shape == (2, 3, 2, 3) and (out == 0).all()
        no_row = inputs | {"query_global": inputs["query_global"][:, :0]}
        out = global_rows_attention(**no_row, **options | {"global_index": torch.empty(2, 0).int()}, impl=impl)
        assert out.shape == (2, 0, 2, 3)


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (True, True)])
def test_neither_keys_nor_scores_are_copied_for_the_heads(causal, masked):
    """The largest tensor is the input's keys, or one mask for all heads."""
    key_len, num_rows = 20_000, 40
    inputs = make_inputs(num_rows, key_len=key_len, num_heads=6, key_heads=2, dtype=torch.float32, batch=1)
    inputs = {"query_global": inputs.pop("query"), **inputs}
    options = {"global_index": torch.arange(0, key_len, key_len // num_rows)[None], "causal": causal}
    options["valid"] = torch.arange(key_len)[None] % 5 > 0 if masked else None
    with LargestTensor() as seen:
        run_rows(inputs, **options, impl="blocked")
    key_bytes, mask_bytes = key_len * 2 * 4 * 4, num_rows * key_len * 4
    # positions are compared as int64 before the mask is bool
    assert seen.bytes <= (mask_bytes if causal else key_bytes)


@SIDES
def test_compiled_as_one_graph(causal):
    inputs, options = build_rows((60, 4, 2, 3, "holes", "ragged"), causal, torch.float32)

    def attend(*tensors):
        return global_rows_attention(**dict(zip(inputs, tensors, strict=True)), **options)

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs.values())
    plain = attend(*inputs.values())
    assert error(compiled.detach(), plain.detach()) <= 1e-6
    compiled_grads = torch.autograd.grad(compiled.square().sum(), tuple(inputs.values()))
    plain_grads = torch.autograd.grad(plain.square().sum(), tuple(inputs.values()))
    assert max(map(error, compiled_grads, plain_grads)) <= 1e-5


@SIDES
def test_two_runs_are_bit_equal_in_any_layout(causal):
    inputs, options = build_rows((150, 4, 2, 3, "holes", "scattered"), causal, torch.float32)
    first = run_rows(inputs, **options, impl="blocked")
    strided = {name: torch.stack([t.detach(), t.detach()], dim=-1)[..., 0] for name, t in inputs.items()}
    again, other = run_rows(inputs, **options, impl="blocked"), run_rows(strided, **options, impl="blocked")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert_same(other, first, tolerance=1e-6)
