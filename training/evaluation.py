"""One evaluation of a task: the same call at the end of a run and from `eval.py`, so that both give one number."""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from training.distributed import Distributed
from training.files import json_ready, write_text
from training.precision import autocast
from training.run_dir import RunDir

REPORT_EVERY_S = 5.0
# what a score depends on beside the checkpoint and the data
SETTINGS = ("model", "share", "protocol", "context", "stride", "window_cut_to", "precision", "device")


def evaluate(
    task: Any,
    model: nn.Module,
    split: str,
    *,
    dist: Distributed,
    precision: str,
    settings: Mapping[str, Any],
    show: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """`task.evaluate` in a resolved precision, shared by the processes; `show` gets a line every few seconds.

    The result also names what the number depends on: task, split, precision, device and data.
    """
    started = reported = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if now - reported >= REPORT_EVERY_S:
            reported = now
            left = (now - started) / done * (total - done)
            show(f"evaluating {split}: {done / total:.0%}, {left:.0f} s left")

    with autocast(precision, dist.device):
        scores = task.evaluate(
            model,
            split,
            **settings,
            rank=dist.rank,
            world_size=dist.world_size,
            reduce=dist.all_reduce_sum,
            progress=progress,
        )
    return {
        "task": task.name,
        "split": split,
        **scores,
        "precision": precision,
        "device": dist.device.type,
        "data": task.fingerprint,
    }


def write_evaluation(folder: RunDir, result: Mapping[str, Any], *, below: str = "eval") -> tuple[Path, Path | None]:
    """Write `result` to `<below>/<split>-step-N.json` of a run folder, by its `split` and `step`.

    A result there of the same SETTINGS is replaced, one of others is kept beside it under a name that says them.
    Returns the path written, and that of the result kept, if any.
    """
    path = folder.path / below / f"{result['split']}-step-{result['step']}.json"
    kept = None
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        former = _settings(text)
        if former != {name: json_ready(result[name]) for name in SETTINGS if name in result}:
            said = ",".join(f"{name}={value}" for name, value in former.items()) or "settings-unknown"
            kept = path.with_name(f"{path.stem},{re.sub(r'[^ -~]|/', '_', said)}.json")
            write_text(kept, text)
    folder.write_json(str(path.relative_to(folder.path)), result)
    return path, kept


def _settings(text: str) -> dict[str, Any]:
    """The SETTINGS that a stored result tells, {} where it cannot be read."""
    try:
        stored = json.loads(text)
    except ValueError:
        return {}
    return {name: stored[name] for name in SETTINGS if name in stored} if isinstance(stored, dict) else {}
