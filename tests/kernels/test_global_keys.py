"""Global keys beside the windows: the oracle against loops, the blocked path against the oracle, float64."""

import pytest
import torch
from hypothesis import given, settings
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.memory import LargestTensor
from kernels.window_attention import blocked, window_attention
from tests.kernels.global_cases import CASES, GLOBAL_SETS, build, drawn_cases, make_global_index
from tests.kernels.window import (
    IMPLEMENTATIONS,
    MASKS,
    assert_blocked_is_the_oracle,
    assert_same,
    by_loops,
    error,
    in_double,
    make_inputs,
    rms_error,
    run,
)

SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])
FORMS = pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])


@pytest.fixture
def explicit_form(monkeypatch, explicit):
    """Scores in the open, as in half precision, where `explicit` is asked for."""
    if explicit:
        monkeypatch.setattr(blocked, "is_explicit", lambda problems, drop: True)


@SIDES
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", GLOBAL_SETS)
@pytest.mark.parametrize("rows", [(9, 9, 0), (3, 12, 5), (5, 7, 4)], ids=["whole", "some", "past_the_keys"])
def test_the_oracle_is_the_definition(rows, kind, mask, causal):
    case = (*rows, 3, 1, [2, 0, 4], [1, 2, 3], mask, kind)
    inputs, options = build(case, causal)
    expected = by_loops(**inputs, **options)
    actual = window_attention(**inputs, **options, impl="reference")
    assert error(actual.detach(), expected.detach()) <= 1e-12


@FORMS
@SIDES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_blocked_is_the_oracle(explicit_form, case, causal):
    assert_blocked_is_the_oracle(*build(case, causal))


@SIDES
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", GLOBAL_SETS)
def test_blocked_is_the_oracle_for_every_mask_and_set(kind, mask, causal):
    assert_blocked_is_the_oracle(*build((75, 75, 0, 2, 2, [5, 2], [1, 3], mask, kind), causal))


@FORMS
@SIDES
def test_blocked_is_the_oracle_in_small_chunks(explicit_form, monkeypatch, causal):
    """One problem at a time, and nothing kept that can be computed again."""
    monkeypatch.setattr(blocked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(blocked, "KEEP_BYTES", 0)
    for name in ("mixed_heads_long", "grouped_query_mixed", "dilation_isolated", "rows_run_past_the_keys"):
        assert_blocked_is_the_oracle(*build(CASES[name], causal))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(drawn_cases())
def test_blocked_is_the_oracle_on_drawn_cases(drawn):
    assert_blocked_is_the_oracle(*build(*drawn))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@SIDES
@pytest.mark.parametrize("kind", ["repeated", "ragged"])
def test_gradients_are_derivatives(impl, kind, causal):
    inputs, options = build((5, 7, 1, 2, 1, [1, 2], [1, 2], "holes", kind), causal)

    def attend(*tensors):
        return window_attention(**dict(zip(inputs, tensors, strict=True)), **options, impl=impl)

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))


NUMERIC_CASES = ["first_token", "mixed_heads_long", "grouped_query", "every_key", "many_rows_at_the_end"]


@SIDES
@pytest.mark.parametrize("name", NUMERIC_CASES)
def test_float32_is_float64_to_rounding(name, causal):
    inputs, options = build(CASES[name], causal, torch.float32)
    exact = run(in_double(inputs), **options, impl="reference")
    result = run(inputs, **options, impl="blocked")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert_same(result, exact, tolerance=1e-5)


@SIDES
@pytest.mark.parametrize("name", NUMERIC_CASES)
def test_bfloat16_is_no_worse_than_plain_torch(name, causal):
    """Twice the error that the oracle itself makes in this dtype, root mean square."""
    inputs, options = build(CASES[name], causal, torch.bfloat16)
    exact = run(in_double(inputs), **options, impl="reference")
    plain = run(inputs, **options, impl="reference")
    result = run(inputs, **options, impl="blocked")
    for tensor, expected in exact.items():
        assert result[tensor].dtype == torch.bfloat16
        assert rms_error(result[tensor], expected) <= 2 * rms_error(plain[tensor], expected), tensor


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_scores_stay_finite(impl):
    inputs, options = build(CASES["mixed_heads_long"], causal=True, dtype=torch.float32)
    inputs = {name: 200 * tensor for name, tensor in inputs.items()}
    assert all(torch.isfinite(tensor).all() for tensor in run(inputs, **options, impl=impl).values())


