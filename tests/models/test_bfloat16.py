"""Whole models in bfloat16 and under autocast: finite, and no farther from exact numbers than with plain attention."""

from functools import cache

import pytest
import torch

from models.encoder import Encoder
from models.heads import MaskedLM
from tests.kernels.window import rms_error
from tests.models.test_export import MECHANISMS, make_inputs

FACTOR = 2  # on the error of scaled_dot_product_attention in the same model
MODES = pytest.mark.parametrize("mode", ["weights", "autocast"])


def make_model(kind) -> MaskedLM:
    """In float64, of weights that bfloat16 holds exactly."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "max_positions": 160, "dim": 48, "num_layers": 1, "num_heads": 3, "hidden": 64}
    model = MaskedLM(Encoder(attention=MECHANISMS[kind], dropout=0.0, max_global_tokens=6, **sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((parameter * (4 if "attention" in name else 1)).bfloat16())
    return model.double()


def results(model):
    """Logits of real tokens, and as one vector the gradients of their mean square by the attention's projections."""
    input_ids, valid, is_global = make_inputs(3, 120)
    logits = model(input_ids, valid, is_global)[valid]
    logits.double().square().mean().backward()
    grads = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    attention = [grad.double().flatten() for name, grad in grads.items() if ".attention.qkv" in name]
    return logits.detach().double(), torch.cat(attention)


@cache
def errors(kind, mode):
    """Of logits and gradients in bfloat16, relative to what they are in float64."""
    exact = results(make_model(kind))
    model = make_model(kind)
    if mode == "weights":
        found = results(model.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = results(model.float())
    return [rms_error(*pair) for pair in zip(found, exact, strict=True)]


@MODES
@pytest.mark.parametrize("kind", [kind for kind in MECHANISMS if kind != "dense"])
def test_bfloat16_costs_no_more_than_with_plain_attention(kind, mode):
    for error, plain in zip(errors(kind, mode), errors("dense", mode), strict=True):
        assert 0 < error < FACTOR * plain
