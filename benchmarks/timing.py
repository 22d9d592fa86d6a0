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
from training.files import replacing

LOW, HIGH = 20, 80  # percentiles of a range
FLUSH_BYTES = 2**28  # written before each call on a GPU: several times any L2 cache
MIN_TURN_SECONDS, MAX_CALLS = 2e-3, 10  # a turn on a GPU repeats short calls up to so long, so often
CLOCK_HZ = 2e9  # above what GPUs run at, so that a wait counted in cycles is not too short
MAX_WAIT_SECONDS = 0.02
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
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            seconds[name][index] = time.perf_counter() - start
    return seconds


def interleave_on_gpu(
    calls: Mapping[Name, Callable[[], object]], *, num_rounds: int, num_warmup: int = 2, device: str = "cuda"
) -> dict[Name, np.ndarray]:
    """Seconds [num_rounds] of GPU time of each call, taken in turn; a turn is the mean of several calls.

    Events stand around each call and an L2 cache full of other data before it. The GPU is kept waiting while the host
    queues a turn, so that launches do not count where the host can run ahead; a call that waits for the GPU pays.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    plans = {name: _plan(call, num_warmup) for name, call in calls.items()}
    seconds = {name: np.empty(num_rounds) for name in calls}
    for index in range(num_rounds):
        for name, call in calls.items():
            num_calls, wait = plans[name]
            torch.cuda._sleep(int(wait * CLOCK_HZ))
            pairs = [_between_events(call, flush) for _ in range(num_calls)]
            torch.cuda.synchronize()
            seconds[name][index] = np.mean([start.elapsed_time(end) for start, end in pairs]) * 1e-3
    return seconds


def _plan(call, num_warmup):
    """How often a turn repeats the call, and the seconds the host needs to queue that."""
    for _ in range(num_warmup):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    took = time.perf_counter() - start
    num_calls = max(1, min(MAX_CALLS, round(MIN_TURN_SECONDS / max(took, 1e-9))))
    return num_calls, min(1.5 * num_calls * queued, MAX_WAIT_SECONDS)


def _between_events(call, flush):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    return start, end


def synchronize(device: str) -> None:
    """Wait for the device to finish what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


@dataclass
class Row:
    """One measured figure. Fields that do not apply stay None and are empty in the CSV."""

    table: str  # module, kernel, scaling or encoder; on a GPU window, global rows, module or encoder
    contender: str
    passes: str  # forward or forward+backward
    batch: int
    seq_len: int
    num_heads: int
    head_dim: int
    window: int | None  # keys on each side
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
    memory_slope: float | None = None  # of log extra memory over log length, from the shortest to the longest
    largest_tensor: int | None = None  # elements of the largest storage made
    largest_share: float | None = None  # the same over T * T; in a slope's row at its worst over the lengths
    case: str | None = None  # in `gpu_cases`, as the fields below of rows from a GPU; of encoders in `encoders`
    num_kv_heads: int | None = None
    dilation: int | None = None
    causal: bool | None = None
    num_globals: int | None = None
    target: float | None = None  # the least ratio that is wanted
    mechanism: str | None = None  # on a CPU, as the file that describes it; on a GPU the table says it
    block_size: int | None = None  # of block-sparse attention, in tokens
    num_random_blocks: int | None = None  # in each row of blocks
    num_landmarks: int | None = None  # of Nyström attention
    num_taps: int | None = None  # of its convolution, where that is measured
    tflops: float | None = None  # useful work a second: 4 and 10 (backward) times pairs times head_dim; projections
    ceiling_share: float | None = None  # of the rate of a large matrix product in the same dtype and run
    roofline_share: float | None = None  # of the speed that bytes and operations of the useful work allow
    reference_error: float | None = None  # from the float64 reference on slices, relative rms, the worst tensor's
    needed_bytes: int | None = None  # tensors that must exist: inputs, output, log-sum-exp, their gradients
    memory_over_needed: float | None = None  # peak with the inputs over that
    num_layers: int | None = None  # of a whole encoder, as the two fields below
    weight_bytes: int | None = None  # of its parameters, which were there before the call
    max_memory_ratio: float | None = None  # the largest memory_ratio that is wanted
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
        "cuda": torch.version.cuda or "none",
        "triton": package_version("triton") or "none",
        "transformers": package_version("transformers") or "none",
    }


def write_csv(path: Path, rows: Sequence[Any], shared: Mapping[str, object]) -> None:
    """Replace the file by `rows`, dataclasses of one kind, each followed by the `shared` columns (`environment`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
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
