"""Checkpoints: safetensors for tensors, JSON for the rest, a manifest with sha256, never pickle.

A checkpoint is the folder `checkpoints/step-N/`. It is written under a temporary name, its files and then the
folder are flushed to disk, and one rename makes it appear; the manifest is the last file written. So a folder
named step-N is whole unless something damaged it later, which the manifest's sizes and digests show.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from training import rng
from training.errors import CheckpointError, ResourceError
from training.files import UNFINISHED, json_ready, point_link, sync, temporary_beside, write_json
from training.tensor_file import model_tensors, read_all, read_model

MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 1
REPLACED = ".old-"


def save_checkpoint(
    run_dir: Path, step: int, *, model: nn.Module, optimizer: Any, state: Mapping[str, Any], keep: int
) -> Path:
    """Write `checkpoints/step-<step>`, move the link `latest` to it, drop all but the newest `keep`.

    `model`: unwrapped (no DDP, not the compiled one). `optimizer`: an object with the state_dict of
    `training.optim.Optimizers`, or None. `state`: JSON values, returned by `load_checkpoint`. An existing
    checkpoint of this step is replaced. Call it in one process only.

    Raises ResourceError where the disk is full or not writable; what was there before stays as it was.
    """
    if keep < 2:
        raise ValueError(f"keep must be at least 2, so that a damaged newest checkpoint costs one, got {keep}")
    folder = Path(run_dir) / "checkpoints"
    final = folder / f"step-{step}"
    temporary = temporary_beside(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        _write(temporary, step, model, optimizer, state)
        _appear(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        raise ResourceError(
            f"the checkpoint {final} could not be written: {error}. Free there: {free:,} bytes; earlier "
            "checkpoints are untouched. Free some space or choose another run_dir."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    point_link(folder / "latest", final.name)
    for old in _complete(run_dir)[keep:]:
        if old != final:  # after going back, higher steps may be there
            _remove(old)
    return final


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step with a manifest and right sizes, or None; digests are not read."""
    complete = _complete(run_dir)
    return complete[0] if complete else None


def sweep_stale(run_dir: Path) -> list[str]:
    """Clean up after a killed process; names what was removed. Only the holder of the run's lock may call it.

    Unfinished folders go; a checkpoint that was being replaced comes back if its successor never appeared.
    """
    folder = Path(run_dir) / "checkpoints"
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name, replaced, _ = path.name.partition(REPLACED)
        if replaced and not (folder / name).exists():
            os.rename(path, folder / name)
        elif replaced or UNFINISHED in path.name:
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
            removed.append(path.name)
    return removed


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    optimizer: Any = None,
    map_location: str | torch.device = "cpu",
    restore_rng: bool = True,
) -> dict[str, Any]:
    """Restore a checkpoint into `model`, `optimizer` and the random generators; returns the caller's state.

    Order: manifest, sizes, digests, header, names with shapes and dtypes, and only then assignment, in place,
    so that ties and the optimizer's references hold. `map_location`: device the tensors are read to on their
    way.

    Raises CheckpointError naming the file, what was found and what was expected.
    """
    path = Path(path)
    verify_files(path)
    saved = _read_json(path / STATE)
    tensors = read_model(path / MODEL, model, map_location)
    if optimizer is not None:
        if saved["optimizer"] is None:
            raise CheckpointError(f"{path} holds no optimizer state; it can be evaluated, not trained further")
        state = {"tensors": read_all(path / OPTIMIZER, map_location), "values": saved["optimizer"]}
        try:
            optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path / OPTIMIZER}: {error}") from error
    with torch.no_grad():
        for key, target in model.state_dict().items():
            target.copy_(tensors[key])
    if restore_rng:
        rng.restore(read_all(path / RNG, "cpu"), saved["rng"])
    return saved["state"]


def verify_files(path: Path) -> dict[str, Any]:
    """Check manifest, sizes and sha256 of every file of a checkpoint; returns the manifest.

    Raises CheckpointError for the first file that is missing or not as written.
    """
    path = Path(path)
    manifest = _check_sizes(path)
    for name, entry in manifest["files"].items():
        found = _sha256(path / name)
        if found != entry["sha256"]:
            raise CheckpointError(
                f"{path / name} is damaged: sha256 {found}, expected {entry['sha256']}. Use an older checkpoint."
            )
    return manifest


def _write(folder: Path, step: int, model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    tensors, aliases = model_tensors(model)
    save_file(tensors, folder / MODEL, metadata={"aliases": json.dumps(aliases)})
    optimizer_state = None if optimizer is None else optimizer.state_dict()
    if optimizer_state is not None:
        flat = {key: value.detach().cpu().contiguous() for key, value in optimizer_state["tensors"].items()}
        save_file(flat, folder / OPTIMIZER)
    generator_tensors, generator_values = rng.capture()
    save_file(generator_tensors, folder / RNG)
    content = {
        "step": step,
        "state": json_ready(state),
        "optimizer": None if optimizer_state is None else optimizer_state["values"],
        "rng": generator_values,
    }
    (folder / STATE).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        os.chmod(file, 0o666 & ~_umask())  # safetensors writes 0600 whatever the umask says
        sync(file)
    files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": files})
    sync(folder)


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


def _remove(path: Path) -> None:
    # renamed first: a kill in between must not leave half a folder under a name that counts
    doomed = temporary_beside(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _complete(run_dir: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    numbered = []
    folder = Path(run_dir) / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else []:
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            numbered.append((int(match[1]), path))
    complete = []
    for _, path in sorted(numbered, reverse=True):
        try:
            _check_sizes(path)
        except CheckpointError:
            continue
        complete.append(path)
    return complete


def _check_sizes(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}; expected a folder such as checkpoints/step-1000")
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}, the file written last")
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format {manifest.get('format')!r}, this code reads {FORMAT}")
    files = manifest.get("files", {})
    missing = {MODEL, RNG, STATE} - files.keys()
    if missing:
        raise CheckpointError(f"{path / MANIFEST} does not list {', '.join(sorted(missing))}")
    for name, entry in files.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise CheckpointError(f"{path / MANIFEST} lists {name!r}, which is not a plain file name")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise CheckpointError(f"{path / MANIFEST} gives {name} as {entry!r}, expected size and sha256")
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != entry["size"]:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise CheckpointError(f"{path / name} {state}, expected {entry['size']:,} bytes. Use an older checkpoint.")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    # the mask can only be read by setting it; the stricter value is in force for an instant
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
