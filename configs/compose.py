"""Checked configurations from overrides, outside Hydra's own entry point."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from configs.check import check
from configs.schema import register

CONFIG_DIR = Path(__file__).resolve().parent


def compose_config(overrides: list[str], config_name: str = "train") -> DictConfig:
    """The checked configuration that `train.py` would run with these overrides."""
    return check(name_experiment(compose_raw(overrides, config_name), overrides))


def name_experiment(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Note the chosen experiment in the configuration, unless the user named the run otherwise."""
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    if "experiment_name" not in chosen and chosen.get("experiment", "null") != "null":
        cfg.experiment_name = chosen["experiment"]
    return cfg


def compose_raw(overrides: list[str], config_name: str = "train") -> DictConfig:
    """Hydra's composition of these overrides, unchecked."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(config_name, overrides=overrides)
