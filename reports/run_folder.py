"""The files of a run folder as plain data; what is missing or broken is noted, never fatal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.saved import read_yaml
from configs.schema import ConfigError
from reports.errors import ReportError
from training.run_lock import settled

CONFIG = "config.yaml"


@dataclass
class RunFolder:
    """What a run folder holds; `problems` says in sentences what could not be read."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    overrides: list[str] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl, by step
    valid: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # "test-step-200" -> numbers
    samples: dict[str, str] = field(default_factory=dict)  # "step-200" -> text, the newest first
    problems: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """running, finished, preempted, failed, interrupted (its process is gone); "unknown" where nothing says so."""
        state = self.status.get("status")
        return str(state) if state else "finished" if self.result else "unknown"


def read_run(path: str | Path, *, history: bool = True) -> RunFolder:
    """Read the run folder at `path`; without `history` only its settings, status and result.

    Raises ReportError where `path` is no run folder.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        what = "is no folder" if not path.is_dir() else f"is no run folder (it has no {CONFIG})"
        raise ReportError(f"{path} {what}; give a folder that train.py made, as runs/default/latest")
    run = RunFolder(path)
    run.config_text = _text(run, CONFIG)
    run.config = _config(run)
    run.overrides = [line.strip() for line in _text(run, "overrides.txt").splitlines() if line.strip()]
    run.env, run.status, run.result = (_json(run, name) for name in ("env.json", "status.json", "result.json"))
    run.status = settled(path, run.status)
    if not history:
        return run
    _read_metrics(run)
    for file in sorted((path / "eval").glob("*.json"), key=_by_step):
        run.evaluations[file.stem] = _json(run, f"eval/{file.name}")
    for file in sorted((path / "samples").glob("*.txt"), key=_by_step, reverse=True):
        run.samples[file.stem] = _text(run, f"samples/{file.name}")
    return run


def find_runs(path: str | Path) -> list[Path]:
    """The run folders at or below `path`, sorted; links (`latest`) are not followed.

    Raises ReportError where there is none.
    """
    path = Path(path)
    runs = list(_walk(path)) if path.is_dir() else []
    if not runs:
        what = f"neither is a run folder nor holds one (no {CONFIG} in it)" if path.is_dir() else "is no folder"
        raise ReportError(f"{path} {what}; give run folders of train.py or a folder that holds some")
    return runs


def _walk(path: Path) -> Iterator[Path]:
    if (path / CONFIG).is_file():
        yield path
        return
    for child in sorted(path.iterdir(), key=lambda child: _natural(child.name)):
        if child.is_dir() and not child.is_symlink():
            yield from _walk(child)


def _text(run: RunFolder, name: str) -> str:
    try:
        return (run.path / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.problems.append(f"{name} could not be read: {error}.")
        return ""


def _json(run: RunFolder, name: str) -> dict[str, Any]:
    text = _text(run, name)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        run.problems.append(f"{name} is not valid JSON: {error}.")
        return {}
    if not isinstance(value, dict):
        run.problems.append(f"{name} holds no JSON object.")
        return {}
    return value


def _config(run: RunFolder) -> dict[str, Any]:
    try:
        # nothing is resolved: a stored config must not read the environment of whoever looks at it
        return read_yaml(run.path / CONFIG)
    except ConfigError as error:
        run.problems.append(f"{CONFIG} could not be read: {error}.")
        return {}


def _read_metrics(run: RunFolder) -> None:
    """Sort the lines into training and evaluation; after a resume the last line of a step holds."""
    train: dict[float, dict[str, Any]] = {}
    valid: dict[float, dict[str, Any]] = {}
    broken = 0
    for line in _text(run, "metrics.jsonl").splitlines():
        try:
            record = json.loads(line)
            step = float(record["step"])
        except (ValueError, TypeError, KeyError):
            broken += bool(line.strip())
            continue
        kinds = {str(key).partition("/")[0] for key in record}
        if not math.isfinite(step):
            broken += 1
        elif "train" in kinds:
            train[step] = record
        elif "valid" in kinds:
            valid[step] = record
    if broken:
        run.problems.append(f"{broken} line(s) of metrics.jsonl could not be read and are left out.")
    run.train = [train[step] for step in sorted(train)]
    run.valid = [valid[step] for step in sorted(valid)]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key under which step-20 comes before step-100."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _by_step(file: Path) -> list[tuple[int, int | str]]:
    return _natural(file.stem)
