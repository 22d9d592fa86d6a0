"""One place a run reports to: metrics.jsonl always, Weights & Biases and TensorBoard where asked for.

No tracker may stop a run: what fails is switched off with one warning.
"""

import contextlib
import errno
import importlib
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.files import json_ready, write_text
from training.run_dir import RunDir, error_line

log = logging.getLogger(__name__)

REDACTED = "[redacted]"
SECRET_KEY = re.compile(
    r"(^|[_.-])(password|passwd|secrets?|credentials?|api_?key|access_?key|private_?key)($|[_.-])"
    r"|^token$|(access|auth|api|hf|bearer|session)_token$",
    re.IGNORECASE,
)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
MIN_FREE_BYTES = 2**16  # W&B writes blocks of half that
FINISH_TIMEOUT = 120.0  # seconds for sending what is left when a run ends; `wandb sync` can send it later


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b.c": value} of a nested configuration, secrets and logins inside URLs blotted out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": item for inner, item in flatten_config(value).items()})
        elif SECRET_KEY.search(str(key)) and value is not None:
            flat[str(key)] = REDACTED
        else:
            flat[str(key)] = _redact_urls(json_ready(value))
    return flat


class Tracker:
    """Sends metrics, pictures and texts to every sink that works. Make one per run, in the main process.

    wandb: None, or all of `mode` ("offline", "online", "disabled"), `project`, `entity`, `group`, `tags` and
    `init_timeout`, the seconds until an unreachable server means offline. Offline needs no account and prints nothing;
    its files stay in `run_dir/wandb`, and `wandb sync` sends them later. `run_dir/wandb_id.txt` holds the run's id, so
    that a resumed run continues it. tensorboard: write event files to `run_dir/tensorboard`. `resume_step`: the step a
    resumed run starts from; TensorBoard then hides what an interrupted run wrote after it.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb: Mapping[str, Any] | None,
        tensorboard: bool,
        config: Mapping[str, Any],
        name: str,
        resume_step: int | None = None,
    ):
        path = Path(run_dir)
        self._sinks: dict[str, _Sink] = {}
        self._open("metrics.jsonl", lambda: _File(path))
        if wandb is not None and wandb["mode"] != "disabled":
            self._open("Weights & Biases", lambda: _Wandb(path, wandb, config, name))
        if tensorboard:
            self._open("TensorBoard", lambda: _TensorBoard(path, resume_step))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers at `step`; names are grouped by a slash ("train/loss")."""
        self._each(lambda sink: sink.log(metrics, step))

    def image(self, name: str, path: Path, step: int) -> None:
        """Show the picture file `path`."""
        self._each(lambda sink: sink.image(name, Path(path), step))

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, such as a generated sample."""
        self._each(lambda sink: sink.text(name, text, step))

    def rewind(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`: metrics.jsonl loses, TensorBoard hides what came after it.

        Weights & Biases takes nothing back: there the repeated steps stand twice.
        """
        self._each(lambda sink: sink.rewind(step))

    def finish(self) -> None:
        """Flush and close every sink; nothing may be logged afterwards. A second call does nothing."""
        self._each(lambda sink: sink.finish())
        self._sinks.clear()

    def _open(self, name: str, make: Callable[[], "_Sink"]) -> None:
        try:
            self._sinks[name] = make()
        except Exception as error:  # a sink is somebody else's code: no failure in it may stop training
            _warn_off(name, error)

    def _each(self, action: Callable[["_Sink"], None]) -> None:
        """Run `action` on every sink; one that fails is dropped with a warning."""
        for name, sink in list(self._sinks.items()):
            try:
                action(sink)
            except Exception as error:  # as above
                del self._sinks[name]
                _warn_off(name, error)
                with contextlib.suppress(Exception):
                    sink.abandon()


def _warn_off(name: str, error: Exception) -> None:
    log.warning("%s is off for this run: %s", name, error_line(error))


