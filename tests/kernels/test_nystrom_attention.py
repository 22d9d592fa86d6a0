"""Nyström attention against its formula, the published ones, and the blocked path against the oracle."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.nystrom_attention import nystrom_attention
from kernels.nystrom_attention.convolution import convolve
from tests.kernels.nystrom import CASES, assert_is_the_oracle, inputs_and_options, with_taps
from tests.kernels.window import IMPLEMENTATIONS, error, in_double, make_inputs, make_valid

PATHS = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def by_formula(query, key, value, num_landmarks, *, taps=None, key_bias=0.0, init="exact", iterations=6):
    """softmax(Q K~^T) Z softmax(Q~ K^T) V + conv(V) on [B, H, T, D] for a length that the landmarks divide."""
    query, key = (tensor / tensor.shape[-1] ** 0.25 for tensor in (query, key))
    means = [tensor.unflatten(2, (num_landmarks, -1)).mean(3) for tensor in (query, key)]
    to_landmarks, between = (torch.softmax(tensor @ means[1].mT, -1) for tensor in (query, means[0]))
    to_keys = torch.softmax(means[0] @ key.mT + key_bias, -1)
    sums = between.sum(-2)
    inverse = between.mT / (sums.amax() if init == "original" else sums.amax(-1)[..., None, None])
    eye = torch.eye(num_landmarks, dtype=query.dtype)
    for _ in range(iterations):
        product = between @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    out = to_landmarks @ inverse @ to_keys @ value
    if taps is not None:
        out = out + F.conv2d(value, taps[:, None, :, None], padding=(taps.shape[1] // 2, 0), groups=len(taps))
    return out


def heads_first(inputs):
    return [inputs[name].detach().transpose(1, 2) for name in ("query", "key", "value")]


@PATHS
@pytest.mark.parametrize("init", ["exact", "original"])
@pytest.mark.parametrize("iterations", [1, 6])
def test_it_is_the_formula(iterations, init, impl):
    inputs = with_taps(make_inputs(24, num_heads=3, head_dim=8), 5)
    taps = inputs["conv_weight"].detach()
    expected = by_formula(*heads_first(inputs), 4, taps=taps, init=init, iterations=iterations).transpose(1, 2)
    found = nystrom_attention(**inputs, num_landmarks=4, pinv_init=init, pinv_iterations=iterations, impl=impl)
    assert error(found.detach(), expected) < 1e-12


@PATHS
@pytest.mark.parametrize("mask", ["tail", "holes"])
def test_hf_hides_padding_from_the_landmarks_queries_alone(mask, impl):
    inputs, valid = with_taps(make_inputs(24, num_heads=3, head_dim=8), 5), make_valid(mask, 2, 24)
    bias = torch.zeros(2, 1, 1, 24).masked_fill(~valid[:, None, None], -1e9).double()
    taps = inputs["conv_weight"].detach()
    expected = by_formula(*heads_first(inputs), 4, taps=taps, key_bias=bias, init="original").transpose(1, 2)
    options = {"num_landmarks": 4, "valid": valid, "pinv_init": "original", "compat": "hf"}
    assert error(nystrom_attention(**inputs, **options, impl=impl).detach(), expected) < 1e-12


@PATHS
@pytest.mark.parametrize("mask", ["tail", "holes", "one_all_masked"])
def test_original_makes_padding_zero_first(mask, impl):
    inputs, valid = with_taps(make_inputs(24, num_heads=3, head_dim=8), 5), make_valid(mask, 2, 24)
    tensors = [tensor * valid[:, None, :, None] for tensor in heads_first(inputs)]
    bias = -1e9 * (1.0 - valid[:, None, None].double())
    taps = inputs["conv_weight"].detach()
    expected = by_formula(*tensors, 4, taps=taps, key_bias=bias, init="original").transpose(1, 2)
    options = {"num_landmarks": 4, "valid": valid, "pinv_init": "original", "compat": "original"}
    assert error(nystrom_attention(**inputs, **options, impl=impl).detach(), expected) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_blocked_is_the_oracle(case):
    inputs, options = inputs_and_options(case)
    assert_is_the_oracle(inputs, options, "blocked")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lengths_and_masks_are_the_oracle(data):
    draw = data.draw
    seq_len, num_landmarks = draw(st.integers(1, 50)), draw(st.integers(1, 52))
    sizes = {"num_heads": draw(st.integers(1, 3)), "head_dim": draw(st.sampled_from([1, 4, 5]))}
    inputs = with_taps(
        make_inputs(seq_len, **sizes, seed=draw(st.integers(0, 9))), draw(st.sampled_from([0, 1, 7, 65]))
    )
    options = {
        "num_landmarks": num_landmarks,
        "valid": make_valid(draw(st.sampled_from(["none", "tail", "holes", "one_all_masked"])), 2, seq_len),
        "pinv_init": draw(st.sampled_from(["exact", "original"])),
        "pinv_iterations": draw(st.integers(1, 7)),
        "scale": draw(st.sampled_from([None, 0.3, 0.0, -0.3])),
    }
    # a matrix of nearly equal rows has a gradient of 1e3 and more beside which rounding shows
    assert_is_the_oracle(inputs, options, "blocked", tolerance=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["not_divided", "holes", "some_exact"])
@PATHS
def test_lower_precision_only_rounds_the_result(impl, case, dtype):
    """What is computed is float32 whatever comes in."""
    inputs, options = inputs_and_options(case, dtype)
    exact = nystrom_attention(**in_double(inputs), **options, impl="reference")
    found = nystrom_attention(**inputs, **options, impl=impl).detach()
    assert found.dtype == dtype
    assert error(found, exact) <= 1e-5 + torch.finfo(dtype).eps / 2


class TestConvolution:
    def test_it_is_a_depthwise_convolution_of_the_values(self):
        value, taps = torch.randn(2, 11, 3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        expected = torch.zeros_like(value)
        for t in range(11):
            for j in range(5):
                if 0 <= t + j - 2 < 11:
                    expected[:, t] += taps[:, j, None] * value[:, t + j - 2]
        assert error(convolve(value, taps), expected) < 1e-14

    def test_of_a_view_of_one_projection_it_is_the_same(self):
        fused, taps = torch.randn(2, 11, 3, 3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        value = fused[:, :, 2]
        assert convolve(value, taps).equal(convolve(value.contiguous(), taps))

    @PATHS
    @pytest.mark.parametrize("compat", [None, "hf"])
    def test_padding_reaches_the_last_tokens_only_under_hf(self, compat, impl):
        """Within half a filter of the end of the text, nowhere else."""
        inputs, valid = with_taps(make_inputs(24, head_dim=4), 5), torch.arange(24).expand(2, 24) < 16
        spoilt = {**inputs, "value": inputs["value"] + 10.0 * ~valid[:, :, None, None]}
        options = {"num_landmarks": 4, "valid": valid, "compat": compat, "impl": impl}
        changed = nystrom_attention(**inputs, **options) != nystrom_attention(**spoilt, **options)
        rows = changed[:, :16].any(dim=(0, 2, 3)).nonzero()[:, 0].tolist()
        assert rows == ([14, 15] if compat == "hf" else [])
