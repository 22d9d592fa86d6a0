"""Writing checkpoints: a copy of everything is taken at once, the disk is waited for in a thread.

A checkpoint is written under a temporary name, its files and then the folder are flushed to disk, and one rename makes
it appear; the manifest is the last file written. Then the link `latest` moves and old checkpoints go.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from training import rng
from training.checkpoint import (
    FOLDER,
    FORMAT,
    LATEST,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    REPLACED,
    RNG,
    STATE,
    best_checkpoint,
    complete_checkpoints,
    file_digest,
)
from training.errors import NumericsError, ResourceError
from training.files import NO_SPACE, json_ready, point_link, sync, temporary_beside, write_json
from training.tensor_file import model_tensors, nonfinite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Snapshot:
    """All that goes to disk, in memory no step changes: tensors by file, aliases of the model's and state as JSON."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    aliases: str
    state: str

    @property
    def num_bytes(self) -> int:
        return len(self.state) + sum(each.nbytes for file in self.tensors.values() for each in file.values())


class CheckpointWriter:
    """Writes checkpoints of one run, one at a time; use it in one process only.

    `keep` newest checkpoints stay, and the one `mark_best` named. `asynchronous`: a thread writes, so that a step waits
    for the copy alone; what it raises comes up at the next `save`, `wait` or `close`. A disk without room costs a
    warning and the checkpoint, not the run: the next save tries again, and `max_failures` in a row are an error.
    `last_step` is the step of the last checkpoint this object has written, None before the first.
    """

    def __init__(self, run_dir: Path, *, keep: int, asynchronous: bool = True, max_failures: int = 3):
        if keep < 2:
            raise ValueError(f"keep must be at least 2, so that a damaged newest checkpoint costs one, got {keep}")
        if max_failures < 1:
            raise ValueError(f"max_failures must be at least 1, got {max_failures}")
        self.last_step: int | None = None
        self._run_dir, self._folder = Path(run_dir), Path(run_dir) / FOLDER
        self._keep, self._max_failures = keep, max_failures
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: futures.Future[None] | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._failures = 0

    def save(self, step: int, *, model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
        """Take a copy of everything as it is now and have it written as `checkpoints/step-<step>`.

        `model`: unwrapped (no DDP, not the compiled one). `optimizer`: an object with the state_dict of
        `training.optim.Optimizers`, or None. `state`: JSON values, returned by `load_checkpoint`. An existing
        checkpoint of this step is replaced.

        Waits for the checkpoint before. Raises NumericsError where a value to be saved is not finite, ResourceError
        where the folder cannot be written or the disk was full too often; what was there before stays as it was.
        """
        self.wait()
        snapshot = self._copy(step, model, optimizer, state)
        if self._pool is None:
            self._write(snapshot)
        else:
            self._pending = self._pool.submit(self._write, snapshot)

    def wait(self) -> None:
        """Return when nothing is being written; raises what the writing raised."""
        if self._pending is None:
            return
        futures.wait([self._pending])
        pending, self._pending = self._pending, None
        pending.result()

    def close(self) -> None:
        """Wait and end the thread; raises what the writing raised."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _copy(self, step: int, model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> _Snapshot:
        weights, aliases = model_tensors(model)
        optimizer_state = None if optimizer is None else optimizer.state_dict()
        generator_tensors, generator_values = rng.capture()
        live = {MODEL: weights, RNG: generator_tensors}
        if optimizer_state is not None:
            live[OPTIMIZER] = {name: each.detach() for name, each in optimizer_state["tensors"].items()}
        self._buffers = {file: _into(self._buffers.get(file, {}), tensors) for file, tensors in live.items()}
        for device in {each.device for tensors in live.values() for each in tensors.values() if each.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        for file in (MODEL, OPTIMIZER):
            for name, count in nonfinite(self._buffers.get(file, {})).items():
                raise NumericsError(
                    f"the checkpoint of step {step} was not written: {name} ({file}) holds {count:,} values that are "
                    f"not finite. The checkpoints before it in {self._folder} are untouched; go on from one of them "
                    "with a lower learning rate (schedule.phases.N.lr) or optim.clip_norm."
                )
        content = {
            "step": step,
            "state": json_ready(state),
            "optimizer": None if optimizer_state is None else optimizer_state["values"],
            "rng": generator_values,
        }
        text = json.dumps(content, allow_nan=False) + "\n"
        return _Snapshot(step, self._buffers, json.dumps(aliases), text)

    def _write(self, snapshot: _Snapshot) -> None:
        final = self._folder / f"step-{snapshot.step}"
        temporary = temporary_beside(final)
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)
                sync(self._folder.parent)
            temporary.mkdir()
            _write_files(temporary, snapshot)
            _appear(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self._failed(final, snapshot.num_bytes, error)
            return
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._failures, self.last_step = 0, snapshot.step
        point_link(self._folder / LATEST, final.name)
        try:
            self._rotate(final)
        except OSError as error:
            log.warning("%s is written, but older checkpoints could not be removed: %s", final, error)

    def _failed(self, final: Path, needed: int, error: OSError | SafetensorError) -> None:
        """Count a checkpoint that could not be written; ResourceError unless a later one may find room."""
        self._failures += 1
        number = _error_number(error)
        existing = next(path for path in (self._folder, *self._folder.absolute().parents) if path.is_dir())
        told = (
            f"the checkpoint {final} could not be written: {os.strerror(number) if number else error}. It needs "
            f"{needed:,} bytes, {shutil.disk_usage(existing).free:,} are free in {self._folder}; earlier checkpoints "
            "are untouched."
        )
        if number not in NO_SPACE:
            raise ResourceError(f"{told} Make the folder writable or choose another run_dir.") from error
        count = f"failure {self._failures} of at most {self._max_failures} in a row (train.max_failed_saves)"
        if self._failures >= self._max_failures:
            raise ResourceError(f"{told} It is {count}. Free some space and run the same command again.") from error
        log.warning("%s Free some space: training goes on and the next save tries again (%s).", told, count)

    def _rotate(self, written: Path) -> None:
        """Drop all but the newest complete ones, the best and the one just written."""
        best = best_checkpoint(self._run_dir)
        for step, path in complete_checkpoints(self._run_dir)[self._keep :]:
            # after going back, higher steps may be there: what was written last is the one known to be sound
            if path != written and (best is None or step != best[0]):
                # renamed first: a kill in between must not leave half a folder under a name that counts
                doomed = temporary_beside(path)
                os.rename(path, doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _into(buffers: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, in the memory of `buffers` where it fits; those of a GPU are still under way."""
    copies = {}
    for name, tensor in tensors.items():
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # page-locked memory is what lets copies from a GPU overlap
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cpu and tensor.is_contiguous():
            # by one thread: on a busy machine, waking the others for every tensor takes longer than the copy
            np.copyto(_as_bytes(buffer), _as_bytes(tensor))
        else:
            buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        copies[name] = buffer
    return copies


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor of any dtype."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _write_files(folder: Path, snapshot: _Snapshot) -> None:
    state = folder / STATE
    state.write_text(snapshot.state, encoding="utf-8")
    for name, tensors in snapshot.tensors.items():
        save_file(tensors, folder / name, metadata={"aliases": snapshot.aliases} if name == MODEL else None)
    mode = state.stat().st_mode & 0o777
    for file in folder.iterdir():
        os.chmod(file, mode)  # safetensors writes 0600 whatever the umask says
        sync(file)
    files = {file.name: {"size": file.stat().st_size, "sha256": file_digest(file)} for file in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"format": FORMAT, "step": snapshot.step, "files": files})  # syncs the folder too


def _appear(temporary: Path, final: Path) -> None:
    """Rename into place; an older folder of the same step steps aside first and goes afterwards."""
    aside = None
    if final.exists():
        aside = final.with_name(final.name + REPLACED + temporary.name.rpartition("-")[2])
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    sync(final.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors has it in the text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
