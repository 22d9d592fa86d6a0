"""Folders that transformers wrote give the same numbers here, and the other way round."""

import json
import logging

import pytest
import torch

from models.pretrained import load_pretrained, published_tensors, save_pretrained

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}  # fmt: skip
ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
KINDS = {
    "bert": ("Bert", {"pad_token_id": 0, "max_position_embeddings": 64}),
    "roberta": ("Roberta", {**ROBERTA, "max_position_embeddings": 66}),
    "longformer": ("Longformer", {**ROBERTA, "max_position_embeddings": 66, "attention_window": [4, 4, 8]}),
    "big_bird": ("BigBird", {"max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 1}),
    "big_bird_rescaled": ("BigBird", {"max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 1,
                                      "use_bias": False, "rescale_embeddings": True}),
    "nystromformer": ("Nystromformer", {"max_position_embeddings": 64, "conv_kernel_size": 5, "num_landmarks": 64}),
}  # fmt: skip


def theirs(kind: str, ending: str):
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{ending}")(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():  # biases and gains other than their initial values
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def inputs(kind: str, seq_len: int = 37):
    generator = torch.Generator().manual_seed(1)
    pad = KINDS[kind][1].get("pad_token_id", 0)
    input_ids = torch.randint(3, 60, (3, seq_len), generator=generator)
    valid = torch.ones(3, seq_len, dtype=torch.bool)
    valid[1, 30:] = False
    if kind not in ("big_bird", "big_bird_rescaled"):
        valid[2, 5:8] = False  # a hole
    is_global = torch.zeros_like(valid)
    if kind == "longformer":
        is_global[0, [0, 9]] = True
        is_global[1, 3] = True
    return input_ids.masked_fill(~valid, pad), valid, is_global


def their_outputs(model, kind, input_ids, valid, is_global):
    extra = {"global_attention_mask": is_global.long()} if kind == "longformer" else {}
    return model(input_ids, attention_mask=valid.long(), **extra)[0]


@pytest.mark.parametrize("ending", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_theirs_gives_their_numbers_and_gradients(kind, ending, tmp_path):
    original = theirs(kind, ending)
    original.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, compat="hf")
    input_ids, valid, is_global = inputs(kind)
    expected = their_outputs(original, kind, input_ids, valid, is_global)[valid]
    found = model(input_ids, valid, is_global if is_global.any() else None)[valid]
    assert (found - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max().item())
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    own = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    grads = published_tensors(model, own)
    largest = max(tensor.grad.abs().max().item() for tensor in original.parameters() if tensor.grad is not None)
    for name, tensor in original.named_parameters():
        if tensor.grad is not None:
            # that of a key's bias is nothing but rounding: a softmax does not see it
            size = largest if name.endswith(("key.bias", "key_global.bias")) else tensor.grad.abs().max().item()
            torch.testing.assert_close(grads[name], tensor.grad, rtol=0.0, atol=1e-4 * size, msg=name)
    save_pretrained(model, tmp_path / "again")
    again = type(original).from_pretrained(tmp_path / "again").eval()
    assert their_outputs(again, kind, input_ids, valid, is_global)[valid].equal(expected)


def test_every_tensor_is_used_or_named(tmp_path, caplog):
    original = theirs("roberta", "ForMaskedLM")
    original.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_pretrained(tmp_path)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        load_pretrained(tmp_path, head="none")
    assert "not used: lm_head.bias, lm_head.dense.bias" in caplog.text
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "roberta"
