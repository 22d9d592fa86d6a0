"""The documents of a corpus: folders, text, JSON lines and WikiExtractor's output, packed or not, read as a stream."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from data.archive import MAGIC, is_archive, listing, open_members, resolve_file
from data.cache import sha256_of
from data.errors import DataError

# what a folder or an archive may hold beside text, as a README.md, is no document
_TEXT = {"", ".txt", ".text"}
_JSON_LINES = {".jsonl"}
_FIELDS = ("text", "article")
_DOCUMENT = re.compile(r'<doc id="[^"]*".*>\s*$')
_END = re.compile(r"</doc>\s*$")


def read_documents(path: str | Path) -> Iterator[str]:
    """Each document of a file or, in sorted order, of all files of text below a folder; blank ones are left out.

    A text (.txt, .text or no ending) is one document, unless it begins with a mark of WikiExtractor: then each
    `<doc id=…>` to `</doc>` is one, its title first; a title alone is none. A line of .jsonl is one, its field "text"
    or else "article". Any may be packed as .gz, .xz, .bz2, .zip, or stand in a .tar, also packed; of a folder or
    archive other kinds of files are left out. Raises DataError naming the file, and where known the line, for what is
    missing, damaged, no UTF-8, no JSON, without a field or an end; and where there is no document at all.
    """
    found = False
    for file in corpus_files(path):
        with open_members(file) as members:
            for name, stream in members:
                is_file_itself = name in (file.name, file.stem)
                if is_file_itself or _is_text(name):
                    for document in _documents(stream, name, str(file) if is_file_itself else f"{name} in {file}"):
                        if document and not document.isspace():
                            found = True
                            yield document
    if not found:
        raise DataError(f"data.path={path} holds no document: name .txt or .jsonl files, or an archive of them")


def corpus_files(path: str | Path) -> list[Path]:
    """The file, or the files of text and the archives below a folder, sorted; hidden ones are left out."""
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        return [resolve_file(path)]
    files = []
    with _reading(folder):
        for here, subfolders, names in os.walk(folder, onerror=_raise):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            paths = [Path(here) / name for name in names if not name.startswith(".") and _is_corpus_file(name)]
            files += [file for file in paths if file.stat().st_size]
    if not files:
        raise DataError(f"data.path={path} has no file of text (.txt, .jsonl, packed or not) in it: {listing(folder)}")
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def corpus_digest(path: str | Path) -> str:
    """Hex sha256 of a file, or of the lines "path size sha256" of a folder's: what its documents depend on."""
    root, files = Path(path).expanduser().absolute(), corpus_files(path)
    with _reading(root):
        if files == [root]:
            return sha256_of(root)
        lines = [f"{file.relative_to(root).as_posix()} {file.stat().st_size} {sha256_of(file)}\n" for file in files]
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _raise(error: OSError) -> None:
    raise error


def _is_corpus_file(name: str) -> bool:
    packed = PurePosixPath(name).suffix.lower().lstrip(".") in MAGIC
    return is_archive(name) or _is_text(PurePosixPath(name).stem if packed else name)


def _is_text(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _TEXT | _JSON_LINES and not PurePosixPath(name).name.startswith(".")


def _documents(stream: IO[bytes], name: str, place: str) -> Iterator[str]:
    lines = _decoded(stream, place)
    if PurePosixPath(name).suffix.lower() in _JSON_LINES:
        for number, line in lines:
            if not line.isspace():
                yield _json_document(line, f"{place}, line {number}")
        return
    start = []
    for number, line in lines:
        start.append(line)
        if not line.isspace():
            if _DOCUMENT.match(line):
                yield from _marked_documents(lines, place, number)
                return
            break
    yield "".join([*start, *(line for _, line in lines)])


def _decoded(stream: IO[bytes], place: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, all ended as on Unix."""
    for number, raw in enumerate(stream, start=1):
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{place}, line {number} is no UTF-8 text ({error.reason}): convert the file") from error
        # a mark of the byte order at the start is no text
        yield number, (line.removeprefix("\ufeff") if number == 1 else line).replace("\r\n", "\n")


def _json_document(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is no JSON ({error})") from error
    fields = record if isinstance(record, dict) else {}
    document = next((fields[name] for name in _FIELDS if name in fields), None)
    if not isinstance(document, str):
        held = ", ".join(map(str, fields)) or f"no fields but a {type(record).__name__}"
        raise DataError(f"{place} has no text in a field {' or '.join(_FIELDS)}; it holds {held}")
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} holds half a character, \\u{ord(document[error.start]):x}: mend that line") from error
    return document


def _marked_documents(lines: Iterator[tuple[int, str]], place: str, opened: int) -> Iterator[str]:
    """What stands between the marks; the first was in line `opened`."""
    document: list[str] | None = []
    for number, line in lines:
        if _DOCUMENT.match(line):
            if document is not None:
                raise DataError(f"{place}, line {number}: a <doc> begins within that of line {opened}: damaged")
            document, opened = [], number
        elif document is None:
            if not line.isspace():
                raise DataError(f"{place}, line {number} stands outside of every <doc> … </doc>: damaged")
        elif _END.match(line):
            title, _, body = "".join(document).strip().partition("\n")
            if body:
                yield f"{title}\n{body}"
            document = None
        else:
            document.append(line)
    if document is not None:
        raise DataError(f"{place} ends inside of the <doc> of line {opened}: it was cut off, fetch or copy it again")
