"""The kernels on a GPU: every dtype and head dim against the oracle, and what only a GPU can show (`make gpu`)."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels.window_attention import global_positions, global_rows_attention, window_attention
from tests.command import run_train, small_run
from tests.kernels.global_cases import make_global_index
from tests.kernels.gpu import assert_as_good_as_plain, assert_nothing_waits, assert_replays_the_same, on_gpu, results
from tests.kernels.window import make_inputs, make_valid
from tests.models.tiny import text, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 32, 40, 64, 80, 96, 128, 160, 256])
def test_every_head_dim(head_dim, dtype):
    inputs = on_gpu(make_inputs(333, num_heads=4, key_heads=2, head_dim=head_dim, dtype=dtype))
    options = {"window": [37, 37, 150, 8], "dilation": [1, 1, 1, 3], "causal": True}
    assert_as_good_as_plain(window_attention, inputs, options)


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_float32_with_tf32_products(head_dim):
    inputs = on_gpu(make_inputs(333, head_dim=head_dim, dtype=torch.float32))
    index = on_gpu({"global_index": make_global_index("scattered", 2, 333)})
    torch.set_float32_matmul_precision("high")
    assert_as_good_as_plain(window_attention, inputs, {"window": 60, "dilation": [1, 2], **index})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "first", "scattered", "ragged", "repeated", "all"])
@pytest.mark.parametrize("mask", ["none", "tail", "holes", "one_all_masked"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_masks_and_global_keys(kind, mask, causal, dtype):
    inputs = on_gpu(make_inputs(301, num_heads=2, head_dim=64, dtype=dtype))
    masks = on_gpu({"valid": make_valid(mask, 2, 301), "global_index": make_global_index(kind, 2, 301)})
    assert_as_good_as_plain(
        window_attention, inputs, {"window": [40, 130], "dilation": [2, 1], "causal": causal, **masks}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [0, 64, 127, 128, 500, 5000])
def test_windows_and_lengths_off_the_tiles(window, head_dim, dtype):
    for seq_len in (1, 127, 128, 1025):
        inputs = on_gpu(make_inputs(seq_len, batch=1, head_dim=head_dim, dtype=dtype))
        assert_as_good_as_plain(window_attention, inputs, {"window": window, "causal": False})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("kind", ["first", "ragged", "out_of_range", "shuffled"])
def test_global_rows(kind, causal, head_dim, dtype):
    index = make_global_index(kind, 2, 1500)[:, :100]
    inputs = make_inputs(index.shape[1], num_heads=4, key_heads=2, head_dim=head_dim, key_len=1500, dtype=dtype)
    inputs = on_gpu({"query_global": inputs.pop("query"), **inputs})
    masks = on_gpu({"valid": make_valid("holes", 2, 1500), "global_index": index})
    assert_as_good_as_plain(global_rows_attention, inputs, {"causal": causal, **masks})


def test_cached_rows_and_views_of_one_projection():
    fused = torch.randn(2, 300, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
    query, key, value = fused.unbind(2)
    inputs = {"query": query[:, 250:], "key": key, "value": value}
    assert_as_good_as_plain(
        window_attention, inputs, {"window": 60, "dilation": [1, 2, 3, 1], "causal": True, "query_start": 250}
    )


def long_problem(seq_len=16384, dtype=torch.bfloat16, num_global=64, batch=1, num_heads=12, head_dim=64):
    torch.manual_seed(0)
    sizes = (batch, seq_len, num_heads, head_dim)
    inputs = {name: torch.randn(sizes, device="cuda", dtype=dtype) for name in ("query", "key", "value")}
    index = torch.arange(num_global, device="cuda").expand(batch, -1) * (seq_len // max(num_global, 1))
    return inputs, {"window": 256, "global_index": index if num_global else None, "impl": "triton"}


def test_long_text_is_that_of_the_blocked_path():
    inputs, options = long_problem(8192, torch.float32)
    ours = results(window_attention, inputs, **options)
    for found, truth in zip(ours, results(window_attention, inputs, **options | {"impl": "blocked"}), strict=True):
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_two_runs_are_the_same_bits():
    inputs, options = long_problem()
    first, second = (results(window_attention, inputs, **options) for _ in range(2))
    assert all(one.equal(two) for one, two in zip(first, second, strict=True))
    rows = {"query_global": inputs["query"][:, :64], "key": inputs["key"], "value": inputs["value"]}
    first, second = (
        results(global_rows_attention, rows, global_index=options["global_index"], impl="triton") for _ in range(2)
    )
    assert all(one.equal(two) for one, two in zip(first, second, strict=True))


def test_offsets_beyond_32_bits():
    """The end of a text of more than 2^31 numbers a tensor is what it is on its own."""
    seq_len, tail = 2**20 + 1000, 2000
    inputs, options = long_problem(seq_len, num_heads=16, head_dim=128, num_global=0)
    options |= {"dilation": [1, 7] * 8, "causal": True}
    assert inputs["query"].numel() > 2**31

    def attend(parts):
        leaves = [tensor.detach().requires_grad_() for tensor in parts.values()]
        out = window_attention(*leaves, **options)
        # rows before the tail weigh nothing, so that the gradients of the tail are those of the short text
        weights = torch.zeros_like(out)
        weights[:, -tail:] = out.detach()[:, -tail:]
        return [out.detach(), *torch.autograd.grad(out, leaves, weights)]

    whole = attend(inputs)
    first = seq_len - tail - 2 * 256 * 7
    last = attend({name: tensor[:, first:] for name, tensor in inputs.items()})
    for ours, truth in zip(whole, last, strict=True):
        torch.testing.assert_close(ours[:, -tail:], truth[:, -tail:], rtol=0, atol=2e-2)


def test_channels_far_apart():
    """A layout whose last stride times the head dim passes 2^31."""
    channels, seq_len = 128, 2**20
    stored = torch.randn(channels, 1, seq_len, 17, device="cuda", dtype=torch.bfloat16)
    spread = stored.permute(1, 2, 3, 0)  # [B, T, H, D]
    assert spread.stride(3) * (channels - 1) > 2**31
    query = key = spread[:, -1000:, -1:]
    ours = window_attention(query, key, key, window=100, impl="triton")
    truth = window_attention(*(query.contiguous(),) * 3, window=100, impl="triton")
    assert ours.equal(truth)


def test_lengths_compile_nothing_anew():
    from kernels.window_attention import global_columns, global_rows, global_rows_grad
    from kernels.window_attention.forward import window_attention_fwd_kernel
    from kernels.window_attention.key_grad import window_attention_key_grad_kernel
    from kernels.window_attention.query_grad import window_attention_query_grad_kernel

    kernels = (
        window_attention_fwd_kernel,
        window_attention_query_grad_kernel,
        window_attention_key_grad_kernel,
        global_columns.global_table_kernel,
        global_columns.global_columns_grad_kernel,
        global_columns.global_columns_sum_kernel,
        global_rows.global_rows_fwd_kernel,
        global_rows.global_rows_combine_kernel,
        global_rows_grad.global_rows_key_grad_kernel,
        global_rows_grad.global_rows_query_grad_kernel,
    )

    def num_variants():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def attend(seq_len):
        inputs = on_gpu(make_inputs(seq_len, head_dim=64, dtype=torch.bfloat16))
        options = {"valid": torch.ones(2, seq_len, dtype=torch.bool).cuda()}
        options["global_index"] = torch.zeros(2, 4, dtype=torch.int64).cuda()
        results(window_attention, inputs, window=100, **options)
        rows = {"query_global": inputs["query"].expand(-1, max(4, seq_len), -1, -1)[:, :4], **inputs}
        del rows["query"]
        results(global_rows_attention, rows, **options)

    attend(512)
    before = num_variants()
    for seq_len in (1, 16, 17, 100, 513, 1024, 3001):
        attend(seq_len)
    assert num_variants() == before


def test_nothing_waits_for_the_gpu():
    inputs, options = long_problem(4096)
    query, key, value = (tensor.requires_grad_() for tensor in inputs.values())
    is_global = torch.zeros(1, 4096, dtype=torch.bool, device="cuda")
    is_global[:, ::512] = True
    weights = torch.randn_like(query)

    def step():
        index = global_positions(is_global, None, 16)
        local = window_attention(query, key, value, **options | {"global_index": index})
        rows = global_rows_attention(query[:, :16], key, value, global_index=index)
        torch.autograd.grad([local, rows], [query, key, value], [weights, weights[:, :16]])

    assert_nothing_waits(step)


def test_a_captured_graph_replays_the_same():
    inputs, options = long_problem(2048)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    weights = torch.randn_like(leaves[0])

    def step():
        out = window_attention(*leaves, **options)
        return (out, *torch.autograd.grad(out, leaves, weights))

    assert_replays_the_same(step, leaves)


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_with_cuda_graphs_from_the_first_call():
    inputs, options = long_problem(2048)
    options |= {"window": [256] * 6 + [100] * 6, "dilation": [1, 3] * 6}
    expected = results(window_attention, inputs, **options)
    compiled = torch.compile(window_attention, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        for found, truth in zip(results(compiled, inputs, **options), expected, strict=True):
            torch.testing.assert_close(found, truth)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_tensors_of_a_device_that_is_not_the_current_one():
    inputs, options = long_problem(1024)
    elsewhere = {name: tensor.to("cuda:1") for name, tensor in inputs.items()}
    there = results(window_attention, elsewhere, **options | {"global_index": options["global_index"].to("cuda:1")})
    for found, truth in zip(there, results(window_attention, inputs, **options), strict=True):
        torch.testing.assert_close(found.to("cuda:0"), truth)


def test_memory_is_that_of_the_tensors_that_must_exist():
    inputs, options = long_problem(32768, num_global=0)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    weights = torch.randn_like(leaves[0])
    torch.autograd.grad(window_attention(*leaves, **options), leaves, weights)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(window_attention(*leaves, **options), leaves, weights)
    extra = torch.cuda.max_memory_allocated() - before
    statistics = 2 * 4 * leaves[0].shape[0] * leaves[0].shape[1] * leaves[0].shape[2]
    needed = 4 * leaves[0].numel() * leaves[0].element_size() + statistics  # the result, three gradients, two vectors
    assert len(grads) == 3 and extra <= 1.1 * needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_model_under_the_compiler_autocast_and_checkpointing(dtype):
    options = {"window": [3, 8, [16, 4, 2, 9]], "dilation": [1, 2, [1, 2, 3, 1]], "dim": 64, "dtype": torch.float32}
    ids = text(200).cuda()

    def loss_and_gradients(model, ids):
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    plain = tiny_model(**options, impl="triton", loud=False).cuda()
    expected = loss_and_gradients(tiny_model(**options, impl="blocked", loud=False).cuda(), ids)
    recomputing = tiny_model(**options, impl="triton", loud=False, checkpoint_activations=True).cuda().train()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for model in (plain, recomputing, torch.compile(copy.deepcopy(plain), fullgraph=True)):
        for found, truth in zip(loss_and_gradients(model, ids), expected, strict=True):
            assert (found - truth).abs().max() <= tolerance * truth.abs().max().clamp(min=1e-3)


def test_checkpointed_it_is_the_same():
    inputs, options = long_problem(2048)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def attend(*qkv):
        return window_attention(*qkv, **options)

    expected = torch.autograd.grad(attend(*leaves).float().sum(), leaves)
    again = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False).float().sum(), leaves)
    assert all(one.equal(two) for one, two in zip(again, expected, strict=True))


def test_training_on_a_gpu_takes_the_kernels(tmp_path):
    arguments = [*small_run(tmp_path), "device=cuda", "precision=bf16", f"run_dir={tmp_path / 'run'}"]
    ended = run_train(*arguments, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "window_attention runs on the triton path" in (tmp_path / "run" / "train.log").read_text()
