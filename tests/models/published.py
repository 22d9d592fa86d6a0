"""Tiny models of transformers with weights of their own, inputs for them, and comparisons with models of ours."""

import pytest
import torch

from models.pretrained import published_tensors

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}  # fmt: skip
ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
BIG_BIRD = {"max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 1, "sep_token_id": 2}
KINDS = {
    "bert": ("Bert", {"pad_token_id": 0, "max_position_embeddings": 64}),
    "roberta": ("Roberta", {**ROBERTA, "max_position_embeddings": 66}),
    "xlm-roberta": ("XLMRoberta", {**ROBERTA, "max_position_embeddings": 66}),
    "longformer": ("Longformer", {**ROBERTA, "max_position_embeddings": 66, "attention_window": [4, 4, 8]}),
    "big_bird": ("BigBird", BIG_BIRD),
    "big_bird_rescaled": ("BigBird", {**BIG_BIRD, "use_bias": False, "rescale_embeddings": True}),
    "nystromformer": ("Nystromformer", {"max_position_embeddings": 64, "conv_kernel_size": 5, "num_landmarks": 64}),
}  # fmt: skip


def theirs(kind: str, ending: str, **options):
    """A model of transformers, the class whose name ends so, with biases and gains other than their initial values."""
    name, own = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{ending}")(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def inputs(kind: str, seq_len: int = 37):
    """Token ids [3, T] from 3 on, pads aside; which are real; which are global."""
    generator = torch.Generator().manual_seed(1)
    pad = KINDS[kind][1].get("pad_token_id", 0)
    input_ids = torch.randint(3, 60, (3, seq_len), generator=generator)
    valid = torch.ones(3, seq_len, dtype=torch.bool)
    valid[1, seq_len - 7 :] = False
    valid[2, 5:8] = False  # a hole
    is_global = torch.zeros_like(valid)
    if kind == "longformer":
        is_global[0, [0, 9]] = True
        is_global[1, 3] = True
    return input_ids.masked_fill(~valid, pad), valid, is_global


def their_outputs(model, kind, input_ids, valid, is_global):
    """The first output of a model of transformers."""
    extra = {"global_attention_mask": is_global.long()} if kind == "longformer" else {}
    return model(input_ids, attention_mask=valid.long(), **extra)[0]


def assert_equal_with_gradients(model, original, found, expected, bound: float = 1e-4, *, of_all=False) -> None:
    """Outputs, and the gradient of every weight for one random weighing of them, to a share of its largest entry.

    of_all: to a share of the largest entry of any weight's, where some are nothing but rounding.
    """
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < bound * max(1.0, expected.abs().max().item())
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    own = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    grads = published_tensors(model, own)
    largest = max(tensor.grad.abs().max().item() for tensor in original.parameters() if tensor.grad is not None)
    for name, tensor in original.named_parameters(remove_duplicate=False):
        tied = name.startswith(("lm_head.decoder.", "cls.predictions.decoder."))
        if tensor.grad is not None and not tied:
            # that of a key's bias is nothing but rounding: a softmax does not see it
            rounding = of_all or name.endswith(("key.bias", "key_global.bias"))
            size = largest if rounding else tensor.grad.abs().max().item()
            torch.testing.assert_close(grads[name], tensor.grad, rtol=0.0, atol=bound * size, msg=name)
