"""One evaluation of a task: the same call at the end of a run and from `eval.py`, so that both give one number."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from training.distributed import Distributed
from training.precision import autocast

REPORT_EVERY_S = 5.0


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
