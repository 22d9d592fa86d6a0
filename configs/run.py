"""The configuration of a run folder: written once, read back checked, compared on resume."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from configs.check import check, check_stride
from configs.compose import task_overrides
from configs.messages import dotted_keys, plain, unknown_key
from configs.saved import flatten, read_yaml, refuse_lookups
from configs.schema import ConfigError, target_class

CONFIG = "config.yaml"
# settings of the place a run runs in and of how it is watched over, not of what it computes: they may change
LOCAL_KEYS = ("device", "num_threads", "data", "tracker", "train")
OWN_KEYS = ("run_dir", "resume")  # of a start, not of the run
MAX_SHOWN = 40  # changes
ABSENT = object()


def load_run(run_dir: str | Path) -> DictConfig:
    """The checked configuration of a run folder; ConfigError where there is none."""
    file = Path(run_dir).expanduser() / CONFIG
    if not file.is_file():
        raise ConfigError(f"run_dir={run_dir} is no run folder: it holds no {CONFIG}")
    return load_config(file)


def load_config(file: Path) -> DictConfig:
    """The checked configuration in a YAML file that a run wrote; ConfigError naming the file and the key.

    Whoever wrote it, nothing in it is looked up and no code is named but our own classes at the three open nodes.
    """
    tree = read_yaml(file)
    try:
        refuse_lookups(tree)
        return check(OmegaConf.create(tree))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def evaluation_settings(cfg: DictConfig, run: Any) -> dict[str, Any]:
    """The settings of an evaluation: what `eval.py` was given, else what the run has; ConfigError for a bad pair.

    `run`: anything with the nodes `task` and `eval` of a run.
    """
    names = (*target_class(run.task, "task").settings, "share")
    settings = {name: run.eval[name] if cfg[name] is None else cfg[name] for name in names}
    if "stride" in settings:
        check_stride("", settings["context"], settings["stride"])
    return settings


def run_files(cfg: DictConfig, run_dir: Path | None = None, step: int = 0) -> dict[str, str]:
    """File name -> text of what a run folder says about its configuration, in the order to write them.

    Where `run_dir` holds another configuration, with which `step` steps were made, that one is kept beside it.
    """
    overrides = "".join(f"{line}\n" for line in task_overrides())
    files = {CONFIG: OmegaConf.to_yaml(cfg), "overrides.txt": overrides}
    if run_dir is None or step == 0 or not (run_dir / CONFIG).is_file():
        return files
    former = f"config-until-step-{step}.yaml"
    # what stands there already made these steps; a later change at the same step made none
    if (run_dir / former).exists() or all(_is_under(key, LOCAL_KEYS) for key in _changes(load_run(run_dir), cfg)):
        return files
    return {former: (run_dir / CONFIG).read_text(encoding="utf-8"), **files}


def check_same_run(run_dir: Path, cfg: DictConfig) -> list[str]:
    """Compare `cfg` with the configuration that a run folder holds already.

    Returns the differences that pass, as lines `- key: value there` and `+ key: value now`: those of the place it runs
    in (LOCAL_KEYS) and those that `cfg.resume.allow_changes` lets pass. Raises ConfigError listing those that nothing
    allows, those that no entry can allow (the task, the shapes of the model), for an entry that names no key, and for
    checkpoints without the configuration that they were trained with.
    """
    checkpoints = (path.name for path in (run_dir / "checkpoints").glob("step-*"))
    if not (run_dir / CONFIG).is_file() and any(name.removeprefix("step-").isdecimal() for name in checkpoints):
        raise ConfigError(
            f"run_dir={run_dir} holds checkpoints of a run but no {CONFIG}, which says what they were trained with: "
            "restore it from a copy, or use another run_dir"
        )
    allowed = list(cfg.resume.allow_changes)
    saved = load_run(run_dir) if (run_dir / CONFIG).is_file() else cfg
    _check_entries(allowed, plain(saved), plain(cfg))
    changes = _changes(saved, cfg)
    shown = [line for key, pair in changes.items() for line in _lines(key, *pair)]
    refused = [key for key in changes if not _is_under(key, (*allowed, *LOCAL_KEYS))]
    fault = _unfit(saved, cfg, list(changes))
    if not refused and not fault:
        return shown
    advice = "use the same or another run_dir; to go on all the same, add "
    advice += f"'resume.allow_changes=[{','.join([*allowed, *refused])}]'"
    more = len(shown) - 2 * MAX_SHOWN
    lines = [
        f"run_dir={run_dir} holds a run with another configuration (- there, + now):",
        *shown[: 2 * MAX_SHOWN],
        *([f"and {more} lines more"] if more > 0 else []),
        *_started_with(run_dir),
        fault or advice,
    ]
    raise ConfigError("\n".join(lines))


def check_same_data(saved: dict, found: dict, checkpoint: str) -> None:
    """ConfigError where a checkpoint was trained on other data than is here now, by what their fingerprints say."""
    # the same bytes may lie in another file
    keys = (saved.keys() | found.keys()) - {"source"}
    changed = sorted(key for key in keys if saved.get(key) != found.get(key))
    if changed:
        listed = ", ".join(f"{key} was {saved.get(key)}, is {found.get(key)}" for key in changed)
        raise ConfigError(f"{checkpoint} was trained on other data ({listed}): give the same, or start a new run")


def check_schedule(num_steps: int, step: int, checkpoint: str) -> None:
    """ConfigError where a checkpoint is further on than the schedule, of `num_steps` steps, will ever be."""
    if step > num_steps:
        raise ConfigError(
            f"the schedule ends at step {num_steps:,}, {checkpoint} is at step {step:,}: give a schedule at least as "
            "long, or another run_dir"
        )


def _changes(saved: DictConfig, cfg: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value there, value now), ABSENT for none, of what differs."""
    there, now = flatten(plain(saved)), flatten(plain(cfg))
    # an empty group is as good as none: what stands in it is a key of its own
    there, now = ({key: value for key, value in flat.items() if value != {}} for flat in (there, now))
    pairs = {key: (there.get(key, ABSENT), now.get(key, ABSENT)) for key in {**now, **there}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and not _is_under(key, OWN_KEYS)}


