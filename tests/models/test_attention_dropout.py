"""Dropout of attention probabilities as modules draw it: in training alone, by torch's generator, recomputed alike."""

import copy
from functools import partial

import pytest
import torch

from models.attention.sliding_window import SlidingWindowAttention
from models.encoder import Encoder

WINDOWED = partial(SlidingWindowAttention, window=[[3, 5]], dilation=[[1, 2]], global_tokens=True, dropout=0.4)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler itself


def make_encoder(attention=WINDOWED, **options) -> Encoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "max_positions": 40, "dim": 8, "num_layers": 1, "num_heads": 2, "hidden": 12}
    return Encoder(attention=attention, dropout=0.0, **sizes, **options).double()


def make_inputs(seq_len=33):
    input_ids = torch.randint(3, 30, (2, seq_len), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, seq_len, dtype=torch.bool)
    valid[1, 20:] = False
    is_global = torch.zeros_like(valid)
    is_global[:, [0, 7]] = True
    return input_ids, valid, is_global


def run(model, seed):
    """States, and the gradients of all that has one."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(*make_inputs())
    out.square().sum().backward()
    return [out.detach(), *(tensor.grad for tensor in model.parameters() if tensor.grad is not None)]


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_is_dropped_in_evaluation():
    model, plain = make_encoder().eval(), make_encoder(partial(WINDOWED, dropout=0.0))
    assert torch.equal(model(*make_inputs()), plain(*make_inputs()))


def test_a_seed_of_torch_is_a_step():
    model = make_encoder()
    one, again, other = run(model, 5), run(model, 5), run(model, 6)
    assert all(torch.equal(first, second) for first, second in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    # one call draws anew, and leaves rows of global tokens undropped no more than the others
    torch.manual_seed(5)
    first, second = model(*make_inputs()), model(*make_inputs())
    assert ((first - second).abs().amax(dim=2)[0] > 1e-9).all()


def test_dropped_attention_is_the_whole_on_average():
    torch.manual_seed(0)
    layer = SlidingWindowAttention(8, 2, 0, num_layers=1, window=3, global_tokens=True, dropout=0.3).double()
    x, index = torch.randn(12, 8, dtype=torch.float64).expand(2000, -1, -1), torch.tensor([[0, 5]]).expand(2000, -1)
    with torch.no_grad():
        found = layer(x, global_index=index)  # each example drops other pairs
        expected = layer.eval()(x[:1], global_index=index[:1])[0]
    assert (found.std(0) > 1e-3).all()
    assert ((found.mean(0) - expected).abs() < 6 * found.std(0) / 2000**0.5).all()


def test_recomputed_it_is_the_same():
    assert_close(run(make_encoder(checkpoint_activations=True), 3), run(make_encoder(), 3))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiled_it_is_the_same(recompute):
    model = make_encoder(checkpoint_activations=recompute)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_close(run(compiled, 3), run(model, 3))


def test_bad_dropout_is_named():
    with pytest.raises(ValueError, match=r"dropout of attention is 1\.0, it must be at least 0 and below 1"):
        make_encoder(partial(WINDOWED, dropout=1.0))
    layer = SlidingWindowAttention(8, 2, 0, num_layers=1, window=3, dropout=0.1, impl="triton")
    with pytest.raises(ValueError, match="impl='triton': the kernels have no dropout; use impl='auto'"):
        layer.check_device(torch.device("cpu"), torch.float32)
