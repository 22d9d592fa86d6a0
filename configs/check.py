"""Checks of a composed configuration, before anything is built: names, types, ranges, and rules across keys."""

import difflib
import inspect
import types
from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import ConfigError, PhaseConfig, RunConfig, target_class

CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "fp32", "bf16"),
    "optim.name": ("adamw", "muon"),
    "tracker.wandb.mode": ("offline", "online", "disabled"),
}
# key: (least, most); None = no limit on that side
RANGES = {
    "data.workers": (0, None),
    "seed": (0, 2**31 - 1),
    "num_threads": (1, None),
    "schedule.micro_batch_tokens": (1, None),
    "schedule.cap.steps": (1, None),
    "schedule.cap.seq_len": (1, None),
    "schedule.cap.batch_size": (1, None),
    "schedule.cap.window": (0, None),
    "train.log_every": (1, None),
    "train.eval_every": (1, None),
    "train.checkpoint_every": (1, None),
    "train.keep_checkpoints": (2, None),
    "eval.context": (2, None),
    "eval.stride": (1, None),
    "eval.batch_tokens": (1, None),
    "optim.weight_decay": (0, None),
    "optim.muon_lr_ratio": (0, None),
    "tracker.wandb.init_timeout": (1, None),
}
PHASE_RANGES = {
    "seq_len": (1, None),
    "batch_size": (1, None),
    "steps": (1, None),
    "warmup_steps": (0, None),
    "lr": (0, None),
    "final_lr_ratio": (0, 1),
}


def nearest(name: str, known) -> str:
    """", did you mean X?" for the known name nearest to `name`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {matches[0]}?" if matches else ""


def check(cfg: DictConfig) -> DictConfig:
    """The same configuration merged into a fresh schema and found sound, or ConfigError naming the key to change."""
    cfg = closed(cfg)
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            raise ConfigError(f"{key} is {value!r}, it must be one of {', '.join(choices)}{nearest(str(value), choices)}")
    for key, limits in RANGES.items():
        check_range(key, OmegaConf.select(cfg, key), *limits)
    check_range("optim.clip_norm", cfg.optim.clip_norm, 0, None)
    for key in ("share", "valid_share"):
        value = cfg.eval[key]
        if not 0 < value <= 1:
            raise ConfigError(f"eval.{key} is {value}, it must be above 0 and at most 1")
    if cfg.eval.stride > cfg.eval.context:
        raise ConfigError(f"eval.stride {cfg.eval.stride} is longer than eval.context {cfg.eval.context}")
    check_options(cfg.task, "task")
    check_options(cfg.model, "model")
    if not cfg.schedule.phases:
        raise ConfigError("schedule.phases is empty, a run needs at least one phase")
    for index, phase in enumerate(cfg.schedule.phases):
        _check_phase(phase, f"schedule.phases.{index}")
    return cfg


def closed(cfg: DictConfig) -> DictConfig:
    """`cfg` merged into a fresh schema, so that a key added with `+` is refused like any other unknown one."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error)) from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: give one with {missing[0]}=…")
    return merged


def describe(error: OmegaConfBaseException) -> str:
    """One line about an OmegaConf error: the full key, what is wrong, the nearest valid key."""
    key = (error.full_key or str(error.key or "")).strip()
    first_line = str(error.msg or error).splitlines()[0]
    if "not in" in first_line and key:
        parent = OmegaConf.select(OmegaConf.structured(RunConfig), key.rpartition(".")[0], default=None)
        if "." not in key:
            parent = OmegaConf.structured(RunConfig)
        if isinstance(parent, DictConfig):
            known = list(parent.keys())
        elif ".phases" in key or "[" in key:
            known = list(PhaseConfig.__dataclass_fields__)
        else:
            known = []
        name = key.rpartition(".")[2]
        return f"there is no configuration key {key}{nearest(name, known)}"
    return f"{key}: {first_line}" if key and key not in first_line else first_line


def check_range(key: str, value, least, most) -> None:
    """ConfigError unless least <= value <= most; None stands for no value and for no limit."""
    if value is None:
        return
    if least is not None and value < least:
        raise ConfigError(f"{key} is {value}, it must be at least {least}")
    if most is not None and value > most:
        raise ConfigError(f"{key} is {value}, it must be at most {most}")


def _check_phase(phase, where):
    for key, limits in PHASE_RANGES.items():
        check_range(f"{where}.{key}", phase[key], *limits)
    if phase.decay not in ("constant", "linear", "cosine"):
        raise ConfigError(f"{where}.decay is {phase.decay!r}, it must be one of constant, linear, cosine")
    if phase.warmup_steps > phase.steps:
        raise ConfigError(f"{where}.warmup_steps {phase.warmup_steps} is more than its steps {phase.steps}")


def check_options(node: DictConfig, where: str) -> None:
    """Bind an open node to the constructor it names: unknown names, missing names and wrong types are refused."""
    cls = target_class(node, where)
    parameters = inspect.signature(cls.__init__).parameters
    known = [name for name in parameters if name != "self"]
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in known:
            raise ConfigError(f"there is no configuration key {where}.{key}{nearest(key, known)}")
        if isinstance(value, DictConfig) and "_target_" in value:
            check_options(value, f"{where}.{key}")
            continue
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if not _fits(plain, parameters[key].annotation):
            expected = _type_name(parameters[key].annotation)
            raise ConfigError(f"{where}.{key} is {plain!r}, it must be {expected}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value suits an annotation made of int, float, bool, str, None, sequences and unions of them."""
    if annotation in (inspect.Parameter.empty, Any):
        return True
    if get_origin(annotation) is not None and _is_union(annotation):
        return any(_fits(value, option) for option in get_args(annotation))
    if annotation is type(None) or annotation is None:
        return value is None
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is str:
        return isinstance(value, str)
    # what is left are containers: the constructor checks their entries
    return isinstance(value, list | dict)


def _is_union(annotation):
    return get_origin(annotation) in (Union, types.UnionType)


def _type_name(annotation):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    if _is_union(annotation):
        return " or ".join(_type_name(option) for option in get_args(annotation))
    return names.get(annotation, "a list")
