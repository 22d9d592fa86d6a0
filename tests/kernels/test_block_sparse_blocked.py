"""The path of block-sparse attention in plain PyTorch: the oracle's values and gradients, in memory linear in T."""

import pytest
import torch
from hypothesis import given, settings
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.memory import LargestTensor
from kernels.block_sparse_attention import BlockPattern, block_sparse_attention, blocked, parts, pieces
from tests.kernels.block_cases import CASES, KINDS, build, drawn_cases, make_block_valid, make_pattern
from tests.kernels.window import assert_same, error, in_double, make_inputs, run


def attend(inputs, **options):
    return run(inputs, block_sparse_attention, **options)


def assert_is_the_oracle(inputs, options):
    assert_same(attend(inputs, **options, impl="blocked"), attend(inputs, **options, impl="reference"))


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocked_is_the_oracle(case, dropout):
    assert_is_the_oracle(*build(case, dropout=dropout))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(drawn_cases())
def test_blocked_is_the_oracle_on_drawn_cases(case):
    assert_is_the_oracle(*build(case, block_size=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["none", "ragged"])
@pytest.mark.parametrize("piece_keys, scores", [(1, 1), (12, 100), (8, 10**6)], ids=["one_block", "few", "many_rows"])
def test_pieces_and_chunks_do_not_matter(monkeypatch, kind, mask, piece_keys, scores):
    """Rows in pieces of a few blocks, whose results are merged; products of few and of many rows."""
    monkeypatch.setattr(pieces, "PIECE_KEYS", piece_keys)
    monkeypatch.setattr(parts, "SCORES_PER_THREAD", scores)
    assert_is_the_oracle(*build((kind, 10, 1, 10, 2, mask), dropout=0.3))


@pytest.mark.parametrize("num_pairs", [0, 1, 2, 3, 4, 7, 11, 100])
@pytest.mark.parametrize("mask", ["none", "ragged", "holes"])
def test_heads_and_examples_that_are_computed_together_do_not_matter(monkeypatch, num_pairs, mask):
    """From one head of one example at a time to everything at once."""
    inputs, options = build(("many_random", 12, 1, 12, 3, mask), dropout=0.3)
    inputs = {name: torch.cat([tensor, tensor.flip(0), 2 * tensor]).detach() for name, tensor in inputs.items()}
    options["valid"] = options["valid"] if mask == "none" else torch.cat([options["valid"]] * 3)
    monkeypatch.setattr(parts, "BYTES_OF_HEADS", num_pairs * 12 * 4 * 3 * 8)
    assert_is_the_oracle(inputs, options)


@pytest.mark.parametrize("block_size, head_dim, seq_len", [(1, 1, 19), (5, 7, 64), (16, 8, 161), (64, 16, 700)])
def test_sizes_of_blocks_and_heads(block_size, head_dim, seq_len):
    inputs = make_inputs(seq_len, head_dim=head_dim)
    assert_is_the_oracle(inputs, {"pattern": make_pattern("bigbird", seq_len, block_size, 2)})


@pytest.mark.parametrize("scale", [0.0, -0.7, 2.0])
def test_scale(scale):
    inputs, options = build(CASES["long_ragged"])
    assert_is_the_oracle(inputs, options | {"scale": scale})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["long_ragged", "uniform_wide", "counts"])
def test_error_is_that_of_plain_attention_in_the_same_dtype(name, dtype):
    """1e-5 relative in float32; in half precision twice the error that the oracle makes there."""
    inputs, options = build(CASES[name], block_size=16, head_dim=16, dtype=dtype)
    exact = attend(in_double(inputs), **options, impl="reference")
    plain = attend(inputs, **options, impl="reference")
    ours = attend(inputs, **options, impl="blocked")
    for tensor, truth in exact.items():
        assert ours[tensor].dtype == dtype
        assert error(ours[tensor], truth) <= max(1e-5, 2 * error(plain[tensor], truth)), tensor


def test_large_scores_do_not_overflow():
    inputs, options = build(CASES["long_ragged"], dtype=torch.float32)
    inputs["query"] = inputs["query"] * 1e4
    assert all(torch.isfinite(tensor).all() for tensor in attend(inputs, **options, impl="blocked").values())


@pytest.mark.parametrize("layout", ["heads_first", "fused", "expanded"])
def test_any_layout(layout):
    inputs, options = build(CASES["long_ragged"])
    expected = attend(inputs, **options, impl="reference")
    if layout == "heads_first":
        inputs = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in inputs.items()}
    elif layout == "fused":
        inputs = dict(zip(inputs, torch.stack(tuple(inputs.values()), dim=2).unbind(2), strict=True))
    else:
        inputs = {name: tensor[:1].expand(2, -1, -1, -1) for name, tensor in inputs.items()}
        expected = attend(inputs, **options, impl="reference")
    assert_same(attend(inputs, **options, impl="blocked"), expected)


