"""The block-sparse kernels on a GPU: every dtype, head dim and block size, what only a GPU can show (`make gpu`)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from tests.kernels.block_cases import CASES, build, make_block_valid, make_pattern
from tests.kernels.gpu import assert_as_good_as_plain, assert_nothing_waits, assert_replays_the_same, on_gpu, results
from tests.kernels.window import make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def assert_good(inputs, options):
    assert_as_good_as_plain(block_sparse_attention, on_gpu(inputs), on_gpu(options))


@DTYPES
@pytest.mark.parametrize("head_dim", [1, 16, 24, 32, 40, 64, 80, 96, 128, 160, 256])
def test_every_head_dim(head_dim, dtype):
    assert_good(*build(("many_random", 7, 9, 9, 2, "ragged"), 64, head_dim, dtype))


@DTYPES
@pytest.mark.parametrize("block_size", [16, 17, 32, 48, 64, 84, 100, 128])
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_every_block_size(mask, block_size, dtype):
    assert_good(*build(("many_random", 6, 5, 8, 2, mask), block_size, 64, dtype))


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("case", CASES)
def test_every_case(case, dropout, dtype):
    assert_good(*build(CASES[case], 64, 64, dtype, dropout))


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_float32_with_tf32_products(head_dim):
    torch.set_float32_matmul_precision("high")
    assert_good(*build(CASES["long_ragged"], 32, head_dim, torch.float32))


def test_views_of_one_projection():
    query, key, value = torch.randn(2, 300, 3, 4, 64, device="cuda", dtype=torch.bfloat16).unbind(2)
    inputs = {"query": query, "key": key, "value": value}
    assert_good(inputs, {"pattern": make_pattern("bigbird", 300, 32, 4)})


def long_problem(seq_len=16384, dtype=torch.bfloat16, num_heads=12, head_dim=64, kind="bigbird"):
    torch.manual_seed(0)
    sizes = (1, seq_len, num_heads, head_dim)
    inputs = {name: torch.randn(sizes, device="cuda", dtype=dtype) for name in ("query", "key", "value")}
    builder = BlockPattern.bigbird if kind == "bigbird" else BlockPattern.uniform
    return inputs, {"pattern": builder(seq_len, 64, num_heads, 3), "impl": "triton"}


@pytest.mark.parametrize("kind", ["bigbird", "uniform"])
def test_long_text_is_that_of_the_blocked_path(kind):
    """Columns and rows of a hundred parts."""
    inputs, options = long_problem(8192 - 7, torch.float32, kind=kind)
    ours = results(block_sparse_attention, inputs, **options)
    for found, truth in zip(
        ours, results(block_sparse_attention, inputs, **options | {"impl": "blocked"}), strict=True
    ):
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_two_runs_are_the_same_bits():
    inputs, options = long_problem()
    options |= {"dropout": 0.1, "dropout_seed": torch.tensor([3], device="cuda")}
    first, second = (results(block_sparse_attention, inputs, **options) for _ in range(2))
    assert all(one.equal(two) for one, two in zip(first, second, strict=True))


def test_offsets_beyond_32_bits():
    """The last heads of a text of more than 2^31 numbers a tensor are what they are on their own."""
    seq_len, num_heads, head_dim = 2**17 + 40, 128, 136
    inputs, _ = long_problem(seq_len, num_heads=num_heads, head_dim=head_dim)
    assert inputs["query"].numel() > 2**31
    pattern = BlockPattern.etc(seq_len, 64, num_heads, 1)
    last = {name: tensor[:, :, -2:].contiguous() for name, tensor in inputs.items()}
    alone = results(block_sparse_attention, last, pattern=BlockPattern.etc(seq_len, 64, 2, 1), impl="triton")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    out = block_sparse_attention(*leaves, pattern, impl="triton")
    weights = torch.zeros_like(out)
    weights[:, :, -2:] = torch.randn(last["query"].shape, generator=torch.Generator().manual_seed(1)).to(out)
    for found, truth in zip([out, *torch.autograd.grad(out, leaves, weights)], alone, strict=True):
        assert found[:, :, -2:].equal(truth)


def test_lengths_compile_nothing_anew():
    from kernels.block_sparse_attention import forward, key_grad, lengths, merge, query_grad

    kernels = (
        forward.block_attention_fwd_kernel,
        query_grad.block_attention_query_grad_kernel,
        key_grad.block_attention_key_grad_kernel,
        merge.block_merge_kernel,
        merge.block_sum_kernel,
        lengths.block_lengths_kernel,
    )
    pattern = make_pattern("bigbird", 4000, 64, 2)

    def num_variants():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def attend(seq_len, masked):
        inputs = on_gpu(make_inputs(seq_len, head_dim=64, dtype=torch.bfloat16))
        valid = torch.ones(2, seq_len, dtype=torch.bool, device="cuda") if masked else None
        results(block_sparse_attention, inputs, pattern=pattern, valid=valid, impl="triton")

    for masked in (True, False):
        attend(512, masked)
        before = num_variants()
        for seq_len in (1, 16, 17, 100, 513, 1024, 3001):
            attend(seq_len, masked)
        assert num_variants() == before


def test_nothing_waits_for_the_gpu():
    inputs, options = long_problem(4096)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    valid = make_block_valid("tail", 1, 4096).cuda()
    weights, seed = torch.randn_like(leaves[0]), torch.tensor([3], device="cuda")

    def step():
        out = block_sparse_attention(*leaves, **options, valid=valid, dropout=0.1, dropout_seed=seed)
        torch.autograd.grad(out, leaves, weights)

    assert_nothing_waits(step)


def test_a_captured_graph_replays_the_same():
    inputs, options = long_problem(2048)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    weights = torch.randn_like(leaves[0])

    def step():
        out = block_sparse_attention(*leaves, **options)
        return (out, *torch.autograd.grad(out, leaves, weights))

    assert_replays_the_same(step, leaves)


def test_memory_is_that_of_the_tensors_that_must_exist():
    """The result, three gradients, two vectors, and the sums of what is cut: two rows and eleven columns of blocks."""
    inputs, options = long_problem(32768)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    weights = torch.randn_like(leaves[0])
    torch.autograd.grad(block_sparse_attention(*leaves, **options), leaves, weights)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(block_sparse_attention(*leaves, **options), leaves, weights)
    extra = torch.cuda.max_memory_allocated() - before
    _, seq_len, num_heads, _ = leaves[0].shape
    needed = 4 * leaves[0].numel() * leaves[0].element_size() + 2 * 4 * seq_len * num_heads
    assert len(grads) == 3 and extra <= 1.4 * needed


def test_the_compiler_checkpoints_and_autocast():
    inputs, options = long_problem(1000, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def attend(*qkv):
        with torch.autocast("cuda", torch.bfloat16):
            return block_sparse_attention(*qkv, **options).float().sum()

    expected = torch.autograd.grad(attend(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(attend, fullgraph=True)(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False), leaves)
    for truth, one, two in zip(expected, compiled, again, strict=True):
        assert two.equal(truth) and (one - truth).abs().max() <= 1e-2 * truth.abs().max()
