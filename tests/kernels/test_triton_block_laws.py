"""Laws of the block-sparse kernels, in the interpreter: what must not matter does not, nothing is written elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from tests.kernels.block_cases import build, make_pattern
from tests.kernels.window import error, make_inputs
from tests.kernels.window import run as run_function

pytestmark = pytest.mark.interpreter
# rows and columns that are cut, and lists that reach past shorter examples
RAGGED = ("uniform", 18, 3, 20, 1, "ragged")


def run(inputs, **options):
    return run_function(inputs, function=block_sparse_attention, impl="triton", **options)


def attend(inputs, **options):
    return block_sparse_attention(**inputs, **options, impl="triton").detach()


def test_every_block_once_is_dense_attention():
    inputs = make_inputs(37, head_dim=8)
    pattern = BlockPattern.from_function(lambda row, column: True, 40, 16, 2)
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs.values())
    dense = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    assert error(attend(inputs, pattern=pattern), dense.detach()) < 1e-12


def test_members_of_a_batch_do_not_know_each_other():
    inputs, options = build(("many_random", 8, 3, 9, 1, "ragged"), block_size=16, head_dim=4)
    both = attend(inputs, **options)
    for index in range(2):
        alone = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        options_alone = {**options, "valid": options["valid"][index : index + 1]}
        assert attend(alone, **options_alone).equal(both[index : index + 1])


def test_padding_changes_no_bit():
    """An example of its own length is the same without the padding behind it, in value and gradients."""
    inputs, pattern = make_inputs(150, batch=1, num_heads=1), make_pattern("many_random", 200, 16, 1)
    valid = torch.arange(150)[None] < 101
    padded = run(inputs, pattern=pattern, valid=valid)
    weights = torch.randn(1, 150, 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:, :101]
    leaves = {name: tensor.detach()[:, :101].requires_grad_() for name, tensor in inputs.items()}
    out = block_sparse_attention(**leaves, pattern=pattern, impl="triton")
    assert out.equal(padded["out"][:, :101])
    for name, grad in zip(leaves, torch.autograd.grad(out, list(leaves.values()), weights), strict=True):
        assert grad.equal(padded[name][:, :101]) and (padded[name][:, 101:] == 0).all()


def test_content_that_nobody_sees_is_irrelevant():
    inputs, options = build(("bigbird", 5, 3, 7, 1, "holes"), block_size=16, head_dim=4)
    spoilt = {
        name: tensor.detach().masked_fill(~options["valid"][:, :, None, None], 1e4) for name, tensor in inputs.items()
    }
    seen = run(inputs, **options)
    for name, tensor in run(spoilt, **options).items():
        assert tensor.equal(seen[name]), name


def test_two_runs_are_the_same_bits():
    inputs, options = build(RAGGED, block_size=16, head_dim=4, dtype=torch.float32)
    first, second = (run(inputs, **options) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


class TestStrides:
    """Tensors are taken as they lie, whatever their strides."""

    def both(self, inputs, grad, valid=None):
        seq_len, num_heads = inputs["query"].shape[1:3]
        options = {"pattern": make_pattern("bigbird", seq_len, 16, num_heads), "valid": valid}
        results = []
        for impl in ("triton", "reference"):
            out = block_sparse_attention(**inputs, **options, impl=impl)
            results.append((out, *torch.autograd.grad(out, list(inputs.values()), grad.expand_as(out))))
        assert results[0][0].is_contiguous()
        for ours, oracle in zip(*results, strict=True):
            assert error(ours, oracle.detach()) < 1e-12

    def test_views_of_one_projection(self):
        fused = torch.randn(2, 40, 3, 2, 8, dtype=torch.float64, requires_grad=True)
        query, key, value = fused.unbind(2)
        self.both({"query": query, "key": key, "value": value}, torch.ones(()))

    def test_heads_before_tokens_and_channels_apart(self):
        query = torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True).transpose(1, 2)
        key = torch.randn(1, 40, 8, 2, dtype=torch.float64, requires_grad=True).transpose(2, 3)
        value = torch.randn(1, 40, 2, 16, dtype=torch.float64, requires_grad=True)[..., ::2]
        self.both({"query": query, "key": key, "value": value}, torch.randn(8, dtype=torch.float64))

    def test_expanded_inputs_gradient_and_mask(self):
        one = torch.randn(1, 40, 1, 8, dtype=torch.float64)
        names = ("query", "key", "value")
        inputs = {name: one.clone().requires_grad_().expand(2, -1, -1, -1) for name in names}
        valid = (torch.rand(1, 40) > 0.4).expand(2, 40)
        self.both(inputs, torch.full((), 2.0, dtype=torch.float64), valid)


def test_nothing_is_written_beside_the_results(monkeypatch):
    """Every tensor that the launchers allocate lies between canaries."""
    allocated, plain = [], torch.empty

    def guarded(*shape, **options):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        flat = plain(shape.numel() + 512, **options).fill_(7)
        allocated.append((flat, shape))
        return flat[256:-256].view(shape)

    inputs, options = build(RAGGED, block_size=20, head_dim=20, dtype=torch.float32)
    monkeypatch.setattr(torch, "empty", guarded)
    run(inputs, **options)
    monkeypatch.undo()
    # lengths; result, statistics and two kinds of sums of parts; three gradients, delta, sums of parts twice
    assert len(allocated) == 11
    for flat, shape in allocated:
        assert (flat[:256] == 7).all() and (flat[-256:] == 7).all(), shape