def test_gradient_of_a_sum():
    """A gradient without memory of its own, all of whose strides are 0."""
    grads = {}
    for impl in ("blocked", "reference"):
        inputs, options = build(CASES["long_ragged"])
        block_sparse_attention(**inputs, **options, impl=impl).sum().backward()
        grads[impl] = {name: tensor.grad for name, tensor in inputs.items()}
    assert_same(grads["blocked"], grads["reference"])


def test_two_runs_have_the_same_bits():
    inputs, options = build(CASES["counts_ragged"], dtype=torch.float32, dropout=0.2)
    first, second = (attend(inputs, **options, impl="blocked") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_output_and_statistics_are_all_that_is_kept():
    inputs, options = build(CASES["long_ragged"], block_size=16, head_dim=8)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        block_sparse_attention(**inputs, **options, impl="blocked")
    batch, seq_len, num_heads, head_dim = inputs["query"].shape
    assert sum(tensor.numel() for tensor in kept) == batch * seq_len * (num_heads * (4 * head_dim + 1) + 1)


def largest_tensors(kind, seq_len, dropout=0.0):
    """Elements of the largest storages that forward and backward make."""
    pattern = make_pattern(kind, seq_len, 16, 1)
    query, key, value = (tensor.detach() for tensor in make_inputs(seq_len, batch=1, num_heads=1).values())
    options = (*blocked.flat(pattern), 0.5, dropout)
    given = (torch.ones(1, seq_len, dtype=torch.bool), torch.tensor([1]))
    with LargestTensor() as of_forward:
        out, lse2 = blocked.forward(query, key, value, *given, *options)
    with LargestTensor() as of_backward:
        blocked.backward(out, query, key, value, out, lse2, *given, *options)
    return of_forward.elements, of_backward.elements


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", ["bigbird", "etc", "uniform"])
def test_no_tensor_is_larger_than_inputs_and_a_chunk(monkeypatch, kind, dropout):
    monkeypatch.setattr(parts, "SCORES_PER_THREAD", 2**12)
    for seq_len in (2048, 4096):
        assert max(largest_tensors(kind, seq_len, dropout)) <= 2 * max(4 * seq_len, 16 * pieces.PIECE_KEYS)


def test_no_row_has_to_be_listed():
    """A pattern whose rows all see nothing gives no chunk at all."""
    pattern = make_pattern("nothing", 40, 4, 2)
    layout = pieces.Layout(pattern.lists, pattern.plan_of_length, block_size=4, front=0, back=0, window=0)
    assert list(pieces.chunks(layout, [10, 10], range(2), torch.ones(2, 10, 4) > 0, max_scores=100)) == []


def test_operators_keep_what_they_promise():
    """Schema, fake tensors, autograd and a trace with symbolic lengths."""
    inputs, options = build(CASES["long_ragged"], dropout=0.2)
    arguments = (
        *inputs.values(),
        options["valid"],
        options["dropout_seed"],
        *blocked.flat(options["pattern"]),
        0.5,
        0.2,
    )
    torch.library.opcheck(torch.ops.longspan.block_sparse_blocked.default, arguments)


@pytest.mark.slow
def test_compiled_in_one_graph_for_all_lengths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pattern = BlockPattern.bigbird(100, 4, 2, 1)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    for seq_len in (100, 97, 41, 6):
        inputs = make_inputs(seq_len)
        options = {"pattern": pattern, "valid": make_block_valid("ragged", 2, seq_len), "impl": "blocked"}
        assert_same(run(inputs, compiled, **options), attend(inputs, **options))
    # one graph for the first length, one for all others
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["long_ragged", "counts_ragged", "uniform_wide"])
def test_on_a_gpu(name):
    inputs, options = build(CASES[name], block_size=16, head_dim=8, dropout=0.2)
    moved = {name: tensor.detach().cuda() for name, tensor in inputs.items()}
    options_moved = {name: option.cuda() if torch.is_tensor(option) else option for name, option in options.items()}
    found, again = (attend_on_gpu(moved, options_moved) for _ in range(2))
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert_same({name: tensor.cpu() for name, tensor in found.items()}, attend_on_gpu(inputs, options))


def attend_on_gpu(inputs, options):
    """As `attend`, with the weights of the result where the inputs are."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = block_sparse_attention(**leaves, **options, impl="blocked")
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).to(out.device))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
