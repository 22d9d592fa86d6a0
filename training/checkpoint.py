"""Checkpoints on disk: which ones count, which are sound, how one is loaded. No pickle is ever read.

A checkpoint is the folder `checkpoints/step-N/`: safetensors for tensors, JSON for the rest, and a manifest with size
and sha256 of each file, the last file written. `training.checkpoint_writer` writes it under a temporary name, flushes
it to disk and renames it. So a folder named step-N is whole unless something damaged it later, which the manifest
shows.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import rng
from training.errors import CheckpointError
from training.files import UNFINISHED, point_link, sync, write_json
from training.tensor_file import nonfinite, read_all, read_model

MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 3
FOLDER, LATEST, BEST = "checkpoints", "latest", "best.json"
REPLACED, DAMAGED = ".old-", ".damaged-"
BEST_METRIC = "valid/loss"
DCP_METADATA = ".metadata"

log = logging.getLogger(__name__)


def numbered_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named as a checkpoint, newest first; nothing in it is looked at."""
    folder = Path(run_dir) / FOLDER
    matches = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(((int(match[1]), path) for match, path in matches if match and path.is_dir()), reverse=True)


def complete_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints that have a manifest and right sizes, newest first; digests are not read."""
    complete = []
    for step, path in numbered_checkpoints(run_dir):
        with contextlib.suppress(CheckpointError):
            check_sizes(path)
            complete.append((step, path))
    return complete


def newest_sound(run_dir: Path, *, set_aside: bool = False) -> Path | None:
    """The newest checkpoint whose manifest, sizes and digests are right; None where there is no checkpoint at all.

    A warning tells of each damaged one above it: file, what was found, what was expected, what is used instead.
    `set_aside` (only for the holder of the run's lock) renames it, so that it is never met again.

    Raises CheckpointError where there are checkpoints and none is sound; nothing is renamed then.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for _, path in numbered_checkpoints(run_dir):
        try:
            verify_files(path)
        except CheckpointError as error:
            damaged.append((path, error))
            continue
        for broken, error in damaged:
            kept = _set_aside(broken) if set_aside else broken
            log.warning(
                "%s. %s is used instead; the damaged one stays as %s until you delete it.", error, path.name, kept
            )
        if damaged and set_aside:
            point_link(path.parent / LATEST, path.name)
        return path
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {damaged[0][0].parent} is sound: "
            + "; ".join(str(error) for _, error in damaged)
            + ". Restore one of them from a copy, or start anew with another run_dir."
        )
    return None


def sweep_stale(run_dir: Path) -> list[str]:
    """Clean up after a killed process; names what was removed. Only the holder of the run's lock may call it.

    Unfinished folders go; a checkpoint that was being replaced comes back if its successor never appeared. Damaged
    ones that were set aside stay.
    """
    folder = Path(run_dir) / FOLDER
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name, replaced, _ = path.name.partition(REPLACED)
        if replaced and not (folder / name).exists():
            os.rename(path, folder / name)
        elif replaced or UNFINISHED in path.name:
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
            removed.append(path.name)
    return removed


def mark_best(run_dir: Path, step: int, value: float) -> bool:
    """Write `checkpoints/best.json` if the validation loss `value` (nats) is the lowest; whether it was.

    Rotation keeps the marked checkpoint. A mark whose checkpoint is gone does not count, and a step without a complete
    one gets none: wait for the writer first.
    """
    former = best_checkpoint(run_dir)
    if not math.isfinite(value) or (former is not None and value >= former[1]):
        return False
    if step not in (complete for complete, _ in complete_checkpoints(run_dir)):
        return False
    write_json(Path(run_dir) / FOLDER / BEST, {"step": step, BEST_METRIC: value})
    return True


def best_checkpoint(run_dir: Path) -> tuple[int, float] | None:
    """(step, validation loss) of best.json; None where there is no readable one or its checkpoint is gone."""
    folder = Path(run_dir) / FOLDER
    try:
        marked = _read_json(folder / BEST)
        step, value = int(marked["step"]), float(marked[BEST_METRIC])
        check_sizes(folder / f"step-{step}")
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None
    return step, value


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: Any = None,
    restore_rng: bool = True,
    strict: bool = True,
) -> dict[str, Any]:
    """Restore a checkpoint into `model`, `optimizer` and the random generators; returns the caller's state.

    Order: manifest, sizes, digests, header, names with shapes and dtypes, finite values, and only then assignment, in
    place, so that ties and the optimizer's references hold. `strict=False` takes what fits and warns with the list of
    what was left out; an optimizer state that does not fit is left out whole.

    Raises CheckpointError naming the file, what was found and what was expected.
    """
    path = Path(path)
    try:
        verify_files(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}.{_other_choices(path)}") from error
    saved = _read_json(path / STATE)
    if missing := {"state", "optimizer", "rng"} - saved.keys():
        raise CheckpointError(f"{path / STATE} has no {', '.join(sorted(missing))}")
    tensors, left_out = read_model(path / MODEL, model, strict=strict)
    check_finite(path / MODEL, tensors)
    generators = read_all(path / RNG)
    if optimizer is not None:
        try:
            _load_optimizer(path, saved["optimizer"], optimizer)
        except CheckpointError as error:
            if strict:
                raise
            left_out.append(f"  optimizer state: {error}")
    own = model.state_dict()
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)
    if left_out:
        log.warning("%s was loaded in part, left out:\n%s", path, "\n".join(left_out))
    if restore_rng:
        rng.restore(generators, saved["rng"])
    return saved["state"]


