"""The blocked path on a GPU: the same function as the oracle computes there in float64. Collected by `make gpu`."""

import pytest
import torch

from kernels.window_attention import window_attention
from tests.kernels.window import in_double, make_inputs, make_valid, num_columns

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mask", ["none", "holes"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("relative", [False, True], ids=["content", "relative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_blocked_is_as_close_to_the_oracle_as_dense_attention(dtype, relative, causal, mask):
    """Value and every gradient: 1e-5 relative, or twice the error of dense attention in the same dtype."""
    window, options = 37, {"window": 37, "dilation": [1, 3], "causal": causal}
    columns = num_columns(window, causal) if relative else None
    inputs = make_inputs(301, head_dim=40, dtype=dtype, columns=columns)
    inputs = {name: tensor.detach().cuda().requires_grad_() for name, tensor in inputs.items()}
    valid = make_valid(mask, 2, 301)
    valid = None if valid is None else valid.cuda()

    def run(tensors, impl):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
        out = window_attention(**dict(zip(tensors, leaves, strict=True)), valid=valid, impl=impl, **options)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return [out, *torch.autograd.grad(out, leaves, weights)]

    exact = run(in_double(inputs), "reference")
    dense, blocked = run(inputs, "reference"), run(inputs, "blocked")
    for truth, peer, ours in zip(exact, dense, blocked, strict=True):
        scale = truth.abs().max()
        error, allowed = ((found.double() - truth).square().mean().sqrt() / scale for found in (ours, peer))
        assert error <= max(1e-5, 2 * allowed)
