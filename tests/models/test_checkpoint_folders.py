"""Folders under other names, with other heads, labels and number types; entries that cannot be honoured."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from models.errors import PretrainedError
from models.heads import MaskedLM, Pretraining, SequenceClassifier, TokenClassifier
from models.pretrained import load_pretrained, save_pretrained
from tests.models.published import inputs, theirs, transformers


def rewrite(folder, **entries) -> None:
    """Entries of a folder's config.json; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def folder_of_ai2(original, folder, **entries) -> None:
    """A transformers Longformer as AI2's own code writes it: a RoBERTa by name, keys counted on one side."""
    original.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    tensors = {name.replace("longformer.", "roberta."): tensor for name, tensor in original.state_dict().items()}
    tensors["roberta.embeddings.position_ids"] = torch.arange(66)[None]
    torch.save(tensors, folder / "pytorch_model.bin")
    one_sided = [window // 2 for window in original.config.attention_window]
    own = {"model_type": None, "architectures": ["RobertaForMaskedLM"], "attention_window": one_sided}
    own |= {"attention_dilation": [1, 1, 1], "attention_mode": "sliding_chunks", "autoregressive": False}
    rewrite(folder, **{**own, **entries})


VARIANTS = {"as released": {}, "roberta": {"model_type": "roberta"}, "longformer": {"model_type": "longformer"},
            "tvm": {"attention_mode": "tvm"}, "no mode": {"attention_mode": None},
            "no dilation": {"attention_dilation": None}, "named": {"attention_mode": "longformer"}}  # fmt: skip


@pytest.mark.parametrize("entries", VARIANTS.values(), ids=VARIANTS)
def test_a_folder_of_ai2_is_the_same_longformer(entries, tmp_path, caplog):
    original = theirs("longformer", "ForMaskedLM")
    folder_of_ai2(original, tmp_path / "ai2", **entries)
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(tmp_path / "ai2")
    assert not caplog.records and type(model) is MaskedLM
    assert [layer.attention.pattern.window[0] for layer in model.encoder.layers] == [2, 2, 4]
    input_ids, valid, is_global = inputs("longformer")
    expected = original(input_ids, attention_mask=valid.long(), global_attention_mask=is_global.long()).logits[valid]
    torch.testing.assert_close(model(input_ids, valid, is_global)[valid], expected, rtol=0.0, atol=1e-4)
    save_pretrained(model, tmp_path / "ours")
    again, info = transformers.LongformerForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert again.config.attention_window == [4, 4, 8] and not info["missing_keys"] and not info["unexpected_keys"]
    once_more = load_pretrained(tmp_path / "ours")  # and is not doubled again
    assert once_more(input_ids, valid, is_global).equal(model(input_ids, valid, is_global))


def test_one_window_for_all_layers_and_a_published_one_given(tmp_path):
    folder_of_ai2(theirs("longformer", "ForMaskedLM"), tmp_path, attention_window=3)
    windows = [layer.attention.pattern.window[0] for layer in load_pretrained(tmp_path).encoder.layers]
    assert windows == [3, 3, 3]
    model = load_pretrained(tmp_path, attention_window=[4, 8, 12])
    assert [layer.attention.pattern.window[0] for layer in model.encoder.layers] == [2, 4, 6]


def test_a_roberta_lengthened_by_the_notebook_counts_both_sides(tmp_path):
    original = theirs("longformer", "ForMaskedLM")
    bare = {"attention_mode": None, "attention_dilation": None, "autoregressive": None}
    folder_of_ai2(original, tmp_path, **bare, model_type="roberta", attention_window=[4, 4, 8],
                  architectures=["RobertaLongForMaskedLM"])  # fmt: skip
    input_ids, valid, is_global = inputs("longformer")
    expected = original(input_ids, attention_mask=valid.long(), global_attention_mask=is_global.long()).logits[valid]
    found = load_pretrained(tmp_path)(input_ids, valid, is_global)[valid]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)


