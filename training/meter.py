"""Sums of a logging interval, and the time its steps took."""

import time
from collections.abc import Mapping
from typing import Any


class Meter:
    """Adds up metrics between log lines; evaluation does not count as time. Its state is JSON, part of a checkpoint."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, float] = {}
        self._targets = self._steps = self._tokens = 0
        self._started = self._last = time.perf_counter()

    def add(self, sums: Mapping[str, float], num_targets: int) -> None:
        """Add the sums of an update over its `num_targets` targets, over all processes."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._targets += num_targets

    def step(self, num_tokens: int) -> None:
        """Count one step, over all processes, and the tokens it read; a step may be left without an update."""
        self._steps += 1
        self._tokens += num_tokens
        self._last = time.perf_counter()

    def report(self) -> tuple[dict[str, float], float]:
        """(means over the interval's targets and the pace, seconds the interval took); starts the next interval.

        An interval without a single update has no means.
        """
        seconds = time.perf_counter() - self._started
        metrics = {f"train/{name}": total / self._targets for name, total in self._sums.items()}
        metrics["perf/tokens_per_s"] = self._tokens / seconds
        metrics["perf/step_ms"] = 1000 * seconds / self._steps
        self._begin()
        return metrics, seconds

    def restart(self) -> None:
        """Leave out the time since the last step or report: it was not training."""
        now = time.perf_counter()
        self._started += now - self._last
        self._last = now

    def state_dict(self) -> dict[str, Any]:
        """The interval so far, as JSON."""
        return {
            "sums": self._sums,
            "targets": self._targets,
            "steps": self._steps,
            "tokens": self._tokens,
            "seconds": time.perf_counter() - self._started,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with an interval where `state_dict` left it."""
        self._begin()
        self._sums = dict(state["sums"])
        self._targets, self._steps, self._tokens = state["targets"], state["steps"], state["tokens"]
        self._started -= state["seconds"]
