"""The character model: size, causality, how far it looks back, its options and what it refuses."""

import pytest
import torch

from configs.compose import compose_config
from configs.schema import ConfigError, build
from kernels.window_attention import WindowPattern
from models.char_lm import CharLM
from tests.models.tiny import VOCAB, loss_and_gradients, text, tiny_model

POSITIONS = pytest.mark.parametrize("positions", ["rotary", "relative"])
# name: window, dilation of three layers and four heads
PATTERNS = {
    "plain": (3, 1),
    "window_0_below": ([0, 2, 4], 1),
    "dilated_above": ([2, 3, 2], [1, [2, 1, 1, 2], [1, 1, 4, 3]]),
    "per_head": ([[1, 2, 3, 4], 2, [0, 0, 5, 1]], [[4, 1, 1, 1], 2, [1, 1, 1, 7]]),
}
EVERY_PATTERN = pytest.mark.parametrize("window, dilation", PATTERNS.values(), ids=PATTERNS.keys())


@pytest.mark.parametrize("size, num_parameters", [("small", 41_083_136), ("large", 102_507_776)])
def test_the_papers_models_have_the_papers_size(size, num_parameters):
    cfg = compose_config([f"model=char_lm_{size}"])
    with torch.device("meta"):
        model = build(cfg.model, "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    # 41M and 102M in table 12 of the paper
    assert num_parameters // 10**6 == {"small": 41, "large": 102}[size]


@pytest.mark.parametrize("positions, own", [("rotary", 0), ("relative", 16 * 16)])
def test_parameters_are_counted_once(positions, own):
    """Embedding tied with the output, a pair of relative biases for all layers, the rest per layer."""
    layer = 4 * 16 * 16 + own + (16 * 64 + 64) + (64 * 16 + 16) + 4 * 16
    shared = VOCAB * 16 + VOCAB + 2 * 16 + (2 * 16 if positions == "relative" else 0)
    model = tiny_model(positions=positions)
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * layer + shared


@POSITIONS
@pytest.mark.parametrize("batch, seq_len", [(1, 1), (2, 2), (3, 70)])
def test_one_row_of_logits_a_character(positions, batch, seq_len):
    model = tiny_model(positions=positions, dtype=torch.float32)
    logits = model(text(seq_len, batch))
    assert logits.shape == (batch, seq_len, VOCAB)
    assert torch.isfinite(logits).all()


@POSITIONS
@EVERY_PATTERN
def test_the_future_does_not_change_the_past(positions, window, dilation):
    model = tiny_model(window=window, dilation=dilation, positions=positions)
    ids = text(80)
    other = ids.clone()
    other[:, 40:] = (other[:, 40:] + 1) % VOCAB
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


@POSITIONS
@EVERY_PATTERN
@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_the_receptive_field_is_exact(positions, window, dilation, impl):
    """A character `receptive_field` before a position changes its logits, none before that does."""
    model = tiny_model(window=window, dilation=dilation, positions=positions, impl=impl)
    reach = model.receptive_field
    ids = text(reach + 40, batch=1)
    last = ids.shape[1] - 1
    original = model(ids)[0, last]
    for distance, moves in ((reach, True), (reach + 1, False), (reach + 2, False), (reach + 30, False)):
        changed = ids.clone()
        changed[0, last - distance] += 1
        difference = (model(changed % VOCAB)[0, last] - original).abs().max()
        assert (difference > 1e-9) if moves else (difference == 0), distance


@POSITIONS
@EVERY_PATTERN
def test_blocked_is_the_oracle_for_every_weight(positions, window, dilation):
    """Lengths of several blocks; one optimizer would see the same loss and the same gradients."""
    options = {"window": window, "dilation": dilation, "positions": positions}
    ids = text(150)
    loss, gradients = loss_and_gradients(tiny_model(**options, impl="blocked"), ids)
    expected_loss, expected = loss_and_gradients(tiny_model(**options, impl="reference"), ids)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12 * expected[name].abs().max().item())


@POSITIONS
def test_every_weight_is_used(positions):
    _, gradients = loss_and_gradients(tiny_model(positions=positions), text(20))
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


@POSITIONS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients(positions, dropout):
    results = []
    for again in (False, True):
        model = tiny_model(positions=positions, dropout=dropout, checkpoint_activations=again)
        torch.manual_seed(1)
        results.append(loss_and_gradients(model, text(50)))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_dropout_is_off_outside_training():
    model = tiny_model(dropout=0.5).eval()
    ids = text(30)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@POSITIONS
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_bfloat16_autocast_keeps_weights_and_gradients_float32(positions, again):
    model = tiny_model(positions=positions, dtype=torch.float32, checkpoint_activations=again, loud=False)
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = loss_and_gradients(model, text(40))
    plain = loss_and_gradients(model, text(40))[1]
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
        cosine = torch.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0)
        assert cosine > 0.99, name


@POSITIONS
def test_a_small_batch_is_learned_by_heart(positions):
    model = tiny_model(window=8, dim=32, num_layers=2, positions=positions, dtype=torch.float32, loud=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = text(24, batch=4)
    first, _ = loss_and_gradients(model, ids)
    for _ in range(60):
        loss, _ = loss_and_gradients(model, ids)
        optimizer.step()
    assert first > 2.5
    # what is left is the characters that have little or no text before them
    assert loss < 0.3


@POSITIONS
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_it_gives_the_same_logits(positions):
    model = tiny_model(positions=positions, num_layers=1, dilation=[[1, 2, 1, 2]])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(text(40)), model(text(40)), rtol=1e-9, atol=1e-12)


