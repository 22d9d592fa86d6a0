"""Checks of a composed configuration, before anything is built: names, types, ranges, rules across keys."""

import inspect
import math
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.messages import describe, nearest, plain, unknown_key
from configs.saved import read_yaml, refuse_code, refuse_lookups, refuse_secrets, walk
from configs.schema import ConfigError, EvaluateConfig, PhaseConfig, PredictConfig, RunConfig, target_class

PROTOCOLS = ("auto", "streaming", "windowed", "uncut")
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "fp32", "bf16"),
    "optim.name": ("adamw", "muon"),
    "eval.protocol": PROTOCOLS,
    "protocol": PROTOCOLS,
    "train.nonfinite": ("stop", "skip", "rewind"),
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
    "schedule.cap.dim": (1, None),
    "train.log_every": (1, None),
    "train.eval_every": (1, None),
    "train.checkpoint_every": (1, None),
    "train.keep_checkpoints": (2, None),
    "train.max_failed_saves": (1, None),
    "train.nonfinite_limit": (1, None),
    "eval.context": (2, None),
    "eval.stride": (1, None),
    "eval.batch_tokens": (1, None),
    "optim.weight_decay": (0, None),
    "optim.clip_norm": (0, None),
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
    "decay_power": (0, None),
}
EVALUATION_RANGES = {
    "num_threads": (1, None),
    "context": (2, None),
    "stride": (1, None),
    "batch_tokens": (1, None),
}
PREDICTION_RANGES = {
    "num_threads": (1, None),
    "length": (1, None),
    "temperature": (0, None),
    "top_k": (1, None),
    "seed": (0, 2**31 - 1),
}


def check(cfg: DictConfig) -> DictConfig:
    """The same configuration in a fresh schema and found sound, or ConfigError naming the key to change."""
    cfg = closed(cfg, RunConfig)
    _check_values(cfg, RANGES)
    for key in ("share", "valid_share"):
        check_share(f"eval.{key}", cfg.eval[key])
    _check_optim(cfg.optim)
    # nothing else is known of these two before the run exists; the rest of a node is its constructor's affair
    check_options(cfg.task, "task", supplied=("data",))
    if "stride" in target_class(cfg.task, "task").settings:
        check_stride("eval.", cfg.eval.context, cfg.eval.stride)
    check_options(cfg.model, "model")
    complete = getattr(target_class(cfg.model, "model"), "complete", None)
    if complete is not None:
        cfg.model = complete(_with_kept_config(cfg))
    if not cfg.schedule.phases:
        raise ConfigError("schedule.phases is empty, a run needs at least one phase")
    for index, phase in enumerate(cfg.schedule.phases):
        _check_phase(phase, f"schedule.phases.{index}")
    return cfg


def _with_kept_config(cfg: DictConfig) -> dict[str, Any]:
    """The options of a model; of a run that goes on when its source is gone, with the `config` that it was run with."""
    from configs.compose import named_run_dir  # it checks too

    options, folder = plain(cfg.model), named_run_dir(cfg)
    source = options.get("source")
    if folder is None or source is None or "model_type" in options["config"] or Path(source).expanduser().is_dir():
        return options
    file = folder / "config.yaml"
    saved = read_yaml(file) if file.is_file() else {}
    refuse_lookups(saved)
    kept = saved.get("model")
    if isinstance(kept, dict) and kept.get("source") == source:
        options["config"] = {**kept["config"], **options["config"]}
    return options


def check_evaluation(cfg: DictConfig) -> DictConfig:
    """The same for the configuration of `eval.py`."""
    cfg = closed(cfg, EvaluateConfig)
    _check_values(cfg, EVALUATION_RANGES)
    _check_source(cfg)
    if cfg.share is not None:
        check_share("share", cfg.share)
    if cfg.task is not None:
        check_options(cfg.task, "task", supplied=("data",))
    return cfg


def check_prediction(cfg: DictConfig) -> DictConfig:
    """The same for the configuration of `predict.py`."""
    cfg = closed(cfg, PredictConfig)
    _check_values(cfg, PREDICTION_RANGES)
    _check_source(cfg)
    if cfg.top_p is not None:
        check_share("top_p", cfg.top_p)
    if (cfg.input is None) == (cfg.prompt is None):
        fault = "there is nothing to read" if cfg.input is None else "input and prompt are both given"
        raise ConfigError(
            f"{fault}: give input=FILE, input=- for stdin, input=DIR for every file of a folder, or prompt=TEXT"
        )
    return cfg


def _check_source(cfg):
    """A run or one checkpoint, not both."""
    if cfg.run_dir is not None and cfg.checkpoint is not None:
        raise ConfigError(
            "run_dir and checkpoint are both given: run_dir=DIR takes the newest checkpoint of a run, checkpoint=PATH "
            "one that you choose"
        )
    if cfg.run_dir is None and cfg.checkpoint is None:
        raise ConfigError("run_dir has no value: give the folder of a run with run_dir=DIR, or checkpoint=PATH")


def closed(cfg: DictConfig, schema: type) -> DictConfig:
    """`cfg` merged into a fresh schema, so that a key added with `+` is refused like any unknown one."""
    refuse_secrets(plain(cfg))
    try:
        tree: Any = OmegaConf.to_container(cfg, resolve=True)
        refuse_code(tree)
        for key, value in walk(tree):
            # an escaped ${…} is a text here, but would be looked up by whoever reads it next
            if isinstance(value, str) and "${" in value:
                raise ConfigError(f"{key} is {value!r} when everything is looked up: write the value itself")
        merged: Any = OmegaConf.merge(OmegaConf.structured(schema), tree)
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error, _known(schema, cfg))) from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        key = re.sub(r"\[(\d+)\]", r".\1", missing[0])
        raise ConfigError(f"{key} has no value: give one with {key}=…")
    return merged


