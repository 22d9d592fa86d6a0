"""Sums of a logging interval, kept on the device, and the time the steps of that interval took."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Meter:
    """Adds up metrics between log lines without a host synchronisation; evaluation and saving do not count as time."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._targets = self._steps = self._tokens = 0
        self._started = self._last = time.perf_counter()

    def add(self, sums: Mapping[str, Tensor], num_targets: int) -> None:
        """Add one micro-batch: sums over its `num_targets` targets."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()
        self._targets += num_targets

    def step(self, num_tokens: int) -> None:
        """Count one update, over all processes, and the tokens it read."""
        self._steps += 1
        self._tokens += num_tokens
        self._last = time.perf_counter()

    def report(self, reduce: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float]:
        """(means over the interval's targets and the pace, seconds the interval took); starts the next interval.

        `reduce` sums a tensor over processes. Reading the sums waits for the device, so the time is that of the work.
        """
        values = list(self._sums.values())
        *totals, targets = reduce(torch.stack([*values, torch.full_like(values[0], self._targets)])).tolist()
        seconds = time.perf_counter() - self._started
        metrics = {f"train/{name}": total / targets for name, total in zip(self._sums, totals, strict=True)}
        metrics["perf/tokens_per_s"] = self._tokens / seconds
        metrics["perf/step_ms"] = 1000 * seconds / self._steps
        self._begin()
        return metrics, seconds

    def restart(self) -> None:
        """Leave out the time since the last update or report: it was not training."""
        now = time.perf_counter()
        self._started += now - self._last
        self._last = now
