"""Short dense models turned into long ones give the same for short texts, and read long ones."""

import json
import logging
import shutil

import pytest
import torch

from models import convert
from models.errors import PretrainedError
from models.pretrained import load_pretrained
from models.tokenizer import load_tokenizer
from tests.corpus import write_tokenizer
from tests.models.published import SIZES, theirs, transformers

LONG = 150
SIZED = {"longformer": {"window": 20}, "big_bird": {"block_size": 16, "num_random_blocks": 1},
         "nystromformer": {"num_landmarks": 20}}  # fmt: skip


@pytest.mark.parametrize("to", SIZED)
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_short_texts_give_the_same_and_long_ones_run(kind, to, tmp_path):
    original = theirs(kind, "ForMaskedLM")
    original.save_pretrained(tmp_path / "short")
    # as every published model has it: the two are compared without
    path = tmp_path / "short" / "config.json"
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    path.write_text(json.dumps(json.loads(path.read_text()) | dropout))
    difference = convert.convert(tmp_path / "short", tmp_path / "long", to=to, max_positions=LONG, **SIZED[to])
    assert difference < 1e-4
    short, long = load_pretrained(tmp_path / "short"), load_pretrained(tmp_path / "long")
    input_ids = torch.randint(3, SIZES["vocab_size"], (2, LONG), generator=torch.Generator().manual_seed(2))
    assert (short(input_ids[:, :12]) - long(input_ids[:, :12])).abs().max() < 1e-4
    assert long(input_ids).isfinite().all()
    rows, table = short.encoder.max_positions, long.encoder.position.weight[long.encoder.position_offset :]
    assert len(table) == LONG and torch.equal(table[rows : 2 * rows], table[:rows])
    with pytest.raises(ValueError, match="151 tokens, the position table of this model 150: .* models.convert"):
        long(torch.full((1, LONG + 1), 5))


@pytest.mark.parametrize("to", ["longformer", "big_bird"])
@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_twelve_layers_give_the_same_where_everything_is_seen(kind, to, tmp_path):
    """With a window over the text, or blocks that are all global: what published conversions do to 2.5e-6."""
    deep = {"num_hidden_layers": 12, "hidden_size": 48, "intermediate_size": 96, "initializer_range": 0.1}
    theirs(kind, "ForMaskedLM", **deep).save_pretrained(tmp_path / "short")
    sizes = {"window": 64} if to == "longformer" else {"block_size": 16, "num_random_blocks": 3}
    convert.convert(tmp_path / "short", tmp_path / "long", to=to, max_positions=LONG, **sizes)
    short = load_pretrained(tmp_path / "short")
    full = {"attention_type": "original_full"} if to == "big_bird" else {}
    long = load_pretrained(tmp_path / "long", **full)
    input_ids = torch.randint(3, SIZES["vocab_size"], (2, 61), generator=torch.Generator().manual_seed(3))
    valid = torch.ones(2, 61, dtype=torch.bool)
    valid[1, 50:] = False
    input_ids[~valid] = 1
    for is_global in (None, torch.arange(61).eq(0).expand(2, -1)):
        difference = (long(input_ids, valid, is_global) - short(input_ids, valid))[valid].abs().max()
        assert difference < 2.5e-6 * max(1.0, short(input_ids, valid)[valid].abs().max().item())


@pytest.mark.parametrize("ending", ["ForTokenClassification", "ForQuestionAnswering", "ForPreTraining"])
def test_other_heads_go_along(ending, tmp_path):
    theirs("bert", ending).save_pretrained(tmp_path / "short")
    convert.convert(tmp_path / "short", tmp_path / "long", to="longformer", max_positions=LONG, window=20)
    short, long = load_pretrained(tmp_path / "short"), load_pretrained(tmp_path / "long")
    assert type(short) is type(long)
    for one, two in zip(short(torch.full((1, 9), 5)), long(torch.full((1, 9), 5)), strict=True):
        torch.testing.assert_close(one, two, rtol=0.0, atol=1e-5)


