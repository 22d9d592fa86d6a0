"""The block-sparse kernels as operators of PyTorch, in the interpreter: compile, checkpointing, autocast, refusals."""

import copy

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from kernels import dispatch, launch, tile_table
from kernels.block_sparse_attention import BlockPattern, api, block_sparse_attention, ops, why_not_triton
from kernels.block_sparse_attention.tables import device_tables
from tests.kernels.block_cases import make_pattern
from tests.kernels.window import make_inputs

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")
SEED = torch.tensor([3])


def small_inputs(dtype=torch.float32, seq_len=40):
    return make_inputs(seq_len, batch=1, num_heads=2, head_dim=16, dtype=dtype)


@pytest.fixture
def pattern():
    return make_pattern("bigbird", 64, 16, 2)


def test_operators_keep_their_word(pattern):
    """Schema, fake results, gradients and dynamic shapes as torch checks them."""
    query, key, value = small_inputs().values()
    valid = torch.arange(40)[None] < 35
    tables = list(device_tables(pattern, CPU))
    opcheck(ops._block_lengths, (valid, tables[-1], 16, True))
    lengths = ops._block_lengths(valid, tables[-1], 16, True)
    sizes = (pattern.block_size, pattern.front, pattern.back, pattern.window, 0.25)
    opcheck(ops._forward, (query, key, value, None, None, None, tables, *sizes, 0.0))
    opcheck(ops._forward, (query, key, value, valid, lengths, SEED, tables, *sizes, 0.5))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_in_one_graph_it_is_the_same(pattern, dynamic):
    """Whatever the length, and although the pattern's tables are not made before the compiler asks for them."""

    def attend(pattern, valid, query, key, value):
        options = {"valid": valid, "dropout": 0.2, "dropout_seed": SEED, "impl": "triton"}
        return block_sparse_attention(query * 1.0, key, value, pattern, **options).square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seq_len in (40, 50):
        inputs = list(small_inputs(seq_len=seq_len).values())
        valid = torch.arange(seq_len)[None] < seq_len - 3
        for ours in (pattern, copy.deepcopy(pattern)):
            found = torch.autograd.grad(compiled(ours, valid, *inputs), inputs)
            expected = torch.autograd.grad(attend(pattern, valid, *inputs), inputs)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)


class Attention(torch.nn.Module):
    """The kernels for one pattern."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern

    def forward(self, query, key, value):
        return block_sparse_attention(query, key, value, self.pattern, impl="triton")


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
@pytest.mark.parametrize("strict", [False, True])
def test_exported_and_saved_it_is_the_same_at_other_lengths(tmp_path, strict):
    """Although the pattern's tables are not there before, and some of them have no element."""
    model = Attention(BlockPattern.bigbird(96, 16, 2, 1, seed=3))
    length, inputs = torch.export.Dim("length", min=5, max=96), tuple(small_inputs(seq_len=40).values())
    program = torch.export.export(model, inputs, dynamic_shapes=({1: length},) * 3, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for seq_len in (40, 96):
        inputs = tuple(small_inputs(seq_len=seq_len).values())
        torch.testing.assert_close(program(*inputs), model(*inputs))


def test_a_new_length_compiles_nothing_anew(pattern):
    torch._dynamo.reset()
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for seq_len in (40, 41, 64, 17):
        if seq_len == 41:
            torch._dynamo.config.error_on_recompile = True
        try:
            compiled(*small_inputs(seq_len=seq_len).values(), pattern, impl="triton")
        finally:
            torch._dynamo.config.error_on_recompile = False


def test_layers_of_unlike_patterns_share_a_graph():
    """One compiled by itself serves the others, once their tables are there."""
    patterns = [make_pattern("bigbird", 64, 16, 2, seed=seed) for seed in range(4)]
    for each in patterns:
        device_tables(each, CPU)
    torch._dynamo.reset()
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    torch._dynamo.config.error_on_recompile = False
    try:
        for each in patterns:
            compiled(*small_inputs().values(), each, impl="triton")
            torch._dynamo.config.error_on_recompile = True
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_checkpointed_it_is_the_same(pattern):
    inputs = list(small_inputs().values())

    def attend(*qkv):
        return block_sparse_attention(*qkv, pattern, dropout=0.3, dropout_seed=SEED, impl="triton")

    expected = torch.autograd.grad(attend(*inputs).sum(), inputs)
    again = torch.autograd.grad(checkpoint(attend, *inputs, use_reentrant=False).sum(), inputs)
    assert all(ours.equal(theirs) for ours, theirs in zip(again, expected, strict=True))


def test_tables_made_in_inference_mode_serve_training(pattern):
    inputs = list(small_inputs().values())
    with torch.inference_mode():
        block_sparse_attention(*inputs, pattern, impl="triton")
    out = block_sparse_attention(*inputs, pattern, impl="triton")
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))


