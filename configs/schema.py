"""The typed run configuration, and `build()`, the only place where a configuration names code."""

import importlib
import inspect
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


class ConfigError(Exception):
    """A configuration the user must change: the message names key, value, limit and the nearest choice."""

    exit_code = 2


@dataclass
class DataConfig:
    """Where raw data comes from. `path`: a local file instead of a download."""

    path: str | None = None
    cache_dir: str = "~/.cache/longspan"
    workers: int = 0


@dataclass
class OptimConfig:
    """Optimizer of all phases; the learning rate is the phase's. Muon takes matrices, AdamW the rest."""

    name: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 0.25
    muon_lr_ratio: float = 1.0


@dataclass
class PhaseConfig:
    """One phase of the schedule. `batch_size` counts all processes' sequences; `attention` is the model's.

    `decay`: "constant", "linear", "cosine", or "polynomial" with `decay_power`.
    """

    seq_len: int = MISSING
    batch_size: int = MISSING
    steps: int = MISSING
    lr: float = MISSING
    warmup_steps: int = 0
    decay: str = "constant"
    final_lr_ratio: float = 0.0
    decay_power: float = 1.0
    reset_optimizer: bool = False
    attention: dict[str, Any] = field(default_factory=dict)


@dataclass
class CapConfig:
    """Upper limits laid over every phase and over the model, so that one file shrinks any experiment.

    `dim` leaves a model alone whose weights come from elsewhere, and every head some width.
    """

    steps: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    window: int | None = None
    dim: int | None = None


@dataclass
class ScheduleConfig:
    """Phases in order, and the tokens one forward pass may hold (the rest of a batch is accumulated)."""

    phases: list[PhaseConfig] = MISSING
    micro_batch_tokens: int | None = None
    cap: CapConfig = field(default_factory=CapConfig)


@dataclass
class TrainConfig:
    """Intervals of the loop, in steps, and what happens when something fails.

    `keep_checkpoints` newest ones stay, and the one with the best validation loss. `max_failed_saves` checkpoints in a
    row may find no room on the disk. `nonfinite`: "stop" before an update whose loss or gradient is not finite, "skip"
    that update, or "rewind" to the last checkpoint and read on in another order; both at most `nonfinite_limit` times.
    """

    log_every: int = 10
    eval_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    async_checkpoints: bool = True
    max_failed_saves: int = 3
    nonfinite: str = "stop"
    nonfinite_limit: int = 10


@dataclass
class ResumeConfig:
    """Going on with a run: the keys that may differ from what it was started with, such as `[optim.weight_decay]`."""

    allow_changes: list[str] = field(default_factory=list)


@dataclass
class EvalConfig:
    """The paper's protocol: windows of `context` characters, `stride` apart, the last `stride` scored.

    `protocol`: "streaming" reads the text once with a rolling cache, "windowed" cuts the windows to what the model can
    see, "uncut" takes them as they are; "auto" streams where that gives the same number, else "windowed". `share` is
    the part of the split that is scored, from its start; `valid_share` the same in training.
    """

    protocol: str = "auto"
    context: int = 32_256
    stride: int = 512
    share: float = 1.0
    valid_share: float = 0.1
    batch_tokens: int = 65_536


@dataclass
class WandbConfig:
    """Weights & Biases: `offline` needs no account, `online` does, `disabled` writes nothing."""

    mode: str = "offline"
    project: str = "longspan"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout: int = 7


@dataclass
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = True


@dataclass
class RunConfig:
    """One run. `model` and `task` are open nodes: the constructor that `_target_` names is their schema."""

    model: dict[str, Any] = MISSING
    task: dict[str, Any] = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    experiment_name: str = "default"
    run_dir: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    num_threads: int | None = None
    compile: bool = False


@dataclass
class EvaluateDataConfig:
    """Where `eval.py` finds the data; what is null is as it was in the run."""

    path: str | None = None
    cache_dir: str | None = None
    workers: int | None = None


