"""Rotary and Transformer-XL positions against their formulas."""

import math

import pytest
import torch

from kernels.window_attention import WindowPattern
from models.attention.sliding_window import SlidingWindowAttention
from models.positions import RelativePositions, RotaryPositions, SharedBiases, sinusoids
from tests.models.tiny import text, tiny_model

DIM, NUM_HEADS, HEAD_DIM = 12, 3, 4
PATTERNS = [
    pytest.param(4, 1, id="plain"),
    pytest.param([[0, 3, 6]], [[1, 2, 3]], id="per_head"),
    pytest.param(50, 1, id="wider_than_text"),
]


def encoding(distance: float) -> list[float]:
    """Sinusoids of one distance, as in arXiv 1706.03762 with all sines first."""
    phases = [distance / 10_000 ** (2 * k / DIM) for k in range(DIM // 2)]
    return [math.sin(phase) for phase in phases] + [math.cos(phase) for phase in phases]


def test_sinusoids_are_the_formula():
    distances = [0, 1, 2, 17, 500, 8192]
    expected = torch.tensor([encoding(distance) for distance in distances], dtype=torch.float64)
    torch.testing.assert_close(sinusoids(torch.tensor(distances), DIM), expected, rtol=0, atol=1e-10)


def relative_layer(window, dilation, dtype=torch.float64, **options):
    torch.manual_seed(3)
    biases = SharedBiases(DIM, NUM_HEADS)
    position = RelativePositions(DIM, NUM_HEADS, biases=biases, **options)
    layer = SlidingWindowAttention(
        DIM, NUM_HEADS, 0, num_layers=1, position=position, causal=True, window=window, dilation=dilation
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.to(dtype)


def transformer_xl(layer, x):
    """Terms a to d of arXiv 1901.02860, section 3.3, pair by pair; `layer` lends its weights and mask."""
    seq_len = x.shape[0]
    seen = layer.pattern.mask(seq_len)
    query, key, value = (part.view(seq_len, NUM_HEADS, HEAD_DIM) for part in layer.qkv(x).chunk(3, dim=-1))
    biases, project = layer.position.biases, layer.position.project.weight
    heads = []
    for h in range(NUM_HEADS):
        rows = []
        for i in range(seq_len):
            keys = seen[h, i].nonzero().flatten().tolist()
            scores = []
            for j in keys:
                distance = torch.tensor(encoding(i - j), dtype=x.dtype)
                key_position = (project @ distance).view(NUM_HEADS, HEAD_DIM)[h]
                a = torch.dot(query[i, h], key[j, h])
                b = torch.dot(query[i, h], key_position)
                c = torch.dot(biases.content[h], key[j, h])
                d = torch.dot(biases.position[h], key_position)
                scores.append((a + b + c + d) / math.sqrt(HEAD_DIM))
            rows.append(torch.softmax(torch.stack(scores), dim=0) @ value[keys, h])
        heads.append(torch.stack(rows))
    return layer.out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize("window, dilation", PATTERNS)
def test_relative_attention_is_transformer_xl(window, dilation):
    layer = relative_layer(window, dilation)
    x = torch.randn(20, DIM, dtype=torch.float64)
    expected = transformer_xl(layer, x)
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_the_relative_term_has_one_column_a_step():
    """Column c of a head stands for the key (window - c) * dilation tokens back."""
    window, dilation = (0, 3, 6), (1, 2, 3)
    layer = relative_layer([list(window)], [list(dilation)])
    query = torch.randn(1, 5, NUM_HEADS, HEAD_DIM, dtype=torch.float64)
    _, _, terms = layer.position(query, query, WindowPattern(window, dilation, True))
    assert terms["position_key"].shape == (NUM_HEADS, 7, HEAD_DIM)
    for h in range(NUM_HEADS):
        for column in range(window[h] + 1):
            distance = torch.tensor(encoding((window[h] - column) * dilation[h]), dtype=torch.float64)
            expected = (layer.position.project.weight @ distance).view(NUM_HEADS, HEAD_DIM)[h]
            torch.testing.assert_close(terms["position_key"][h, column], expected, rtol=0, atol=1e-12)


def test_dropout_reaches_the_sinusoids_in_training_alone():
    layer = relative_layer(4, 1, dropout=0.5)
    x = torch.randn(1, 9, DIM, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_rotary_turns_each_pair_by_its_phase():
    query = torch.randn(1, 9, 2, 6, dtype=torch.float64)
    rotated, same, terms = RotaryPositions(12, 2)(query, query, None)
    assert terms == {} and torch.equal(rotated, same)
    pairs = torch.complex(query[..., :3], query[..., 3:])
    for k in range(3):
        phase = torch.arange(9, dtype=torch.float64)[:, None] * 10_000.0 ** (-k / 3)
        expected = pairs[..., k] * torch.polar(torch.ones_like(phase), phase)
        torch.testing.assert_close(torch.complex(rotated[..., k], rotated[..., 3 + k]), expected, rtol=0, atol=1e-12)


def test_rotary_scores_depend_on_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 40, 1, 8)
    query, key, _ = RotaryPositions(8, 1)(query, key, None)
    scores = query[0, :, 0] @ key[0, :, 0].T  # [T, T]
    for distance in range(40):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions, tolerance", [("rotary", 1e-10), ("relative", 1e-10)])
@pytest.mark.parametrize("before", [1, 64, 301])
def test_logits_do_not_depend_on_where_the_text_stands(positions, tolerance, before):
    """Past the receptive field, the same characters further right in a longer text give the same logits."""
    model = tiny_model(window=[2, 5, 3], dilation=[1, 1, [1, 2, 3, 1]], positions=positions)
    reach = model.receptive_field
    ids = text(reach + 12)
    moved = torch.cat([text(before, seed=1), ids], dim=1)
    torch.testing.assert_close(model(moved)[:, before + reach :], model(ids)[:, reach:], rtol=0, atol=tolerance)


def test_rotary_does_see_the_order():
    """Swapping two characters inside the window changes the logits after them."""
    for positions in ("rotary", "relative"):
        model = tiny_model(positions=positions, num_layers=1, window=8)
        ids = torch.tensor([[1, 2, 3, 4]])
        swapped = torch.tensor([[2, 1, 3, 4]])
        assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-6
