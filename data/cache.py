"""Files built once in a cache folder and checked at every use by the size and sha256 kept beside them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError

try:
    import fcntl
except ImportError:  # no advisory locks on Windows; two builders then do the same work twice
    fcntl = None  # type: ignore[assignment]


def sha256_of(file: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cached_file(
    cache_dir: str | Path, key: str, build: Callable[[Callable[[bytes], None]], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """The file `<cache_dir>/<key>.bin` and its record, building both where they are missing or damaged.

    `build(write)` hands the content to `write` piece by piece and returns further entries for the record.
    The record (`<key>.json`) holds `bytes` and `sha256`, which are compared with the file at every call.
    Raises DataError naming data.cache_dir where the folder cannot be written.
    """
    file = Path(cache_dir).expanduser().absolute() / f"{key}.bin"
    record = _checked_record(file)
    if record is not None:
        return file, record
    with cache_errors(cache_dir):
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file):
            record = _checked_record(file)  # another process may have built it meanwhile
            if record is None:
                record = _build(file, build)
    return file, record


@contextlib.contextmanager
def cache_errors(cache_dir: str | Path) -> Iterator[None]:
    """Turn a failed write into a DataError that names data.cache_dir."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write the data cache {Path(cache_dir).expanduser()} ({reason}): "
            "name a writable folder with enough space by data.cache_dir="
        ) from error


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold `<file>.lock` so that processes started together build once; where locks fail, go on."""
    with open(f"{file}.lock", "wb") as handle:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomically(file: Path, content: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    with _temp_beside(file) as (descriptor, temp):
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temp, file)


def _checked_record(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.with_suffix(".json").read_text())
        whole = file.stat().st_size == record["bytes"] and sha256_of(file) == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _build(file: Path, build: Callable[[Callable[[bytes], None]], dict[str, Any]]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with _temp_beside(file) as (descriptor, temp):
        with os.fdopen(descriptor, "wb") as stream:

            def write(piece: bytes) -> None:
                stream.write(piece)
                digest.update(piece)

            extra = build(write)
            stream.flush()
            os.fsync(stream.fileno())
            written = stream.tell()
        on_disk = temp.stat().st_size
        if on_disk != written:
            raise OSError(f"{temp} has {on_disk:,} bytes after {written:,} were written")
        os.replace(temp, file)
    record = {**extra, "bytes": written, "sha256": digest.hexdigest()}
    write_atomically(file.with_suffix(".json"), json.dumps(record, indent=1).encode())
    return record


@contextlib.contextmanager
def _temp_beside(file: Path) -> Iterator[tuple[int, Path]]:
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    temp = Path(name)
    try:
        yield descriptor, temp
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        temp.unlink(missing_ok=True)
