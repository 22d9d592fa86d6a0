"""The blocked path as operators of PyTorch: what they promise the compiler, and one graph for all lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels.window_attention import global_rows_attention, traced, window_attention
from kernels.window_attention.pattern import WindowPattern
from tests.kernels.test_window_runtime import build
from tests.kernels.window import assert_same, make_inputs, make_valid, run

SEED = torch.tensor([5])
INDEX = torch.tensor([[0, -1, 9], [3, 3, 39]])
pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler itself


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", ["masked", "relative", "dilated", "globals_masked"])
def test_the_operator_of_windows_is_what_it_says(kind, dropout):
    """Schema, fake kernel and gradients, for whole numbers that are symbols as well."""
    inputs, options = build(kind, 40, True, window=5, dtype=torch.float64)
    terms = [inputs.get(name) for name in ("position_query", "position_key")]
    pattern = WindowPattern.of(5, options["dilation"], num_heads=2, causal=True)
    sizes = (list(pattern.window), list(pattern.dilation), True, 0.5, 0, dropout)
    tensors = (*list(inputs.values())[:3], *terms, options["valid"], options["global_index"])
    torch.library.opcheck(traced._window, (*tensors, SEED if dropout else None, *sizes))


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
def test_the_operator_of_rows_is_what_it_says(dropout):
    tensors = make_inputs(3, key_len=40).values()
    options = (make_valid("holes", 2, 40), SEED if dropout else None, False, 0.5, dropout)
    torch.library.opcheck(traced._rows, (*tensors, INDEX, *options))


@pytest.mark.parametrize("kind", ["relative_masked", "globals_dilated", "globals_masked"])
def test_one_graph_for_all_lengths_and_starts(kind):
    backend, num_compiled = CompileCounterWithBackend("aot_eager"), set()
    torch.compiler.reset()
    compiled = torch.compile(window_attention, fullgraph=True, backend=backend, dynamic=True)
    for seq_len, query_start in ((40, 3), (77, 20), (200, 7)):
        inputs, options = build(kind, seq_len, causal=True, window=9, dtype=torch.float64)
        options |= {"query_start": query_start, "dropout": 0.2, "dropout_seed": SEED}
        assert_same(run(inputs, compiled, **options), run(inputs, **options))
        num_compiled.add(backend.frame_count)
    assert len(num_compiled) == 1


def test_rows_are_one_graph_for_all_lengths():
    backend, num_compiled = CompileCounterWithBackend("aot_eager"), set()
    torch.compiler.reset()
    compiled = torch.compile(global_rows_attention, fullgraph=True, backend=backend, dynamic=True)
    for num_keys in (40, 77, 200):
        inputs = make_inputs(3, key_len=num_keys)
        inputs["query_global"] = inputs.pop("query")
        options = {"global_index": INDEX, "valid": make_valid("tail", 2, num_keys), "impl": "blocked"}
        assert_same(run(inputs, compiled, **options), run(inputs, global_rows_attention, **options))
        num_compiled.add(backend.frame_count)
    assert len(num_compiled) == 1
