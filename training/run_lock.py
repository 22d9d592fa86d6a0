"""Which process holds a run folder: run.lock names it by pid, host and start.

The kernel's lock only guards the moment of reading and rewriting: held for the whole run it would pass to forked data
workers and outlive a killed trainer.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.errors import RunDirError

LOCK = "run.lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; a lock left by a process that is gone is taken over.

    Raises RunDirError naming the holder's pid and host, or what keeps the lock from being written.
    """
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid())}
    path = folder / LOCK
    try:
        with open(path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            holder = _living(_read(file))
            if holder is None:
                _write(file, json.dumps(own))
    except OSError as error:
        raise RunDirError(f"the run folder {folder} cannot be written: {error}. Choose another run_dir.") from error
    if holder is not None:
        raise RunDirError(
            f"the run folder {folder} is in use by process {holder['pid']} on host {holder['host']}. Wait for it, or, "
            f"if that process is gone, delete {path}."
        )
    try:
        yield
    finally:
        # what cannot be cleared, or went with the folder, is taken over by the next process
        with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _read(file) == own:
                _write(file, "")


def holder_of(folder: Path) -> dict[str, Any] | None:
    """`pid` and `host` of the process that holds `folder`, None where there is none; writes nothing."""
    try:
        with open(folder / LOCK, encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # not every file system locks what is open for reading
                fcntl.flock(file, fcntl.LOCK_SH)
            return _living(_read(file))
    except OSError:
        return None


def settled(folder: Path, status: dict[str, Any]) -> dict[str, Any]:
    """`status` of a run, with "interrupted" in the place of a "running" that no process is there for any more."""
    if status.get("status") == "running" and holder_of(folder) is None:
        return {**status, "status": "interrupted"}
    return status


def _read(file: Any) -> dict[str, Any] | None:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return holder if isinstance(holder["pid"], int) and isinstance(holder["host"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def _write(file: Any, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _living(holder: dict[str, Any] | None) -> dict[str, Any] | None:
    """The holder if it may still run; on another host that cannot be known, so it counts as running."""
    if holder is None or holder["host"] != socket.gethostname():
        return holder
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return holder if _same_start(holder) else None


def _same_start(holder: Mapping[str, Any]) -> bool:
    """Whether the process of that number is the one that took the lock: numbers are given anew, also after a boot."""
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
