"""The run folder: made exclusively, locked by one process, every file in it whole or absent."""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.environment import describe_environment
from training.errors import RunDirError
from training.files import point_link, to_json, write_json, write_text

LOCK = "run.lock"


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


class RunDir:
    """Reads and writes the files of one run folder, which it makes if needed; one process should write."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self._metrics = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"the run folder {self.path} cannot be made: {error}") from error

    def write_json(self, name: str, value: Any) -> None:
        """Replace the file `name` (folders in it are made) by `value` as strict JSON, in one step."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, value)

    def status(self, status: str, **fields: Any) -> None:
        """Replace status.json: the status (running, finished, preempted, failed ...), time and `fields`."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.write_json("status.json", {"status": status, "time": stamp, **fields})

    def read_status(self) -> dict[str, Any]:
        """The content of status.json, {} where there is none."""
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and hand it to the operating system."""
        if self._metrics is None:
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._metrics.write(to_json(metrics) + "\n")
        self._metrics.flush()

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of metrics.jsonl with a step above `step`, and a last line cut by a crash.

        The final test follows the last checkpoint, so a line of its numbers goes too.
        """
        self.close()
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["step"] <= step and not any(name.startswith("test/") for name in entry):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_text(path, "".join(kept))

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
        file = logging.FileHandler(self.path / "train.log", encoding="utf-8")
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
            file.close()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; a lock left by a process that is gone is taken over.

        Raises RunDirError naming the holder's pid and host.
        """
        own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid())}
        with self._lock_file() as file:
            holder = _parse(file.read())
            if holder and _is_alive(holder, own["host"]):
                raise RunDirError(
                    f"the run folder {self.path} is in use by process {holder['pid']} on host "
                    f"{holder['host']}. Wait for it, or, if that process is gone, delete {self.path / LOCK}."
                )
            _overwrite(file, json.dumps(own))
        try:
            yield
        finally:
            self.close()
            with self._lock_file() as file:
                if _parse(file.read()) == own:
                    _overwrite(file, "")

    def close(self) -> None:
        """Close metrics.jsonl; the next `log_metrics` opens it again."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[Any]:
        # the kernel's lock only guards the moment of reading and rewriting: held for the whole run it would
        # pass to forked data workers and outlive a killed trainer
        try:
            file = open(self.path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise RunDirError(f"the run folder {self.path} cannot be written: {error}") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file


def _overwrite(file: Any, text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _parse(text: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(text)
        return holder if isinstance(holder["pid"], int) and isinstance(holder["host"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def _is_alive(holder: Mapping[str, Any], host: str) -> bool:
    """Whether the holder may still run; on another host that cannot be known, so it counts as alive."""
    if holder["host"] != host:
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # the number may have been given to another process since
    started = _start_time(holder["pid"])
    return started is None or holder.get("started") is None or started == holder["started"]


def _start_time(pid: int) -> str | None:
    """Start of a process as the kernel counts it, with the boot it belongs to; None where /proc is absent."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # the second field is the command in brackets and may hold spaces; the start is the 22nd
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"{boot}:{ticks}"