def test_a_head_of_another_form_is_refused(tmp_path):
    theirs("bert", "ForSequenceClassification").save_pretrained(tmp_path / "short")
    with pytest.raises(PretrainedError, match="the source has no dense.weight"):
        convert.convert(tmp_path / "short", tmp_path / "long", to="longformer", max_positions=LONG, window=20)
    assert not (tmp_path / "long").exists()


def test_global_projections_begin_as_copies(tmp_path):
    theirs("roberta", "ForMaskedLM").save_pretrained(tmp_path / "short")
    convert.convert(tmp_path / "short", tmp_path / "long", to="longformer", max_positions=LONG, window=20)
    attention = load_pretrained(tmp_path / "long").encoder.layers[1].attention
    assert torch.equal(
        torch.cat([attention.query_global.weight, attention.key_value_global.weight]), attention.qkv.weight
    )
    # with the window over all of a short text a global token changes nothing
    model, input_ids = load_pretrained(tmp_path / "long"), torch.arange(3, 18)[None]
    is_global = torch.zeros_like(input_ids, dtype=torch.bool)
    is_global[0, 4] = True
    assert (model(input_ids, None, is_global) - model(input_ids)).abs().max() < 1e-4


def test_random_rows_are_others_and_reserved_ones_stay(tmp_path):
    theirs("roberta", "ForMaskedLM").save_pretrained(tmp_path / "short")
    options = {"to": "longformer", "max_positions": LONG, "window": 20, "positions": "random"}
    convert.convert(tmp_path / "short", tmp_path / "long", **options)
    short, long = (load_pretrained(tmp_path / name).encoder.position.weight for name in ("short", "long"))
    assert torch.equal(short[:2], long[:2]) and (short[2:20] - long[2:20]).abs().amax(dim=1).min() > 1e-3


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    theirs("longformer", "ForMaskedLM").save_pretrained(tmp_path / "long")
    with pytest.raises(PretrainedError, match="is a longformer, only bert, roberta, xlm-roberta are converted"):
        convert.convert(tmp_path / "long", tmp_path / "new", to="big_bird", max_positions=LONG)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(PretrainedError, match="is there already and not empty"):
        convert.convert(tmp_path / "long", tmp_path / "full", to="big_bird", max_positions=LONG)
    with pytest.raises(PretrainedError, match="full/file is there already and no folder: name a new folder"):
        convert.convert(tmp_path / "long", tmp_path / "full" / "file", to="big_bird", max_positions=LONG)
    assert convert.main([str(tmp_path / "none" / "such" / "folder"), str(tmp_path / "new"), "--to", "longformer"]) == 4
    assert "is no folder with config.json" in capsys.readouterr().err


def short_with_tokenizer(kind, folder):
    """A short model with the bare files that a RoBERTa or a BERT of 2019 comes with."""
    if kind == "bert":
        words = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *"abcdefghijklmnopqrstuvwxyz",
            "##a",
            "##s",
            "the",
            "of",
            "is",
            ".",
        ]
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(words))
    else:
        shutil.copytree(write_tokenizer(folder.parent), folder)
    theirs(kind, "ForMaskedLM", vocab_size=330).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    return folder


