"""Processes killed while they write checkpoints: python -m tests.checkpoint_kills random|points FOLDER [NUM_KILLS].

A process of its own, because it forks: one import of torch serves all the processes that are killed.
"""

import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training import checkpoint_writer
from training.checkpoint import load_checkpoint, mark_best, newest_sound, sweep_stale
from training.checkpoint_writer import CheckpointWriter
from training.files import UNFINISHED

NUM_MEASURED = 5
BASE = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


class Moments:
    """The state of an optimizer, for checkpoints."""

    def __init__(self):
        self.tensors = {"first": torch.zeros_like(BASE), "second": torch.zeros_like(BASE)}

    def state_dict(self) -> dict:
        return {"tensors": self.tensors, "values": {}}

    def load_state_dict(self, state: dict) -> None:
        self.tensors = state["tensors"]


def fill(model: nn.Module, moments: Moments, step: int) -> None:
    """What a checkpoint of this step must contain."""
    with torch.no_grad():
        torch.add(BASE, step, out=model.weight.data)
    torch.mul(BASE, step, out=moments.tensors["first"])
    torch.sub(BASE, step, out=moments.tensors["second"])


def check_content(path: Path) -> int:
    """Load a checkpoint and compare it with what its step must contain; returns the step."""
    model, moments, expected, expected_moments = (make() for make in (linear, Moments, linear, Moments))
    step = load_checkpoint(path, model=model, optimizer=moments)["step"]
    fill(expected, expected_moments, step)
    assert path.name == f"step-{step}", (path, step)
    assert torch.equal(model.weight, expected.weight), f"{path}: other weights"
    assert all(torch.equal(moments.tensors[key], value) for key, value in expected_moments.tensors.items()), path
    return step


def linear() -> nn.Linear:
    """A model of one matrix, 4 MB."""
    return nn.Linear(*BASE.shape, bias=False)


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """(process id, descriptor to read what it says) of a process that does `work` and must not return."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            work(writing)
        except BaseException as error:
            os.write(writing, f"failed {error!r}\n".encode())
        os._exit(1)
    os.close(writing)
    return pid, reading


def save_for_ever(run_dir: Path, pipe: int) -> None:
    """Go on from the newest checkpoint and save step after step; says when each write begins and ends."""

    class Reporting(CheckpointWriter):
        def _write(self, snapshot):
            os.write(pipe, f"begins {snapshot.step}\n".encode())
            super()._write(snapshot)
            os.write(pipe, f"ended {snapshot.step}\n".encode())

    model, moments = linear(), Moments()
    sweep_stale(run_dir)
    newest = newest_sound(run_dir)
    step = load_checkpoint(newest, model=model, optimizer=moments)["step"] if newest else 0
    writer = Reporting(run_dir, keep=2)
    while True:
        step += 1
        fill(model, moments, step)
        writer.save(step, model=model, optimizer=moments, state={"step": step})


def where_it_landed(folder: Path, step: int) -> str:
    """What a process killed in writing `step` left behind."""
    for path in folder.iterdir():
        if path.name.startswith(f"step-{step}{UNFINISHED}"):
            sizes = {file.name: file.stat().st_size for file in path.iterdir()}
            done = f"{sum(sizes.values()) / 1e6:.1f} of 12.6 MB in {len(sizes)} files"
            return f"{done}, {'with' if 'manifest.json' in sizes else 'without'} manifest"
        if UNFINISHED in path.name:
            return f"renamed, in the removal of {path.name.partition(UNFINISHED)[0]}"
    if not (folder / f"step-{step}").exists():
        return "nothing written yet"
    linked = (folder / "latest").is_symlink() and os.readlink(folder / "latest") == f"step-{step}"
    return "renamed and linked" if linked else "renamed, not linked"


def kill_at_random(run_dir: Path, num_kills: int) -> None:
    """Kill saving processes inside a write `num_kills` times and check each time what is left; a line for each."""
    draw, folder, durations, count, tries = random.Random(0), run_dir / "checkpoints", [], 0, 0
    while count < num_kills:
        tries += 1
        assert tries <= 4 * num_kills + 4, f"only {count} of {tries} kills landed inside a write"
        pid, descriptor = fork(lambda pipe: save_for_ever(run_dir, pipe))
        nth, share, begins, ended = draw.randint(1, 3), draw.random(), [], []
        with os.fdopen(descriptor) as pipe:
            while len(begins) < (nth if durations else NUM_MEASURED + 1):
                word, rest = (pipe.readline() or "failed at once").split(maxsplit=1)
                assert word in ("begins", "ended"), rest
                (begins if word == "begins" else ended).append((int(rest), time.perf_counter()))
            if not durations:
                durations = [end - begin for (_, begin), (_, end) in zip(begins, ended, strict=False)]
            # every other one early: the bytes are written in the first tenth, the rest waits for the disk
            delay = share * statistics.median(durations) * (1 if tries % 2 else 0.1)
            waited_for = begins[-1][0]
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            for line in pipe:  # what it said since
                (begins if line.startswith("begins") else ended).append((int(line.split()[1]), 0.0))
        step, written = begins[-1][0], ended[-1][0] if ended else begins[0][0] - 1
        inside, landed = written < step, where_it_landed(folder, step)
        newest = newest_sound(run_dir)
        found = check_content(newest) if newest else 0
        swept = sweep_stale(run_dir)
        assert written <= found <= max(step, written), f"step {written} was written, the newest is {found}"
        assert newest_sound(run_dir) == newest
        names = {path.name for path in folder.iterdir()}
        assert not [name for name in names if "." in name], names
        count += inside
        print(
            f"{f'kill {count} in the write of step {step}' if inside else f'after the write of step {step}'}, "
            f"{delay * 1000:.1f} ms after that of step {waited_for} began (one takes "
            f"{statistics.median(durations) * 1000:.0f} ms): {landed}; swept {len(swept)}, step-{found} is right",
            flush=True,
        )


def die(*_: object, **__: object) -> None:
    """Be killed here."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_second_rename() -> None:
    """Be killed between the two renames of a checkpoint that replaces another."""
    rename, seen = os.rename, []

    def counted(source, target):
        die() if seen else seen.append(rename(source, target))

    os.rename = counted


