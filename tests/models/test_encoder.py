"""The encoder beyond what published checkpoints show: positions asked for, recomputed blocks, pre-norm, errors."""

from functools import partial

import pytest
import torch

from models.attention.dense import DenseAttention
from models.attention.sliding_window import SlidingWindowAttention
from models.encoder import Encoder
from models.heads import MaskedLM

WINDOWED = partial(SlidingWindowAttention, window=2, bias=True, global_tokens=True)


def make_encoder(attention=WINDOWED, **options) -> Encoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "max_positions": 20, "dim": 12, "num_layers": 2, "num_heads": 3, "hidden": 20}
    return Encoder(attention=attention, dropout=0.0, **sizes, **options).double()


def make_inputs(seq_len=17):
    input_ids = torch.randint(3, 30, (2, seq_len), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, seq_len, dtype=torch.bool)
    valid[1, 11:] = False
    is_global = torch.zeros_like(valid)
    is_global[0, [0, 7]] = True
    return input_ids, valid, is_global


def test_logits_where_asked_are_those_of_all():
    model, inputs = MaskedLM(make_encoder()).double(), make_inputs()
    positions = torch.tensor([[3, 0, 16], [1, 1, 10]])
    found = model(*inputs, logit_positions=positions)
    assert found.shape == (2, 3, 30)
    torch.testing.assert_close(found, model(*inputs).take_along_dim(positions[..., None], dim=1))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_recomputed_blocks_give_the_same_gradients(pre_norm):
    inputs, grads = make_inputs(), []
    for recompute in (False, True):
        model = make_encoder(pre_norm=pre_norm, checkpoint_activations=recompute).train()
        model(*inputs).square().sum().backward()
        grads.append([tensor.grad for tensor in model.parameters() if tensor.grad is not None])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_pre_norm_normalises_before_each_sum_and_at_the_end():
    model, (input_ids, valid, _) = make_encoder(DenseAttention, pre_norm=True), make_inputs()
    x = model.embed(input_ids, None, None)
    for layer in model.layers:
        x = x + layer.attention(layer.attention_norm(x), valid=valid)
        x = x + layer.mlp(layer.mlp_norm(x))
    torch.testing.assert_close(model(input_ids, valid), model.norm(x))


def test_neither_padding_nor_neighbours_change_a_text():
    model, (input_ids, valid, is_global) = make_encoder(), make_inputs()
    together = model(input_ids, valid, is_global)
    alone = model(input_ids[1:, :11], None, is_global[1:, :11])
    torch.testing.assert_close(together[1:, :11], alone)


def test_counted_positions_pass_over_padding_on_the_left():
    options = {"positions": "counted", "pad_id": 1, "position_offset": 2}
    model, (input_ids, _, _) = make_encoder(DenseAttention, **options), make_inputs(9)
    padded = torch.cat([torch.ones(2, 4, dtype=torch.int64), input_ids], dim=1)
    torch.testing.assert_close(model(padded, padded != 1)[:, 4:], model(input_ids))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="num_heads 5 does not divide dim 12"):
        Encoder(attention=WINDOWED, vocab_size=9, max_positions=9, dim=12, num_heads=5)
    with pytest.raises(ValueError, match="positions='counted' needs a pad_id"):
        make_encoder(positions="counted")
    with pytest.raises(ValueError, match="activation is 'gulu', it must be one of gelu"):
        make_encoder(activation="gulu")
    with pytest.raises(ValueError, match="21 tokens, the position table of this model 20"):
        make_encoder()(torch.full((1, 21), 3))
    input_ids, _, is_global = make_inputs()
    with pytest.raises(ValueError, match="row 0 has 2 global tokens, the capacity is 1: raise max_global_tokens"):
        make_encoder(max_global_tokens=1)(input_ids, None, is_global)
    with pytest.raises(ValueError, match="this layer has no global tokens: build it with global_tokens=True"):
        make_encoder(partial(SlidingWindowAttention, window=2))(input_ids, None, is_global)
    with pytest.raises(ValueError, match="built without a pooler"):
        make_encoder().pool(torch.zeros(1, 2, 12))
