"""Hugging Face's Nyströmformer attention and ours, weight for weight."""

import pytest
import torch

from kernels.nystrom_attention import nystrom_attention
from tests.kernels.window import IMPLEMENTATIONS, error

BATCH, SEQ_LEN, HEADS, HEAD_DIM = 2, 24, 3, 8
PATHS = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def peer(num_landmarks, *, seq_len=SEQ_LEN, taps=5):
    """Its self-attention in float64."""
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_landmarks=num_landmarks,
        segment_means_seq_len=seq_len,
        conv_kernel_size=taps,
    )
    return NystromformerSelfAttention(config).double()


def ours(module, x, impl, **options):
    """The same projections and filter around our attention."""
    projections = [module.query, module.key, module.value]
    query, key, value = (layer(x).unflatten(-1, (HEADS, HEAD_DIM)) for layer in projections)
    taps = module.conv.weight[:, 0, :, 0]
    return nystrom_attention(query, key, value, conv_weight=taps, compat="hf", **options, impl=impl).flatten(2)


def assert_equal_with_gradients(module, theirs, found, x):
    weights = torch.randn_like(theirs)
    inputs = [x, *module.parameters()]
    assert error(found.detach(), theirs.detach()) < 1e-12
    grads = (torch.autograd.grad(out, inputs, weights) for out in (found, theirs))
    for one, other in zip(*grads, strict=True):
        # the bias of keys has no gradient but rounding
        assert (one - other).abs().max() < 1e-11 * max(1.0, other.abs().max().item())


@PATHS
@pytest.mark.parametrize("taps", [1, 5, 65])
@pytest.mark.parametrize("init", ["original", "exact"])
@pytest.mark.parametrize("num_landmarks", [1, 4, 12])
def test_the_nystrom_path_without_padding(num_landmarks, init, taps, impl):
    module = peer(num_landmarks, taps=taps)
    module.init_option = init  # its option for it raises when it is constructed
    x = torch.randn(BATCH, SEQ_LEN, HEADS * HEAD_DIM, dtype=torch.float64, requires_grad=True)
    found = ours(module, x, impl, num_landmarks=num_landmarks, pinv_init=init)
    assert_equal_with_gradients(module, module(x)[0], found, x)


@PATHS
@pytest.mark.parametrize("length", [9, 24, 31])
@pytest.mark.parametrize("padded", [False, True])
def test_the_exact_path_of_the_public_checkpoints(padded, length, impl):
    """As many landmarks as the configured length: plain attention for texts of any length, padding hidden as keys."""
    module = peer(SEQ_LEN)
    x = torch.randn(BATCH, length, HEADS * HEAD_DIM, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(length) < torch.tensor([[length], [length - 4 * padded]])
    mask = torch.zeros(BATCH, 1, 1, length, dtype=torch.float64).masked_fill(~valid[:, None, None], -1e9)
    found = ours(module, x, impl, num_landmarks=length, valid=valid)
    assert_equal_with_gradients(module, module(x, mask)[0], found, x)