def die_marking_the_best() -> None:
    """Be killed when best.json is about to be replaced."""
    replace = os.replace
    os.replace = lambda source, target: die() if Path(target).name == "best.json" else replace(source, target)


def die_half_way(folder: Path, **_: object) -> None:
    """Be killed when the first of a folder's files is removed."""
    sorted(folder.iterdir())[0].unlink()
    die()


# where a process dies while it saves once more after steps 1 and 2: (step, what is put in place before)
POINTS: dict[str, tuple[int, Callable[[], object]]] = {
    "before the manifest": (3, lambda: setattr(checkpoint_writer, "write_json", die)),
    "in the manifest": (3, lambda: setattr(os, "replace", die)),
    "before the rename": (3, lambda: setattr(os, "rename", die)),
    "before the link": (3, lambda: setattr(checkpoint_writer, "point_link", die)),
    "before the mark of the best": (3, die_marking_the_best),
    "before a removal": (3, lambda: setattr(shutil, "rmtree", die)),
    "in a removal": (3, lambda: setattr(shutil, "rmtree", die_half_way)),
    "in a replacement": (2, die_in_second_rename),
}


def kill_at_points(run_dir: Path) -> None:
    """Kill a saving process at each of POINTS; a JSON object for each says what is left."""
    for point, (step, arrange) in POINTS.items():
        folder = run_dir / point

        def work(_: int, folder: Path = folder, step: int = step, arrange: Callable = arrange) -> None:
            model, moments = linear(), Moments()
            writer = CheckpointWriter(folder, keep=2)
            for each in (1, 2, step):
                if (folder / "checkpoints" / "step-2").exists():
                    arrange()
                fill(model, moments, each)
                writer.save(each, model=model, optimizer=moments, state={"step": each})
                writer.wait()
                mark_best(folder, each, 1 / each)

        pid, descriptor = fork(work)
        with os.fdopen(descriptor) as pipe:
            said = pipe.read()
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, said
        checkpoints = folder / "checkpoints"
        report: dict[str, Any] = {"point": point, "link": os.readlink(checkpoints / "latest")}
        for moment in ("found", "after_sweep"):
            newest = newest_sound(folder)
            report[moment] = newest and check_content(newest)
            if moment == "found":
                report["swept"] = len(sweep_stale(folder))
        report["names"] = sorted(path.name for path in checkpoints.iterdir())
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    mode, where, *rest = sys.argv[1:]
    if mode == "points":
        BASE = BASE[:64, :64].contiguous()  # no moment has to be hit there
        kill_at_points(Path(where))
    else:
        kill_at_random(Path(where), int(rest[0]))
