"""How every benchmark measures: contenders in turn, medians with a range, CSV rows that name the machine."""

import csv
import datetime
import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from training.environment import cpu_model, git, package_version

LOW, HIGH = 20, 80  # percentiles of a range
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Median with the 20 and 80 % percentiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values) -> "Spread":
        """Spread of a sequence of numbers."""
        return cls(*(float(np.percentile(values, share)) for share in (50, LOW, HIGH)))


def interleave(
    calls: Mapping[Name, Callable[[], object]], *, num_rounds: int, device: str, num_warmup: int = 2
) -> dict[Name, np.ndarray]:
    """Seconds [num_rounds] of each call, taken in turn (A B A B), so that a slow minute meets all of them."""
    for call in calls.values():
        for _ in range(num_warmup):
            call()
    seconds = {name: np.empty(num_rounds) for name in calls}
    for index in range(num_rounds):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            seconds[name][index] = time.perf_counter() - start
    return seconds


def _synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


@dataclass
class Row:
    """One measured figure. Fields that do not apply stay None and are empty in the CSV."""

    table: str  # module, kernel or scaling
    contender: str
    passes: str  # forward or forward+backward
    batch: int
    seq_len: int
    num_heads: int
    head_dim: int
    window: int  # keys on each side
    dtype: str
    device: str
    num_rounds: int | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio: float | None = None  # the contender's time over ours, median over the rounds
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    setup_s: float | None = None  # compilation and mask building, paid once and not in the time
    max_error: float | None = None  # largest absolute difference from our output
    extra_memory_bytes: int | None = None  # peak above the level before the call, in a fresh process
    memory_ratio: float | None = None  # our extra memory over the contender's
    slope: float | None = None  # of log time over log length
    slope_p20: float | None = None
    slope_p80: float | None = None
    largest_tensor: int | None = None  # elements of the largest storage made
    largest_share: float | None = None  # the same over T * T; in a slope's row at its worst over the lengths
    note: str | None = None

    def time(self, seconds: np.ndarray) -> "Row":
        """Enter the times of the rounds, in seconds."""
        spread = Spread.of(seconds * 1e3)
        self.num_rounds = len(seconds)
        self.median_ms, self.p20_ms, self.p80_ms = spread.median, spread.low, spread.high
        return self

    def ratio_to(self, seconds: np.ndarray, ours: np.ndarray) -> "Row":
        """Enter the ratio to our times of the same rounds."""
        spread = Spread.of(seconds / ours)
        self.ratio, self.ratio_p20, self.ratio_p80 = spread.median, spread.low, spread.high
        return self


def log_slope(lengths: list[int], seconds: dict[int, np.ndarray]) -> Spread:
    """Least-squares slope of log time over log length, of each round; 1 is linear growth."""
    times = np.log(np.stack([seconds[length] for length in lengths]))  # [lengths, num_rounds]
    return Spread.of(np.polyfit(np.log(lengths), times, 1)[0])


def environment() -> dict[str, str | int | bool]:
    """When, with which sources and versions and on which machine: the columns that every row carries."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": (git("rev-parse", "HEAD") or "none").strip(),
        "dirty": bool(git("status", "--porcelain")),
        "cpu": cpu_model(),
        "num_cores": os.cpu_count() or 0,
        "num_threads": torch.get_num_threads(),
        "allocator": _allocator_settings(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton") or "none",
        "transformers": package_version("transformers") or "none",
    }


def write_csv(path: Path, rows: Sequence[Any], shared: Mapping[str, object]) -> None:
    """Replace the file by `rows`, dataclasses of one kind, each followed by the `shared` columns (`environment`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = [field.name for field in fields(rows[0])]
        writer = csv.DictWriter(file, fieldnames=[*columns, *shared], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(entry) for name, entry in {**asdict(row), **shared}.items()})


def _cell(entry):
    return f"{entry:.6g}" if isinstance(entry, float) else entry


def _allocator_settings() -> str:
    """Changes to malloc: whether it keeps freed memory decides how often a call pays for fresh pages."""
    names = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")
    chosen = {name: text for name, text in os.environ.items() if name.startswith(names)}
    return " ".join(f"{name}={text}" for name, text in sorted(chosen.items())) or "default"
