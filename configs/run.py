"""The configuration of a run folder: written once, read back checked, compared on resume."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from configs.check import check
from configs.schema import ConfigError

# settings of the place a run runs in, not of what it computes
LOCAL_KEYS = ("run_dir", "device", "num_threads", "data.path", "data.cache_dir", "data.workers", "tracker", "train")


def load_run(run_dir: str | Path) -> DictConfig:
    """The checked configuration of a run folder; ConfigError where there is none."""
    path = Path(run_dir).expanduser() / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run_dir={run_dir} is no run folder: it holds no config.yaml")
    return check(OmegaConf.load(path))


def run_files(cfg: DictConfig) -> dict[str, str]:
    """File name -> text of what a run folder says about its configuration."""
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return {"config.yaml": OmegaConf.to_yaml(cfg), "overrides.txt": "".join(f"{line}\n" for line in overrides)}


def check_same_run(run_dir: Path, cfg: DictConfig) -> None:
    """ConfigError listing what differs between `cfg` and the configuration a run folder already holds, if any does."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return
    saved, given = (_flat(OmegaConf.to_container(node, resolve=True)) for node in (OmegaConf.load(path), cfg))
    changes = [
        f"{key}: {saved.get(key, 'absent')} there, {given.get(key, 'absent')} now"
        for key in sorted(saved.keys() | given.keys())
        if saved.get(key) != given.get(key) and not key.startswith(LOCAL_KEYS)
    ]
    if changes:
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise ConfigError(f"{run_dir} holds a run with another configuration ({shown}): use the same or another run_dir")


def _flat(node, prefix=""):
    if isinstance(node, dict):
        return {key: value for name, child in node.items() for key, value in _flat(child, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): node}
