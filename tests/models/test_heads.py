"""Heads that no class of transformers has, and what heads do with their arguments."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F

from models.encoder import Encoder
from models.heads import Candidates, Pretraining, Retrieval, candidate_scores
from models.pretrained import load_pretrained, save_pretrained
from tests.models.published import KINDS, inputs, theirs, transformers


def pairs(kind):
    """Two texts each: ids [3, 2, T], which are real, which are global."""
    return (torch.stack([tensor, tensor.roll(1, 0)], dim=1) for tensor in inputs(kind))


def test_scores_of_candidates_are_means_over_their_mentions():
    scores = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [3.0, 5.0, 7.0, 9.0, 11.0]], requires_grad=True)
    index = torch.tensor([[0, -1, 2, 0, 2], [-1, 1, -1, -1, -1]])
    found = candidate_scores(scores, index, 3)
    assert found.tolist() == [[4.5, -torch.inf, 10.0], [-torch.inf, 5.0, -torch.inf]]
    F.cross_entropy(found, torch.tensor([2, 1])).backward()
    # a candidate alone has probability 1; two share what the first row's loss pulls, each by half for two mentions
    share = torch.tensor([4.5, 10.0]).softmax(0)[0].item() / 4
    expected = torch.tensor([[share, 0.0, -share, share, -share], [0.0] * 5])
    torch.testing.assert_close(scores.grad, expected)
    # chunks of a text, side by side
    chunks, places = scores.detach().reshape(1, -1), torch.tensor([[0, 1, -1, -1, -1, 0, -1, -1, 1, -1]])
    assert candidate_scores(chunks, places, 2).tolist() == [[2.0, 5.5]]
    with pytest.raises(ValueError, match=r"scores are \(2, 5\), candidate_index is \(1, 10\)"):
        candidate_scores(scores, places, 2)
    with pytest.raises(RuntimeError, match="out of bounds"):
        candidate_scores(scores, index, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_one_layer_over_the_states(kind, tmp_path):
    original = theirs(kind, "ForMaskedLM")
    original.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", head="candidates", compat="hf")
    assert type(model) is Candidates
    given, positions = inputs(kind), torch.tensor([[2, 4], [0, 1], [9, 9]])
    states, found = model.encoder(*given), model(*given)
    torch.testing.assert_close(found, states @ model.out.weight[0])
    torch.testing.assert_close(model(*given, logit_positions=positions), found.take_along_dim(positions, dim=1))
    saved_and_loaded_again(model, original, given, tmp_path / "ours")
    tensors = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (tensors["longspan_head"], tensors["architectures"]) == ("candidates", [f"{KINDS[kind][0]}Model"])


@pytest.mark.parametrize("kind", KINDS)
def test_retrieval_compares_the_first_tokens(kind, tmp_path):
    original = theirs(kind, "Model")
    original.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", head="retrieval", compat="hf", num_labels=3)
    assert type(model) is Retrieval
    input_ids, valid, is_global = pairs(kind)
    x, y = (model.encoder(input_ids[:, one], valid[:, one], is_global[:, one])[:, 0] for one in (0, 1))
    expected = model.out(model.up(torch.cat([x, y, x * y, x - y], dim=1)).relu())
    found = model(input_ids, valid, is_global)
    assert found.shape == (3, 3)
    torch.testing.assert_close(found, expected)
    saved_and_loaded_again(model, original, (input_ids, valid, is_global), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"input_ids must be \[B, 2, T\], two texts each, got \(3, 37\)"):
        model(input_ids[:, 0])


def saved_and_loaded_again(model, original, given, folder):
    """The same head and numbers with us; in transformers the bare encoder, with the head's tensors left over."""
    save_pretrained(model, folder)
    again = load_pretrained(folder, compat="hf")
    assert type(again) is type(model)
    torch.testing.assert_close(again(*given), model(*given), rtol=0.0, atol=0.0)
    save_pretrained(load_pretrained(folder, head="none"), folder / "bare")
    assert "longspan_head" not in json.loads((folder / "bare" / "config.json").read_text())
    assert type(load_pretrained(folder / "bare")) is Encoder
    bare, info = type(original.base_model).from_pretrained(folder, output_loading_info=True)
    head = "candidates." if type(model) is Candidates else "retrieval."
    assert info["unexpected_keys"] and all(name.startswith(head) for name in info["unexpected_keys"])
    assert all("pooler" in name for name in info["missing_keys"])
    state = original.base_model.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in bare.state_dict().items() if "pooler" not in name)


@pytest.mark.parametrize("kind", ["roberta", "longformer", "nystromformer"])
def test_pretraining_where_no_class_has_it(kind, tmp_path):
    """Sentence order for Nyströmformer: saved as ForMaskedLM with a pooler and two logits more, which come back."""
    original = theirs(kind, "ForMaskedLM")
    original.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", head="pretraining", compat="hf")
    save_pretrained(model, tmp_path / "ours")
    again = load_pretrained(tmp_path / "ours", compat="hf")
    assert type(again) is Pretraining
    given = inputs(kind)
    for found, expected in zip(again(*given), model(*given), strict=True):
        assert found.equal(expected)
    name = f"{KINDS[kind][0]}ForMaskedLM"
    stock, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert all("pooler" in name or name.startswith("cls.seq_relationship") for name in info["unexpected_keys"])
    state = original.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in stock.state_dict().items())


def test_a_new_head_is_named_and_small(tmp_path, caplog):
    theirs("roberta", "ForMaskedLM").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(tmp_path, head="sequence", num_labels=5)
    assert "new, not from the files: classifier.dense.weight, classifier.dense.bias, classifier.out_proj" in caplog.text
    assert "not used: lm_head.bias" in caplog.text
    assert model.out.weight.shape == (5, 32) and model.dense.weight.std() < 0.03 and not model.out.bias.any()


def test_question_logits_are_lowered_in_compat_alone(tmp_path):
    theirs("big_bird", "ForQuestionAnswering").save_pretrained(tmp_path)
    input_ids, valid, _ = inputs("big_bird")
    input_ids[:2, 6] = 2  # the third text has no separator
    logits = load_pretrained(tmp_path, compat="hf")(input_ids, valid)
    lowered = logits[..., 0] < -1e5
    assert lowered[:2, 1:7].all() and not lowered[:2, 7:].any() and not lowered[:, 0].any() and not lowered[2].any()
    plain = load_pretrained(tmp_path)
    assert plain.question_end is None and plain(input_ids, valid).abs().max() < 1e3
    positions = torch.tensor([[0, 3, 30]] * 3)
    some = load_pretrained(tmp_path, compat="hf")(input_ids, valid, logit_positions=positions)
    torch.testing.assert_close(some, logits.take_along_dim(positions[..., None], dim=1))
    bare = load_pretrained(tmp_path, compat="hf")
    bare.question_end = None
    kinds = (torch.arange(37) > 6).long().expand(2, -1)
    told = bare(input_ids[:2], valid[:2], token_type_ids=kinds)
    torch.testing.assert_close(told[:, 7:], logits[:2, 7:])
    assert not torch.allclose(bare(input_ids[:2], valid[:2])[:, 7:], logits[:2, 7:])
