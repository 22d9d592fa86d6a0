"""Checked configurations from overrides, outside Hydra's own entry point."""

import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from configs.check import check
from configs.messages import plain
from configs.schema import ConfigError, register

CONFIG_DIR = Path(__file__).resolve().parent
MAX_NAME = 120  # letters of a folder's name
# their values are taken as they are typed
TEXT_KEYS = (
    "run_dir", "checkpoint", "data.path", "data.cache_dir", "input", "output", "prompt",
    "model.source", "task.tokenizer",
)  # fmt: skip


def compose_config(overrides: list[str], config_name: str = "train") -> DictConfig:
    """The checked configuration that `train.py` would run with these overrides, or ConfigError."""
    from configs.explain import explain  # it composes too

    try:
        cfg = compose_raw(overrides, config_name)
    except Exception as error:
        message = explain(error, overrides, config_name)
        if message is None:
            raise
        raise ConfigError(message) from None
    return check(name_experiment(cfg, overrides))


def name_experiment(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Note the chosen experiment in the configuration, unless the user named the run otherwise."""
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    if "experiment_name" not in chosen and chosen.get("experiment", "null") != "null":
        cfg.experiment_name = chosen["experiment"]
    return cfg


def task_overrides() -> list[str]:
    """The overrides of the job that Hydra is running as they were typed: a `${...}` in one stays as it is."""
    return plain(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def job_folder() -> str:
    """Folder name of the job of a sweep that Hydra is running: its number, what the sweep varies, other overrides."""
    job = HydraConfig.get().job
    fixed = job.config.override_dirname.exclude_keys
    words = [word for word in task_overrides() if not word.startswith("run_dir=")]
    # a long name is cut: what differs between jobs must not be
    words.sort(key=lambda word: word.partition("=")[0].lstrip("+~") in fixed)
    text = "".join(letter if letter.isalnum() or letter in "=,.-_" else "-" for letter in ",".join(words))
    return f"{job.num}_{text}"[:MAX_NAME]


def open_keys(arguments: list[str]) -> list[str]:
    """The overrides as Hydra must see them.

    Keys of a phase's `attention`, or of a published `config`, need not be there yet, so they get `++`; paths and texts
    are quoted where Hydra would not read them as they stand: the folder of a sweep's job holds `=` and commas, others
    letters beyond ASCII.
    """
    free = r"^(?=schedule\.phases\.\d+\.attention\b|model\.config\.)"
    opened = [re.sub(free, "++", argument) for argument in arguments]
    return [quoted(argument) for argument in opened]


def quoted(argument: str) -> str:
    """An override of a path or a text as Hydra takes it for what was typed; data given as `a,b` stays a sweep."""
    key, _, value = argument.partition("=")
    is_plain = re.fullmatch(r"[\w./:+%@$*? -]*", value, re.ASCII) and key != "prompt"
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    is_sweep = key.startswith("data.") and "," in value
    if key not in TEXT_KEYS or value in ("", "null") or is_plain or is_quoted or is_sweep:
        return argument
    # inside quotes a backslash counts only in front of a quote, the closing one included
    text = re.sub(r"(\\*)(?='|$)", r"\1\1", value).replace("'", r"\'")
    return f"{key}='{text}'"


def named_run_dir(cfg: DictConfig) -> Path | None:
    """The run folder that the user named, in a sweep the job's own below it; None where a new one is to be made."""
    if cfg.run_dir is None:
        return None
    parent = Path(cfg.run_dir).expanduser().absolute()
    is_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return parent / job_folder() if is_sweep else parent


def compose_raw(overrides: list[str], config_name: str = "train", *, hydra: bool = False) -> DictConfig:
    """Hydra's composition of these overrides, unchecked; with `hydra` its own section is there too."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(config_name, overrides=open_keys(overrides), return_hydra_config=hydra)
