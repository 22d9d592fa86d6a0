"""Numbers that are not finite: what is kept of such a batch, when a run has had enough of them, scores."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from training.errors import NumericsError
from training.files import write_json

FOLDER = "nonfinite"
log = logging.getLogger(__name__)


def keep_batch(run_dir: Path, batch: Any, facts: Mapping[str, Any], rank: int) -> Path:
    """Write a process's batch and `facts` (step, phase, lr, loss …) to `run_dir/nonfinite/step-N`; returns that folder.

    The batch, a tensor or an object whose `tensors()` have names, is kept as it came from the task, in
    `batch-rank-R.safetensors`. No room for it costs a warning.
    """
    folder = run_dir / FOLDER / f"step-{facts['step']}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"batch": batch} if isinstance(batch, Tensor) else batch.tensors()
        # cloned: rows of a larger memory would be refused by the format
        tensors = {name: part.detach().cpu().clone() for name, part in parts.items()}
        save_file(tensors, folder / f"batch-rank-{rank}.safetensors")
        if rank == 0:
            write_json(folder / "facts.json", facts)
    except (OSError, SafetensorError) as error:
        log.warning("the batch of step %d could not be kept in %s: %s", facts["step"] + 1, folder, error)
    return folder


def check_limit(policy: str, count: int, limit: int, folder: Path) -> None:
    """NumericsError once the batches that were skipped, or gone back from, are more than `limit`."""
    if count > limit:
        raise NumericsError(
            f"the loss or gradient was not finite {count} times, train.nonfinite={policy} allows {limit} "
            f"(train.nonfinite_limit); the last batch is in {folder}. Lower the learning rate (schedule.phases.N.lr) "
            "or optim.clip_norm, or raise the limit."
        )


def stopped(facts: Mapping[str, Any], folder: Path) -> NumericsError:
    """The error that ends a run at its first such batch."""
    return NumericsError(
        f"loss {facts['loss']}, gradient norm {facts['grad_norm']} at step {facts['step'] + 1} (lr {facts['lr']:g}): "
        f"stopped before the update. The weights before it are in checkpoints/step-{facts['step']}, the batch is in "
        f"{folder}. Go on with a lower learning rate (schedule.phases.N.lr=… 'resume.allow_changes=[schedule]'), or "
        "with train.nonfinite=skip or rewind; where it stops again at once the update before has spoilt the weights: "
        f"remove the newest of the folders {folder.parent.parent / 'checkpoints'}/step-N to go further back."
    )


def check_score(result: Mapping[str, Any], metric: str, run_dir: Path) -> None:
    """NumericsError where the `metric` of an evaluation, which names its `split` and `step`, is not finite."""
    if not math.isfinite(result[metric]):
        raise NumericsError(
            f"{result['split']} {metric} is {result[metric]} at step {result['step']:,}: these weights give no finite "
            f"score. All checkpoints are kept in {run_dir / 'checkpoints'}. Score an earlier one (python eval.py "
            "checkpoint=PATH), or remove those that came after it and train on with a lower learning rate "
            "(schedule.phases.N.lr=… 'resume.allow_changes=[schedule]')."
        )
