"""train.py and eval.py in this process, as from a shell: arguments in, exit code and both streams out."""

import contextlib
import io
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
TINY = ("model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.attention.window=8")


@dataclass
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


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
