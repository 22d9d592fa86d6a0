"""How the blocked path runs: linear memory, any layout, recomputed, compiled, under autocast."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import LargestTensor
from kernels import dispatch
from kernels.nystrom_attention import nystrom_attention
from kernels.nystrom_attention.convolution import convolve
from tests.kernels.nystrom import inputs_and_options, of_squares, results, weights_for, with_taps
from tests.kernels.window import assert_same, error, make_inputs, make_valid

KINDS = pytest.mark.parametrize("kind", ["plain", "masked", "convolved"])


def build(kind, seq_len, num_landmarks=64):
    inputs = make_inputs(seq_len, batch=1, num_heads=2, head_dim=4, dtype=torch.float32)
    valid = make_valid("tail", 1, seq_len) if kind == "masked" else None
    return with_taps(inputs, 5 if kind == "convolved" else 0), {"num_landmarks": num_landmarks, "valid": valid}


@KINDS
def test_nothing_is_as_large_as_length_times_landmarks(kind):
    inputs, options = build(kind, 4096)
    with LargestTensor() as seen:
        of_squares(inputs, options, "blocked")
    # heads of 4 channels make the text a 16th of its weights on the landmarks
    assert seen.bytes <= 1.1 * 4096 * 2 * 4 * 4


@KINDS
def test_what_is_kept_for_the_backward_pass_is_linear(kind):
    """Inputs, result and copies of them for each token, for the landmarks a few tensors of their own size."""

    def kept(seq_len, num_landmarks):
        inputs, options = build(kind, seq_len, num_landmarks)
        storages = {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no two share an address
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            nystrom_attention(**inputs, **options, impl="blocked")
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    query_bytes = 2048 * 2 * 4 * 4
    assert (kept(4096, 64) - kept(2048, 64)) / query_bytes < 8
    assert (kept(2048, 128) - kept(2048, 64)) / (64 * 2 * 4 * 4) < 12


def test_views_of_one_fused_projection():
    fused = torch.randn(2, 50, 3, 2, 4, dtype=torch.float64)
    options = {"num_landmarks": 8, "valid": make_valid("tail", 2, 50)}
    names = ("query", "key", "value")
    expected = results(with_taps(dict(zip(names, fused.unbind(2), strict=True)), 5), options, "reference")
    taps = expected.pop("conv_weight")
    fused.requires_grad_()
    inputs = with_taps(dict(zip(names, fused.unbind(2), strict=True)), 5)
    out = nystrom_attention(**inputs, **options, impl="blocked")
    out.backward(weights_for(out))
    assert error(out.detach(), expected["out"]) <= 1e-12
    assert error(fused.grad, torch.stack([expected[name] for name in names], dim=2)) <= 1e-11
    assert error(inputs["conv_weight"].grad, taps) <= 1e-12


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="heads_first"),
        pytest.param(lambda x: x.transpose(1, 3).contiguous().transpose(1, 3), id="head_dim_first"),
        pytest.param(lambda x: torch.stack([x, x], dim=-1)[..., 0], id="every_second_number"),
        pytest.param(lambda x: x[:1].expand(2, -1, -1, -1), id="expanded"),
    ],
)
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_any_layout_gives_the_same(mask, layout):
    inputs = {name: layout(tensor.detach()) for name, tensor in make_inputs(40).items()}
    plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
    options = {"num_landmarks": 6, "valid": make_valid(mask, 2, 40)}
    assert_same(*(results(with_taps(each, 5), options, "blocked") for each in (inputs, plain)), 1e-11)


@pytest.mark.parametrize("case", ["not_divided", "holes", "more_than_tokens", "some_exact"])
def test_recomputed_in_the_backward_pass(case):
    inputs, options = inputs_and_options(case)

    def attend(*tensors):
        return nystrom_attention(**dict(zip(inputs, tensors, strict=True)), **options, impl="blocked").square().sum()

    plain = torch.autograd.grad(attend(*inputs.values()), list(inputs.values()))
    again = torch.autograd.grad(checkpoint(attend, *inputs.values(), use_reentrant=False), list(inputs.values()))
    assert all(one.equal(other) for one, other in zip(again, plain, strict=True))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("case", ["not_divided", "holes", "more_than_tokens", "some_exact"])
def test_compiled_as_one_graph(case, dynamic):
    inputs, options = inputs_and_options(case)

    def attend(*tensors):
        return nystrom_attention(**dict(zip(inputs, tensors, strict=True)), **options, impl="auto").square().sum()

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    leaves = list(inputs.values())
    found, plain = (torch.autograd.grad(each(*leaves), leaves) for each in (compiled, attend))
    assert max(map(error, found, plain)) <= 1e-11


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_autocast_rounds_what_comes_in_and_goes_out(impl):
    inputs, options = inputs_and_options("holes", torch.float32)
    rounded = {name: tensor.detach().bfloat16() for name, tensor in inputs.items() if name != "conv_weight"}
    expected = nystrom_attention(**{**inputs, **rounded}, **options, impl=impl).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = nystrom_attention(**inputs, **options, impl=impl)
    assert found.dtype == torch.bfloat16 and found.detach().equal(expected)
    found.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs.values())


def test_the_choice_is_said_once(caplog):
    dispatch.say_once.cache_clear()
    inputs, options = inputs_and_options("divided", torch.float32)
    with caplog.at_level("INFO"):
        automatic = results(inputs, options, "auto")
    assert_same(automatic, results(inputs, options, "blocked"), 0.0)
    said = [record.message for record in caplog.records if "nystrom_attention" in record.message]
    assert said == ["nystrom_attention runs on the blocked path: the fastest one outside of GPUs"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_the_convolution_is_compiled_once_for_all_lengths():
    """By inductor, which compiles torch's own convolution anew for each."""
    backend, num_compiled = CompileCounterWithBackend("inductor"), set()
    torch.compiler.reset()
    compiled = torch.compile(convolve, fullgraph=True, backend=backend, dynamic=True)
    for seq_len in (20, 33, 50):
        value = torch.randn(2, seq_len, 3, 4, dtype=torch.float64, requires_grad=True)
        taps = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        weights = torch.randn_like(value)
        found, plain = (
            torch.autograd.grad((f(value, taps) * weights).sum(), (value, taps)) for f in (compiled, convolve)
        )
        assert max(map(error, found, plain)) <= 1e-12
        num_compiled.add(backend.frame_count)
    assert len(num_compiled) == 1


def test_the_operator_of_the_convolution_is_what_it_says():
    value, taps = torch.randn(2, 9, 3, 4, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.longspan.convolve.default, (value, taps))