def test_a_pattern_may_go_before_the_backward_pass():
    inputs = list(small_inputs().values())
    out = block_sparse_attention(*inputs, make_pattern("bigbird", 64, 16, 2), impl="triton")
    expected = block_sparse_attention(*inputs, make_pattern("bigbird", 64, 16, 2), impl="reference")
    for ours, theirs in zip(*(torch.autograd.grad(each.sum(), inputs) for each in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_computes_in_its_dtype(pattern):
    inputs = small_inputs()
    with torch.autocast("cpu", torch.float16):
        out = block_sparse_attention(**inputs, pattern=pattern, impl="triton")
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs.values())


def test_twice_differentiated_it_refuses(pattern):
    query, key, value = small_inputs().values()
    out = block_sparse_attention(query, key, value, pattern, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_a_gradient_of_one_input_alone(pattern):
    query, key, value = (tensor.detach() for tensor in small_inputs().values())
    grads = []
    for impl in ("triton", "reference"):
        out = block_sparse_attention(query, key.requires_grad_(), value, pattern, impl=impl)
        grads.append(torch.autograd.grad(out.sum() * 2 + out.square().sum(), key)[0])
    torch.testing.assert_close(*grads)


class TestRefusals:
    def test_wide_heads(self):
        inputs = make_inputs(4, head_dim=257, dtype=torch.float32)
        with pytest.raises(ValueError, match="head dim of at most 256, not 257"):
            block_sparse_attention(**inputs, pattern=make_pattern("bigbird", 16, 16, 2), impl="triton")

    @pytest.mark.parametrize("block_size", [8, 129])
    def test_blocks_that_are_too_small_or_too_large(self, block_size):
        with pytest.raises(ValueError, match=f"block size of 16 to 128, not {block_size}"):
            pattern = make_pattern("bigbird", 200, block_size, 2)
            block_sparse_attention(**small_inputs(), pattern=pattern, impl="triton")

    def test_integers(self):
        assert "not torch.int64" in str(why_not_triton(CPU, head_dim=16, dtype=torch.int64))

    def test_cpu_tensors_outside_the_interpreter(self, monkeypatch, pattern):
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
        with pytest.raises(ValueError, match="run on CUDA, the tensors are on the CPU: .*TRITON_INTERPRET=1"):
            block_sparse_attention(**small_inputs(), pattern=pattern, impl="triton")

    def test_devices_that_are_too_small(self, monkeypatch):
        class Tiny:
            name, major, minor, shared_memory_per_block_optin = "Tiny", 8, 6, 1000

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Tiny)
        reason = launch.device_lacks("cuda:0", 2, 64, api.KERNELS)
        assert "of shared memory for heads of 64 channels, Tiny has 1,000" in reason


@pytest.mark.parametrize("kernel", api.KERNELS)
def test_the_tile_table_has_every_head_dim(kernel):
    place = {"num_seen": 1, "arch": "sm_90"}
    for element_size in (2, 4):
        for head_dim in (1, 16, 20, 64, 80, 128, 200, 256):
            tiles = tile_table.choose(kernel, element_size=element_size, head_dim=head_dim, **place)
            assert tiles["BLOCK_D"] >= head_dim and min(tiles["BLOCK_M"], tiles["BLOCK_N"]) >= 16


def test_automatic_choice_on_a_cpu_stays_with_plain_pytorch(pattern):
    inputs = small_inputs()
    automatic, blocked = (block_sparse_attention(**inputs, pattern=pattern, impl=impl) for impl in ("auto", "blocked"))
    assert automatic.equal(blocked)
