"""The Triton kernels of Nyström attention in the interpreter against the oracle: values and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import launch
from kernels.nystrom_attention import nystrom_attention
from tests.kernels.nystrom import (
    CASES,
    assert_as_good_as_plain,
    assert_is_the_oracle,
    inputs_and_options,
    of_squares,
    results,
    with_taps,
)
from tests.kernels.window import assert_same, error, make_inputs, make_valid

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_oracle(case):
    inputs, options = inputs_and_options(case)
    assert_is_the_oracle(inputs, options, "triton")


@pytest.mark.parametrize("head_dim", [1, 40, 256])
def test_every_width_of_head(head_dim):
    inputs = with_taps(make_inputs(21, batch=1, head_dim=head_dim), 3)
    assert_is_the_oracle(inputs, {"num_landmarks": 5, "valid": make_valid("holes", 1, 21)}, "triton")


@pytest.mark.parametrize("num_landmarks, programs", [(4, 1), (4, 10**6), (40, 7), (40, 10**6), (100, 10**6)])
def test_any_number_of_parts(monkeypatch, num_landmarks, programs):
    """Of tokens, and where there are many landmarks of these; what tokens get through landmarks counts once."""
    monkeypatch.setattr(launch, "PROGRAMS", programs)
    inputs = with_taps(make_inputs(100, batch=1, num_heads=1), 9)
    assert_is_the_oracle(inputs, {"num_landmarks": num_landmarks, "valid": make_valid("tail", 1, 100)}, "triton", 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["not_divided", "holes", "some_exact"])
def test_error_is_at_most_twice_that_of_the_formula_in_the_same_dtype(case, dtype):
    inputs, options = inputs_and_options(case, dtype)
    options.pop("compat")
    assert_as_good_as_plain(inputs, options, "triton")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lengths_and_masks_are_the_oracle(data):
    draw = data.draw
    seq_len, num_landmarks = draw(st.integers(1, 36)), draw(st.integers(1, 38))
    sizes = {"num_heads": draw(st.integers(1, 2)), "head_dim": draw(st.sampled_from([4, 20])), "batch": 1}
    inputs = with_taps(
        make_inputs(seq_len, **sizes, seed=draw(st.integers(0, 9))), draw(st.sampled_from([0, 1, 7, 33]))
    )
    options = {
        "num_landmarks": num_landmarks,
        "valid": make_valid(draw(st.sampled_from(["none", "tail", "holes", "one_all_masked"])), 1, seq_len),
        "pinv_init": draw(st.sampled_from(["exact", "original"])),
        "pinv_iterations": draw(st.integers(1, 6)),
        "scale": draw(st.sampled_from([None, 0.3, 0.0, -0.3])),
    }
    # a matrix of nearly equal rows has a gradient of 1e3 and more beside which rounding shows
    assert_is_the_oracle(inputs, options, "triton", tolerance=1e-9)


def test_members_of_a_batch_do_not_know_each_other():
    inputs, valid = with_taps(make_inputs(37, batch=3), 5), torch.arange(37) < torch.tensor([[37], [20], [9]])
    inputs["query"].data[0] *= 9.0  # peaked
    both = nystrom_attention(**inputs, num_landmarks=10, valid=valid, impl="triton")
    for b in range(3):
        alone = {name: tensor if name == "conv_weight" else tensor[b : b + 1] for name, tensor in inputs.items()}
        found = nystrom_attention(**alone, num_landmarks=10, valid=valid[b : b + 1], impl="triton")
        assert error(found.detach(), both[b : b + 1].detach()) < 1e-13


@pytest.mark.parametrize("length", [5, 17])
def test_padding_changes_nothing(length):
    inputs = with_taps(make_inputs(length, batch=1), 7)
    tokens = ("query", "key", "value")
    pad = torch.full((1, 9, 2, 4), 3.0, dtype=torch.float64)
    padded = {name: torch.cat([inputs[name].detach(), pad], 1) for name in tokens}
    valid = torch.arange(length + 9)[None] < length
    found = of_squares({**inputs, **padded}, {"num_landmarks": 9, "valid": valid}, "triton")
    for name in ("out", *tokens):
        assert found[name][:, length:].eq(0).all()
        found[name] = found[name][:, :length]
    assert_same(found, of_squares(inputs, {"num_landmarks": 9}, "triton"), 1e-11)


def test_content_of_padding_is_irrelevant():
    inputs, valid = with_taps(make_inputs(37, batch=1), 5), make_valid("holes", 1, 37)
    spoilt = {
        name: tensor if name == "conv_weight" else tensor.detach().masked_fill(~valid[:, :, None, None], 1e4)
        for name, tensor in inputs.items()
    }
    options = {"num_landmarks": 6, "valid": valid}
    assert_same(results(spoilt, options, "triton"), results(inputs, options, "triton"), 0.0)


def test_two_runs_are_the_same_bits():
    inputs = with_taps(make_inputs(50, batch=1, dtype=torch.float32), 5)
    options = {"num_landmarks": 8, "valid": make_valid("tail", 1, 50)}
    assert_same(results(inputs, options, "triton"), results(inputs, options, "triton"), 0.0)


class TestStrides:
    """Tensors are taken as they lie, whatever their strides."""

    def both(self, inputs, grad, **options):
        leaves = list(inputs.values())
        found = []
        for impl in ("triton", "reference"):
            out = nystrom_attention(**inputs, **options, impl=impl)
            found.append((out, *torch.autograd.grad(out, leaves, grad.expand_as(out), retain_graph=True)))
        for ours, oracle in zip(*found, strict=True):
            assert error(ours.detach(), oracle.detach()) < 1e-11

    @pytest.mark.parametrize("num_landmarks", [6, 40])
    def test_views_of_one_projection(self, num_landmarks):
        fused = torch.randn(2, 30, 3, 2, 8, dtype=torch.float64, requires_grad=True)
        inputs = with_taps(dict(zip(("query", "key", "value"), fused.unbind(2), strict=True)), 5)
        self.both(inputs, torch.ones(()).double(), num_landmarks=num_landmarks)

    @pytest.mark.parametrize("num_landmarks", [6, 40])
    def test_heads_before_tokens_and_channels_apart(self, num_landmarks):
        query = torch.randn(2, 2, 30, 8, dtype=torch.float64, requires_grad=True).transpose(1, 2)
        key = torch.randn(2, 30, 8, 2, dtype=torch.float64, requires_grad=True).transpose(2, 3)
        value = torch.randn(2, 30, 2, 16, dtype=torch.float64, requires_grad=True)[..., ::2]
        inputs = with_taps({"query": query, "key": key, "value": value}, 5)
        self.both(inputs, torch.randn(8, dtype=torch.float64), num_landmarks=num_landmarks)

    def test_expanded_inputs_gradient_and_mask(self):
        one = torch.randn(1, 30, 2, 8, dtype=torch.float64)
        inputs = {name: one.clone().requires_grad_().expand(3, -1, -1, -1) for name in ("query", "key", "value")}
        valid = make_valid("holes", 1, 30).expand(3, 30)
        self.both(inputs, torch.full((), 2.0, dtype=torch.float64), num_landmarks=6, valid=valid)