def _known(schema, cfg):
    """The keys that a configuration may have: the schema's, with those of the open nodes and of a phase."""
    tree = plain(OmegaConf.structured(schema))
    for name in {"model", "task"} & tree.keys() & cfg.keys():
        tree[name] = plain(cfg[name])
    if "schedule" in tree:
        tree["schedule"]["phases"] = [dict.fromkeys(PhaseConfig.__dataclass_fields__)]
    return tree


def _check_values(cfg, ranges):
    """Words among their choices, numbers in their ranges, nothing empty and nothing that is not a number."""
    for key, value in leaves(cfg):
        if value == "":
            raise ConfigError(f"{key} has an empty value: give one, or leave the key out")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} is {value}, it must be a finite number")
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value is not None:
            check_choice(key, value, choices)
    for key, limits in ranges.items():
        check_range(key, OmegaConf.select(cfg, key), *limits)


def leaves(node, prefix: str = ""):
    """(dotted key, value) of everything in a configuration that holds nothing else."""
    if not OmegaConf.is_config(node):
        yield prefix.rstrip("."), node
        return
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        yield from leaves(node[key], f"{prefix}{key}.")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        hint = nearest(str(value), choices)
        raise ConfigError(f"{key} is {value!r}, it must be one of {', '.join(choices)}{hint}")


def check_share(key: str, value: float) -> None:
    """ConfigError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ConfigError(f"{key} is {value}, it must be above 0 and at most 1")


def check_stride(prefix: str, context: int, stride: int) -> None:
    """ConfigError where a window scores more characters than it holds."""
    if stride > context:
        raise ConfigError(f"{prefix}stride is {stride}, it must be at most {prefix}context ({context})")


def _check_optim(optim):
    if len(optim.betas) != 2 or not all(isinstance(beta, float) and 0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(f"optim.betas is {list(optim.betas)}, it must be two numbers from 0 to below 1")
    if optim.eps <= 0:
        raise ConfigError(f"optim.eps is {optim.eps}, it must be above 0")


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
    check_choice(f"{where}.decay", phase.decay, ("constant", "linear", "cosine", "polynomial"))
    if phase.warmup_steps > phase.steps:
        raise ConfigError(
            f"{where}.warmup_steps is {phase.warmup_steps}, it must be at most {where}.steps ({phase.steps})"
        )


def check_options(node: DictConfig, where: str, *, supplied: Sequence[str] = ()) -> None:
    """Bind an open node to the constructor it names: unknown and missing names and wrong types are refused.

    `supplied`: arguments that the program gives itself.
    """
    cls = target_class(node, where)
    parameters = dict(inspect.signature(cls).parameters)
    for name in supplied:
        parameters.pop(name)
    optional = {name for name, value in parameters.items() if value.default is not value.empty}
    partial = node.get("_partial_", False)
    if not isinstance(partial, bool):
        raise ConfigError(f"{where}._partial_ is {partial!r}, it must be true or false")
    for key, value in node.items():
        if key in ("_target_", "_partial_"):
            continue
        if key not in parameters:
            # what has no default and is not given here is the calling code's to set
            names = [name for name in parameters if name in node or name in optional]
            known = dict.fromkeys([where, *(f"{where}.{name}" for name in names)])
            raise ConfigError(unknown_key(f"{where}.{key}", known))
        annotation = parameters[key].annotation
        if not _fits(plain(value), annotation):
            hint = nearest(str(value), get_args(annotation)) if get_origin(annotation) is Literal else ""
            raise ConfigError(f"{where}.{key} is {_text(plain(value))}, it must be {_expected(annotation)}{hint}")
        if isinstance(value, DictConfig) and "_target_" in value:
            check_options(value, f"{where}.{key}")
    required = [name for name in parameters if name not in node and name not in optional]
    # a partial node gets the rest later, from the code that calls it
    if required and not partial:
        raise ConfigError(f"{where}.{required[0]} has no value: give one with {where}.{required[0]}=…")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value suits an annotation: a scalar, None, a Literal, a container, a union."""
    if annotation in (inspect.Parameter.empty, Any):
        return True
    if _is_union(annotation):
        return any(_fits(value, option) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if annotation in (type(None), None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation in (bool, int, str):
        return type(value) is annotation
    container = get_origin(annotation) or annotation
    if isinstance(container, type) and issubclass(container, Mapping):
        return isinstance(value, dict)
    if isinstance(container, type) and issubclass(container, Sequence):
        # the constructor checks the entries
        return isinstance(value, list)
    # what is left is built from a node of its own
    return isinstance(value, dict) and "_target_" in value


def _is_union(annotation):
    return get_origin(annotation) in (Union, types.UnionType)


def _expected(annotation):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    if annotation in (type(None), None):
        return "null"
    if _is_union(annotation):
        return " or ".join(_expected(option) for option in get_args(annotation))
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    container = get_origin(annotation) or annotation
    is_list = isinstance(container, type) and issubclass(container, Sequence)
    return names.get(annotation, "a list" if is_list else "a group with a _target_")


def _text(value):
    return "null" if value is None else repr(value)
