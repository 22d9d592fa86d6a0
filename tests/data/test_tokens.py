"""Token corpora: what is encoded is what is mapped, once, in splits that hold; damage is found."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.documents import read_documents
from data.errors import DataError
from data.tokens import TokenCorpus, load_tokens

TEXTS = [f"document {number} " + "word " * (number % 7) for number in range(100)]


class Bytes:
    """A tokenizer whose ids are bytes, and which counts what it is asked for."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift
        self.calls: list[int] = []

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.calls.append(len(texts))
        return [[byte + self.shift for byte in text.encode()] for text in texts]


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture
def corpus_file(tmp_path) -> Path:
    return write(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def load(tmp_path):
    def load(path: Path, encode: Bytes, **options) -> TokenCorpus:
        settings = {"vocab_size": 256, "tokenizer_digest": "bytes", "cache_dir": tmp_path / "cache", "progress": False}
        return load_tokens(path, encode=encode, **{**settings, **options})

    return load


def documents_of(corpus: TokenCorpus, split: str) -> list[list[int]]:
    part = corpus.splits[split]
    spans = zip(part.offsets[:-1], part.offsets[1:], strict=True)
    return [part.tokens[start:end].tolist() for start, end in spans]


def texts_of(corpus: TokenCorpus, split: str) -> list[str]:
    return [bytes(ids).decode() for ids in documents_of(corpus, split)]


def test_every_document_is_in_one_split_whole(load, corpus_file):
    corpus = load(corpus_file, Bytes(), holdout=0.1)
    parts = {split: texts_of(corpus, split) for split in ("train", "valid", "test")}
    assert {split: len(texts) for split, texts in parts.items()} == {"train": 80, "valid": 10, "test": 10}
    assert sorted(sum(parts.values(), [])) == sorted(TEXTS)
    # within a split, in the order of the corpus
    assert all(texts == sorted(texts, key=TEXTS.index) for texts in parts.values())
    for split in corpus.splits.values():
        assert split.tokens.dtype == np.uint16 and split.offsets.dtype == np.int64
        assert split.offsets[0] == 0 and split.offsets[-1] == len(split.tokens) == split.num_tokens
        assert isinstance(split.tokens, np.memmap) and not split.tokens.flags.writeable
    facts = corpus.fingerprint
    assert facts["documents"] == 100 and facts["tokens"] == sum(map(len, TEXTS))
    assert facts["source"] == "corpus.jsonl" and facts["tokenizer"] == "bytes" and len(facts["sha256"]) == 64
    assert json.loads(json.dumps(facts)) == facts


def test_splits_follow_the_text_not_its_place(load, tmp_path, corpus_file):
    one = load(corpus_file, Bytes(), holdout=0.1)
    other = load(write(tmp_path / "other.jsonl", TEXTS[::-1]), Bytes(), holdout=0.1)
    for split in ("train", "valid", "test"):
        assert sorted(texts_of(one, split)) == sorted(texts_of(other, split))


def test_a_corpus_is_encoded_once_in_batches(load, corpus_file):
    first, second = Bytes(), Bytes()
    corpus = load(corpus_file, first)
    again = load(corpus_file, second)
    assert first.calls == [100] and second.calls == []
    assert again == corpus


@pytest.mark.parametrize("what", ["tokenizer", "holdout", "vocab_size", "content", "ending"])
def test_what_changes_the_ids_makes_new_ones(load, corpus_file, what):
    before = load(corpus_file, Bytes())
    options = {
        "tokenizer": {"tokenizer_digest": "other"},
        "holdout": {"holdout": 0.2},
        "vocab_size": {"vocab_size": 2**16 + 1},
    }.get(what, {})
    if what == "content":
        write(corpus_file, [*TEXTS, "one more"])
    if what == "ending":  # the same bytes as one document
        corpus_file = corpus_file.rename(corpus_file.with_suffix(".txt"))
        with pytest.raises(DataError, match="has 1 document with text"):
            load(corpus_file, Bytes())
        return
    encode = Bytes()
    after = load(corpus_file, encode, **options)
    assert sum(encode.calls) == len(TEXTS) + (what == "content")
    assert after.splits["train"].file != before.splits["train"].file
    assert after.splits["train"].tokens.dtype == (np.int32 if what == "vocab_size" else np.uint16)


@pytest.mark.parametrize("place", [0, 1000, -3], ids=["tokens", "middle", "offsets"])
def test_damage_in_the_cache_is_mended(load, corpus_file, place):
    corpus = load(corpus_file, Bytes())
    file = corpus.splits["train"].file
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 1
    for content in (bytes(damaged), whole[:-1], b""):
        file.write_bytes(content)
        encode = Bytes()
        assert texts_of(load(corpus_file, encode), "train") and encode.calls == [100]
        assert file.read_bytes() == whole
    file.with_suffix(".json").write_text("{")
    assert load(corpus_file, Bytes()) == corpus


def test_a_split_travels_as_a_path(load, corpus_file):
    split = load(corpus_file, Bytes()).splits["valid"]
    tokens = split.tokens.tolist()  # once mapped, no map may travel either
    sent = pickle.dumps(split)
    assert len(sent) < 500
    assert pickle.loads(sent).tokens.tolist() == tokens
    assert pickle.loads(sent).offsets.tolist() == split.offsets.tolist()


def test_large_ids_and_empty_documents(load, tmp_path):
    file = write(tmp_path / "corpus.jsonl", ["aa", "b", "ccc", "d"])

    def encode(texts: list[str]) -> list[list[int]]:
        return [[] if text == "b" else [70_000 + ord(text[0])] * len(text) for text in texts]

    corpus = load(file, encode, vocab_size=10**5)
    assert corpus.fingerprint["documents"] == 3 and corpus.fingerprint["tokens"] == 6
    found = [ids for split in corpus.splits for ids in documents_of(corpus, split)]
    assert sorted(found) == [[70_097] * 2, [70_099] * 3, [70_100]]


def test_long_documents_are_encoded_few_at_a_time(load, tmp_path):
    encode = Bytes()
    corpus = load(write(tmp_path / "corpus.jsonl", ["a" * 3_000_000, "b" * 3_000_000, "c"]), encode)
    assert encode.calls == [2, 1]
    assert sorted(split.num_tokens for split in corpus.splits.values()) == [1, 3_000_000, 3_000_000]
    # an odd number of ids of two bytes lies before them
    assert all(split.offsets.flags.aligned for split in corpus.splits.values())


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_documents(load, tmp_path, count):
    file = write(tmp_path / "corpus.jsonl", TEXTS[:count])
    with pytest.raises(DataError, match=f"corpus.jsonl has {count} documents? with text, at least 3 are needed"):
        load(file, Bytes())
    assert not list((tmp_path / "cache").glob("*.bin"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode": Bytes(shift=200)}, r"encode gave ids 2\d\d to 3\d\d, vocab_size is 256"),
        ({"encode": Bytes(shift=-200)}, r"encode gave ids -1\d\d to"),
        ({"encode": lambda texts: [[1]]}, "encode gave 1 lists of ids for 100 texts"),
        ({"holdout": 0.5}, "holdout=0.5 must lie between 0 and 0.5"),
    ],
)
def test_impossible_values(load, corpus_file, options, message):
    with pytest.raises(ValueError, match=message):
        load(corpus_file, **{"encode": Bytes(), **options})


def test_progress_is_shown_on_stderr(load, corpus_file, capsys):
    load(corpus_file, Bytes(), progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "encoding corpus.jsonl: 100 documents" in shown.err


def test_books(load, data_file):
    """Thirteen real documents, the longest kind of corpus, as bytes."""
    folder = data_file("books")
    corpus = load(folder, Bytes(), holdout=0.1)
    assert {name: split.num_documents for name, split in corpus.splits.items()} == {"train": 11, "valid": 1, "test": 1}
    assert corpus.fingerprint["tokens"] == sum(len(text.encode()) for text in read_documents(folder))