@pytest.mark.parametrize("to", SIZED)
@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_the_tokenizer_goes_along_as_the_one_it_is(kind, to, tmp_path):
    """Transformers' classes for these types read the same files as something else, or not at all."""
    short = short_with_tokenizer(kind, tmp_path / "short")
    convert.convert(short, tmp_path / "long", to=to, max_positions=LONG, **SIZED[to])
    sentences = ["Paris is the capital of France.", convert.SENTENCE]
    expected = load_tokenizer(short)
    assert len(set(expected.encode(sentences)[0])) > 4
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path / "long")
    assert stock(sentences, add_special_tokens=False)["input_ids"] == expected.encode(sentences)
    assert stock(sentences[0])["input_ids"] == expected.fast(sentences[0])["input_ids"]  # start and end, too
    assert load_tokenizer(tmp_path / "long").encode(sentences) == expected.encode(sentences)
    settings = json.loads((tmp_path / "long" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"].startswith({"roberta": "Roberta", "bert": "Bert"}[kind])
    assert settings["model_max_length"] == stock.model_max_length == LONG
    assert expected.fast.model_max_length == 64


def test_without_a_tokenizer_none_is_written_and_that_is_said(tmp_path, caplog):
    theirs("roberta", "ForMaskedLM").save_pretrained(tmp_path / "short")
    with caplog.at_level(logging.WARNING):
        convert.convert(tmp_path / "short", tmp_path / "long", to="longformer", max_positions=LONG, window=20)
    assert f"{tmp_path / 'long'}: no tokenizer is written, {tmp_path / 'short'} holds none" in caplog.text
    assert {file.name for file in (tmp_path / "long").iterdir()} == {"config.json", "model.safetensors"}


def test_tokenizer_files_that_cannot_be_read_are_copied_and_that_is_said(tmp_path, caplog):
    short = short_with_tokenizer("roberta", tmp_path / "short")
    (short / "vocab.json").write_text("{}")  # without a token for a mask
    convert.convert(short, tmp_path / "long", to="longformer", max_positions=LONG, window=20)
    assert "the tokenizer files are copied as they are: " in caplog.text
    assert (tmp_path / "long" / "vocab.json").read_text() == "{}"


def test_a_tokenizer_that_gives_other_ids_is_an_error(tmp_path, monkeypatch):
    short = short_with_tokenizer("roberta", tmp_path / "short")
    other = short_with_tokenizer("bert", tmp_path / "other")
    monkeypatch.setattr(convert, "load_tokenizer", lambda path: load_tokenizer(short if path == short else other))
    with pytest.raises(PretrainedError, match="the tokenizer written to .*long gives other ids than that of .*short"):
        convert.convert(short, tmp_path / "long", to="longformer", max_positions=LONG, window=20)


@pytest.mark.parametrize("to", ["longformer", "big_bird"])
@pytest.mark.parametrize(("kind", "entry", "expected"),
                         [("roberta", None, 2), ("bert", None, 3), ("bert", 7, 7)])  # fmt: skip
def test_the_separator_is_that_of_the_source(kind, entry, expected, to, tmp_path):
    """By its entry, else by its tokenizer; transformers else takes 66 for BigBird, 2 for Longformer."""
    short = short_with_tokenizer(kind, tmp_path / "short")
    if entry is not None:
        path = short / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sep_token_id": entry}))
    convert.convert(short, tmp_path / "long", to=to, max_positions=LONG, **SIZED[to])
    assert json.loads((tmp_path / "long" / "config.json").read_text())["sep_token_id"] == expected
    assert transformers.AutoConfig.from_pretrained(tmp_path / "long").sep_token_id == expected


def test_without_a_tokenizer_the_separator_is_the_end_of_a_text(tmp_path):
    theirs("roberta", "ForQuestionAnswering").save_pretrained(tmp_path / "short")
    convert.convert(tmp_path / "short", tmp_path / "long", to="longformer", max_positions=LONG, window=20)
    assert json.loads((tmp_path / "long" / "config.json").read_text())["sep_token_id"] == 2
    theirs("bert", "ForMaskedLM").save_pretrained(tmp_path / "bert")
    convert.convert(tmp_path / "bert", tmp_path / "unknown", to="longformer", max_positions=LONG, window=20)
    assert "sep_token_id" not in json.loads((tmp_path / "unknown" / "config.json").read_text())


def test_questions_of_a_converted_bigbird_end_where_they_should(tmp_path):
    short = short_with_tokenizer("roberta", tmp_path / "short")
    options = {"to": "big_bird", "max_positions": LONG, **SIZED["big_bird"]}
    convert.convert(short, tmp_path / "long", **options)
    assert load_pretrained(tmp_path / "long", head="span_qa", compat="hf").question_end == 2


def test_a_source_without_a_pad_is_named(tmp_path):
    theirs("bert", "ForMaskedLM").save_pretrained(tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    with pytest.raises(PretrainedError, match="has no pad_token_id: a Longformer counts its positions by it"):
        convert.convert(tmp_path / "short", tmp_path / "long", to="longformer", max_positions=LONG, window=20)
