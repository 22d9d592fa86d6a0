"""Laws of Nyström attention: where it is plain attention, and what must not change it."""

import pytest
import torch
import torch.nn.functional as F

from kernels.nystrom_attention import nystrom_attention
from tests.kernels.nystrom import of_squares, results, with_taps
from tests.kernels.window import IMPLEMENTATIONS, assert_same, error, make_inputs, make_valid

TOKENS = ("query", "key", "value")
PATHS = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def attend(inputs, **options):
    return nystrom_attention(**inputs, **options).detach()


def dense(inputs, valid=None):
    query, key, value = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    mask = None if valid is None else valid[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).detach()


@PATHS
@pytest.mark.parametrize("num_landmarks", [13, 14, 100])
def test_a_text_no_longer_than_the_landmarks_is_plain_attention(num_landmarks, impl):
    inputs = make_inputs(13, head_dim=8)
    assert error(attend(inputs, num_landmarks=num_landmarks, impl=impl), dense(inputs)) < 1e-13


@PATHS
def test_so_is_each_short_example_of_a_longer_batch(impl):
    """Not the true inverse of its landmarks' weights, which six steps miss, but the softmax itself."""
    inputs, valid = make_inputs(40, batch=4, head_dim=8), torch.arange(40) < torch.tensor([[40], [12], [13], [1]])
    found = attend(inputs, num_landmarks=12, valid=valid, impl=impl)
    plain = dense(inputs, valid)
    for b, length in ((1, 12), (3, 1)):
        assert error(found[b, :length], plain[b, :length]) < 1e-13
    for b, length in ((0, 40), (2, 13)):
        assert error(found[b, :length], plain[b, :length]) > 1e-3


@PATHS
def test_with_more_landmarks_it_comes_closer_to_plain_attention(impl):
    generator = torch.Generator().manual_seed(0)
    walk = 0.3 * torch.randn(1, 96, 2, 8, generator=generator, dtype=torch.float64).cumsum(1)
    inputs = {"query": walk, "key": walk, "value": torch.randn(1, 96, 2, 8, generator=generator, dtype=torch.float64)}
    errors = [(attend(inputs, num_landmarks=n, impl=impl) - dense(inputs)).norm() for n in (2, 48, 96)]
    assert errors[0] > 1.5 * errors[1] and errors[2] < 1e-10


@PATHS
@pytest.mark.parametrize("length", [5, 17, 30])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side, length, impl):
    """For texts longer and shorter than the number of landmarks: values and the gradients of real tokens."""
    inputs = with_taps(make_inputs(length, batch=1), 7)
    before, after = (0, 11) if side == "right" else (11, 0)
    tokens = {name: F.pad(inputs[name].detach(), (0, 0, 0, 0, before, after), value=3.0) for name in TOKENS}
    valid = F.pad(torch.ones(1, length), (before, after)) > 0
    found = of_squares({**inputs, **tokens}, {"num_landmarks": 9, "valid": valid}, impl)
    assert_same(without_padding(found, valid), of_squares(inputs, {"num_landmarks": 9}, impl), 1e-11)


def without_padding(found, valid):
    """Result and gradients of the real tokens; those of the others must be zero."""
    for name in ("out", *TOKENS):
        assert found[name][~valid].eq(0).all()
    return {name: tensor[:, valid[0]] if name in ("out", *TOKENS) else tensor for name, tensor in found.items()}


@PATHS
def test_tokens_that_are_not_valid_do_not_exist(impl):
    """Wherever they stand: but for the convolution a text with holes is the text without them."""
    inputs, valid = make_inputs(40, batch=1), make_valid("holes", 1, 40)
    found = of_squares(inputs, {"num_landmarks": 7, "valid": valid}, impl)
    real = {name: tensor[:, valid[0]] for name, tensor in inputs.items()}
    assert_same(without_padding(found, valid), of_squares(real, {"num_landmarks": 7}, impl), 1e-11)


@PATHS
@pytest.mark.parametrize("num_landmarks", [4, 20])
def test_content_of_padding_is_irrelevant(num_landmarks, impl):
    inputs, valid = with_taps(make_inputs(37), 5), make_valid("holes", 2, 37)
    spoilt = {
        name: tensor if name == "conv_weight" else tensor.detach().masked_fill(~valid[:, :, None, None], 1e4)
        for name, tensor in inputs.items()
    }
    options = {"num_landmarks": num_landmarks, "valid": valid}
    assert_same(results(spoilt, options, impl), results(inputs, options, impl), 0.0)


@PATHS
@pytest.mark.parametrize("init", ["exact", "original"])
def test_members_of_a_batch_know_each_other_only_under_original(init, impl):
    inputs, valid = make_inputs(37, batch=3), torch.arange(37) < torch.tensor([[37], [20], [9]])
    inputs["query"].data[0] *= 9.0  # peaked, the largest column sum
    options = {"num_landmarks": 10, "pinv_init": init, "impl": impl}
    both = attend(inputs, valid=valid, **options)
    for b in range(3):
        alone = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
        same = error(attend(alone, valid=valid[b : b + 1], **options), both[b : b + 1]) < 1e-13
        assert same == (init == "exact" or b != 1)  # the first decides, the last is plain attention


@PATHS
def test_heads_may_be_permuted(impl):
    inputs, order = with_taps(make_inputs(37, num_heads=3), 5), [2, 0, 1]
    permuted = {
        name: tensor[order] if name == "conv_weight" else tensor[:, :, order] for name, tensor in inputs.items()
    }
    options = {"num_landmarks": 6, "impl": impl}
    assert error(attend(permuted, **options), attend(inputs, **options)[:, :, order]) < 1e-14


@PATHS
def test_the_same_query_everywhere_gets_the_mean_it_deserves(impl):
    """Equal keys make every weight equal: all three matrices average, whatever their inverse is."""
    inputs = make_inputs(20)
    inputs["key"] = inputs["key"][:, :1].detach().expand(-1, 20, -1, -1)
    found = attend(inputs, num_landmarks=4, impl=impl, pinv_iterations=30)
    assert error(found, inputs["value"].detach().mean(1, keepdim=True).expand_as(found)) < 1e-9


@PATHS
def test_a_middle_tap_adds_the_value_itself(impl):
    inputs, valid = make_inputs(23), make_valid("tail", 2, 23)
    taps = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]] * 2, dtype=torch.float64)
    options = {"num_landmarks": 5, "valid": valid, "impl": impl}
    added = attend(inputs, conv_weight=taps, **options) - attend(inputs, **options)
    assert error(added, inputs["value"].detach() * valid[:, :, None, None]) < 1e-12


@PATHS
def test_two_runs_are_the_same_bits(impl):
    inputs = with_taps(make_inputs(50, dtype=torch.float32), 5)
    options = {"num_landmarks": 8, "valid": make_valid("holes", 2, 50)}
    assert_same(results(inputs, options, impl), results(inputs, options, impl), 0.0)