def test_set_attention_changes_the_patterns():
    model = tiny_model(window=4)
    assert model.attention_patterns() == [WindowPattern((4,) * 4, (1,) * 4, True)] * 3
    assert model.receptive_field == 12
    ids = text(60)
    narrow = model(ids)

    model.set_attention(window=[1, 5, [2, 9, 2, 2]])
    assert [pattern.window for pattern in model.attention_patterns()] == [(1,) * 4, (5,) * 4, (2, 9, 2, 2)]
    assert model.receptive_field == 15
    model.set_attention(dilation=[1, [1, 1, 1, 3], 2])
    assert [pattern.dilation for pattern in model.attention_patterns()] == [(1,) * 4, (1, 1, 1, 3), (2,) * 4]
    assert [pattern.window for pattern in model.attention_patterns()] == [(1,) * 4, (5,) * 4, (2, 9, 2, 2)]
    assert model.receptive_field == 1 + 15 + 18

    model.set_attention(window=4, dilation=1)
    assert torch.equal(model(ids), narrow)


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param({"windw": 3}, "unknown attention option windw, did you mean window?", id="typo"),
        pytest.param({"dilations": 3}, "unknown attention option dilations, did you mean dilation?", id="plural"),
        pytest.param({"qqq": 3}, r"unknown attention option qqq \(known: window, dilation\)", id="nothing_near"),
        pytest.param({"window": -1}, "layer 0: window of head 0 is -1, it must be at least 0", id="window"),
        pytest.param({"window": [1, 2]}, "window has 2 entries, the model has 3 layers", id="layers"),
        pytest.param({"window": 2.5}, "window of layer 0 is 2.5, it must be a whole number", id="fraction"),
        pytest.param({"window": True}, "window of layer 0 is True, it must be a whole number", id="bool"),
        pytest.param({"window": [1, 2, "3"]}, "window of layer 2 is '3', it must be a whole number", id="string"),
        pytest.param({"dilation": [1, 1, 0]}, "layer 2: dilation of head 0 is 0, .*at least 1", id="dilation"),
        pytest.param({"dilation": [1, [1, 2], 1]}, "layer 1: dilation has 2 entries for 4 heads", id="heads"),
        pytest.param(
            {"dilation": [1, 1, [1, 1, 1, 1, 2]]},
            "layer 2: dilation has 5 entries for 4 heads",
            id="no_such_head",
        ),
        pytest.param(
            {"window": [1, [1, 2, None, 1], 1]},
            "window of layer 1 is None, it must be a whole number",
            id="null",
        ),
    ],
)
def test_bad_attention_options_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        tiny_model().set_attention(**options)
    if not options.keys() - {"window", "dilation"}:
        with pytest.raises(ValueError, match=message):
            tiny_model(**options)


def test_a_refused_change_leaves_every_layer_as_it_was():
    model = tiny_model()
    before = model.attention_patterns()
    with pytest.raises(ValueError, match="layer 2: window of head 0 is -1"):
        model.set_attention(window=[1, 2, -1])
    assert model.attention_patterns() == before


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param({"dim": 18}, "num_heads 4 does not divide dim 18", id="heads_do_not_divide"),
        pytest.param({"dim": 0}, "dim is 0, it must be at least 1", id="dim"),
        pytest.param({"num_layers": 0}, "num_layers is 0, it must be at least 1", id="layers"),
        pytest.param({"num_heads": -2}, "num_heads is -2, it must be at least 1", id="heads"),
        pytest.param({"vocab_size": 0}, "vocab_size is 0, it must be at least 1", id="vocab"),
        pytest.param({"mlp_ratio": 0}, "mlp_ratio is 0, it must be at least 1", id="mlp"),
        pytest.param({"dropout": 1.0}, "dropout is 1.0, it must be at least 0 and below 1", id="dropout"),
        pytest.param({"dropout": -0.1}, "dropout is -0.1, it must be at least 0", id="negative_dropout"),
        pytest.param(
            {"positions": "absolute"},
            "positions is 'absolute', it must be 'rotary' or 'relative'",
            id="positions",
        ),
        pytest.param({"dim": 12}, "rotary positions need an even head dim, got 12 / 4 = 3", id="rotary_odd"),
        pytest.param(
            {"dim": 5, "num_heads": 1, "positions": "relative"},
            "relative positions need an even dim, got 5",
            id="relative_odd",
        ),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(loud=False, **options)


def test_configured_values_are_checked_with_their_place():
    attention = {
        "_target_": "models.attention.sliding_window.SlidingWindowAttention",
        "_partial_": True,
        "window": [4, -1],
    }
    node = {
        "_target_": "models.char_lm.CharLM",
        "dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "attention": attention,
    }
    with pytest.raises(ConfigError, match="layer 1: .*window of head 0 is -1, it must be at least 0"):
        build(node, "model")


def test_unbuilt_arguments_are_named():
    with pytest.raises(NotImplementedError, match="argument document_start is not implemented"):
        tiny_model()(text(4), document_start=torch.zeros(2, 4))


def test_any_attention_module_can_be_handed_in():
    """The architecture knows nothing of windows."""

    class Nothing(torch.nn.Module):
        def __init__(self, dim, num_heads, layer, *, num_layers, position, causal):
            super().__init__()
            assert causal and 0 <= layer < num_layers

        def forward(self, x):
            return torch.zeros_like(x)

    model = CharLM(attention=Nothing, vocab_size=VOCAB, dim=16, num_layers=2, num_heads=4)
    logits = model(torch.tensor([[1, 2, 1]]))
    assert torch.equal(logits[:, 0], logits[:, 2])