@dataclass
class EvaluateConfig:
    """What `eval.py` takes; settings left null come from the run.

    `checkpoint`: a folder checkpoints/step-N of a run, else the newest sound one of `run_dir`; or the folder of a
    published model, for which `task` says what it is scored in, and `precision` how, as a run's, and `output` the
    folder of the result (default: one in runs/eval). `strict=false` loads the tensors that fit and lists the others.
    """

    run_dir: str | None = None
    checkpoint: str | None = None
    output: str | None = None
    task: Any = None
    strict: bool = True
    split: str = "test"
    protocol: str | None = None
    device: str = "auto"
    precision: str = "auto"
    num_threads: int | None = None
    context: int | None = None
    stride: int | None = None
    share: float | None = None
    batch_tokens: int | None = None
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)


@dataclass
class PredictConfig:
    """What `predict.py` takes: a run, one of its checkpoints or the folder of a published model; an input, and how to
    continue it.

    `input`: a file, `-` for stdin, or a folder of files; `prompt`: a text instead. `length` in the task's units.
    `temperature` 0 always takes the likeliest; `top_k`, `top_p` draw among the likeliest only.
    """

    run_dir: str | None = None
    checkpoint: str | None = None
    strict: bool = True
    input: str | None = None
    prompt: str | None = None
    output: str | None = None
    length: int = 400
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    device: str = "auto"
    num_threads: int | None = None


def register() -> None:
    """Put the schemas where the defaults lists of train.yaml, eval.yaml and predict.yaml find them."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="predict_schema", node=PredictConfig)


# what each open node may build; anything else would let a shared config run code
BUILDABLE = {"task": "tasks.", "model": "models.", "model.attention": "models.attention."}
PUBLIC_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")


def target_class(node: DictConfig | dict, where: str) -> type:
    """The class that the `_target_` of a node names; ConfigError unless it is defined where that name says.

    `where`: the node's dotted key, one of BUILDABLE.
    """
    if where not in BUILDABLE:
        raise ConfigError(f"{where}._target_ is not allowed: only {', '.join(BUILDABLE)} are built from one")
    prefix = BUILDABLE[where]
    target = node.get("_target_")
    if not isinstance(target, str) or not target.startswith(prefix):
        found = "null" if target is None else target
        raise ConfigError(f"{where}._target_ is {found}, it must name a class under {prefix}")
    module_name, _, class_name = target.rpartition(".")
    found = None
    if PUBLIC_NAME.fullmatch(target):
        try:
            found = getattr(importlib.import_module(module_name), class_name, None)
        except ModuleNotFoundError as error:
            # a module of ours that lacks a package of others says so itself
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise
    # checked on the resolved object: an alias imported into one of our modules is not defined there
    if not inspect.isclass(found) or f"{found.__module__}.{found.__qualname__}" != target:
        from configs.messages import nearest

        hint = nearest(target, _classes(prefix))
        raise ConfigError(f"{where}._target_ is {target}, which is no class defined under {prefix}{hint}")
    return found


def _classes(prefix: str) -> list[str]:
    """Dotted names of the classes that the modules imported so far define under a package."""
    return [
        f"{name}.{attribute}"
        for name, module in list(sys.modules.items())
        if name.startswith(prefix)
        for attribute, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == name
    ]


def build(node: DictConfig | dict, where: str, **runtime) -> Any:
    """Construct the class a node names, nested nodes first; `_partial_: true` gives a callable instead.

    Options are plain Python values, no configuration object travels further. `runtime` adds arguments that no
    configuration holds. Raises ConfigError for a target not ours and for a value the constructor refuses.
    """
    plain: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    cls = target_class(node, where)
    options = {key: value for key, value in plain.items() if key not in ("_target_", "_partial_")}
    for key, value in options.items():
        if isinstance(value, dict) and "_target_" in value:
            options[key] = build(value, f"{where}.{key}")

    def construct(*positional, **late):
        _check_arguments(cls, where, options, positional, late)
        try:
            return cls(*positional, **options, **late)
        except ValueError as error:
            from configs.messages import with_keys

            raise ConfigError(with_keys(str(error), options, where)) from error

    return construct if node.get("_partial_") else construct(**runtime)


def _check_arguments(cls, where, options, positional, late) -> None:
    """ConfigError for an option that the caller sets itself, and for one that nobody gives."""
    parameters = inspect.signature(cls).parameters
    supplied = {*list(parameters)[: len(positional)], *late}
    for name in options:
        if name in supplied:
            raise ConfigError(f"{where}.{name} is set by the code that builds it: leave it out")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in supplied and name not in options:
            raise ConfigError(f"{where}.{name} has no value: give one with {where}.{name}=…")
