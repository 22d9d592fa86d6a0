"""Read a plain, zip, gz, xz, bz2 or tar file as streams of raw bytes, with errors that name the file."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
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
_BROKEN = (EOFError, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
_OPENERS = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open, None: open}
_TAR = re.compile(r"\.(tar(\.(gz|xz|bz2))?|tgz|txz|tbz2)$", re.IGNORECASE)
_MAX_LISTED = 12


def resolve_file(path: str | Path, *, key: str = "data.path") -> Path:
    """The absolute path of an existing, non-empty file.

    Raises DataError naming `key`; where the file is missing, it lists what its folder holds.
    """
    file = Path(path).expanduser().absolute()
    try:
        if file.is_dir():
            raise DataError(f"{key}={path} is a folder, a file is needed; it holds: {listing(file)}")
        if not file.exists():
            folder = next((parent for parent in file.parents if parent.is_dir()), file.parent)
            raise DataError(f"{key}={path} does not exist; {folder} holds: {listing(folder)}")
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
    with _damage_named(file, kind), ExitStack() as stack:
        if kind == "zip":
            archive = stack.enter_context(zipfile.ZipFile(file))
            yield stack.enter_context(archive.open(_pick_member(file, archive, member)))
        else:
            yield stack.enter_context(_OPENERS[kind](file, "rb"))


@contextmanager
def open_members(file: Path) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """What a file holds, as (name, stream): a zip's files by name, a tar's in its order, else the file itself unpacked.

    A stream is read before the next is asked for, and nothing is written to disk. Damage met while reading inside
    the block is a DataError.
    """
    kind = compression(file)
    is_tar = _TAR.search(file.name) is not None
    with _damage_named(file, "tar" if is_tar else kind), ExitStack() as stack:
        if kind == "zip":
            archive = stack.enter_context(zipfile.ZipFile(file))
            names = sorted(entry.filename for entry in archive.infolist() if not entry.is_dir())
            yield ((name, archive.open(name)) for name in names)
            return
        stream = stack.enter_context(_OPENERS[kind](file, "rb"))
        if is_tar:
            yield _tar_members(stack.enter_context(tarfile.open(fileobj=stream, mode="r|")))
        else:
            yield iter([(file.stem if file.suffix.lower().lstrip(".") in MAGIC else file.name, stream)])


def is_archive(name: str) -> bool:
    """Whether a file of this name holds files: a zip or a tar, packed or not."""
    return name.lower().endswith(".zip") or _TAR.search(name) is not None


def chunks(stream: IO[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """Successive non-empty reads of at most `size` bytes."""
    while chunk := stream.read(size):
        yield chunk


@contextmanager
def _damage_named(file: Path, kind: str | None) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise DataError(_damaged(file, kind, error)) from error
    except OSError as error:
        # bz2 reports a corrupt stream as a bare OSError without an errno
        if error.errno is None:
            raise DataError(_damaged(file, kind, error)) from error
        raise


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in archive:
        stream = archive.extractfile(member) if member.isfile() else None
        if stream is not None:
            yield member.name, stream


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


def listing(folder: Path) -> str:
    """The first names in a folder, hidden ones last, for a message."""
    try:
        names = [entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir()]
    except OSError as error:
        return f"unknown ({error.strerror or error})"
    names.sort(key=lambda name: (name.startswith("."), name))  # hidden ones are seldom what was meant
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "nothing") + more
