"""Corpora: splits, sources, the cache, and every way a file can be wrong."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data import chars
from data.chars import load_chars, split_lengths
from data.errors import DataError

RAW = np.random.default_rng(0).choice(np.frombuffer(b"abcdefgh ijkl", np.uint8), 100_000).tobytes()


def sha1(raw: bytes) -> str:
    return hashlib.sha1(raw).hexdigest()


def zipped(raw: bytes, *names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("text8",):
            archive.writestr(name, raw)
    return buffer.getvalue()


PACKED = {
    "plain": lambda raw: raw,
    "zip": zipped,
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def whole(corpus) -> bytes:
    return b"".join(bytes(corpus.splits[split]) for split in ("train", "valid", "test"))


@pytest.mark.parametrize("named", [True, False], ids=["ending", "no_ending"])
@pytest.mark.parametrize("kind", PACKED)
def test_every_packing_gives_the_same_splits(tmp_path, kind, named):
    file = tmp_path / ("corpus" if kind == "plain" or not named else f"corpus.{kind}")
    file.write_bytes(PACKED[kind](RAW))
    corpus = load_chars("text8", path=file, cache_dir=tmp_path / "cache")
    assert [len(corpus.splits[split]) for split in ("train", "valid", "test")] == [90_000, 5_000, 5_000]
    assert whole(corpus) == RAW
    assert corpus.vocab_size == 256 and corpus.name == "text8"
    expected = {"source": file.name, "bytes": len(RAW), "sha256": hashlib.sha256(RAW).hexdigest()}
    assert json.loads(json.dumps(corpus.fingerprint)) == expected


def test_splits_are_read_only_memory_maps(tmp_path):
    (tmp_path / "corpus.xz").write_bytes(lzma.compress(RAW))
    corpus = load_chars("enwik8", path=tmp_path / "corpus.xz", cache_dir=tmp_path)
    for split in corpus.splits.values():
        assert isinstance(split, np.memmap) and split.dtype == np.uint8
        with pytest.raises(ValueError, match="read-only"):
            split[0] = 0


def test_a_plain_file_is_mapped_in_place(tmp_path):
    (tmp_path / "corpus").write_bytes(RAW)
    corpus = load_chars("enwik8", path=tmp_path / "corpus", cache_dir=tmp_path / "cache")
    assert str(corpus.splits["test"].filename) == str(tmp_path / "corpus")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("num_bytes", "lengths"),
    [(10**8, [90_000_000, 5_000_000, 5_000_000]), (4_154_327, [3_738_894, 207_716, 207_717])],
)
def test_split_lengths(num_bytes, lengths):
    assert split_lengths(num_bytes) == lengths


def test_unpacked_once_and_reused(tmp_path, monkeypatch):
    (tmp_path / "corpus.gz").write_bytes(gzip.compress(RAW))
    load_chars("enwik8", path=tmp_path / "corpus.gz", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(chars, "open_bytes", lambda *a, **k: pytest.fail("unpacked a second time"))
    corpus = load_chars("enwik8", path=tmp_path / "corpus.gz", cache_dir=tmp_path / "cache")
    assert whole(corpus) == RAW


def test_loaders_started_together_unpack_once(tmp_path, monkeypatch):
    (tmp_path / "corpus.gz").write_bytes(gzip.compress(RAW))
    opened, original = [], chars.open_bytes

    def slow_open(*arguments, **options):
        opened.append(arguments)
        time.sleep(0.2)
        return original(*arguments, **options)

    monkeypatch.setattr(chars, "open_bytes", slow_open)
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(load_chars, "enwik8", path=tmp_path / "corpus.gz", cache_dir=tmp_path / "cache")
            for _ in range(4)
        ]
    assert all(whole(job.result()) == RAW for job in jobs)
    assert len(opened) == 1


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, 1000),
        lambda file: file.write_bytes(b"?" + file.read_bytes()[1:]),
        lambda file: file.unlink(),
        lambda file: file.with_suffix(".json").unlink(),
        lambda file: file.with_suffix(".json").write_text("{"),
    ],
    ids=["truncated", "edited", "deleted", "no_record", "broken_record"],
)
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    (tmp_path / "corpus.gz").write_bytes(gzip.compress(RAW))
    cache = tmp_path / "cache"
    load_chars("enwik8", path=tmp_path / "corpus.gz", cache_dir=cache)
    [file] = cache.glob("*.bin")
    damage(file)
    assert whole(load_chars("enwik8", path=tmp_path / "corpus.gz", cache_dir=cache)) == RAW
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("kind", ["zip", "gz", "xz", "bz2"])
@pytest.mark.parametrize("kept", [0.5, 0.999, 4], ids=["half", "tail", "four_bytes"])
def test_truncated_archive(tmp_path, kind, kept):
    packed = PACKED[kind](RAW)
    (tmp_path / f"corpus.{kind}").write_bytes(packed[: int(kept * len(packed)) if kept < 1 else kept])
    with pytest.raises(DataError, match=rf"corpus\.{kind}.*(truncated or damaged|was cut off)"):
        load_chars("text8", path=tmp_path / f"corpus.{kind}", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.bin")), "nothing broken may stay in the cache"
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize("kind", ["zip", "gz", "xz", "bz2"])
def test_flipped_byte_in_an_archive(tmp_path, kind):
    packed = bytearray(PACKED[kind](RAW))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / f"corpus.{kind}").write_bytes(packed)
    with pytest.raises(DataError, match="truncated or damaged|a-z and space"):
        load_chars("text8", path=tmp_path / f"corpus.{kind}", cache_dir=tmp_path / "cache")


@pytest.mark.fault(24)
@pytest.mark.parametrize("kind", PACKED)
def test_empty_file(tmp_path, kind):
    (tmp_path / f"corpus.{kind}").write_bytes(PACKED[kind](b""))
    with pytest.raises(DataError, match=rf"corpus\.{kind}.*empty file \(0 bytes\)"):
        load_chars("enwik8", path=tmp_path / f"corpus.{kind}", cache_dir=tmp_path / "cache")


@pytest.mark.fault(24)
def test_white_space_only(tmp_path):
    (tmp_path / "corpus").write_bytes(b" \n" * 500)
    with pytest.raises(DataError, match=r"corpus holds only white space \(1,000 bytes\)"):
        load_chars("enwik8", path=tmp_path / "corpus", cache_dir=tmp_path)


def test_too_short_to_split(tmp_path):
    (tmp_path / "corpus").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"corpus holds 3 bytes, too few .*at least 200"):
        load_chars("enwik8", path=tmp_path / "corpus", cache_dir=tmp_path)


@pytest.mark.fault(22)
def test_missing_file_lists_what_is_there(tmp_path):
    (tmp_path / "text8.xz").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.path=.*text9\.xz does not exist; .* holds: text8\.xz$"):
        load_chars("text8", path=tmp_path / "text9.xz", cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"does not exist; .* holds: text8\.xz$"):
        load_chars("text8", path=tmp_path / "no" / "such" / "folder.xz", cache_dir=tmp_path)


@pytest.mark.fault(22)
def test_a_folder_lists_what_it_holds(tmp_path):
    (tmp_path / "text8.xz").write_bytes(b"")
    with pytest.raises(DataError, match=r"is a folder, a file is needed; it holds: text8\.xz"):
        load_chars("text8", path=tmp_path, cache_dir=tmp_path)


@pytest.mark.fault(22)
def test_zip_with_several_files(tmp_path):
    (tmp_path / "one.zip").write_bytes(zipped(RAW, "readme.txt", "text8"))
    assert whole(load_chars("text8", path=tmp_path / "one.zip", cache_dir=tmp_path)) == RAW
    (tmp_path / "two.zip").write_bytes(zipped(RAW, "a.txt", "b.txt"))
    with pytest.raises(DataError, match=r"two\.zip must hold one file, it holds 2: a\.txt, b\.txt"):
        load_chars("text8", path=tmp_path / "two.zip", cache_dir=tmp_path)


@pytest.mark.fault(23)
@pytest.mark.parametrize("kind", ["plain", "xz"])
def test_text8_refuses_other_bytes_and_says_where(tmp_path, kind):
    raw = b"a" * 2_000_000 + b"B" + b"a" * 1000  # beyond the first piece that is read
    (tmp_path / f"corpus.{kind}").write_bytes(PACKED[kind](raw))
    with pytest.raises(DataError, match=r"a-z and space, but .* has b'B' at byte 2,000,000: .*prepare text8"):
        load_chars("text8", path=tmp_path / f"corpus.{kind}", cache_dir=tmp_path / "cache")
    load_chars("enwik8", path=tmp_path / f"corpus.{kind}", cache_dir=tmp_path / "cache")


@pytest.mark.fault(22)
def test_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError, match=r"unknown dataset 'enwiki8': did you mean enwik8\?"):
        load_chars("enwiki8")
    with pytest.raises(DataError, match=r"known are text8, enwik8, python_source"):
        load_chars("something")


def test_unwritable_cache_names_the_setting(tmp_path):
    (tmp_path / "corpus.xz").write_bytes(lzma.compress(RAW))
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot write the data cache .*cache .*data\.cache_dir="):
        load_chars("enwik8", path=tmp_path / "corpus.xz", cache_dir=tmp_path / "cache")


def serve(monkeypatch, server, content: bytes, published: bytes = RAW) -> None:
    server.content = content
    monkeypatch.setitem(chars.SOURCES, "text8", chars.Source(server.url, "sha1", sha1(published)))


def test_publishers_zip_is_fetched_checked_and_kept(server, tmp_path, monkeypatch):
    serve(monkeypatch, server, zipped(RAW))
    corpus = load_chars("text8", cache_dir=tmp_path)
    assert whole(corpus) == RAW
    assert corpus.fingerprint["source"] == "text8.zip"
    server.status = 500
    assert whole(load_chars("text8", cache_dir=tmp_path)) == RAW, "a second load needs no network"


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (zipped(RAW[::-1]), f"sha1 {sha1(RAW[::-1])}, expected {sha1(RAW)}"),
        (b"<html>please log in</html>", "does not start as one"),
    ],
    ids=["other_text", "login_page"],
)
def test_wrong_content_is_fetched_again_once_then_refused(server, tmp_path, monkeypatch, content, fault):
    serve(monkeypatch, server, content)
    with pytest.raises(DataError, match=fault) as caught:
        load_chars("text8", cache_dir=tmp_path)
    assert "data.path=" in str(caught.value) and caught.value.exit_code == 3
    assert len(server.seen_ranges) == 2
    server.content = zipped(RAW)
    assert whole(load_chars("text8", cache_dir=tmp_path)) == RAW, "the bad digest must not be remembered"


def test_real_prefixes(data_file, tmp_path):
    enwik8 = load_chars("enwik8", path=data_file("enwik8/enwik8_head.xz"), cache_dir=tmp_path)
    assert bytes(enwik8.splits["train"][:10]) == b"<mediawiki"
    assert sum(len(split) for split in enwik8.splits.values()) == 4_154_327
    text8 = load_chars("text8", path=data_file("text8/text8_head.xz"), cache_dir=tmp_path)
    assert bytes(text8.splits["train"][:21]) == b" anarchism originated"
