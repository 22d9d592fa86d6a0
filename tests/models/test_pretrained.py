"""Folders that transformers wrote give the same numbers here, and the other way round."""

import json
import logging

import pytest
import torch

from models.errors import PretrainedError
from models.pretrained import load_pretrained, save_pretrained
from tests.models.published import (
    KINDS,
    SIZES,
    assert_equal_with_gradients,
    inputs,
    their_outputs,
    theirs,
    transformers,
)


@pytest.mark.parametrize("ending", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_theirs_gives_their_numbers_and_gradients(kind, ending, tmp_path):
    original = theirs(kind, ending)
    original.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, compat="hf")
    input_ids, valid, is_global = inputs(kind)
    expected = their_outputs(original, kind, input_ids, valid, is_global)[valid]
    found = model(input_ids, valid, is_global if is_global.any() else None)[valid]
    assert_equal_with_gradients(model, original, found, expected)
    save_pretrained(model, tmp_path / "again")
    again = type(original).from_pretrained(tmp_path / "again").eval()
    assert their_outputs(again, kind, input_ids, valid, is_global)[valid].equal(expected)


@pytest.mark.parametrize("kind", ["bert", "longformer", "big_bird"])
def test_the_pooler_is_theirs(kind, tmp_path):
    original = theirs(kind, "Model")
    original.save_pretrained(tmp_path)
    input_ids = inputs(kind)[0]
    model = load_pretrained(tmp_path, compat="hf")
    torch.testing.assert_close(model.pool(model(input_ids)), original(input_ids)[1], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("seq_len", "training"), [(37, True), (20, False)], ids=["train", "short"])
def test_bigbird_in_training_and_on_short_texts(seq_len, training, tmp_path):
    """Its random blocks are drawn in train() alone, and texts of up to (5 + 2 r) b = 28 tokens are seen whole."""
    original = theirs("big_bird", "ForMaskedLM")
    original.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path, compat="hf").train(training)
    input_ids, valid, _ = inputs("big_bird", seq_len)
    expected = original.train(training)(input_ids, attention_mask=valid.long())[0][valid]
    torch.testing.assert_close(model(input_ids, valid)[valid], expected, rtol=0.0, atol=1e-4)


def test_nystromformer_through_landmarks(tmp_path):
    """Theirs takes one length, without padding."""
    torch.manual_seed(0)
    options = {**KINDS["nystromformer"][1], "num_landmarks": 8, "segment_means_seq_len": 32}
    original = transformers.NystromformerForMaskedLM(transformers.NystromformerConfig(**SIZES, **options)).eval()
    original.save_pretrained(tmp_path)
    input_ids = torch.randint(3, 60, (2, 32), generator=torch.Generator().manual_seed(1))
    found = load_pretrained(tmp_path, compat="hf")(input_ids)
    torch.testing.assert_close(found, original(input_ids)[0], rtol=0.0, atol=1e-4)


def test_shards_and_old_pickles_are_read(tmp_path):
    original = theirs("roberta", "ForMaskedLM")
    original.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    original.save_pretrained(tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(original.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    input_ids = inputs("roberta")[0]
    shards, pickled = (load_pretrained(tmp_path / name)(input_ids) for name in ("shards", "pickle"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1 and shards.equal(pickled)
    untied = {**original.state_dict(), "lm_head.decoder.weight": torch.zeros(60, 32)}
    torch.save(untied, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match=r"lm_head.decoder.weight: not equal to encoder.word.weight"):
        load_pretrained(tmp_path / "pickle")


class Runs:
    def __reduce__(self):
        return print, ("this code must not run",)


@pytest.mark.fault(41)
@pytest.mark.fault(42)
def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch, capsys):
    theirs("roberta", "ForMaskedLM").save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match=r"the file has \(60, 32\), config.json says \(61, 32\)"):
        load_pretrained(tmp_path, vocab_size=61)
    with pytest.raises(PretrainedError, match="head is 'sequnce', it must be one of 'none', 'masked_lm'"):
        load_pretrained(tmp_path, head="sequnce")
    with pytest.raises(PretrainedError, match="compat is 'tf', it must be None or 'hf'"):
        load_pretrained(tmp_path, compat="tf")
    with pytest.raises(PretrainedError, match="model_type is 't5', known are bert, big_bird"):
        load_pretrained(tmp_path, model_type="t5")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(PretrainedError, match="model.safetensors is damaged .* copy or download it again"):
        load_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(PretrainedError, match="holds none of model.safetensors"):
        load_pretrained(tmp_path)
    torch.save({"x": Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match="more than tensors and is refused, as loading it would run code"):
        load_pretrained(tmp_path)
    assert "must not run" not in capsys.readouterr().out
    with pytest.raises(PretrainedError, match="holds no config.json"):
        load_pretrained(tmp_path.parent)
    with pytest.raises(PretrainedError, match="no/such/folder is no folder with config.json"):
        load_pretrained("no/such/folder")
    with pytest.raises(PretrainedError, match="the model was not made by load_pretrained"):
        save_pretrained(torch.nn.Linear(1, 1), tmp_path / "new")


@pytest.mark.fault(40)
def test_a_hub_name_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PretrainedError, match="nobody/nothing is no folder here, and the Hugging Face hub cannot be"):
        load_pretrained("nobody/nothing")


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
