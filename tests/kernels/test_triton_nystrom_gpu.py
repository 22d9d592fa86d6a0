"""The kernels of Nyström attention on a GPU: every dtype and head dim, and what only a GPU can show (`make gpu`)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.nystrom_attention import nystrom_attention
from tests.kernels.gpu import assert_nothing_waits, assert_replays_the_same, on_gpu
from tests.kernels.nystrom import assert_as_good_as_plain, results, with_taps
from tests.kernels.window import assert_same, make_inputs, make_valid

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def problem(seq_len, num_landmarks, *, num_taps=33, mask="none", **sizes):
    inputs = on_gpu(with_taps(make_inputs(seq_len, **sizes), num_taps))
    valid = make_valid(mask, len(inputs["query"]), seq_len)
    return inputs, {"num_landmarks": num_landmarks, "valid": None if valid is None else valid.cuda()}


@DTYPES
@pytest.mark.parametrize("head_dim", [1, 16, 24, 32, 40, 64, 80, 96, 128, 160, 256])
def test_every_head_dim(head_dim, dtype):
    assert_as_good_as_plain(*problem(701, 64, head_dim=head_dim, dtype=dtype), "triton")


@DTYPES
@pytest.mark.parametrize("num_landmarks", [1, 15, 16, 17, 64, 65, 128, 200, 512, 1000])
@pytest.mark.parametrize("mask", ["none", "tail", "holes", "one_all_masked"])
def test_masks_and_numbers_of_landmarks(mask, num_landmarks, dtype):
    assert_as_good_as_plain(*problem(801, num_landmarks, mask=mask, head_dim=64, dtype=dtype), "triton")


@DTYPES
@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 127, 1025])
@pytest.mark.parametrize("num_taps", [0, 1, 3, 65, 129])
def test_lengths_and_filters_off_the_tiles(num_taps, seq_len, dtype):
    inputs, options = problem(seq_len, 32, num_taps=num_taps, batch=1, head_dim=64, dtype=dtype)
    assert_as_good_as_plain(inputs, options, "triton")


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_float32_with_tf32_products(head_dim):
    inputs, options = problem(701, 64, head_dim=head_dim, dtype=torch.float32)
    torch.set_float32_matmul_precision("high")
    assert_as_good_as_plain(inputs, options, "triton")


def test_the_kernels_are_the_default_and_the_blocked_path_agrees():
    inputs, options = problem(4096, 64, batch=1, num_heads=4, head_dim=64, dtype=torch.float32)
    automatic = results(inputs, options, "auto")
    assert_same(automatic, results(inputs, options, "triton"), 0.0)
    assert_same(automatic, results(inputs, options, "blocked"), 1e-4)


def long_problem(seq_len=16384, num_landmarks=64, dtype=torch.bfloat16, num_heads=12, head_dim=64):
    torch.manual_seed(0)
    sizes = (1, seq_len, num_heads, head_dim)
    inputs = {name: torch.randn(sizes, device="cuda", dtype=dtype) for name in ("query", "key", "value")}
    inputs["conv_weight"] = torch.randn(num_heads, 65, device="cuda")
    return inputs, {"num_landmarks": num_landmarks, "impl": "triton"}


def step_of(inputs, options):
    """A call that returns the result and all gradients, and the leaves it reads."""
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    weights = torch.randn_like(leaves["query"])

    def step():
        out = nystrom_attention(**leaves, **options)
        return (out, *torch.autograd.grad(out, list(leaves.values()), weights))

    return step, list(leaves.values())


def test_two_runs_are_the_same_bits():
    step, _ = step_of(*long_problem())
    assert all(one.equal(other) for one, other in zip(step(), step(), strict=True))


def test_offsets_past_two_to_the_31():
    """Views whose tokens lie 2^16 elements apart, 40,000 of them, against their copies."""
    far = torch.randn(40_000, 1 << 16, device="cuda", dtype=torch.bfloat16)
    views = far[None, :, -3 * 128 :].unflatten(-1, (3, 2, 64)).unbind(2)
    found = []
    for copied in (False, True):
        inputs = {
            name: (view.contiguous() if copied else view).detach().requires_grad_()
            for name, view in zip(("query", "key", "value"), views, strict=True)
        }
        out = nystrom_attention(**inputs, num_landmarks=64, conv_weight=torch.ones(2, 5, device="cuda"), impl="triton")
        found.append((out, *torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))))
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_lengths_compile_nothing_anew():
    from kernels.nystrom_attention import band, key_grad, means, query_grad, softmax_forward

    kernels = (
        softmax_forward.softmax_fwd_kernel,
        key_grad.softmax_key_grad_kernel,
        query_grad.softmax_query_grad_kernel,
        means.segment_means_kernel,
        band.convolve_kernel,
        band.band_grad_kernel,
    )

    def num_variants():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def attend(seq_len):
        inputs, options = problem(seq_len, 64, mask="tail", head_dim=64, dtype=torch.bfloat16)
        results(inputs, options, "triton")

    attend(512)
    before = num_variants()
    for seq_len in (65, 66, 100, 513, 1024, 3001):
        attend(seq_len)
    assert num_variants() == before


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_waits_for_the_gpu(masked):
    inputs, options = long_problem(4096)
    valid = torch.arange(4096, device="cuda")[None] < 4000 if masked else None
    step, _ = step_of(inputs, {**options, "valid": valid})
    assert_nothing_waits(step)


def test_a_captured_graph_replays_the_same():
    step, leaves = step_of(*long_problem(2048))
    assert_replays_the_same(step, leaves)


def test_memory_is_linear():
    def extra(seq_len):
        step, leaves = step_of(*long_problem(seq_len))
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step()
        assert len(kept) == 5
        return (torch.cuda.max_memory_allocated() - before) / leaves[0].nbytes

    # the result and that without the convolution, three gradients, that of the values' convolution and their sum
    assert extra(131072) <= 7.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_checkpointed_it_is_the_same(dtype):
    inputs, options = long_problem(2048, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def attend(*tensors):
        return nystrom_attention(**dict(zip(inputs, tensors, strict=True)), **options).float().square().sum()

    expected = torch.autograd.grad(attend(*leaves), leaves)
    compiled = torch.compile(attend, fullgraph=True)
    for again in (compiled, lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False)):
        for found, truth in zip(torch.autograd.grad(again(*leaves), leaves), expected, strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-2, atol=1e-2 * truth.abs().max().item())