def _is_under(key: str, entries: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{entry}.") for entry in entries)


def _check_entries(entries: list[str], *trees: dict) -> None:
    for entry in entries:
        if not any(entry in dotted_keys(tree) for tree in trees):
            raise ConfigError(f"resume.allow_changes: {unknown_key(entry, trees[-1])}")


def _unfit(saved: DictConfig, cfg: DictConfig, changed: list[str]) -> str | None:
    """One line about changes that no run can take, None where there are none."""
    task = [key for key in changed if _is_under(key, ("task",))]
    if task:
        return f"{', '.join(task)} cannot change within a run: use another run_dir"
    model = [key for key in changed if _is_under(key, ("model",))]
    if model and _shape(saved) != _shape(cfg):
        return f"the weights there do not fit the model now ({', '.join(model)} changed): use another run_dir"
    return None


def _shape(cfg: DictConfig) -> tuple:
    """What a checkpoint's weights fit: names and shapes of the parameters, heads of every layer."""
    import torch

    from configs.phases import build_model

    with torch.device("meta"):
        model = build_model(cfg)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # as many heads as before share the same matrices otherwise
    return shapes, [pattern.num_heads for pattern in model.attention_patterns()]


def _lines(key: str, there: Any, now: Any) -> list[str]:
    signed = (("-", there), ("+", now))
    return [f"{sign} {key}: {'null' if value is None else value}" for sign, value in signed if value is not ABSENT]


def _started_with(run_dir: Path) -> list[str]:
    file = run_dir / "overrides.txt"
    words = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
    typed = " ".join(word for word in words if word)
    return [f"it was started with: {typed}"] if typed else []
