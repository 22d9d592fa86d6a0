"""train.py and eval.py in this process, as from a shell: arguments in, exit code and both streams out."""

import contextlib
import io
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import eval
import train
from configs.cli import entry

# a model for which a window for every layer and head is easily written
TINY = ("model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.attention.window=8", "schedule.cap.dim=null")


@dataclass
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


def small_run(folder: Path, *, size: int = 40_000, seed: int = 0) -> list[str]:
    """Arguments of a run of a second: a tiny model in fp32 on a text written to `folder`, nothing but metrics.jsonl."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 8))) for _ in range(200)]
    text = folder / f"text-{seed}.txt"
    text.write_text(" ".join(draw.choices(words, k=size // 4))[:size])
    quiet = ("tracker.wandb.mode=disabled", "tracker.tensorboard=false", "device=cpu", "precision=fp32")
    return [
        "size=debug",
        *TINY,
        *quiet,
        "task.sample_chars=10",
        f"data.path={text}",
        f"data.cache_dir={folder / 'cache'}",
    ]


def phases(*entries: dict) -> list[str]:
    """Overrides that make these the phases of the schedule, as they are."""
    listed = json.dumps(list(entries)).replace('"', "").replace(" ", "")
    return [f"schedule.phases={listed}", "schedule.cap={steps:null,seq_len:null,batch_size:null,window:null}"]


def metrics_of(folder: Path, *, timed: bool = False) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock or the memory says unless `timed`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "perf/", "mem/")
    return [{key: value for key, value in line.items() if timed or not key.startswith(clock)} for line in lines]


def run_train(*arguments: object, cwd: Path, job=None) -> Finished:
    """`python train.py ARGUMENTS` in the folder `cwd`; `job` takes the place of its main function."""
    return _run("train", job or train.main, arguments, cwd)


def run_eval(*arguments: object, cwd: Path) -> Finished:
    """`python eval.py ARGUMENTS` in the folder `cwd`."""
    return _run("eval", eval.main, arguments, cwd)


def _run(name, job, arguments, cwd):
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    argv = mock.patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)])
    code = 0
    with streams[0], streams[1], argv, contextlib.chdir(cwd):
        try:
            entry(name, job)
        except SystemExit as ended:
            code = ended.code
        finally:
            # a process of its own would take these with it
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
    return Finished(code, out.getvalue(), err.getvalue())
