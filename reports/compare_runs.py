"""Runs grouped by what they have in common, with mean and spread of a score over the seeds of each group."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.saved import flatten
from reports.errors import ReportError
from reports.metrics import headline_metric, is_number, metric_named, number
from reports.run_folder import RunFolder, find_runs, read_run

# where a run lies, what it prints and what it keeps: none of it changes what is learned
LOCAL_KEYS = ("run_dir", "device", "num_threads", "data.cache_dir", "data.workers")
LOCAL_GROUPS = ("train.", "tracker.", "hydra.")
MISSING = "(not set)"


@dataclass
class Row:
    """One group of runs that differ in their seed alone, or one run without the score.

    `settings` holds the keys that differ between the groups; `values` one score a run, in the order of `runs`
    and `seeds`; `spread` is max - min; `std` is the sample standard deviation, None for a single run. `nonfinite` is
    the score of a run whose score is not finite: it stands as the mean of a row of its own.
    """

    settings: dict[str, Any]
    runs: list[str]
    seeds: list[Any]
    values: list[float] = field(default_factory=list)
    status: str = "finished"
    tokens_per_second: float | None = None
    nonfinite: float | None = None

    @property
    def num_runs(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else self.nonfinite

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if self.num_runs > 1 else None

    @property
    def low(self) -> float | None:
        return min(self.values, default=None)

    @property
    def high(self) -> float | None:
        return max(self.values, default=None)

    @property
    def spread(self) -> float | None:
        return max(self.values) - min(self.values) if self.values else None

    def as_json(self) -> dict[str, Any]:
        """The row as plain data."""
        names = ("settings", "status", "num_runs", "mean", "std", "low", "high", "spread", "values", "seeds")
        return {name: getattr(self, name) for name in (*names, "tokens_per_second", "runs")}


@dataclass
class Comparison:
    """The rows, finished groups first and sorted by the score, and the keys that tell them apart.

    `together` names, for a shown key, the keys that change exactly when it does; they have no column of
    their own. `averaged` names the keys, other than seeds, that differ within a group (only with `by`).
    `problems` says in sentences which files could not be read.
    """

    metric: str
    keys: list[str]
    rows: list[Row]
    together: dict[str, list[str]] = field(default_factory=dict)
    averaged: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def compare_runs(paths: Sequence[str | Path], metric: str | None = None, by: Sequence[str] | None = None) -> Comparison:
    """Group the runs at or below `paths`; `metric` is a number of result.json, by default the headline score.

    Two runs belong together when their configs agree in all but seeds, `LOCAL_KEYS` and `LOCAL_GROUPS`,
    or, with `by`, in the keys named there. Raises ReportError for a path without a run, a metric that no run
    has and a key of `by` that no config has.
    """
    found = {run.resolve(): run for path in paths for run in find_runs(path)}
    runs = [read_run(path, history=False) for path in found.values()]
    metric = _choose_metric(runs, metric)
    settings = [_compared(run) for run in runs]
    names = sorted({key for one in settings for key in one})
    differing = [key for key in names if len({_text(one, key) for one in settings}) > 1]
    if by is not None:
        _check_keys(by, names)
    keys = list(by) if by is not None else differing
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, one in enumerate(settings):
        groups.setdefault(tuple(_text(one, key) for key in keys), []).append(index)
    averaged = [
        key
        for key in differing
        if key not in keys
        and any(len({_text(settings[index], key) for index in members}) > 1 for members in groups.values())
    ]
    rows: list[Row] = []
    for members in groups.values():
        shown = {key: settings[members[0]].get(key, MISSING) for key in keys}
        rows += _rows([runs[index] for index in members], metric, shown)
    sign = 1.0 if metric_named(metric).lower_is_better else -1.0
    rows.sort(key=lambda row: (not row.values, sign * statistics.fmean(row.values or [0.0])))
    shown_keys, together = (keys, {}) if by is not None else _merge_keys(rows, keys)
    problems = [f"{run.path}: {problem}" for run in runs for problem in run.problems]
    return Comparison(metric, shown_keys, rows, together, averaged, problems)


def _rows(runs: Sequence[RunFolder], metric: str, settings: Mapping[str, Any]) -> list[Row]:
    """One row for the finished runs of a group and one for every other run."""
    scored = [run for run in runs if _has_score(run, metric)]
    rows = []
    if scored:
        speeds = [run.result["tokens_per_second"] for run in scored if is_number(run.result.get("tokens_per_second"))]
        rows.append(
            Row(
                dict(settings),
                [str(run.path) for run in scored],
                [run.config.get("seed") for run in scored],
                [score for run in scored if (score := _score(run, metric)) is not None],
                tokens_per_second=statistics.fmean(speeds) if speeds else None,
            )
        )
    for run in runs:
        if not _has_score(run, metric):
            # of a run that goes on it would be a former one
            score = _score(run, metric) if run.state in ("finished", "failed") else None
            missing = run.state == "finished" and score is None
            status = f"finished without {metric}" if missing else run.state
            step = run.status.get("step")
            status += f" at step {step}" if is_number(step) else ""
            nonfinite = score if score is not None and not math.isfinite(score) else None
            rows.append(
                Row(dict(settings), [str(run.path)], [run.config.get("seed")], status=status, nonfinite=nonfinite)
            )
    return rows


def _compared(run: RunFolder) -> dict[str, Any]:
    flat = flatten(run.config)
    return {
        key: value
        for key, value in flat.items()
        if key not in LOCAL_KEYS and not key.startswith(LOCAL_GROUPS) and key.rpartition(".")[2] != "seed"
    }


def _text(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], sort_keys=True, default=str) if key in settings else MISSING


def _score(run: RunFolder, metric: str) -> float | None:
    return number(flatten(run.result).get(metric))


def _has_score(run: RunFolder, metric: str) -> bool:
    score = _score(run, metric)
    return run.state == "finished" and score is not None and math.isfinite(score)


def _choose_metric(runs: Sequence[RunFolder], metric: str | None) -> str:
    present = sorted({key for run in runs for key, value in flatten(run.result).items() if number(value) is not None})
    if metric is None:
        headline = next(filter(None, (headline_metric(run.result) for run in runs)), None)
        return headline.name if headline else "bpc"  # nothing has finished: every run is listed with its status
    if metric not in present:
        listed = ", ".join(present) or "none, no run has a result.json yet"
        raise ReportError(f"metric {metric!r}: no run has it; present are: {listed}")
    return metric


def _check_keys(by: Sequence[str], names: Sequence[str]) -> None:
    import difflib

    for key in by:
        if key not in names:
            nearest = difflib.get_close_matches(key, names, n=3, cutoff=0.4)
            hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
            raise ReportError(f"--by {key}: no run's config has this key{hint}")


def _merge_keys(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Of keys that split the rows in the same way keep the one with the shortest values."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        texts = [_text(row.settings, key) for row in rows]
        order = list(dict.fromkeys(texts))
        groups.setdefault(tuple(order.index(text) for text in texts), []).append(key)
    together = {}
    for members in groups.values():
        longest = {key: max(len(_text(row.settings, key)) for row in rows) for key in members}
        shown = min(members, key=lambda key: (longest[key], key.count("."), members.index(key)))
        together[shown] = [key for key in members if key != shown]
    return list(together), {key: others for key, others in together.items() if others}
