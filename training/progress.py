"""Live progress: one updating line on a terminal, one plain line per report elsewhere."""

import contextlib
import logging
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# ahead of others in the line: the number a person looks at first
HEADLINES = ("train/bpc", "train/bits_per_token", "train/accuracy", "train/loss")
REDRAW_S = 0.2
log = logging.getLogger(__name__)
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A reader that has left, as `| head` does, is no reason to end a run: from here on it is silent."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ProgressReporter:
    """Shows a run of `total_steps` updates in `num_phases` phases; silent unless `enabled`.

    On a terminal the line redraws at every `update`, at most five times a second; otherwise every `update` is
    a line, so call it once per logging interval.
    """

    def __init__(self, total_steps: int, num_phases: int, enabled: bool = True, console: Console | None = None):
        self._total = total_steps
        self._num_phases = num_phases
        self._console = console or _Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._enabled = enabled
        self._clock = _Clock(total_steps)
        self._drawn = float("-inf")
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=16),
                TextColumn("{task.percentage:3.0f}% {task.description}"),
                console=self._console,
                auto_refresh=False,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=total_steps)
            self._bar.start()

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a line of metrics, named as in metrics.jsonl.

        Read are "step" (updates done), "phase" (from 0), "train/bpc", "optim/lr", "perf/tokens_per_s",
        "mem/peak_gib"; "progress/eta_s" where the caller knows better than the pace so far. What is absent is
        left out.
        """
        if not self._enabled:
            return
        step = int(metrics.get("step", 0))
        eta = metrics.get("progress/eta_s", self._clock.remaining(step))
        line = describe(metrics, self._total, self._num_phases, eta)
        if self._bar is None:
            self._console.print(line, markup=False)
            return
        self._bar.update(self._task, completed=step, description=line.replace("[", r"\["))
        now = time.monotonic()
        if now - self._drawn >= REDRAW_S or step >= self._total:
            self._drawn = now
            self._bar.refresh()

    def message(self, text: str) -> None:
        """Print a line of its own, above the live line on a terminal, and log it."""
        if self._enabled:
            log.info("%s", text)
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Remove the live line; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Clock:
    """Seconds left at the pace of the last reports, since phases differ in the cost of a step."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._last: tuple[int, float] | None = None
        self._pace: float | None = None  # seconds per step

    def remaining(self, step: int) -> float | None:
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            pace = (now - self._last[1]) / (step - self._last[0])
            self._pace = pace if self._pace is None else 0.7 * self._pace + 0.3 * pace
        if self._last is None or step != self._last[0]:
            self._last = (step, now)
        return None if self._pace is None else self._pace * max(self._total - step, 0)


def describe(metrics: Mapping[str, Any], total_steps: int, num_phases: int, eta_s: float | None) -> str:
    """One line for a person: phase, step, headline metric, learning rate, tokens per second, ETA, memory."""
    parts = [f"phase {int(metrics.get('phase', 0)) + 1}/{num_phases}"] if num_phases > 1 else []
    parts.append(f"step {int(metrics.get('step', 0)):,}/{total_steps:,}")
    headline = next((name for name in HEADLINES if _is_number(metrics.get(name))), None)
    if headline:
        parts.append(f"{headline.rpartition('/')[2]} {metrics[headline]:.3f}")
    if _is_number(metrics.get("optim/lr")):
        parts.append(f"lr {metrics['optim/lr']:.2e}")
    if _is_number(metrics.get("perf/tokens_per_s")):
        parts.append(f"{metrics['perf/tokens_per_s']:,.0f} tokens/s")
    if eta_s is not None:
        parts.append(f"{format_duration(eta_s)} left")
    if _is_number(metrics.get("mem/peak_gib")):
        parts.append(f"{metrics['mem/peak_gib']:.2f} GiB")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """ "42s", "3m05s", "2h07m", "3d04h"."""
    whole = max(int(round(seconds)), 0)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def reset_peak_memory(device: torch.device | str) -> None:
    """Forget the peak so far, where that can be done (CUDA, Linux): a sweep may run several runs in one process."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")  # proc(5): resets VmHWM


def peak_memory_bytes(device: torch.device | str) -> int:
    """Most memory held since the last reset: tensors of a CUDA device, or resident memory of this process on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes elsewhere


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
