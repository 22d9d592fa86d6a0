"""Byte corpora as memory-mapped splits: text8, enwik8 and the interpreter's own sources."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import python_source
from data.archive import CHUNK, chunks, compression, open_bytes, resolve_file
from data.cache import cache_errors, cached_file, sha256_of
from data.download import download, forget
from data.errors import DataError

SPLITS = ("train", "valid", "test")
DEFAULT_CACHE = "~/.cache/longspan"
MIN_BYTES = 200


@dataclass(frozen=True)
class Source:
    """Where a published corpus comes from, and its publisher's digest of the unpacked bytes."""

    url: str
    algorithm: str
    digest: str


# the digests stand on the publisher's pages: mattmahoney.net/dc/textdata.html
SOURCES = {
    "text8": Source("http://mattmahoney.net/dc/text8.zip", "md5", "3bea1919949baf155f99411df5fada7e"),
    "enwik8": Source("http://mattmahoney.net/dc/enwik8.zip", "sha1", "57b8363b814821dc9d47aa4d41f58733519076b2"),
}
CORPORA = (*SOURCES, "python_source")


@dataclass(frozen=True)
class CharCorpus:
    """One corpus as bytes. `splits`: "train", "valid", "test" -> read-only uint8 memory maps, shape [length].

    `fingerprint` is JSON-able and says what was read: `source`, `bytes` and `sha256` of the raw bytes; for
    the interpreter's sources also `python_version`, `num_files` and `list_sha256`.
    """

    name: str
    splits: Mapping[str, np.ndarray]
    fingerprint: Mapping[str, Any]
    vocab_size: int = 256


def load_chars(name: str, *, path: str | Path | None = None, cache_dir: str | Path = DEFAULT_CACHE) -> CharCorpus:
    """Load "text8", "enwik8" or "python_source".

    text8 and enwik8 come from `path` (plain, zip, gz, xz or bz2) or, without one, from the publisher's zip,
    kept in `cache_dir`. A file of 10^8 bytes is split 90M/5M/5M, any other 90/5/5 % by byte offset.
    python_source reads the standard library and splits it by file; with `path` it takes any local text
    instead, split by offset.

    Unpacked bytes are written to `cache_dir` once and memory-mapped; a plain `path` is mapped where it is.
    Raises DataError for an unknown name, a missing, empty, damaged or foreign file, or an unwritable cache.
    """
    if name not in CORPORA:
        near = difflib.get_close_matches(name, CORPORA, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"unknown dataset {name!r}: {hint}known are {', '.join(CORPORA)}")
    if path is None and name == "python_source":
        file, record = python_source.python_source(cache_dir)
        split_bytes = record.pop("split_bytes")
        lengths = [split_bytes[split] for split in SPLITS]
        return _corpus(name, file, lengths, {"source": "python standard library", **record})
    if path is None:
        file, record = _published(name, cache_dir)
    else:
        file, record = _local(name, resolve_file(path), cache_dir)
    record.pop("published_digest", None)
    _refuse_blank(file, record)
    return _corpus(name, file, split_lengths(record["bytes"], record["source"]), record)


def split_lengths(num_bytes: int, source: str = "the file") -> list[int]:
    """Lengths of train, valid, test: 90/5/5 % by byte offset, which is 90M/5M/5M for the full 10^8 bytes."""
    if num_bytes < MIN_BYTES:
        raise DataError(f"{source} holds {num_bytes} bytes, too few to split 90/5/5 (at least {MIN_BYTES})")
    ends = [num_bytes * 90 // 100, num_bytes * 95 // 100, num_bytes]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def fetch(name: str, cache_dir: str | Path = DEFAULT_CACHE) -> Path:
    """The publisher's zip of "text8" or "enwik8" in `cache_dir`, downloaded where it is missing."""
    with cache_errors(cache_dir):
        folder = Path(cache_dir).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    return download(SOURCES[name].url, folder / f"{name}.zip")


def _published(name: str, cache_dir: str | Path) -> tuple[Path, dict[str, Any]]:
    """Unpack the publisher's zip; bytes that are not the publisher's are fetched again once, then refused."""
    expected = SOURCES[name]
    for _ in range(2):
        archive = fetch(name, cache_dir)
        try:
            file, record = _local(name, archive, cache_dir)
        except DataError as error:
            fault = str(error)
        else:
            if record["published_digest"] == expected.digest:
                return file, record
            fault = f"{expected.algorithm} {record['published_digest']}, expected {expected.digest}"
        # its stored digest goes too: it says what came first, which may have been a login page
        forget(archive)
    raise DataError(
        f"{expected.url} does not unpack to the published {name}, after a second download too: {fault}; "
        "give a local file by data.path="
    )


def _local(name: str, source: Path, cache_dir: str | Path) -> tuple[Path, dict[str, Any]]:
    """The raw bytes of `source` as a plain file, and their record."""
    check = _check_text8 if name == "text8" else _check_nothing
    if compression(source) is None:
        raw = _map(source, 0, source.stat().st_size)
        for start in range(0, len(raw), CHUNK):
            check(raw[start : start + CHUNK], start, source)
        return source, {"source": source.name, "bytes": len(raw), "sha256": sha256_of(source)}

    def build(write: Callable[[bytes], None]) -> dict[str, Any]:
        algorithm = SOURCES[name].algorithm if name in SOURCES else "sha1"
        published = hashlib.new(algorithm, usedforsecurity=False)
        start = 0
        with open_bytes(source, member=name) as stream:
            for piece in chunks(stream):
                check(np.frombuffer(piece, np.uint8), start, source)
                write(piece)
                start += len(piece)
                published.update(piece)
        if start == 0:
            raise DataError(f"{source} unpacks to an empty file (0 bytes): name a file that holds text")
        return {"published_digest": published.hexdigest()}

    # the corpus is part of the key: what one accepts another may refuse
    file, record = cached_file(cache_dir, f"{name}-{sha256_of(source)[:16]}", build)
    return file, {**record, "source": source.name}


def _refuse_blank(file: Path, record: dict[str, Any]) -> None:
    raw = _map(file, 0, record["bytes"])
    if all(raw[start : start + CHUNK].tobytes().isspace() for start in range(0, len(raw), CHUNK)):
        raise DataError(f"{record['source']} holds only white space ({len(raw):,} bytes): name a file of text")


def _check_nothing(piece: np.ndarray, start: int, source: Path) -> None:
    """enwik8 and free text may hold any byte."""


def _check_text8(piece: np.ndarray, start: int, source: Path) -> None:
    allowed = ((piece >= ord("a")) & (piece <= ord("z"))) | (piece == ord(" "))
    if not allowed.all():
        offset = int(np.argmin(allowed))
        raise DataError(
            f"text8 holds only a-z and space, but {source} has {bytes([int(piece[offset])])!r} at byte "
            f"{start + offset:,}: clean it first with `python -m data.prepare text8 {source.name} OUTPUT`"
        )


def _corpus(name: str, file: Path, lengths: list[int], fingerprint: dict[str, Any]) -> CharCorpus:
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    spans = zip(SPLITS, starts, lengths, strict=True)
    splits = {split: _map(file, start, length) for split, start, length in spans}
    return CharCorpus(name=name, splits=splits, fingerprint=fingerprint)


def _map(file: Path, offset: int, length: int) -> np.memmap:
    return np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=(length,))
