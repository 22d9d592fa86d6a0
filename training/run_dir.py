"""The run folder: made exclusively, locked by one process, every file in it whole or absent."""

import contextlib
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.environment import describe_environment
from training.errors import RunDirError
from training.files import point_link, replacing, to_json, write_json, write_text
from training.run_lock import hold, settled

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # the folder of it in that of a run


def create_run_dir(root: str | Path, name: str) -> Path:
    """Make `<root>/<name>/<YYYY-MM-DD>_<HHMMSS>_<id>` and move the link `latest` beside it; returns its path.

    The id keeps runs started in the same second apart. Raises RunDirError where the name is not usable as one
    folder name, or the folder cannot be made.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise RunDirError(f"experiment name {name!r} cannot name a folder: it must be non-empty, without '/'")
    parent = Path(root).absolute() / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            path = parent / f"{time.strftime('%Y-%m-%d_%H%M%S')}_{secrets.token_hex(3)}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
    except OSError as error:
        raise RunDirError(f"no run folder can be made in {parent}: {error}. Choose another run_dir.") from error
    point_link(parent / "latest", path.name)
    return path


def keep_tokenizer(task: Any, path: Path) -> None:
    """Write the tokenizer of a task that has one into its run folder, so that the run needs its source no more."""
    kept = path / TOKENIZER
    if hasattr(type(task), "tokenizer") and task.folder != kept:
        task.tokenizer.save(kept)


def find_tokenizer(task: Any, path: Path | None) -> None:
    """Have a task whose tokenizer's folder is gone take what the run folder `path`, if any, has kept of it."""
    if path is not None and hasattr(type(task), "tokenizer"):
        kept = path.absolute() / TOKENIZER
        if kept.is_dir() and not task.folder.is_dir():
            task.folder = kept


class RunDir:
    """Reads and writes the files of one run folder, which it makes if needed; one process should write."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self._metrics = None
        self._status_failed = False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"the run folder {self.path} cannot be made: {error}. Choose another run_dir.") from error

    def write_json(self, name: str, value: Any) -> None:
        """Replace the file `name` (folders in it are made) by `value` as strict JSON, in one step."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)

    def status(self, status: str, **fields: Any) -> None:
        """Replace status.json: the status (running, finished, preempted, failed ...), time and `fields`.

        A disk without room for it stops nothing: one warning tells of it.
        """
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        content = {"status": status, "time": stamp, **fields}
        try:
            self.write_json("status.json", content)
        except OSError as error:
            try:
                # no room for a second file: the bytes of the old one are there to be used
                _overwrite(self.path / "status.json", to_json(content, indent=2) + "\n")
            except OSError:
                if not self._status_failed:
                    log.warning("status.json cannot be written, status is %s: %s", status, error_line(error))
                self._status_failed = True

    def read_status(self) -> dict[str, Any]:
        """The content of status.json, {} where there is none or, after a warning, none that can be read.

        The status of a run that says "running" though no process holds its folder is "interrupted".
        """
        path = self.path / "status.json"
        try:
            status = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(status, dict):
                raise ValueError("it holds no JSON object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read and counts as missing: %s", path, error)
            return {}
        return settled(self.path, status)

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and hand it to the operating system; no part of a line is left behind."""
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
        line = memoryview((to_json(metrics) + "\n").encode())
        end = self._metrics.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that is nearly full takes a part of it
                line = line[self._metrics.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._metrics.truncate(end)
            raise

    def truncate_metrics(self, step: int) -> None:
        """Cut metrics.jsonl back to the checkpoint of `step`, in one step; lines that a crash has cut go too.

        A checkpoint is written before the evaluation of its step, which a resumed run therefore repeats: the line of
        that goes as well.
        """
        self.close()
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        num_broken = 0
        with replacing(path) as temporary, open(path, "rb") as old, open(temporary, "wb") as new:
            for line in old:
                kept = _is_kept(line, step)
                # the last line may lack its end, that is how a killed process leaves it
                num_broken += kept is None and line.endswith(b"\n")
                if kept:
                    new.write(line)
        if num_broken:
            log.warning("%s: %d line(s) were no JSON with a step and are dropped", path, num_broken)

    def write_env(self) -> None:
        """Write env.json (versions, machine, git, command line) and, for changed sources, dirty.diff."""
        environment, diff = describe_environment()
        if diff:
            write_text(self.path / "dirty.diff", diff)
        self.write_json("env.json", environment)

    @contextlib.contextmanager
    def log_file(self) -> Iterator[None]:
        """Append what is logged from INFO on to train.log; warnings go on to stderr as well."""
        root = logging.getLogger()
        level, before = root.level, list(root.handlers)
        try:
            file = _LogFile(self.path / "train.log")
        except OSError as error:
            raise RunDirError(
                f"the run folder {self.path} cannot be written: {error}. Choose another run_dir."
            ) from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers: list[logging.Handler] = [file]
        if not before and logging.lastResort is not None:
            handlers.append(logging.lastResort)  # which logging drops as soon as there is any other
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(min(level, logging.INFO))
        try:
            yield
        finally:
            root.setLevel(level)
            for handler in handlers:
                root.removeHandler(handler)
            with contextlib.suppress(OSError):  # it was said when the first line did not fit
                file.close()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; a lock left by a process that is gone is taken over.

        Raises RunDirError naming the holder's pid and host.
        """
        with hold(self.path):
            try:
                yield
            finally:
                self.close()

    def close(self) -> None:
        """Close metrics.jsonl; the next `log_metrics` opens it again."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


class _LogFile(logging.FileHandler):
    """A log that is left alone, after one warning, when its file cannot be written any more."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8")
        self._is_off = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._is_off:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._is_off = True
        log.warning("%s is off for this run: %s", Path(self.baseFilename).name, error_line(error))


def error_line(error: BaseException) -> str:
    """Type and message of an error on one line of at most about 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _is_kept(line: bytes, step: int) -> bool | None:
    """Whether a line of metrics.jsonl comes before the evaluation of `step`; None where it cannot be read."""
    try:
        entry = json.loads(line)
        if entry["step"] == step and line.endswith(b"\n"):
            return not any(name.startswith(("valid/", "test/")) for name in entry)
        return bool(entry["step"] < step) and line.endswith(b"\n")
    except (ValueError, KeyError, TypeError):
        return None


def _overwrite(path: Path, text: str) -> None:
    """Put `text` in the place of what an existing file holds."""
    with open(path, "r+b") as file:
        file.write(text.encode())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
