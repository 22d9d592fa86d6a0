"""The embedded corpus: the running interpreter's own standard library, without tests and packages."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.cache import cached_file
from data.errors import DataError

MIN_BYTES = 2_000_000
# files end in a newline, so one more leaves an empty line between two files
SEPARATOR = b"\n"
SPLITS = ("train", "valid", "test")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# written when the interpreter is built: a table of one machine's paths, not source
_SKIPPED_PREFIX = "_sysconfigdata"


def split_of(relative_path: str) -> str:
    """ "train", "valid" or "test" (about 90/5/5 % of the files), by the sha256 of a relative POSIX path."""
    bucket = int.from_bytes(hashlib.sha256(os.fsencode(relative_path)).digest(), "big") % 20
    return {0: "test", 1: "valid"}.get(bucket, "train")


def source_files(root: Path) -> list[str]:
    """Sorted relative POSIX paths of the .py files below `root`, tests and installed packages left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        here = Path(folder)
        found += [
            (here / name).relative_to(root).as_posix()
            for name in names
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIX)
        ]
    return sorted(found)


def python_source(cache_dir: str | Path, *, root: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """One file of train, valid and test text, in this order, and its record.

    The record holds `split_bytes` (split -> length), `python_version`, `num_files` and `list_sha256`, the
    sha256 over the sorted lines "path size sha256". Within a split the files stand in sorted order, each
    followed by `SEPARATOR`. Raises DataError where fewer than MIN_BYTES are found (a stripped library).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    contents = {name: _read(root / name) for name in source_files(root)}
    total = sum(len(content) for content in contents.values())
    if total < MIN_BYTES:
        raise DataError(
            f"the standard library at {root} holds only {total:,} bytes of .py sources "
            f"(at least {MIN_BYTES:,} are needed): name any large text file by data.path="
        )
    lines = [f"{name} {len(text)} {hashlib.sha256(text).hexdigest()}\n" for name, text in contents.items()]
    facts = {
        "python_version": platform.python_version(),
        "num_files": len(contents),
        "list_sha256": hashlib.sha256(os.fsencode("".join(lines))).hexdigest(),
    }

    def build(write: Callable[[bytes], None]) -> dict[str, Any]:
        split_bytes = dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            for name, text in contents.items():
                if split_of(name) == split:
                    write(text + SEPARATOR)
                    split_bytes[split] += len(text + SEPARATOR)
        return {"split_bytes": split_bytes}

    file, record = cached_file(cache_dir, f"python_source-{facts['list_sha256'][:16]}", build)
    return file, {**record, **facts}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} of the standard library cannot be read ({error.strerror}): name a text by data.path="
        ) from error
