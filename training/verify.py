"""Check checkpoints: python -m training.verify CHECKPOINT|RUN_DIR [--json]."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training.checkpoint import (
    DCP_METADATA,
    FOLDER,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    RNG,
    STATE,
    numbered_checkpoints,
    verify_files,
)
from training.errors import CheckpointError
from training.tensor_file import nonfinite, read_all


@dataclass(frozen=True)
class Finding:
    """What was found in one checkpoint; `problem` is None for a sound one. `bytes`: of the files in its manifest."""

    path: str
    problem: str | None
    step: int | None = None
    bytes: int = 0
    num_tensors: int = 0
    num_nonfinite: int = 0

    def line(self) -> str:
        """One line for a reader."""
        facts = "" if self.step is None else f"step {self.step:,}, {self.bytes:,} bytes, {self.num_tensors:,} tensors"
        if self.problem is None:
            return f"sound    {self.path}: {facts}, all values finite"
        return f"DAMAGED  {self.path}: {self.problem}" + (f" ({facts})" if facts else "")


def inspect_checkpoint(path: Path) -> Finding:
    """Check manifest, sizes, digests, headers and every value of a checkpoint; nothing is unpickled or executed."""
    try:
        manifest = verify_files(path)
        problem, num_tensors, num_nonfinite = None, 0, 0
        for name in manifest["files"]:
            if not name.endswith(".safetensors"):
                continue
            tensors = read_all(path / name)
            bad = nonfinite(tensors)
            num_tensors, num_nonfinite = num_tensors + len(tensors), num_nonfinite + sum(bad.values())
            for tensor, count in bad.items():
                problem = problem or f"{path / name}: {tensor} holds {count:,} values that are not finite"
    except CheckpointError as error:
        return Finding(str(path), str(error))
    size = sum(entry["size"] for entry in manifest["files"].values())
    return Finding(str(path), problem, manifest.get("step"), size, num_tensors, num_nonfinite)


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints of a run folder (or of its folder checkpoints/), newest first; else `path` itself.

    Raises CheckpointError for a run folder without any, and for what is neither that nor a checkpoint.
    """
    run_dir = path.absolute().parent if path.name == FOLDER else path
    if not (run_dir / FOLDER).is_dir():
        _check_kind(path)
        return [path]
    found = [checkpoint for _, checkpoint in numbered_checkpoints(run_dir)]
    if not found:
        raise CheckpointError(f"no checkpoints in {run_dir / FOLDER}; expected folders such as step-1000")
    return found


def _check_kind(path: Path) -> None:
    """CheckpointError where there is nothing at `path`, or a folder that is no checkpoint, not even a damaged one."""
    expected = "expected a checkpoint such as DIR/checkpoints/step-1000, or the folder DIR of a run that has some"
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint or run folder {path}: {expected}")
    names = (MODEL, OPTIMIZER, RNG, STATE, MANIFEST, DCP_METADATA)
    named = path.absolute().name.startswith("step-")
    if path.is_dir() and not named and not any((path / name).exists() for name in names):
        raise CheckpointError(f"{path} is neither a checkpoint nor the folder of a run with checkpoints: {expected}")


def main(arguments: Sequence[str]) -> int:
    """Print a line (or a JSON object in a list) for each checkpoint; 0 where all are sound, else 4."""
    parser = argparse.ArgumentParser(prog="python -m training.verify", description="Check checkpoints of a run.")
    parser.add_argument("path", type=Path, help="a checkpoint folder, or a run folder for all of its checkpoints")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of lines")
    options = parser.parse_args(arguments)
    try:
        paths = checkpoints_at(options.path)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return CheckpointError.exit_code
    findings = []
    for path in paths:
        findings.append(inspect_checkpoint(path))
        if not options.json:
            print(findings[-1].line(), flush=True)
    if options.json:
        print(json.dumps([asdict(each) for each in findings], indent=2))
    return 0 if all(each.problem is None for each in findings) else CheckpointError.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
