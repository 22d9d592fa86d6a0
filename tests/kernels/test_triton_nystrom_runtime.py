"""The kernels of Nyström attention as operators of PyTorch, in the interpreter: compile, checkpointing, autocast."""

import json

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from kernels import tile_table
from kernels.nystrom_attention import api, nystrom_attention, ops, why_not_triton
from tests.kernels.nystrom import inputs_and_options, with_taps
from tests.kernels.window import make_inputs

pytestmark = pytest.mark.interpreter
CASES = pytest.mark.parametrize("case", ["not_divided", "holes", "more_than_tokens"])


def test_operators_keep_their_word():
    """Schema, fake results, gradients and dynamic shapes as torch checks them."""
    inputs = with_taps(make_inputs(20, batch=1, head_dim=16, dtype=torch.float32), 5)
    query, key, value, taps = inputs.values()
    valid = torch.arange(20)[None] < 18
    opcheck(ops._nystrom_forward, (query, key, value, None, None, 4, 0.25, 6, "exact"))
    opcheck(ops._nystrom_forward, (query, key, value, valid, valid, 4, 0.25, 2, "original"))
    opcheck(ops._softmax_forward, (query, key, value, valid, valid, 0.25))
    base = query.detach().clone().requires_grad_()
    opcheck(ops._convolve_forward, (base, value, taps, None))
    opcheck(ops._convolve_forward, (base, value, taps, valid))


@pytest.mark.parametrize("dynamic", [True, False])
@CASES
def test_compiled_in_one_graph_it_is_the_same(case, dynamic):
    inputs, options = inputs_and_options(case, torch.float32)

    def attend(*tensors):
        return nystrom_attention(**dict(zip(inputs, tensors, strict=True)), **options, impl="triton").square().sum()

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = list(inputs.values())
    found, expected = (torch.autograd.grad(each(*leaves), leaves) for each in (compiled, attend))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@CASES
def test_checkpointed_it_is_the_same(case):
    inputs, options = inputs_and_options(case, torch.float32)

    def attend(*tensors):
        return nystrom_attention(**dict(zip(inputs, tensors, strict=True)), **options, impl="triton").square().sum()

    leaves = list(inputs.values())
    expected = torch.autograd.grad(attend(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False), leaves)
    assert all(ours.equal(theirs) for ours, theirs in zip(again, expected, strict=True))


@CASES
def test_autocast_computes_in_its_dtype(case):
    inputs, options = inputs_and_options(case, torch.float32)
    with torch.autocast("cpu", torch.float16):
        out = nystrom_attention(**inputs, **options, impl="triton")
    assert out.dtype == torch.float16
    halves = {name: tensor if name == "conv_weight" else tensor.half() for name, tensor in inputs.items()}
    assert out.equal(nystrom_attention(**halves, **options, impl="triton"))
    out.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs.values())


def test_only_some_inputs_want_a_gradient():
    inputs, options = inputs_and_options("holes")
    tensors = {name: tensor.detach() for name, tensor in inputs.items()}
    tensors["conv_weight"].requires_grad_()
    (found,) = torch.autograd.grad(nystrom_attention(**tensors, **options, impl="triton").sum(), tensors["conv_weight"])
    (expected,) = torch.autograd.grad(
        nystrom_attention(**tensors, **options, impl="reference").sum(), tensors["conv_weight"]
    )
    torch.testing.assert_close(found, expected)


def test_twice_differentiated_it_refuses():
    inputs, options = inputs_and_options("not_divided", torch.float32)
    out = nystrom_attention(**inputs, **options, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), inputs["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_what_the_kernels_cannot_take_is_named():
    with pytest.raises(ValueError, match="head dim of at most 256, not 257"):
        nystrom_attention(**make_inputs(4, head_dim=257, dtype=torch.float32), num_landmarks=2, impl="triton")
    assert "not torch.int64" in str(why_not_triton(torch.device("cpu"), head_dim=16, dtype=torch.int64))


def test_the_table_has_these_kernels_and_no_others():
    kernels = {row["kernel"] for row in json.loads(tile_table.FILE.read_text())}
    assert set(api.KERNELS) == {kernel for kernel in kernels if kernel.startswith("nystrom_")}


@pytest.mark.parametrize("kernel", api.KERNELS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_table_has_every_head_dim(kernel, arch):
    for element_size in (2, 4):
        for head_dim in (1, 16, 20, 64, 80, 128, 200, 256):
            tiles = tile_table.choose(kernel, num_seen=64, arch=arch, element_size=element_size, head_dim=head_dim)
            assert tiles["BLOCK_D"] >= head_dim and min(tiles["BLOCK_M"], tiles["BLOCK_N"]) >= 16
