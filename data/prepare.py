"""Prepare character corpora: `python -m data.prepare text8 INPUT OUTPUT`, `... download NAME`."""

from __future__ import annotations

import argparse
import codecs
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from data.archive import chunks, compression, open_bytes, resolve_file
from data.chars import DEFAULT_CACHE, SOURCES, load_chars
from data.errors import DataError
from data.text8_clean import clean_dump

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 usage, 3 data, 130 Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0


def clean_file(source: str | Path, output: str | Path, *, progress: bool = True) -> dict[str, int | str]:
    """Clean the dump `source` (plain, zip, gz, xz or bz2) into text8 form at `output`.

    Returns `bytes` and `sha256` of what was written, and `bad_bytes`, how many bytes of the dump are no UTF-8 text or
    NUL: as text8 has letters alone, they become spaces like every mark. Raises DataError for a dump that cannot be
    read or holds no article text, and for an output that exists already or cannot be written.
    """
    file, target = resolve_file(source, key="INPUT"), Path(output).expanduser().absolute()
    if target.exists():
        raise DataError(f"OUTPUT={output} exists already: delete it or name another file")
    digest, written, bad = hashlib.sha256(), 0, BadBytes()
    try:
        descriptor, temp = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    except OSError as error:
        raise DataError(f"OUTPUT={output} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for piece in clean_dump(bad.watch(_read_with_progress(file, progress))):
                stream.write(piece)
                digest.update(piece)
                written += len(piece)
        if not written:
            raise DataError(f"INPUT={source} has no article text (no '<text '): name a Wikipedia XML dump")
        # a temp file is private; what replaces it is an ordinary one
        os.chmod(temp, 0o644)
        os.replace(temp, target)
    except OSError as error:
        raise DataError(f"OUTPUT={output} cannot be written: {error.strerror}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temp)
    return {"bytes": written, "sha256": digest.hexdigest(), "bad_bytes": bad.count}


class BadBytes:
    """Counts the bytes of a stream that are no UTF-8 text, and NULs."""

    _BAD = re.compile("[\0\udc80-\udcff]")

    def __init__(self):
        self.count = 0
        # every byte that is none becomes one surrogate, which UTF-8 text cannot hold
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")

    def watch(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces, counted on the way."""
        for piece in pieces:
            self._add(piece)
            yield piece
        self._add(b"", final=True)

    def _add(self, piece, final=False):
        self.count += len(self._BAD.findall(self._decoder.decode(piece, final)))


def _read_with_progress(file: Path, progress: bool) -> Iterator[bytes]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    # how long a packed file is when unpacked is not known beforehand
    total = file.stat().st_size if compression(file) is None else None
    with (
        Progress(*columns, console=Console(stderr=True), disable=not progress) as bar,
        open_bytes(file) as stream,
    ):
        task = bar.add_task(f"cleaning {file.name}", total=total)
        for piece in chunks(stream):
            yield piece
            bar.advance(task, len(piece))


def _run_text8(options: argparse.Namespace) -> None:
    facts = clean_file(options.input, options.output)
    print(f"{options.output}: {facts['bytes']:,} bytes, sha256 {facts['sha256']}")
    if facts["bad_bytes"]:
        print(f"{facts['bad_bytes']:,} bytes of {options.input} are no UTF-8 text: like every mark they became spaces")
    print(f"train on it: python train.py task.dataset=text8 data.path={options.output}")


def _run_download(options: argparse.Namespace) -> None:
    corpus = load_chars(options.name, cache_dir=options.cache_dir)
    lengths = ", ".join(f"{split} {len(text):,}" for split, text in corpus.splits.items())
    print(f"{options.name} is in {Path(options.cache_dir).expanduser()}: {lengths} characters")
    print(f"sha256 of the text: {corpus.fingerprint['sha256']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.prepare", description="Prepare character corpora for training."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    text8 = commands.add_parser(
        "text8",
        help="clean a Wikipedia XML dump into text8 form",
        description="Clean a Wikipedia XML dump into text8 form: a-z and single spaces, digits spelled out. "
        "From the first bytes of enwik9 this gives text8 itself.",
    )
    text8.add_argument("input", metavar="INPUT", help="the dump: plain, zip, gz, xz or bz2")
    text8.add_argument("output", metavar="OUTPUT", help="the text file to write; must not exist yet")
    text8.set_defaults(run=_run_text8)
    download = commands.add_parser(
        "download",
        help="fetch and check a published corpus",
        description="Fetch a published corpus into the cache and check it; goes on after an interruption.",
    )
    download.add_argument("name", choices=sorted(SOURCES))
    download.add_argument(
        "--cache-dir", default=DEFAULT_CACHE, metavar="DIR", help="where to keep it (default: %(default)s)"
    )
    download.set_defaults(run=_run_download)
    return parser


if __name__ == "__main__":
    sys.exit(main())
