"""What a published model says of a text: masks, labels, labels of words, by the head of its folder."""

import pytest
import torch

from data.errors import DataError
from models.pretrained import build_pretrained, load_pretrained, save_pretrained
from models.tokenizer import load_tokenizer
from predict import shown
from tasks.prediction import published_answer
from tests.corpus import write_tokenizer

TEXT = "Paris lies in France."
CONFIG = {
    "model_type": "longformer", "vocab_size": 330, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 42, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
    "attention_window": 4, "id2label": {"0": "no", "1": "yes", "2": "maybe"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def folder_with(head, tokenizer, folder, **entries):
    torch.manual_seed(0)
    model = build_pretrained({**CONFIG, **entries}, tokenizer, head=head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_pretrained(model, folder)
    return folder


def ids_of(tokenizer, text):
    loaded = load_tokenizer(tokenizer)
    return torch.tensor([[loaded.cls_id, *loaded.encode([text])[0], loaded.sep_id]])


def answer_and_logits(tokenizer, folder, **entries):
    """What is said of the text, and the logits [labels] of a global first token."""
    folder_with("sequence", tokenizer, folder, **entries)
    ids = ids_of(tokenizer, TEXT)
    with torch.no_grad():
        logits = load_pretrained(folder)(ids, is_global=torch.arange(ids.shape[1])[None] == 0)[0]
    return published_answer(str(folder), device="cpu")[1](TEXT), logits


@pytest.mark.parametrize("problem", [{}, {"problem_type": "single_label_classification"}])
def test_a_text_gets_the_label_of_its_global_first_token(tokenizer, tmp_path, problem):
    found, logits = answer_and_logits(tokenizer, tmp_path, **problem)
    expected = sorted(zip(logits.softmax(dim=-1).tolist(), ("no", "yes", "maybe"), strict=True), reverse=True)
    assert [each["label"] for each in found["labels"]] == [label for _, label in expected]
    assert [each["probability"] for each in found["labels"]] == pytest.approx([share for share, _ in expected])
    assert found["label"] == expected[0][1] and set(found) == {"label", "labels"}
    assert shown(found) == "\n".join([expected[0][1], *(f"  {label}: {share:.4f}" for share, label in expected)])


def test_labels_of_one_name_do_not_become_one(tokenizer, tmp_path):
    names = {"0": "no", "1": "no", "2": "yes"}
    found, logits = answer_and_logits(tokenizer, tmp_path, id2label=names)
    assert sorted(each["label"] for each in found["labels"]) == ["no", "no", "yes"]
    shares = [each["probability"] for each in found["labels"]]
    assert shares == pytest.approx(sorted(logits.softmax(dim=-1).tolist(), reverse=True))
    assert sum(shares) == pytest.approx(1.0)


def test_of_several_labels_each_has_a_probability_of_its_own(tokenizer, tmp_path):
    found, logits = answer_and_logits(tokenizer, tmp_path, problem_type="multi_label_classification")
    expected = dict(zip(("no", "yes", "maybe"), logits.sigmoid().tolist(), strict=True))
    assert set(found) == {"labels"}
    assert {each["label"]: each["probability"] for each in found["labels"]} == pytest.approx(expected)
    assert [each["probability"] for each in found["labels"]] == sorted(expected.values(), reverse=True)
    assert shown(found).startswith("  ") and len(shown(found).splitlines()) == 3


@pytest.mark.parametrize("problem", [{}, {"problem_type": "regression"}])
def test_one_number_is_a_score(tokenizer, tmp_path, problem):
    found, logits = answer_and_logits(tokenizer, tmp_path, num_labels=1, **problem)
    assert found == {"score": pytest.approx(logits.item())} and shown(found) == str(found["score"])


def test_several_numbers_are_scores(tokenizer, tmp_path):
    found, logits = answer_and_logits(tokenizer, tmp_path, problem_type="regression")
    assert found == {"score": pytest.approx(logits.tolist())}


def test_another_kind_of_problem_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="problem_type in the model's config.json is 'ranking', it must be regression"):
        answer_and_logits(tokenizer, tmp_path, problem_type="ranking")


@pytest.mark.parametrize("head", ["masked_lm", "pretraining", "sequence", "token"])
def test_what_is_not_finite_is_an_error(head, tokenizer, tmp_path):
    model = load_pretrained(folder_with(head, tokenizer, tmp_path / "sound"))
    with torch.no_grad():
        model.encoder.norm.weight.fill_(float("nan"))
    save_pretrained(model, tmp_path / "broken", tokenizer=tokenizer)
    with pytest.raises(DataError, match="what the model gives for this text is not finite"):
        published_answer(str(tmp_path / "broken"), device="cpu")[1]("Paris lies in <mask>.")


def test_words_get_the_label_of_their_first_token(tokenizer, tmp_path):
    folder = folder_with("token", tokenizer, tmp_path)
    found = published_answer(str(folder), device="cpu")[1](TEXT)["words"]
    # byte-level BPE parts words at spaces and marks
    assert [word["word"].strip() for word in found] == ["Paris", "lies", "in", "France", "."]
    with torch.no_grad():
        shares = load_pretrained(folder)(ids_of(tokenizer, TEXT)).softmax(dim=-1)[0]
    places = [place for place, _, _ in load_tokenizer(tokenizer).words(TEXT)]
    for word, place in zip(found, places, strict=True):
        best = int(shares[place].argmax())
        assert word["label"] == CONFIG["id2label"][str(best)]
        assert word["probability"] == pytest.approx(shares[place, best].item())


@pytest.mark.parametrize("head", ["masked_lm", "pretraining"])
def test_masks_are_filled_by_both_heads_that_know_words(head, tokenizer, tmp_path):
    folder = folder_with(head, tokenizer, tmp_path)
    (candidates,) = published_answer(str(folder), device="cpu")[1]("Paris lies in <mask>.")["masks"]
    assert len(candidates) == 5 and candidates[0]["probability"] >= candidates[4]["probability"] > 0


def test_other_heads_and_long_texts_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="has the head 'span_qa', which says nothing of one text: masked_lm"):
        published_answer(str(folder_with("span_qa", tokenizer, tmp_path / "span")), device="cpu")
    check, answer = published_answer(str(folder_with("sequence", tokenizer, tmp_path / "long")), device="cpu")
    with pytest.raises(DataError, match="the text has .* tokens, the position table of this model 40"):
        answer("Paris " * 60)
    with pytest.raises(DataError, match="the text has .* tokens, the position table of this model 40"):
        check("Paris " * 60)
    check(TEXT)


@pytest.mark.parametrize("head", ["masked_lm", "pretraining"])
def test_a_text_without_a_mask_is_refused_by_the_check_alone(head, tokenizer, tmp_path):
    check, _ = published_answer(str(folder_with(head, tokenizer, tmp_path)), device="cpu")
    check("Paris lies in <mask>.")
    with pytest.raises(DataError, match="there is nothing to fill: the text has no <mask>"):
        check(TEXT)
