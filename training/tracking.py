"""One place a run reports to: metrics.jsonl always, Weights & Biases and TensorBoard where asked for.

No tracker may stop a run: what fails is switched off with one warning.
"""

import importlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.files import json_ready, write_text
from training.run_dir import RunDir

log = logging.getLogger(__name__)

REDACTED = "[redacted]"
SECRET_KEY = re.compile(
    r"(^|[_.-])(password|passwd|secrets?|credentials?|api_?key|access_?key|private_?key)($|[_.-])"
    r"|^token$|(access|auth|api|hf|bearer|session)_token$",
    re.IGNORECASE,
)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
FINITE = (int, float)


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

    wandb: None, or options `mode` ("offline" by default, "online", "disabled"), `project`, `entity`, `group`,
    `tags`, `init_timeout` (seconds). Offline needs no account and prints nothing; its files stay in
    `run_dir/wandb`, and `wandb sync` sends them later. `run_dir/wandb_id.txt` holds the run's id, so that a
    resumed run continues it. tensorboard: write event files to `run_dir/tensorboard`. `resume_step`: the step
    a resumed run starts from; TensorBoard then hides what an interrupted run wrote after it.
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
        self._run_dir = RunDir(run_dir)
        self._file = self._run_dir
        self._wandb: _Wandb | None = None
        self._board: _TensorBoard | None = None
        path = self._run_dir.path
        if wandb is not None and wandb.get("mode", "offline") != "disabled":
            self._guard("_wandb", lambda _: setattr(self, "_wandb", _Wandb(path, wandb, config, name)), start=True)
        if tensorboard:
            self._guard("_board", lambda _: setattr(self, "_board", _TensorBoard(path, resume_step)), start=True)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers at `step`; names are grouped by a slash ("train/loss")."""
        self._guard("_file", lambda sink: sink.log_metrics({"step": step, **metrics}))
        self._each(lambda sink: sink.log(metrics, step))

    def image(self, name: str, path: Path, step: int) -> None:
        """Show the picture file `path`."""
        self._each(lambda sink: sink.image(name, Path(path), step))

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, such as a generated sample."""
        self._each(lambda sink: sink.text(name, text, step))

    def finish(self) -> None:
        """Flush and close every sink; nothing may be logged afterwards. A second call does nothing."""
        self._each(lambda sink: sink.finish())
        self._wandb = self._board = None
        self._run_dir.close()

    def _each(self, action: Callable[[Any], None]) -> None:
        self._guard("_wandb", action)
        self._guard("_board", action)

    def _guard(self, attribute: str, action: Callable[[Any], None], start: bool = False) -> None:
        """Run `action` on a sink; at its first failure warn and drop the sink."""
        sink = getattr(self, attribute)
        if sink is None and not start:
            return
        try:
            action(sink)
        except Exception as error:  # a sink is somebody else's code: no failure in it may stop training
            title = {"_wandb": "Weights & Biases", "_board": "TensorBoard", "_file": "metrics.jsonl"}[attribute]
            reason = " ".join(str(error).split())[:300]
            log.warning("%s is off for this run: %s: %s", title, type(error).__name__, reason)
            setattr(self, attribute, None)


class _Wandb:
    def __init__(self, run_dir: Path, options: Mapping[str, Any], config: Mapping[str, Any], name: str):
        mode = options.get("mode", "offline")
        self._environment = self._redirect(run_dir, mode)
        try:
            self._module = importlib.import_module("wandb")
            try:
                self._run = self._start(run_dir, mode, options, config, name)
            except self._module.errors.Error as error:
                if mode == "offline":
                    raise
                log.warning("Weights & Biases goes on offline: %s", " ".join(str(error).split())[:300])
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
            project=options.get("project") or "longspan",
            entity=options.get("entity"),
            group=options.get("group"),
            tags=list(options.get("tags") or []),
            name=name,
            config=flatten_config(config),
            settings=self._module.Settings(
                silent=True,
                console="off",
                # W&B needs about twice this to give up
                init_timeout=float(options.get("init_timeout") or 7),
                disable_git=True,  # env.json has the commit and the diff
                disable_code=True,
                disable_job_creation=True,
            ),
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
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


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None):
        board = importlib.import_module("torch.utils.tensorboard")
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = board.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, FINITE) and not isinstance(value, bool):
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
        self._writer.close()


def _redact_urls(value: Any) -> Any:
    if isinstance(value, list):
        return [_redact_urls(item) for item in value]
    if isinstance(value, dict):
        return flatten_config(value)
    return URL_LOGIN.sub(f"{REDACTED}@", value) if isinstance(value, str) else value
