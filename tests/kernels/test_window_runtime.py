"""How the blocked path runs: linear memory, any layout, recomputed, compiled, the same every time."""

import warnings

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import LargestTensor
from kernels.window_attention import blocked, window_attention
from tests.kernels.window import assert_same, error, make_inputs, make_valid, num_columns, run

SIDES = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_sides"])
NAMES = ["content", "masked", "relative", "relative_masked", "dilated", "globals", "globals_masked", "globals_dilated"]
KINDS = pytest.mark.parametrize("kind", NAMES)


def build(kind: str, seq_len: int, causal: bool, window: int = 64, dtype: torch.dtype = torch.float32, **shape):
    """Inputs and options for one of the ways through the blocked path."""
    columns = num_columns(window, causal) if "relative" in kind else None
    inputs = make_inputs(seq_len, columns=columns, dtype=dtype, **shape)
    valid = make_valid("tail", len(inputs["query"]), seq_len) if "masked" in kind else None
    index = torch.tensor([[seq_len // 2, -1, 0, 3, seq_len - 1]]).expand(len(inputs["query"]), -1)
    return inputs, {
        "window": window,
        "dilation": [1, 3] if "dilated" in kind else 1,
        "causal": causal,
        "valid": valid,
        "global_index": index if "globals" in kind else None,
        "impl": "blocked",
    }


def largest_tensor(kind: str, seq_len: int, causal: bool, **more) -> int:
    """Bytes of the largest tensor of both passes; more: options of the call."""
    inputs, options = build(kind, seq_len, causal, batch=1, head_dim=4)
    with LargestTensor() as seen:
        run(inputs, **options | more)
    return seen.bytes


@SIDES
@KINDS
def test_the_largest_tensor_grows_with_the_length_not_its_square(kind, causal):
    single, double = largest_tensor(kind, 8192, causal), largest_tensor(kind, 16_384, causal)
    assert single < 4 * 8192**2 / 10
    # not exactly twice: the first and last blocks, whose windows are cut, are computed apart
    assert double < 2.05 * single


def kept_for_backward(kind: str, seq_len: int, causal: bool, window: int, dtype: torch.dtype, **more) -> int:
    """Bytes that the forward pass leaves for the backward pass."""
    inputs, options = build(kind, seq_len, causal, window, dtype, batch=1)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no two share an address
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        window_attention(**inputs, **options | more)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@SIDES
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_of_length_times_window_is_kept(monkeypatch, kind, causal, dtype):
    """Beyond a fixed allowance (here nothing) a longer text keeps inputs and results, no scores or masks."""
    monkeypatch.setattr(blocked, "KEEP_BYTES", 0)
    query_bytes = 4096 * 2 * 4 * dtype.itemsize
    for window in (16, 128):
        long, longer = (kept_for_backward(kind, seq_len, causal, window, dtype) for seq_len in (4096, 8192))
        assert (longer - long) / query_bytes < 8, window


@pytest.mark.parametrize("relative", [False, True], ids=["content", "relative"])
@SIDES
def test_views_of_one_fused_projection(causal, relative):
    """Query, key and value as a model hands them over, and the gradient of what they are views of."""
    columns = num_columns(9, causal) if relative else None
    extra = {} if columns is None else {"position_key": torch.randn(2, columns, 4, dtype=torch.float64)}
    fused = torch.randn(2, 150, 3 + relative, 2, 4, dtype=torch.float64)
    names = ("query", "key", "value", "position_query")[: 3 + relative]
    options = {"window": 9, "dilation": [1, 2], "causal": causal}
    expected = run(dict(zip(names, fused.unbind(2), strict=True)) | extra, **options, impl="reference")
    fused.requires_grad_()
    out = window_attention(**dict(zip(names, fused.unbind(2), strict=True)), **extra, **options, impl="blocked")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(weights)
    assert error(out.detach(), expected["out"]) <= 1e-12
    assert error(fused.grad, torch.stack([expected[name] for name in names], dim=2)) <= 1e-12


@SIDES
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="heads_first"),
        pytest.param(lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), id="head_dim_first"),
        pytest.param(lambda x: torch.stack([x, x], dim=-1)[..., 0], id="every_second_number"),
        pytest.param(lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :], id="a_later_part"),
        pytest.param(lambda x: x[:1].expand(2, -1, -1, -1), id="expanded"),
    ],
)
def test_any_layout_gives_the_same(layout, causal):
    inputs = {name: layout(tensor.detach()) for name, tensor in make_inputs(140).items()}
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
    options = {"window": [9, 30], "dilation": [2, 1], "causal": causal, "impl": "blocked"}
    assert_same(run(inputs, **options), run(plain, **options))


@SIDES
@KINDS
def test_an_expanded_gradient(kind, causal):
    inputs, options = build(kind, 140, causal, window=9, dtype=torch.float64)
    results = []
    for gradient in (lambda out: torch.ones(()).double().expand(out.shape), torch.ones_like):
        out = window_attention(**inputs, **options)
        results.append(torch.autograd.grad(out, tuple(inputs.values()), gradient(out)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@SIDES
@KINDS
def test_two_runs_are_bit_equal(kind, causal):
    inputs, options = build(kind, 300, causal, window=20)
    first, second = run(inputs, **options), run(inputs, **options)
    assert all(torch.equal(first[name], second[name]) for name in first)


@KINDS
def test_recomputed_in_the_backward_pass(kind):
    inputs, options = build(kind, 200, causal=True, window=9)
    names = tuple(inputs)

    def attend(*tensors):
        return window_attention(**dict(zip(names, tensors, strict=True)), **options)

    plain = attend(*inputs.values())
    again = checkpoint(attend, *inputs.values(), use_reentrant=False)
    assert torch.equal(plain, again)
    plain_grads = torch.autograd.grad(plain.square().sum(), tuple(inputs.values()))
    again_grads = torch.autograd.grad(again.square().sum(), tuple(inputs.values()))
    assert all(torch.equal(one, other) for one, other in zip(plain_grads, again_grads, strict=True))


@pytest.mark.parametrize("kind", ["masked", "relative", "dilated", "globals", "globals_masked"])
def test_compiled_as_one_graph(kind):
    """No graph break in a call that every layer makes, and no warning from our code."""
    inputs, options = build(kind, 100, causal=True, window=9)
    names = tuple(inputs)

    def attend(*tensors):
        return window_attention(**dict(zip(names, tensors, strict=True)), **{**options, "impl": "auto"})

    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs.values())
    assert not [str(warning.message) for warning in caught if "window_attention" in str(warning.message)]
    plain = attend(*inputs.values())
    assert error(compiled.detach(), plain.detach()) <= 1e-6
    compiled_grads = torch.autograd.grad(compiled.square().sum(), tuple(inputs.values()))
    plain_grads = torch.autograd.grad(plain.square().sum(), tuple(inputs.values()))
    assert max(map(error, compiled_grads, plain_grads)) <= 1e-5
