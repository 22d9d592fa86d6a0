"""The command line before Hydra sees it: what would lead past our checks, or add a key that nothing reads."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.compose import CONFIG_DIR, compose_raw
from configs.messages import dotted_keys, nearest, plain, unknown_key
from configs.schema import ConfigError

# Hydra's own; argparse takes any unambiguous beginning of one
FLAGS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun",
)  # fmt: skip
OTHER_TREE = "the configurations are those of the folder configs; --config-dir DIR adds a folder of yours to them"
# what reads a configuration past the checks, as argparse names it -> what to do instead
REFUSED = {
    "experimental_rerun": "it would unpickle a file, which can run code; to go on with a run give run_dir=DIR",
    "config_path": OTHER_TREE,
    "config_name": OTHER_TREE,
}
# what Hydra notes of this very start, not settings of its own
NOTED = ("runtime", "overrides")


def is_override(argument: str) -> bool:
    """Whether a word is an override and no flag."""
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def key_of(word: str) -> str:
    """The dotted key or the group that an override sets."""
    return word.partition("=")[0].lstrip("+~")


def is_swept(argument: str) -> bool:
    """Whether an override gives several values to run one after the other."""
    if not is_override(argument):
        return False
    try:
        return OverridesParser.create().parse_override(argument).is_sweep_override()
    except HydraException:
        return False


def single_overrides(argument: str) -> Iterable[str]:
    """An override, a swept one once for each of its values; nothing for a flag."""
    if not is_override(argument):
        return []
    parsed = OverridesParser.create().parse_override(argument)
    if not parsed.is_discrete_sweep():
        return [argument]
    return [f"{argument.partition('=')[0]}={value}" for value in parsed.sweep_string_iterator()]


def refused_flag(arguments: list[str]) -> str | None:
    """One line about an option with dashes that Hydra does not know or that we do not take, None for sound ones."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.startswith("--") and not any(flag.startswith(name) for flag in FLAGS):
            setting = f"{name.strip('-')}={value or '…'}"
            hint = nearest(name, FLAGS) or f": settings are written without dashes, as in {setting}"
            return f"there is no option {name}{hint}"
    given = get_args_parser().parse_args(arguments)
    for name, instead in REFUSED.items():
        if getattr(given, name) is not None:
            return f"the option --{name.replace('_', '-')} is not taken: {instead}"
    if any(key_of(word) == "hydra.searchpath" for word in arguments):
        return f"hydra.searchpath is not taken: {OTHER_TREE}"
    return None


def added_folder(arguments: list[str]) -> Path | None:
    """The folder that `--config-dir` adds to ours."""
    given = get_args_parser().parse_known_args(arguments)[0].config_dir
    return None if given is None else Path(given).absolute()


def search_path(folder: Path | None) -> list[str]:
    """The override that makes `compose_raw` look into an added folder too."""
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.searchpath=['file://{quoted}']"] if folder else []


def refused_addition(arguments: list[str], config_name: str) -> str | None:
    """One line about a key added with `+` that is no key of ours, None where all are.

    Every option of a constructor stands in its group's file, so that this is known before the constructor is.
    """
    added = [word for word in arguments if word.startswith("+") and is_override(word)]
    try:
        rest = [next(iter(single_overrides(word))) for word in arguments if is_override(word) and word not in added]
        folder = added_folder(arguments)
        tree = plain(compose_raw([*search_path(folder), *rest], config_name)) if added else {}
    except (HydraException, OmegaConfBaseException, ValueError, TypeError):
        return None  # a fault of the others, which is found when Hydra meets it
    for word in added:
        key = key_of(word)
        is_group = "/" in key or any((root / key).is_dir() for root in (CONFIG_DIR, folder) if root)
        # what Hydra and the attention of a phase take is not known here
        if not key or is_group or key.startswith("hydra.") or re.match(r"schedule\.phases\.\d+\.attention\b", key):
            continue
        known = list(dotted_keys(tree))
        parts = key.split(".")
        for depth in range(1, len(parts) + 1):
            if ".".join(parts[:depth]) not in known:
                return unknown_key(".".join(parts[:depth]), tree)
    return None


def check_added_folder(arguments: list[str], config_name: str) -> None:
    """ConfigError where a folder of `--config-dir` changes Hydra's own section for a job of this command line.

    That section names callbacks, launchers and log handlers, which run before any check of ours. What Hydra raises
    about the command line is raised here too.
    """
    folder = added_folder(arguments)
    if folder is None:
        return
    if not folder.is_dir():
        raise ConfigError(f"--config-dir={folder} is no folder")
    choices = [choice for word in arguments if (choice := list(single_overrides(word)))]
    single = [words[0] for words in choices if len(words) == 1]
    ours = [words for words in choices if key_of(words[0]).startswith(("hydra.", "hydra/"))]
    expected = [_launcher(words, config_name) for words in itertools.product(*ours)]
    # a sweep is composed without what varies, then once a job
    jobs = {tuple(single), *itertools.product(*choices)}
    found = [_launcher([*search_path(folder), *words], config_name) for words in jobs]
    for section in found:
        changed = [name for name in section if all(section[name] != other.get(name) for other in expected)]
        if changed:
            raise ConfigError(
                f"--config-dir={folder} sets hydra.{changed[0]}, which could run code before anything is checked: "
                "give settings of the launcher on the command line"
            )


def _launcher(words: Iterable[str], config_name: str) -> dict[str, Any]:
    """Hydra's section of a composed configuration, as it stands."""
    section: Any = OmegaConf.to_container(compose_raw(list(words), config_name, hydra=True).hydra)
    section["job"].pop("override_dirname")
    section.pop("searchpath")
    return {name: value for name, value in section.items() if name not in NOTED}
