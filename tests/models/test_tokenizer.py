"""Tokenizers from a checkpoint's own files: the kinds there are, what a task asks of them, what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest

from models.errors import PretrainedError
from models.tokenizer import load_tokenizer
from tests.corpus import SPECIALS, write_tokenizer
from tests.helpers import ROOT

TEXT = "Paris is the capital of France."


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("bpe"))


@pytest.fixture
def wordpiece(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "par", "##is", "is", "the", "capital", "of", "france", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return tmp_path


def test_byte_level_vocabulary_of_roberta(bpe):
    tokenizer = load_tokenizer(bpe)
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 1, 2, 4)
    assert tokenizer.special_ids == [0, 1, 2, 3, 4] and tokenizer.vocab_size == 320
    (ids,) = tokenizer.encode([TEXT])
    assert tokenizer.decode(ids) == TEXT and not set(ids) & set(tokenizer.special_ids)
    assert tokenizer.encode([]) == []


def test_word_pieces_of_bert(wordpiece):
    tokenizer = load_tokenizer(wordpiece)
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id) == (2, 3, 0, 4)
    assert tokenizer.encode([TEXT]) == [[5, 6, 7, 8, 9, 10, 11, 12]]
    starts = tokenizer.word_starts()
    assert starts.dtype == np.bool_ and starts.tolist() == [place != 6 for place in range(13)]
    # a letter that marks words elsewhere
    (wordpiece / "vocab.txt").write_text((wordpiece / "vocab.txt").read_text() + "\nĠ")
    assert load_tokenizer(wordpiece).word_starts()[:13].tolist() == starts.tolist()


def test_capital_letters_stay_where_the_folder_says_so(wordpiece):
    (wordpiece / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert load_tokenizer(wordpiece).encode(["Paris is"]) == [[1, 7]]


def test_one_file_with_everything(bpe, tmp_path):
    load_tokenizer(bpe).fast.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode([TEXT]) == load_tokenizer(bpe).encode([TEXT])
    assert tokenizer.digest == load_tokenizer(bpe).digest


def test_a_mask_in_a_text_is_the_tokenizers_own(bpe, wordpiece):
    for folder in (bpe, wordpiece):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode_prompt("Paris is the <mask> of France.").count(tokenizer.mask_id) == 1


def test_special_tokens_in_a_corpus_are_text(bpe, wordpiece):
    for folder, text in ((bpe, "Paris <mask> is </s> <pad> the"), (wordpiece, "paris [MASK] is [SEP] the")):
        tokenizer = load_tokenizer(folder)
        (ids,) = tokenizer.encode([text])
        unknown = tokenizer.fast.unk_token_id
        assert not (set(ids) - {unknown}) & set(tokenizer.special_ids)
    assert load_tokenizer(bpe).decode(load_tokenizer(bpe).encode(["a </s> b"])[0]) == "a </s> b"


def test_word_starts_of_byte_level_tokens(bpe):
    tokenizer = load_tokenizer(bpe)
    starts = tokenizer.word_starts()
    (ids,) = tokenizer.encode([" Paris lies in France"])
    words = "".join(" |" + tokenizer.decode([i]).strip() if starts[i] else tokenizer.decode([i]) for i in ids)
    assert words == " |Paris |lies |in |France"
    assert not starts[: len(SPECIALS)].any()


def test_words_with_their_places(bpe, wordpiece):
    for folder, text in ((bpe, "Paris lies in France"), (wordpiece, "Paris is the capital")):
        tokenizer = load_tokenizer(folder)
        words = tokenizer.words(text)
        assert [text[start:end].strip() for _, start, end in words] == text.split()
        (ids,) = tokenizer.encode([text])
        starts = [place for place, _, _ in words]
        assert starts[0] == 1 and starts == sorted(set(starts)) and starts[-1] <= len(ids)


def test_digest_changes_with_the_vocabulary(bpe, tmp_path):
    other = write_tokenizer(tmp_path, vocab_size=300)
    assert load_tokenizer(bpe).digest != load_tokenizer(other).digest


@pytest.mark.fault(40)
def test_what_is_no_tokenizer_is_refused(tmp_path, wordpiece):
    with pytest.raises(PretrainedError, match="is no folder with tokenizer files"):
        load_tokenizer(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(PretrainedError, match="neither tokenizer.json, nor vocab.json with merges.txt, nor vocab.txt"):
        load_tokenizer(empty)
    (empty / "spiece.model").write_bytes(b"x")
    with pytest.raises(PretrainedError, match="SentencePiece model but no tokenizer.json"):
        load_tokenizer(empty)
    (empty / "tokenizer.json").write_text("{")
    with pytest.raises(PretrainedError, match="cannot be read"):
        load_tokenizer(empty)


def test_the_published_vocabulary(data_file):
    tokenizer = load_tokenizer(data_file("tokenizers/roberta-base/vocab.json").parent)
    assert tokenizer.vocab_size == 50265 and tokenizer.mask_id == 50264
    # the ids that transformers documents for RoBERTa
    assert tokenizer.encode(["Hello world", " Hello world"]) == [[31414, 232], [20920, 232]]


HOSTILE = {
    "pair": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", "mine.Tokenizer"]}}),
    "old form": ("tokenizer_config.json", {"auto_map": ["mine.Tokenizer", None], "tokenizer_class": "Tokenizer"}),
    "of another": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "nobody/else--mine.Tokenizer"]}}),
    "configuration": ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}),
    "of both": ("config.json", {"model_type": "bert", "auto_map": {"AutoTokenizer": "mine.Tokenizer"}}),
}


@pytest.mark.fault(41)
@pytest.mark.parametrize(("file", "entries"), HOSTILE.values(), ids=HOSTILE)
def test_code_that_comes_with_a_tokenizer_is_refused_without_a_question(bpe, tmp_path, file, entries):
    folder = tmp_path / "folder"
    load_tokenizer(bpe).fast.save_pretrained(folder)
    if file == "config.json":
        (folder / "tokenizer_config.json").unlink()
    (folder / file).write_text(json.dumps(entries))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code = f"from models.tokenizer import load_tokenizer; load_tokenizer({str(folder)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, input="y\ny\ny\n", capture_output=True, text=True, timeout=240)
    assert not (tmp_path / "ran").exists()
    assert f"PretrainedError: {folder / file} names code of the folder's own (auto_map)" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr


def test_code_of_a_model_does_not_keep_its_tokenizer_from_being_read(bpe, tmp_path):
    load_tokenizer(bpe).fast.save_pretrained(tmp_path)
    own = {"model_type": "bert", "auto_map": {"AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert load_tokenizer(tmp_path).encode([TEXT]) == load_tokenizer(bpe).encode([TEXT])


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_settings_that_are_no_object_are_named(wordpiece, content):
    (wordpiece / "tokenizer_config.json").write_text(content)
    with pytest.raises(PretrainedError, match="tokenizer_config.json (holds a list|is no JSON)"):
        load_tokenizer(wordpiece)
