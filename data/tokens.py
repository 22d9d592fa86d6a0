"""Corpora as token ids: encoded once into the cache, memory-mapped, split by document."""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data.cache import cached_file
from data.documents import corpus_digest, read_documents
from data.errors import DataError

SPLITS = ("train", "valid", "test")
# of the cached files; another number makes those of before unread
_FORMAT = 1
# a tokenizer's threads want many texts at a time, memory wants few
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1024, 1 << 22
_OFFSET_BYTES = 8

Encode = Callable[[list[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class TokenSplit:
    """Documents in a row in a file; it travels to workers as that file's path and these numbers.

    file: holds `num_tokens` ids of `dtype` from byte `tokens_at` on, and from `offsets_at` on where documents begin.
    """

    file: Path
    dtype: str
    tokens_at: int
    num_tokens: int
    offsets_at: int
    num_documents: int

    @cached_property
    def tokens(self) -> np.ndarray:
        """Ids of all documents, memory-mapped, uint16 or int32 [num_tokens]."""
        return np.memmap(self.file, self.dtype, "r", self.tokens_at, (self.num_tokens,))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Document i is tokens[offsets[i] : offsets[i + 1]]; memory-mapped, int64 [num_documents + 1]."""
        return np.memmap(self.file, np.int64, "r", self.offsets_at, (self.num_documents + 1,))

    def __reduce__(self) -> tuple:
        return TokenSplit, astuple(self)


@dataclass(frozen=True)
class TokenCorpus:
    """`splits`: "train", "valid", "test" -> TokenSplit. `fingerprint`, JSON-able, says what was read and by what."""

    splits: Mapping[str, TokenSplit]
    fingerprint: Mapping[str, Any]


def load_tokens(
    path: str | Path,
    *,
    encode: Encode,
    vocab_size: int,
    tokenizer_digest: str,
    cache_dir: str | Path,
    holdout: float = 0.01,
    progress: bool = True,
) -> TokenCorpus:
    """The documents of `path` (`data.documents`) as token ids, encoded where the cache has not got them whole.

    encode: texts -> their ids below `vocab_size`, without special tokens; many texts a call. tokenizer_digest: changes
    whenever `encode` does. holdout: share of the documents that is valid, and as many are test, at least one each:
    those whose text has the smallest sha256, so the same ones wherever they stand.

    Raises DataError for a corpus that cannot be read or has too few documents, ValueError for ids out of range.
    """
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout={holdout} must lie between 0 and 0.5: valid and test take that share each")
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    digest = corpus_digest(path)
    # the ending says how the bytes are read
    settings = [_FORMAT, digest, Path(path).suffixes[-2:], tokenizer_digest, dtype.name, holdout]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def build(write: Callable[[bytes], None]) -> dict[str, Any]:
        folder = Path(cache_dir).expanduser()
        with tempfile.TemporaryFile(dir=folder) as spool:
            documents = _with_progress(read_documents(path), f"encoding {Path(path).name}", progress)
            lengths, hashes = _encode_all(documents, encode, vocab_size, dtype, spool)
            return _write_splits(write, spool, dtype, lengths, _split_numbers(hashes, holdout, path))

    file, record = cached_file(cache_dir, f"tokens-{key}", build)
    fingerprint = {
        "source": Path(path).expanduser().absolute().name,
        "sha256": digest,
        "tokenizer": tokenizer_digest,
        "holdout": holdout,
        "documents": sum(facts["num_documents"] for facts in record["splits"].values()),
        "tokens": sum(facts["num_tokens"] for facts in record["splits"].values()),
    }
    splits = {name: TokenSplit(file, dtype.name, **facts) for name, facts in record["splits"].items()}
    return TokenCorpus(splits, fingerprint)


def _encode_all(
    documents: Iterable[str], encode: Encode, vocab_size: int, dtype: np.dtype, spool: IO[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """Write the ids of each document to `spool`; their lengths, int64, and 64 bits of their texts' sha256, uint64.

    What encodes to nothing is left out.
    """
    lengths, hashes = array("q"), array("Q")
    for texts in _batches(documents):
        encoded = encode(texts)
        if len(encoded) != len(texts):
            raise ValueError(f"encode gave {len(encoded)} lists of ids for {len(texts)} texts")
        for text, ids in zip(texts, encoded, strict=True):
            values = np.asarray(ids, np.int64)
            if not len(values):
                continue
            if values.min() < 0 or values.max() >= vocab_size:
                raise ValueError(f"encode gave ids {values.min()} to {values.max()}, vocab_size is {vocab_size}")
            spool.write(values.astype(dtype).tobytes())
            lengths.append(len(values))
            hashes.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
    return np.array(lengths, np.int64), np.array(hashes, np.uint64)


def _split_numbers(hashes: np.ndarray, holdout: float, path: str | Path) -> dict[str, np.ndarray]:
    """Split -> the numbers of its documents, ascending."""
    num_held = max(1, round(holdout * len(hashes)))
    if len(hashes) <= 2 * num_held:
        raise DataError(
            f"data.path={path} has {len(hashes)} document{'s' if len(hashes) != 1 else ''} with text, at least "
            f"{2 * num_held + 1} are needed to hold one out for valid and one for test: name more, or cut it into more"
        )
    order = np.argsort(hashes, kind="stable")
    parts = {"train": order[2 * num_held :], "valid": order[num_held : 2 * num_held], "test": order[:num_held]}
    return {split: np.sort(numbers) for split, numbers in parts.items()}


def _write_splits(
    write: Callable[[bytes], None],
    spool: IO[bytes],
    dtype: np.dtype,
    lengths: np.ndarray,
    split_numbers: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Write the documents of each split one after another, then the offsets of each; returns where they are."""
    spool.flush()
    tokens = np.memmap(spool, dtype, "r")  # type: ignore[call-overload]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    splits: dict[str, dict[str, int]] = {}
    written = 0
    for split, numbers in split_numbers.items():
        splits[split] = {"tokens_at": written, "num_documents": len(numbers)}
        for number in numbers:
            write(tokens[starts[number] : starts[number + 1]].tobytes())
        splits[split]["num_tokens"] = int(lengths[numbers].sum())
        written += splits[split]["num_tokens"] * dtype.itemsize
    padding = -written % _OFFSET_BYTES
    write(bytes(padding))
    written += padding
    for split, numbers in split_numbers.items():
        splits[split]["offsets_at"] = written
        offsets = np.concatenate([[0], np.cumsum(lengths[numbers])]).astype(np.int64)
        write(offsets.tobytes())
        written += offsets.nbytes
    return {"splits": splits}


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for document in documents:
        texts.append(document)
        characters += len(document)
        if len(texts) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _with_progress(documents: Iterable[str], title: str, progress: bool) -> Iterator[str]:
    # how many there are is not known before the last
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,} documents"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(title, total=None)
        for document in documents:
            yield document
            bar.advance(task)