@SIDES
def test_a_list_without_columns_costs_no_bit(causal):
    inputs, options = build(CASES["mixed_heads_long"], causal, torch.float32)
    options["global_index"] = torch.empty(2, 0, dtype=torch.int64)
    empty = run(inputs, **options, impl="blocked")
    none = run(inputs, **options | {"global_index": None}, impl="blocked")
    assert all(torch.equal(empty[name], none[name]) for name in none)


@SIDES
def test_keys_that_no_row_sees_are_never_read(causal):
    """Not a number in one of them would show: pads, and keys out of reach that are not global."""
    inputs = {name: tensor.detach() for name, tensor in make_inputs(4, key_len=200).items()}
    options = {"window": [5, 2], "dilation": [1, 3], "causal": causal, "query_start": 100, "impl": "blocked"}
    options["global_index"] = torch.tensor([[3, -1, 50], [-1, 200, 7]])
    expected = window_attention(**inputs, **options)
    never = torch.ones(2, 200, dtype=torch.bool)
    never[:, 94 : 104 + (0 if causal else 6)] = False
    never[0, [3, 50]] = never[1, 7] = False
    for name in ("key", "value"):
        inputs[name][never] = torch.nan
    assert torch.equal(window_attention(**inputs, **options), expected)


@SIDES
@pytest.mark.parametrize("dilation", [1, 7])
def test_what_is_made_does_not_grow_with_the_keys(dilation, causal):
    largest = []
    for key_len in (5_000, 50_000):
        inputs = {name: tensor.detach() for name, tensor in make_inputs(3, key_len=1, dtype=torch.float32).items()}
        for name in ("key", "value"):
            # one key seen many times: a view of them has next to no memory behind it, unlike a copy
            inputs[name] = torch.randn(2, 1, 3, 4)[:, :, :2].expand(-1, key_len, -1, -1)
        index = make_global_index("scattered", 2, 100)
        with LargestTensor() as seen:
            window_attention(
                **inputs,
                window=30,
                dilation=dilation,
                causal=causal,
                query_start=key_len - 2_000,
                global_index=index,
                impl="blocked",
            )
        largest.append(seen.bytes)
    assert largest[0] == largest[1]


@SIDES
def test_a_dilation_above_the_length_does_not_copy_the_global_keys_to_every_row(causal):
    """As many classes as rows share them: what is made at a time is bounded by a chunk, not by T * G * D."""
    inputs = make_inputs(4_000, batch=1, head_dim=16, dtype=torch.float32)
    index = make_global_index("all", 1, 60)
    with LargestTensor() as seen:
        run(inputs, window=2, dilation=5_000, causal=causal, global_index=index, impl="blocked")
    assert 1.7 * blocked.CHUNK_BYTES < 4_000 * 60 * 16 * 2 * 4
    assert seen.bytes <= blocked.CHUNK_BYTES


@SIDES
@pytest.mark.parametrize("chunk", [2**24, 2**21], ids=["heads_together", "head_by_head"])
@pytest.mark.parametrize("allowed", [2**20, 5 * 2**20, 9 * 2**20])
def test_no_more_is_kept_for_the_backward_pass_than_is_allowed(monkeypatch, causal, allowed, chunk):
    """Of masks and of copies of keys with columns beside them, which at this head dim are twice as large."""
    monkeypatch.setattr(blocked, "KEEP_BYTES", allowed)
    monkeypatch.setattr(blocked, "CHUNK_BYTES", chunk)
    inputs = make_inputs(4096, batch=1, head_dim=64, dtype=torch.float32)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no two share an address
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        window_attention(**inputs, window=16, causal=causal, global_index=torch.tensor([[5, 900, -1]]), impl="blocked")
    tensor_bytes = 4096 * 2 * 64 * 4
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) <= 5 * tensor_bytes + allowed
