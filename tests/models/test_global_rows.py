"""Rows of global tokens in the module: few of them over the layer's inputs, many over projected keys and values."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.agreement import relative_error
from models.attention import sliding_window
from models.attention.sliding_window import SlidingWindowAttention
from models.encoder import Encoder

FEW = 8  # as many rows of 2 heads as a width of 32 lets be computed without projected keys


def make_layer(**options) -> SlidingWindowAttention:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(32, 2, 0, num_layers=1, window=3, global_tokens=True, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def result_and_gradients(layer, x, index, **inputs):
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = x.clone().requires_grad_()
    out = layer(x, global_index=index, **inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    return {"out": out, **dict(zip(("x", *names), torch.autograd.grad(out, [x, *parameters], weights), strict=True))}


@pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("padded", [False, True], ids=["all_valid", "padded"])
def test_few_rows_are_those_over_projected_keys(causal, bias, padded, monkeypatch):
    layer = make_layer(causal=causal, bias=bias)
    x = torch.randn(3, 21, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    valid = torch.ones(3, 21, dtype=torch.bool)
    if padded:
        valid[1, 15:] = False
    few = torch.full((3, FEW), -1)
    few[0, :3], few[1, :1] = torch.tensor([0, 9, 20]), torch.tensor([14])  # and a text without any
    many = F.pad(few, (0, 1), value=-1)
    widths, compute = [], sliding_window.global_rows_attention

    def watched(query, key, value, **options):
        widths.append(key.shape[-1])
        return compute(query, key, value, **options)

    monkeypatch.setattr(sliding_window, "global_rows_attention", watched)
    found = result_and_gradients(layer, x, few, valid=valid)
    expected = result_and_gradients(layer, x, many, valid=valid)
    assert widths == [32, 16]  # the layer's width, the width of a head
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_few_rows_under_autocast_round_as_those_over_projected_keys_do():
    x = torch.randn(3, 21, 32, generator=torch.Generator().manual_seed(1))
    few = torch.tensor([[0, 9, 20], [14, -1, -1], [-1, -1, -1]])
    expected = result_and_gradients(make_layer(bias=True), x.double(), few)
    layer = make_layer(bias=True).float()
    with torch.autocast("cpu", torch.bfloat16):
        ways = [result_and_gradients(layer, x, index) for index in (few, F.pad(few, (0, FEW), value=-1))]
    for name, truth in expected.items():
        found, usual = (relative_error(way[name], truth) for way in ways)
        assert ways[0][name].dtype == ways[1][name].dtype and found < 1.5 * usual, name


def test_lists_of_global_tokens_are_as_long_as_they_must_be():
    seen = []

    class Attention(torch.nn.Identity):
        def forward(self, x, *, valid, global_index):
            seen.append(global_index.tolist())
            return x

    sizes = {"vocab_size": 9, "max_positions": 12, "dim": 8, "num_layers": 1, "num_heads": 2, "hidden": 8}
    encoder = Encoder(attention=lambda *_, **__: Attention(), **sizes)
    input_ids = torch.zeros(2, 12, dtype=torch.int64)
    for chosen in ([0, 7], [], [0, 5, 11]):
        is_global = torch.zeros(2, 12, dtype=torch.bool)
        is_global[1, chosen] = True
        encoder(input_ids, None, is_global)
    assert seen == [[[-1, -1], [0, 7]], [[-1], [-1]], [[-1, -1, -1], [0, 5, 11]]]
    with pytest.raises(ValueError, match="the capacity is 2"):
        Encoder(attention=lambda *_, **__: Attention(), max_global_tokens=2, **sizes)(input_ids, None, is_global)
