"""Which path a call takes, what it says about it, and the dtype it computes in."""

import logging
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.window_attention
from kernels import dispatch
from kernels.window_attention import api, global_rows_attention, window_attention
from tests.helpers import run_python
from tests.kernels.window import error, make_inputs, make_valid, run

OPTIONS = {"window": 3, "global_index": torch.tensor([[0, 4], [2, -1]])}
INDEX = torch.tensor([[0, -1, 4], [2, 2, 9]])


def rows(**options):
    inputs = make_inputs(3, key_len=10, dtype=torch.float32)
    return global_rows_attention(*inputs.values(), global_index=INDEX, **options)


def columns(**options):
    return window_attention(**make_inputs(10, dtype=torch.float32), **OPTIONS, **options)


CALLS = pytest.mark.parametrize("call", [columns, rows], ids=["window_attention", "global_rows_attention"])


@pytest.fixture
def kernels_that(monkeypatch):
    """Puts kernels in place that refuse with a reason, or where it is None answer "kernels" and note the call.

    The blocked path answers "blocked".
    """

    def put(reason):
        calls = []

        def answer(*tensors, **options):
            calls.append((tensors, options))
            return "kernels"

        def why_not(device, *, head_dim, dtype, needs=()):
            calls.append((device.type, dtype, head_dim, tuple(needs)))
            return reason

        monkeypatch.setattr(api, "why_not_triton", why_not)
        ops = types.SimpleNamespace(window_attention=answer, global_rows_attention=answer)
        monkeypatch.setattr(kernels.window_attention, "ops", ops, raising=False)
        return calls

    def blocked(*tensors, **options):
        return "blocked"

    monkeypatch.setattr(api, "blocked", types.SimpleNamespace(window_attention=blocked, global_rows_attention=blocked))

    dispatch.say_once.cache_clear()
    return put


@CALLS
def test_the_kernels_get_what_they_are_asked_for(kernels_that, call):
    calls = kernels_that(None)
    assert call(impl="triton") == "kernels"
    (device, dtype, head_dim, needs), (tensors, options) = calls
    assert (device, dtype, head_dim, needs) == ("cpu", torch.float32, 4, ())
    assert len(tensors) == 3 and options["scale"] == 0.5 and options["valid"] is None
    expected = {"scale", "valid", "global_index"} | ({"pattern", "query_start"} if call is columns else {"causal"})
    assert set(options) == expected


@CALLS
def test_a_named_path_never_falls_back(kernels_that, call):
    kernels_that("the moon is full")
    with pytest.raises(ValueError, match="impl='triton': the moon is full"):
        call(impl="triton")


def test_the_kernels_have_no_relative_term(kernels_that):
    kernels_that(None)
    inputs = make_inputs(10, columns=4, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="impl='triton' has no position_query and position_key"):
        window_attention(**inputs, window=3, causal=True, impl="triton")


@CALLS
def test_the_kernels_have_no_dropout(kernels_that, call):
    kernels_that(None)
    with pytest.raises(NotImplementedError, match="impl='triton' has no dropout yet, use impl='auto' or 'blocked'"):
        call(impl="triton", dropout=0.1, dropout_seed=torch.tensor(1))


def test_without_triton_auto_is_blocked_and_triton_an_error():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.window_attention import window_attention\n"
        "query = torch.randn(1, 5, 2, 4)\n"
        "def attend(impl): return window_attention(query, query, query, window=2, impl=impl)\n"
        "assert torch.equal(attend('auto'), attend('blocked')); attend('triton')"
    )
    done = run_python("-c", code)
    assert done.stderr.splitlines()[-1] == (
        "ValueError: window_attention: impl='triton': the package triton is not installed"
    )


@CALLS
@pytest.mark.parametrize("reason", [None, "the moon is full"])
def test_on_a_gpu_auto_takes_the_kernels_where_they_can(kernels_that, caplog, call, reason):
    """Tensors that only say where they are: no GPU is needed."""
    calls = kernels_that(reason)
    name = "window_attention" if call is columns else "global_rows_attention"
    with FakeTensorMode(), caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        query, key = (torch.empty(2, length, 2, 4, device="cuda") for length in (3, 10))
        index = torch.empty(2, 3, dtype=torch.int64, device="cuda")
        for _ in range(2):
            if call is columns:
                out = window_attention(query, key, key, window=3, global_index=index)
            else:
                out = global_rows_attention(query, key, key, global_index=index)
    assert calls[0] == ("cuda", torch.float32, 4, ())
    path, why = ("triton", "fastest") if reason is None else ("blocked", reason)
    assert out == ("kernels" if reason is None else "blocked")
    assert [record.message.split(": ")[0] for record in caplog.records] == [f"{name} runs on the {path} path"]
    assert why in caplog.text


def test_on_a_gpu_auto_is_blocked_where_an_argument_is_lacking(kernels_that):
    calls = kernels_that("the kernels have no position_query")
    with FakeTensorMode():
        query = torch.empty(2, 10, 2, 4, device="cuda")
        position_key = torch.empty(2, 4, 4, device="cuda")
        out = window_attention(
            query, query, query, window=3, causal=True, position_query=query, position_key=position_key
        )
    assert calls == [("cuda", torch.float32, 4, ("position_query", "position_key"))] and out == "blocked"


@CALLS
def test_auto_says_once_what_it_took(caplog, call):
    dispatch.say_once.cache_clear()
    name = "window_attention" if call is columns else "global_rows_attention"
    with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        call(impl="blocked")
        assert not caplog.records
        call()
        call()
    assert [record.message.split(":")[0] for record in caplog.records] == [f"{name} runs on the blocked path"]


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_under_autocast_all_is_cast_as_plain_attention_casts(impl):
    inputs = make_inputs(40, dtype=torch.float32)
    inputs["key"] = inputs["key"].detach().half().requires_grad_()
    options = {"window": 5, "global_index": torch.tensor([[0, 9], [30, -1]]), "valid": make_valid("holes", 2, 40)}
    low = {name: tensor.detach().bfloat16() for name, tensor in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = run(inputs, **options, impl=impl)
        expected = run(low, **options, impl=impl)
    for name, dtype in {"out": torch.bfloat16, "query": torch.float32, "key": torch.half}.items():
        assert result[name].dtype == dtype
        assert torch.equal(result[name], expected[name].to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert rows(impl=impl).dtype == torch.bfloat16
        # float64 is left as it is
        exact = make_inputs(40)
        assert window_attention(**exact, **options, impl=impl).dtype == torch.float64


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_under_autocast_as_one_graph():
    inputs = make_inputs(40, dtype=torch.float32)

    def attend(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return window_attention(*tensors, **OPTIONS)

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs.values())
    assert compiled.dtype == torch.bfloat16
    assert error(compiled.detach(), attend(*inputs.values()).detach()) <= 0.01
