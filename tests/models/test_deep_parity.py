"""Twelve layers of each mechanism beside transformers': states of every layer, logits, the gradient of every weight."""

import pytest
import torch

from models.pretrained import load_pretrained
from tests.models.published import assert_equal_with_gradients, inputs, theirs

DEEP = {"num_hidden_layers": 12, "hidden_size": 48, "intermediate_size": 96, "initializer_range": 0.15}
WINDOWS = [4, 4, 4, 8, 8, 8, 8, 16, 16, 16, 32, 32]  # theirs needs the largest to be a multiple of each
ROWS = {"max_position_embeddings": 160}
BLOCKS = {**ROWS, "block_size": 8, "num_random_blocks": 2}
LANDMARKS = {"num_landmarks": 16, "segment_means_seq_len": 96, "max_position_embeddings": 96}
CASES = {
    "bert": ("bert", 101, ROWS, False),
    "roberta": ("roberta", 101, ROWS, False),
    "xlm-roberta": ("xlm-roberta", 101, ROWS, False),
    "longformer": ("longformer", 101, {**ROWS, "attention_window": WINDOWS}, False),
    "big_bird_in_training": ("big_bird", 149, BLOCKS, True),
    "big_bird_in_evaluation": ("big_bird", 149, BLOCKS, False),
    "nystromformer": ("nystromformer", 96, LANDMARKS, False),
}


SINGLE, DOUBLE = torch.float32, torch.float64
# theirs of Longformer gives gradients that are nan in float64
ALL = [(case, dtype) for case in CASES for dtype in (SINGLE, DOUBLE) if (case, dtype) != ("longformer", DOUBLE)]


@pytest.mark.parametrize(("case", "dtype"), ALL)
def test_twelve_layers(case, dtype, tmp_path):
    """In float64 each gradient by itself: in float32 those of deep queries and keys are mostly rounding."""
    kind, seq_len, options, training = CASES[case]
    original = theirs(kind, "ForMaskedLM", **DEEP, **options).train(training)
    original.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, compat="hf").train(training).to(dtype)
    original.to(dtype)
    input_ids, valid, is_global = inputs(kind, seq_len)
    theirs_only, ours_only = {"attention_mask": valid.long()}, {"valid": valid}
    if kind == "longformer":
        theirs_only["global_attention_mask"], ours_only["is_global"] = is_global.long(), is_global
    if kind == "nystromformer":  # theirs takes no padding on its way through landmarks
        input_ids, valid = inputs("bert", seq_len)[0].clamp(min=3), torch.ones_like(valid)
        theirs_only, ours_only = {}, {}
    states = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, given, state: states.append(state))
    out = original(input_ids, output_hidden_states=True, **theirs_only)
    logits = model(input_ids, **ours_only)
    assert len(states) == 12
    for found, expected in zip(states, out.hidden_states[1:], strict=True):
        assert (found - expected[:, :seq_len])[valid].abs().max() < (1e-4 if dtype == SINGLE else 1e-10)
    # Longformer's tokens stay apart, and with them its gradients above rounding
    rounding = dtype == SINGLE and kind != "longformer"
    bound = 1e-5 if rounding else 1e-4 if dtype == SINGLE else 1e-8
    assert_equal_with_gradients(model, original, logits[valid], out.logits[valid], bound, of_all=rounding)
