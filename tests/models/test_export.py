"""Whole models through torch.compile and torch.export: one graph for all lengths, equal to eager mode, files."""

import copy
import logging
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models.attention.block_sparse import BlockSparseAttention
from models.attention.dense import DenseAttention
from models.attention.nystrom import NystromAttention
from models.attention.sliding_window import SlidingWindowAttention
from models.encoder import Encoder
from models.heads import MaskedLM
from tests.helpers import run_python
from tests.models.tiny import loss_and_gradients, text, tiny_model

LONGEST, NUM_LANDMARKS = 160, 4
WINDOWED = partial(SlidingWindowAttention, window=[[3, 5, 3]], dilation=[[1, 2, 1]], bias=True, global_tokens=True)
MECHANISMS = {
    "dense": DenseAttention,
    "window": WINDOWED,
    "block_sparse": partial(BlockSparseAttention, max_positions=LONGEST, block_size=4, num_random_blocks=1),
    "nystrom": partial(NystromAttention, num_landmarks=NUM_LANDMARKS, num_taps=5),
}
KINDS = pytest.mark.parametrize("kind", MECHANISMS)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler itself


@pytest.fixture(autouse=True)
def quiet_compiler(monkeypatch):
    """The compiler writes a line for every step where something listens at all levels, as pytest does."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch.compiler.reset()


def make_model(attention, dtype=torch.float64, **options) -> MaskedLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "max_positions": LONGEST, "dim": 12, "num_layers": 1, "num_heads": 3, "hidden": 20}
    model = MaskedLM(Encoder(attention=attention, dropout=0.0, max_global_tokens=6, **sizes, **options)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention" in name and parameter.dim() > 1:
                parameter.mul_(8)  # so that every key counts
    return model


def make_inputs(batch, seq_len):
    input_ids = torch.randint(3, 30, (batch, seq_len), generator=torch.Generator().manual_seed(seq_len))
    valid = torch.ones(batch, seq_len, dtype=torch.bool)
    valid[-1, seq_len - 3 :] = False
    is_global = torch.zeros_like(valid)
    is_global[0, [0, 5]] = True
    return input_ids, valid, is_global


def results(model, inputs):
    """Logits, and the gradient of every parameter that has one, by name."""
    model.zero_grad()
    logits = model(*inputs)
    logits.square().mean().backward()
    return {name.removeprefix("_orig_mod."): parameter.grad for name, parameter in model.named_parameters()
            if parameter.grad is not None} | {"logits": logits.detach()}  # fmt: skip


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


@KINDS
def test_compiled_once_for_all_lengths_in_one_graph(kind):
    """The first length is compiled as it is, the second as a symbol; a third compiles nothing."""
    model = make_model(MECHANISMS[kind])
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    for batch, seq_len in ((2, 17), (3, 40), (2, 33), (4, LONGEST), (2, 60)):
        inputs = make_inputs(batch, seq_len)
        assert_close(results(compiled, inputs), results(model, inputs))
    assert backend.frame_count == 2


@KINDS
def test_recomputed_blocks_give_the_same_gradients(kind):
    """In eager mode and compiled."""
    inputs, expected = make_inputs(2, 40), results(make_model(MECHANISMS[kind]), make_inputs(2, 40))
    model = make_model(MECHANISMS[kind], checkpoint_activations=True)
    assert_close(results(model, inputs), expected)
    assert_close(results(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs), expected)


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_a_character_model_is_compiled_once_for_all_lengths(positions):
    model = tiny_model(window=[3, 5, 4], dilation=[1, 2, 1], num_layers=3, positions=positions)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    for seq_len in (30, 50, 41, 90):
        (loss, grads), (own_loss, own_grads) = (loss_and_gradients(each, text(seq_len)) for each in (compiled, model))
        torch.testing.assert_close(loss, own_loss)
        assert_close({name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}, own_grads)
    assert backend.frame_count == 2


def exported(model, strict):
    """A program of any number of texts of any length."""
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=NUM_LANDMARKS + 1, max=LONGEST)}
    inputs = make_inputs(2, 17)
    return torch.export.export(model, inputs, dynamic_shapes=(sizes,) * len(inputs), strict=strict)


@KINDS
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_an_exported_program_takes_any_length_and_batch(kind, strict):
    model = make_model(MECHANISMS[kind]).eval()
    program = exported(model, strict).module()
    for batch, seq_len in ((2, 17), (3, 40), (1, 9), (4, LONGEST)):
        inputs = make_inputs(batch, seq_len)
        torch.testing.assert_close(program(*inputs), model(*inputs), rtol=1e-9, atol=1e-12)


LOAD = """
import sys, torch
# the operators of a program must be known before it is loaded
import kernels.block_sparse_attention, kernels.nystrom_attention, kernels.window_attention
for path in sys.argv[1:]:
    program = torch.export.load(path + ".pt2").module()
    for inputs, expected in torch.load(path + ".results"):
        torch.testing.assert_close(program(*inputs), expected, rtol=1e-9, atol=1e-12)
print("the same", len(sys.argv) - 1)
"""


def test_saved_programs_give_the_same_in_another_process(tmp_path):
    paths = []
    for kind, attention in MECHANISMS.items():
        model = make_model(attention).eval()
        paths.append(str(tmp_path / kind))
        torch.export.save(exported(model, strict=False), paths[-1] + ".pt2")
        cases = [make_inputs(*shape) for shape in ((1, 23), (3, 90))]
        torch.save([(inputs, model(*inputs).detach()) for inputs in cases], paths[-1] + ".results")
    done = run_python("-c", LOAD, *paths)
    assert done.stdout.strip() == "the same 4", done.stderr


def test_too_many_global_tokens_fail_in_a_program_as_well():
    program = exported(make_model(WINDOWED).eval(), strict=False).module()
    input_ids, valid, _ = make_inputs(1, 30)
    with pytest.raises(RuntimeError, match="more global tokens than the capacity 6: raise max_global_tokens"):
        program(input_ids, valid, torch.ones_like(valid))


def test_patterns_of_published_code_are_those_of_one_length():
    model = make_model(partial(MECHANISMS["block_sparse"], compat="hf")).eval()
    with pytest.raises(ValueError, match="compat='hf' has another pattern for each length: export one"):
        exported(model, strict=False)
    inputs = make_inputs(2, 40)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="call the model once in eager mode with a text of this length"):
        compiled(*inputs)
    expected = model(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    program = torch.export.export(model, inputs).module()
    torch.testing.assert_close(program(*inputs), expected)