class _Sink:
    """What the tracker asks of a place that metrics go to; a sink that cannot do one of these things leaves it."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers."""

    def image(self, name: str, path: Path, step: int) -> None:
        """Show a picture file."""

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text."""

    def rewind(self, step: int) -> None:
        """Forget what came after the checkpoint of `step`."""

    def finish(self) -> None:
        """Flush and close."""

    def abandon(self) -> None:
        """Let go of what can still be let go of after a failure."""
        self.finish()


class _File(_Sink):
    def __init__(self, run_dir: Path):
        self._folder = RunDir(run_dir)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        self._folder.log_metrics({"step": step, **metrics})

    def rewind(self, step: int) -> None:
        self._folder.truncate_metrics(step)

    def finish(self) -> None:
        self._folder.close()


class _Wandb(_Sink):
    def __init__(self, run_dir: Path, options: Mapping[str, Any], config: Mapping[str, Any], name: str):
        mode, self._folder = options["mode"], run_dir
        self._environment = self._redirect(run_dir, mode)
        try:
            self._module = importlib.import_module("wandb")
            try:
                self._run = self._start(run_dir, mode, options, config, name)
            except self._module.errors.Error as error:
                if mode == "offline":
                    raise
                log.warning("Weights & Biases goes on offline: %s", error_line(error))
                self._module.teardown()  # its service still holds the run's id
                self._run = self._start(run_dir, "offline", options, config, name)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except BaseException:
            self._restore_environment()
            raise

    def _start(self, run_dir: Path, mode: str, options: Mapping[str, Any], config: Mapping[str, Any], name: str) -> Any:
        return self._module.init(
            dir=str(run_dir),
            mode=mode,
            id=self._run_id(run_dir),
            resume="allow",
            project=options["project"],
            entity=options["entity"],
            group=options["group"],
            tags=list(options["tags"]),
            name=name,
            config=flatten_config(config),
            settings=self._module.Settings(
                silent=True,
                console="off",
                init_timeout=float(options["init_timeout"]),
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
                disable_git=True,  # env.json has the commit and the diff
                disable_code=True,
                disable_job_creation=True,
            ),
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if shutil.disk_usage(self._folder).free < MIN_FREE_BYTES:  # its service would lose the numbers and not say so
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # the step travels as a metric: W&B's own counter would refuse what a resumed run repeats
        self._run.log({"step": step, **metrics})

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({"step": step, name: self._module.Image(str(path))})

    def text(self, name: str, text: str, step: int) -> None:
        table = self._module.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({"step": step, name: table})

    def finish(self) -> None:
        try:
            self._run.finish()
            self._module.teardown()  # ends its service process
        finally:
            self._restore_environment()

    def abandon(self) -> None:
        try:
            self._module.teardown()  # not the run's own end, which waits for a service that may be gone
        finally:
            self._restore_environment()

    @staticmethod
    def _run_id(run_dir: Path) -> str:
        path = run_dir / "wandb_id.txt"
        if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
            return known
        fresh = secrets.token_hex(4)
        write_text(path, fresh + "\n")
        return fresh

    @staticmethod
    def _redirect(run_dir: Path, mode: str) -> dict[str, str | None]:
        """Keep W&B's files inside the run folder and its crash reports off; returns the former values."""
        wanted = {
            "WANDB_CACHE_DIR": str(run_dir / "wandb" / "cache"),
            "WANDB_DATA_DIR": str(run_dir / "wandb" / "data"),
            "WANDB_SILENT": "true",
            "WANDB_ERROR_REPORTING": "false",
        }
        if mode == "offline":  # online, the settings hold the user's server
            wanted["WANDB_CONFIG_DIR"] = str(run_dir / "wandb" / "config")
        former = {key: os.environ.get(key) for key in wanted}
        os.environ.update(wanted)
        return former

    def _restore_environment(self) -> None:
        for key, value in self._environment.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


class _TensorBoard(_Sink):
    def __init__(self, run_dir: Path, resume_step: int | None):
        self._folder = run_dir / "tensorboard"
        self._hook = threading.excepthook
        self._start(resume_step)

    def _start(self, after: int | None) -> None:
        """Write a new file of events, beside which those of former files above step `after` are hidden."""
        board = importlib.import_module("torch.utils.tensorboard")
        others = set(threading.enumerate())
        purge_step = None if after is None else after + 1
        self._writer = board.SummaryWriter(str(self._folder), purge_step=purge_step)
        self._workers = workers = set(threading.enumerate()) - others

        # the writer's thread hands an error to the next call, and Python would print it besides
        def hook(failure: Any) -> None:
            if failure.thread not in workers:
                self._hook(failure)

        threading.excepthook = hook

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._start(step)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, name: str, path: Path, step: int) -> None:
        picture = importlib.import_module("PIL.Image")
        numpy = importlib.import_module("numpy")
        with picture.open(path) as image:
            self._writer.add_image(name, numpy.asarray(image.convert("RGB")), step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        # the page renders Markdown: an indented block shows the text as it is
        self._writer.add_text(name, "\n".join("    " + line for line in text.splitlines()), step)

    def finish(self) -> None:
        try:
            self._writer.close()
        finally:
            for worker in self._workers:
                worker.join(1.0)  # one that fails does so before the hook goes
            threading.excepthook = self._hook


def _redact_urls(value: Any) -> Any:
    if isinstance(value, list):
        return [_redact_urls(item) for item in value]
    if isinstance(value, dict):
        return flatten_config(value)
    return URL_LOGIN.sub(f"{REDACTED}@", value) if isinstance(value, str) else value
