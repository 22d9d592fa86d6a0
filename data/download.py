"""Download a file with progress, resume after an interruption, and a digest that is checked at every use."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from data.cache import cache_errors, locked, sha256_of, write_atomically
from data.errors import DataError

TIMEOUT_SECONDS = 30.0
MAX_TRIES = 3
_PIECE = 1 << 18
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError)
_ADVICE = "give a local file instead by data.path= (plain, zip, gz, xz or bz2)"


def download(url: str, destination: str | Path, *, sha256: str | None = None, progress: bool = True) -> Path:
    """Fetch `url` to `destination` unless it is there already, and check it.

    An interrupted transfer leaves `<name>.part`, which the next call continues by an HTTP range, or restarts
    where the server has none. `sha256` is the publisher's digest (hex); without one the digest of the first
    download is printed, stored beside the file as `<name>.sha256` and expected from then on. A file that does
    not match is deleted and fetched once more. Raises DataError for a second mismatch (both digests), a
    failing network or an unwritable folder.
    """
    destination = Path(destination).expanduser().absolute()
    with cache_errors(destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists() and _matches(destination, sha256 or _stored_digest(destination)):
            return destination
        with locked(destination):
            return _download_locked(url, destination, sha256, progress)


def forget(destination: Path) -> None:
    """Delete a downloaded file, its stored digest and its parts: the next call fetches it afresh."""
    for file in (destination, _digest_file(destination), _part(destination), _validator_file(destination)):
        file.unlink(missing_ok=True)


def _download_locked(url: str, destination: Path, sha256: str | None, progress: bool) -> Path:
    expected = sha256 or _stored_digest(destination)
    for last_attempt in (False, True):
        if not destination.exists():
            _fetch(url, destination, progress)
        found = sha256_of(destination)
        if expected is None:
            _say(f"sha256 of {destination.name} (first download, expected from now on): {found}")
            expected = found
        if found == expected:
            if _stored_digest(destination) != found:
                write_atomically(_digest_file(destination), f"{found}  {destination.name}\n".encode())
            return destination
        destination.unlink()
        if not last_attempt:
            _say(f"{destination.name} has sha256 {found}, expected {expected}: fetching it again")
    raise DataError(
        f"{url} has the wrong content: sha256 {found}, expected {expected}, after a second download too; "
        f"if the publisher has changed the file, delete {_digest_file(destination)}, or {_ADVICE}"
    )


def _fetch(url: str, destination: Path, progress: bool) -> None:
    """Transfer to the .part file until it is whole, then rename it."""
    part = _part(destination)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(destination.name, total=None)
        failures, furthest = 0, _size(part)
        while True:
            try:
                if _transfer(url, destination, bar, task):
                    break
                reason = "the server closed the connection early"
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code < 500:
                    raise DataError(f"cannot download {url}: {reason}; {_ADVICE}") from error
            except _NETWORK_ERRORS as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            # a server without ranges starts over each time: only new ground counts as progress
            failures = 0 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures >= MAX_TRIES:
                kept = f"{_size(part):,} bytes are kept in {part}, the same command continues from there; "
                raise DataError(
                    f"cannot download {url} ({reason}); {kept if _size(part) else ''}without a network {_ADVICE}"
                )
            time.sleep(0.2 * 2**failures)
    os.replace(part, destination)
    _validator_file(destination).unlink(missing_ok=True)


def _transfer(url: str, destination: Path, bar: Progress, task: TaskID) -> bool:
    """One request; True when the .part file is whole afterwards."""
    part, start = _part(destination), 0
    headers = {"User-Agent": "longspan", "Accept-Encoding": "identity"}
    validator = _stored_validator(destination, url)
    if _size(part) and validator is not None:
        start = _size(part)
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    request = urllib.request.Request(url, headers=headers)
    try:
        with _network_side():
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return _whole_or_restart(part, error.headers.get("Content-Range", ""))
        raise
    with response:
        if response.status != 206:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            return False
        _store_validator(destination, url, response.headers)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        bar.update(task, total=total, completed=start)
        with part.open("ab" if start else "wb") as stream:
            while piece := _read(response):
                stream.write(piece)
                bar.advance(task, len(piece))
    return total is None or _size(part) == total


def _read(response: http.client.HTTPResponse) -> bytes:
    with _network_side():
        return response.read(_PIECE)


@contextlib.contextmanager
def _network_side() -> Iterator[None]:
    """Tell a failing connection, whose errors may be any OSError, from a failing disk."""
    try:
        yield
    except (urllib.error.URLError, ConnectionError):
        raise
    except OSError as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def _whole_or_restart(part: Path, content_range: str) -> bool:
    """After "range not satisfiable": the part is complete, or it does not belong to this file."""
    if content_range == f"bytes */{_size(part)}":
        return True
    part.unlink()
    return False


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _part(destination: Path) -> Path:
    return destination.with_name(destination.name + ".part")


def _digest_file(destination: Path) -> Path:
    return destination.with_name(destination.name + ".sha256")


def _validator_file(destination: Path) -> Path:
    return destination.with_name(destination.name + ".part.json")


def _store_validator(destination: Path, url: str, headers: http.client.HTTPMessage) -> None:
    # a weak tag may not be used to continue a transfer (RFC 9110, 13.1.5)
    tag = headers.get("ETag", "")
    validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")
    record = json.dumps({"url": url, "validator": validator})
    write_atomically(_validator_file(destination), record.encode())


def _stored_validator(destination: Path, url: str) -> str | None:
    """The server's name for the version the .part file is a part of; None for a part of another URL."""
    try:
        record = json.loads(_validator_file(destination).read_text())
        return record["validator"] if record["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stored_digest(destination: Path) -> str | None:
    with contextlib.suppress(OSError, IndexError):
        return _digest_file(destination).read_text().split()[0]
    return None


def _matches(file: Path, expected: str | None) -> bool:
    return expected is not None and sha256_of(file) == expected


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
