"""Files that are either whole or not there: temporary file, fsync, rename."""

import contextlib
import errno
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.errors import ResourceError

# what goes away when somebody frees space; a folder that may not be written to stays so
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
UNFINISHED = ".tmp-"


def json_ready(value: Any) -> Any:
    """A copy of `value` that strict JSON can hold.

    Infinities and not-a-number become the strings "inf", "-inf", "nan" (`float()` reads them back); NumPy and
    torch scalars become Python numbers; tuples, sets, paths and other objects become lists and strings.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [json_ready(item) for item in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and torch, arrays and scalars
        return json_ready(value.tolist())
    return str(value)


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON text (see `json_ready`)."""
    return json.dumps(json_ready(value), indent=indent, allow_nan=False, ensure_ascii=False)


def sync(path: Path) -> None:
    """Ask the disk to keep a file, or the entries of a folder, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """An unused name in the folder of `path`, recognisable as unfinished work."""
    return path.with_name(f"{path.name}{UNFINISHED}{secrets.token_hex(4)}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` at the end; a reader, or a crash, meets the old one or the new."""
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented strict JSON (see `json_ready`), in one step."""
    write_text(path, to_json(value, indent=2) + "\n")


def point_link(link: Path, target: str) -> None:
    """Move the symbolic link `link` to `target` in one step.

    A file system without links is no error: the link is a convenience, nothing in the code depends on it.
    """
    temporary = temporary_beside(link)
    try:
        os.symlink(target, temporary)
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """A disk that is full in here, and that nothing better was done about, is a ResourceError about `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise ResourceError(
            f"{error.filename or folder} could not be written: {os.strerror(error.errno)}. What was written before is "
            "whole. Free some space and run the same command again."
        ) from error