def verify_files(path: Path) -> dict[str, Any]:
    """Check manifest, sizes and sha256 of every file of a checkpoint; returns the manifest.

    Raises CheckpointError (a clause without a full stop) for the first file that is missing or not as written.
    """
    path = Path(path)
    manifest = check_sizes(path)
    for name, entry in manifest["files"].items():
        try:
            found = file_digest(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
        if found != entry["sha256"]:
            raise CheckpointError(f"{path / name} is damaged: sha256 {found}, expected {entry['sha256']}")
    return manifest


def check_sizes(path: Path) -> dict[str, Any]:
    """Check that a folder is one of our checkpoints with all its files of the right sizes; returns the manifest.

    Raises CheckpointError (a clause without a full stop). Files that would have to be unpickled are refused by name.
    """
    _refuse_foreign(path)
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format {manifest.get('format')!r}, this code reads {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path / MANIFEST} gives its files as {files!r}, expected an object")
    if missing := {MODEL, RNG, STATE} - files.keys():
        raise CheckpointError(f"{path / MANIFEST} does not list {', '.join(sorted(missing))}")
    for name, entry in files.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise CheckpointError(f"{path / MANIFEST} lists {name!r}, which is not a plain file name")
        expected = {"size": int, "sha256": str}
        if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in expected.items()):
            raise CheckpointError(f"{path / MANIFEST} gives {name} as {entry!r}, expected size and sha256")
        try:
            found = (path / name).stat().st_size
        except OSError:
            found = None
        if found != entry["size"]:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise CheckpointError(f"{path / name} {state}, expected {entry['size']:,} bytes")
    return manifest


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError naming the first tensor of the file `path` that holds infinite values or NaN."""
    for name, count in nonfinite(tensors).items():
        raise CheckpointError(
            f"{path}: {name} holds {count:,} of {tensors[name].numel():,} values that are not finite; nothing of it "
            "was loaded"
        )


def file_digest(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_foreign(path: Path) -> None:
    """What is not a checkpoint of ours is told apart by names alone: opening a pickle is what runs its code."""
    if path.is_file():
        kind = "" if path.suffix == ".safetensors" else ", and reading it could run code from it where it is a pickle"
        raise CheckpointError(
            f"{path} is a single file{kind}; it was not opened. Expected a folder such as checkpoints/step-1000 with "
            f"{MANIFEST} and {MODEL}, as training writes it"
        )
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; expected a folder such as checkpoints/step-1000")
    if (path / DCP_METADATA).exists():
        raise CheckpointError(
            f"{path} holds {DCP_METADATA}, the pickle of a torch.distributed.checkpoint; reading it could run code "
            f"from it, so it was not opened. Expected a folder with {MANIFEST} and {MODEL}, as training writes it"
        )
    if not (path / MANIFEST).is_file():
        names = sorted(entry.name for entry in path.iterdir())
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise CheckpointError(
            f"{path} is not a complete checkpoint: it has no {MANIFEST}, the file written last. It holds "
            f"{listed or 'nothing'}; expected {MODEL}, {RNG}, {STATE} and {MANIFEST}"
        )


def _other_choices(path: Path) -> str:
    """A sentence naming the complete checkpoints beside `path` or, where it is a run folder, in it."""
    for run_dir in (path, path.parent.parent):
        others = [str(other) for _, other in complete_checkpoints(run_dir) if other.name != path.name]
        if others:
            return f" Complete ones there: {', '.join(others[:3])}."
    return ""


def _set_aside(path: Path) -> Path:
    """The new name of a damaged checkpoint; its old one where the folder cannot be changed."""
    aside = path.with_name(f"{path.name}{DAMAGED}{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
        sync(path.parent)
    except OSError:
        return path
    return aside


def _load_optimizer(path: Path, values: Any, optimizer: Any) -> None:
    if values is None:
        raise CheckpointError(f"{path} holds no optimizer state; it can be evaluated, not trained further")
    tensors = read_all(path / OPTIMIZER)
    check_finite(path / OPTIMIZER, tensors)
    try:
        optimizer.load_state_dict({"tensors": tensors, "values": values})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path / OPTIMIZER}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value