def test_a_dilated_folder_of_ai2_is_computed_and_not_exported(tmp_path):
    folder_of_ai2(theirs("longformer", "ForMaskedLM"), tmp_path, attention_dilation=[1, 2, [1, 1, 3, 3]])
    model = load_pretrained(tmp_path)
    dilations = [layer.attention.pattern.dilation for layer in model.encoder.layers]
    assert dilations == [(1, 1, 1, 1), (2, 2, 2, 2), (1, 1, 3, 3)]
    assert model(*inputs("longformer")).isfinite().all()
    with pytest.raises(PretrainedError, match=r"attention_dilation is \[1, 2, \[1, 1, 3, 3\]\]: .* nothing is written"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mode", ["n2", "sliding_chunks_no_overlap", "sliding_chunks3"])
def test_modes_of_ai2_that_see_other_keys_are_refused(mode, tmp_path):
    folder_of_ai2(theirs("longformer", "ForMaskedLM"), tmp_path, attention_mode=mode)
    with pytest.raises(PretrainedError, match=f"attention_mode is '{mode}', which sees other keys than a sliding"):
        load_pretrained(tmp_path)
    model = load_pretrained(tmp_path, attention_mode="longformer")
    assert model.encoder.layers[2].attention.pattern.window[0] == 4


REFUSED = {
    "relative": ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    "decoder": ("bert", {"is_decoder": True}, "is_decoder is True: this is a decoder, encoders alone are loaded here"),
    "cross": ("bert", {"add_cross_attention": True}, "add_cross_attention is True"),
    "causal": ("longformer", {"autoregressive": True}, "autoregressive is True"),
    "next": ("bert", {"architectures": ["BertForNextSentencePrediction"]}, "architectures names BertForNext.* head="),
    "causal_lm": ("bert", {"architectures": ["BertLMHeadModel"]}, "architectures names BertLMHeadModel, known heads"),
    "old": ("bert", {"model_type": None}, "model_type is None, known are bert, big_bird"),
    "windowless": ("longformer", {"attention_mode": "tvm", "attention_window": None}, "no entry 'attention_window'"),
    "none": ("bert", {"num_labels": 0}, "num_labels is 0, it must be a whole number of at least 1"),
}


@pytest.mark.parametrize(("kind", "entries", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_compute_something_else_is_refused(kind, entries, message, tmp_path):
    theirs(kind, "ForMaskedLM").save_pretrained(tmp_path)
    rewrite(tmp_path, **entries)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(tmp_path)


def test_absolute_positions_and_what_says_no_are_taken(tmp_path):
    theirs("bert", "ForMaskedLM").save_pretrained(tmp_path)
    rewrite(tmp_path, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    assert type(load_pretrained(tmp_path)) is MaskedLM


def test_an_unknown_entry_is_named_with_the_nearest(tmp_path):
    theirs("longformer", "ForMaskedLM").save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="has no entry atention_window, did you mean attention_window"):
        load_pretrained(tmp_path, atention_window=8)
    with pytest.raises(PretrainedError, match="has no entry xyz; known are .*vocab_size"):
        load_pretrained(tmp_path, xyz=8)
    assert load_pretrained(tmp_path, attention_window=8).encoder.layers[0].attention.pattern.window[0] == 4


def test_labels_are_theirs_and_written_back(tmp_path):
    names = {0: "left", 1: "right", 2: "neither"}
    theirs("roberta", "ForSequenceClassification", id2label=names).save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    assert type(model) is SequenceClassifier and model.out.out_features == 3
    save_pretrained(model, tmp_path / "ours")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert config.id2label == names and config.label2id == {"left": 0, "right": 1, "neither": 2}
    with pytest.raises(PretrainedError, match=r"classifier.out_proj.weight: the file has \(3, 32\), .* says \(4, 32\)"):
        load_pretrained(tmp_path / "theirs", num_labels=4)
    other = load_pretrained(tmp_path / "theirs", head="token", id2label={0: "a", 1: "b"})
    assert other.out.out_features == 2
    save_pretrained(other, tmp_path / "tokens")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "tokens")
    assert config.id2label == {0: "a", 1: "b"} and config.architectures == ["RobertaForTokenClassification"]


def test_another_head_does_not_take_tensors_of_the_same_name(tmp_path, caplog):
    original = theirs("bert", "ForTokenClassification")
    original.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(tmp_path, head="sequence")
    assert "new, not from the files: bert.pooler.dense.weight" in caplog.text
    assert "not used: classifier.bias, classifier.weight" in caplog.text
    assert not model.out.weight.equal(original.classifier.weight)
    rewrite(tmp_path, architectures=None)  # nothing says whose they are
    assert load_pretrained(tmp_path, head="token").out.weight.equal(original.classifier.weight)


def test_a_pretraining_folder_and_the_heads_it_gives(tmp_path, caplog):
    original = theirs("big_bird", "ForPreTraining")
    original.save_pretrained(tmp_path / "theirs")
    assert type(load_pretrained(tmp_path / "theirs")) is Pretraining
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(tmp_path / "theirs", head="masked_lm", compat="hf")
    assert "not used: cls.seq_relationship.bias, cls.seq_relationship.weight" in caplog.text
    input_ids, valid, _ = inputs("big_bird")
    expected = original(input_ids, attention_mask=valid.long()).prediction_logits[valid]
    torch.testing.assert_close(model(input_ids, valid)[valid], expected, rtol=0.0, atol=1e-4)
    save_pretrained(model, tmp_path / "ours")
    again, info = transformers.BigBirdForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(again.eval()(input_ids, attention_mask=valid.long()).logits[valid], expected)
    caplog.clear()
    assert type(load_pretrained(tmp_path / "theirs", head="token")) is TokenClassifier
    assert "new, not from the files: classifier.weight" in caplog.text and "pooler" not in caplog.text


def test_bert_writes_a_pooler_where_its_class_has_one(tmp_path):
    theirs("bert", "ForPreTraining").save_pretrained(tmp_path / "theirs")
    for head, pooled in {"masked_lm": False, "span_qa": False, "sequence": True, "pretraining": True}.items():
        save_pretrained(load_pretrained(tmp_path / "theirs", head=head), tmp_path / head)
        names = load_file(tmp_path / head / "model.safetensors")
        assert ("bert.pooler.dense.weight" in names) == pooled


def test_half_precision_comes_in_as_float32_and_says_so(tmp_path):
    original = theirs("roberta", "ForMaskedLM").half()
    original.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours")
    again = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert again.dtype == torch.float32
    input_ids, valid, _ = inputs("roberta")
    torch.testing.assert_close(again(input_ids, attention_mask=valid.long())[0][valid], model(input_ids, valid)[valid])
