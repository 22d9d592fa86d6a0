"""Every head on every architecture gives the numbers and gradients of transformers' class, read and written."""

import pytest
import torch

from models.pretrained import load_pretrained, save_pretrained
from tests.models.published import KINDS, assert_equal_with_gradients, inputs, theirs

NAMES = {0: "no", 1: "maybe", 2: "yes"}
ENDINGS = {"span_qa": "ForQuestionAnswering", "sequence": "ForSequenceClassification",
           "token": "ForTokenClassification", "multiple_choice": "ForMultipleChoice"}  # fmt: skip
BOUND = 2e-5
SEPARATOR = 2


def case(kind: str, head: str):
    """What theirs takes, and what ours takes for the same: where theirs makes up global tokens, ours is told them."""
    input_ids, valid, _ = inputs(kind)
    is_global = torch.zeros_like(valid)
    if head in ("span_qa", "multiple_choice"):  # three separators each, at places of their own
        for row, first in enumerate((6, 11, 3)):
            end = 36 if row != 1 else 29
            input_ids[row, [first, first + 1, end]] = SEPARATOR
            is_global[row] = torch.arange(37) < first if head == "span_qa" else torch.arange(37) > first + 1
    if head == "sequence":
        is_global[:, 0] = True
    own = {"input_ids": input_ids, "valid": valid}
    if head == "multiple_choice":
        own = {name: torch.stack([tensor, tensor.flip(0), tensor[[1, 0, 2]]]) for name, tensor in own.items()}
        is_global = torch.stack([is_global, is_global.flip(0), is_global[[1, 0, 2]]])
    published = {"input_ids": own["input_ids"], "attention_mask": own["valid"].long()}
    if kind == "longformer" and head == "token":  # alone theirs sees none
        is_global[0, [0, 9]] = True
        is_global[1, 3] = True
        published["global_attention_mask"] = is_global.long()
    if kind == "longformer":
        own["is_global"] = is_global
    return published, own


def their_logits(model, published):
    """The logits of a model of transformers, of spans as [B, T, 2]."""
    out = model(**published)
    return torch.stack([out.start_logits, out.end_logits], dim=-1) if "start_logits" in out else out.logits


def of_real_tokens(logits, own):
    """Those that mean anything; what is lowered by a million has its gradients, and few digits."""
    valid = own["valid"]
    return (logits[valid] if logits.shape[:2] == valid.shape and valid.dim() == 2 else logits).clamp(min=-1e5)


@pytest.mark.parametrize("head", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_numbers_and_gradients(kind, head, tmp_path):
    labels = {} if head in ("span_qa", "multiple_choice") else {"id2label": NAMES}
    original = theirs(kind, ENDINGS[head], **labels)
    original.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", compat="hf")
    published, own = case(kind, head)
    expected, found = their_logits(original, published), model(**own)
    shape = {"span_qa": (3, 37, 2), "sequence": (3, 3), "token": (3, 37, 3), "multiple_choice": (3, 3)}[head]
    assert found.shape == shape
    assert_equal_with_gradients(model, original, of_real_tokens(found, own), of_real_tokens(expected, own), BOUND)
    save_pretrained(model, tmp_path / "ours")
    again, info = type(original).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert again.config.id2label == original.config.id2label
    state = original.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(their_logits(again.eval(), published), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "big_bird"])
def test_pretraining_gives_both_kinds_of_logits(kind, tmp_path):
    original = theirs(kind, "ForPreTraining")
    original.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", compat="hf")
    input_ids, valid, _ = inputs(kind)
    logits, relationship = model(input_ids, valid)
    out = original(input_ids, attention_mask=valid.long())
    found = torch.cat([logits[valid].flatten(), relationship.flatten()])
    expected = torch.cat([out.prediction_logits[valid].flatten(), out.seq_relationship_logits.flatten()])
    assert_equal_with_gradients(model, original, found, expected, BOUND)
    positions = torch.tensor([[4], [0], [9]])
    some, same = model(input_ids, valid, logit_positions=positions)
    torch.testing.assert_close(some, logits.take_along_dim(positions[..., None], dim=1))
    assert same.equal(relationship)
    save_pretrained(model, tmp_path / "ours")
    again, info = type(original).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.eval()(input_ids, attention_mask=valid.long()).prediction_logits.equal(out.prediction_logits)


@pytest.mark.parametrize("head", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_a_head_stands_where_theirs_stands(kind, head, tmp_path):
    """The same seed draws the same, as nothing else draws: the share of `classifier_dropout` where theirs heeds it."""
    options = {"hidden_dropout_prob": 0.3}
    if kind not in ("longformer", "nystromformer"):
        options["classifier_dropout"] = 0.6
    original = theirs(kind, ENDINGS[head], **options)
    original.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, compat="hf")
    for module in (*original.base_model.modules(), *model.encoder.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    published, own = case(kind, head)
    torch.manual_seed(3)
    expected = their_logits(original.train(), published)
    torch.manual_seed(3)
    found = of_real_tokens(model.train()(**own), own)
    torch.testing.assert_close(found, of_real_tokens(expected, own), rtol=1e-4, atol=1e-4)
    quiet = of_real_tokens(model.eval()(**own), own)
    without = {"span_qa": "big_bird" not in kind, "multiple_choice": kind == "nystromformer"}.get(head, False)
    if kind not in ("big_bird", "big_bird_rescaled"):  # its own random blocks differ in eval()
        assert torch.allclose(found, quiet, rtol=1e-4, atol=1e-4) == without
