"""Read a plain, zip, gz, xz or bz2 file as one stream of raw bytes, with errors that name the file."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from data.errors import DataError

CHUNK = 1 << 20
MAGIC = {"zip": b"PK", "gz": b"\x1f\x8b", "xz": b"\xfd7zXZ\x00", "bz2": b"BZh"}
# a file whose name does not say: longer marks, since a plain text may well begin with "PK"
_UNNAMED = {"zip": rb"PK\x03\x04", "gz": rb"\x1f\x8b\x08", "xz": rb"\xfd7zXZ\x00", "bz2": rb"BZh[1-9]1A"}
_BROKEN = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, zlib.error)
_MAX_LISTED = 12


def resolve_file(path: str | Path, *, key: str = "data.path") -> Path:
    """The absolute path of an existing, non-empty file.

    Raises DataError naming `key`; where the file is missing, it lists what its folder holds.
    """
    file = Path(path).expanduser().absolute()
    try:
        if file.is_dir():
            raise DataError(f"{key}={path} is a folder, a file is needed; it holds: {_listing(file)}")
        if not file.exists():
            folder = next((parent for parent in file.parents if parent.is_dir()), file.parent)
            raise DataError(f"{key}={path} does not exist; {folder} holds: {_listing(folder)}")
        if file.stat().st_size == 0:
            raise DataError(f"{key}={path} is an empty file (0 bytes): name a file that holds text")
    except OSError as error:
        raise DataError(f"{key}={path} cannot be read: {error.strerror or error}") from error
    return file


def compression(file: Path) -> str | None:
    """ "zip", "gz", "xz", "bz2", or None for a plain file, by its first bytes.

    Raises DataError where the file's ending names a format that its bytes do not have.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(6)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    ending = file.suffix.lower().lstrip(".")
    if ending in MAGIC and not head.startswith(MAGIC[ending]):
        raise DataError(
            f"{file} is named .{ending} but does not start as one: "
            "it is damaged or was cut off; fetch it again, or rename it if it is plain text"
        )
    if ending in MAGIC:
        return ending
    return next((kind for kind, mark in _UNNAMED.items() if re.match(mark, head)), None)


@contextmanager
def open_bytes(file: Path, *, member: str | None = None) -> Iterator[IO[bytes]]:
    """The raw bytes of `file` as a stream; damage met while reading inside the block is a DataError.

    `member` is the zip entry preferred where an archive holds several files.
    """
    kind = compression(file)
    try:
        with ExitStack() as stack:
            if kind == "zip":
                archive = stack.enter_context(zipfile.ZipFile(file))
                yield stack.enter_context(archive.open(_pick_member(file, archive, member)))
            else:
                opener = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open, None: open}[kind]
                yield stack.enter_context(opener(file, "rb"))
    except _BROKEN as error:
        raise DataError(_damaged(file, kind, error)) from error
    except OSError as error:
        # bz2 reports a corrupt stream as a bare OSError without an errno
        if error.errno is None:
            raise DataError(_damaged(file, kind, error)) from error
        raise


def chunks(stream: IO[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """Successive non-empty reads of at most `size` bytes."""
    while chunk := stream.read(size):
        yield chunk


def _damaged(file: Path, kind: str | None, error: Exception) -> str:
    size = file.stat().st_size
    return f"{file} ({size:,} bytes) is a truncated or damaged {kind} file ({error}): fetch or copy it again"


def _pick_member(file: Path, archive: zipfile.ZipFile, member: str | None) -> str:
    names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    if len(names) == 1:
        return names[0]
    matches = [name for name in names if Path(name).stem == member or Path(name).name == member]
    if len(matches) == 1:
        return matches[0]
    listed = ", ".join(names[:_MAX_LISTED]) or "nothing"
    raise DataError(f"{file} must hold one file, it holds {len(names)}: {listed}; unpack it, name one")


def _listing(folder: Path) -> str:
    try:
        names = [entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir()]
    except OSError as error:
        return f"unknown ({error.strerror or error})"
    names.sort(key=lambda name: (name.startswith("."), name))  # hidden ones are seldom what was meant
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "nothing") + more
