"""The configuration of a run folder: written once, read back checked, compared on resume."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from configs.check import check, check_stride, leaves
from configs.compose import task_overrides
from configs.schema import ConfigError

# settings of the place a run runs in, not of what it computes
LOCAL_KEYS = ("run_dir", "device", "num_threads", "data", "tracker", "train")


def load_run(run_dir: str | Path) -> DictConfig:
    """The checked configuration of a run folder; ConfigError where there is none."""
    path = Path(run_dir).expanduser() / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run_dir={run_dir} is no run folder: it holds no config.yaml")
    saved: Any = OmegaConf.load(path)
    return check(saved)


def evaluation_settings(cfg: DictConfig, run: DictConfig) -> dict[str, Any]:
    """The settings of an evaluation: what `eval.py` was given, else what the run has; ConfigError for a bad pair."""
    names = ("context", "stride", "share", "batch_tokens")
    settings = {name: run.eval[name] if cfg[name] is None else cfg[name] for name in names}
    check_stride("", settings["context"], settings["stride"])
    return settings


def run_files(cfg: DictConfig) -> dict[str, str]:
    """File name -> text of what a run folder says about its configuration."""
    overrides = "".join(f"{line}\n" for line in task_overrides())
    return {"config.yaml": OmegaConf.to_yaml(cfg), "overrides.txt": overrides}


def check_same_run(run_dir: Path, cfg: DictConfig) -> None:
    """ConfigError listing what differs between `cfg` and the configuration a run folder holds already."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return
    saved, given = dict(leaves(OmegaConf.load(path))), dict(leaves(cfg))
    changes = [
        f"{key}: {saved.get(key, 'absent')} there, {given.get(key, 'absent')} now"
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key) and key.partition(".")[0] not in LOCAL_KEYS
    ]
    if changes:
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise ConfigError(
            f"run_dir={run_dir} holds a run with another configuration ({shown}): use the same or another run_dir"
        )


def check_same_data(saved: dict, found: dict, checkpoint: str) -> None:
    """ConfigError where a checkpoint was trained on other data than is here now, by what their fingerprints say."""
    # the same bytes may lie in another file
    keys = (saved.keys() | found.keys()) - {"source"}
    changed = sorted(key for key in keys if saved.get(key) != found.get(key))
    if changed:
        listed = ", ".join(f"{key} was {saved.get(key)}, is {found.get(key)}" for key in changed)
        raise ConfigError(f"{checkpoint} was trained on other data ({listed}): give the same, or start a new run")
