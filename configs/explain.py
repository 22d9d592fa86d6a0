"""What Hydra refused to compose, found by composing the overrides one by one, and said without its advice."""

import re
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from configs.compose import CONFIG_DIR, compose_raw
from configs.launch import added_folder, key_of, search_path, single_overrides
from configs.messages import describe, nearest, plain, unknown_key

REFUSALS = (HydraException, OmegaConfBaseException, ValueError, TypeError)


def explain(error: Exception, arguments: list[str], config_name: str) -> str | None:
    """One line about what Hydra raised around the jobs; None where that is no refusal of a configuration."""
    if not isinstance(error, REFUSALS):
        return None
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override))
    several = re.search(r"(?:argument|parameters) '(.*?)=(.*)'(?: requires|$)", str(error).partition("\n")[0])
    if several:
        key, value = several.groups()
        return f"{key} has several values, {value}: add -m to run each, or write a list as {key}=[{value}]"
    words = [word for argument in arguments for word in single_overrides(argument)]
    folder = added_folder(arguments)
    groups = _groups(folder)
    for word in words:
        fault = _group_fault(word, groups)
        if fault:
            return fault
    chosen = [word for word in words if key_of(word) in groups and not word.startswith("~")]
    found = [*search_path(folder), *chosen]
    if folder:
        try:
            compose_raw(found, config_name)
        except REFUSALS as refused:
            return " ".join(str(refused).split())
    # Hydra mostly names the one it stopped at
    for word in sorted(words, key=lambda word: word not in str(error) and f"'{key_of(word)}'" not in str(error)):
        if word in chosen:
            continue
        try:
            compose_raw([*found, word], config_name)
        except REFUSALS as refused:
            return _value_fault(word, refused, found, config_name)
    ours = not isinstance(error, HydraException | OmegaConfBaseException)
    return None if ours else " ".join(str(error).split())


def _groups(added: Path | None) -> dict[str, list[str]]:
    """Group -> its options: the folders of YAML files beside this file, and those of an added folder."""
    groups: dict[str, list[str]] = {}
    for root in filter(None, (CONFIG_DIR, added)):
        for file in sorted(root.glob("*/**/*.yaml")):
            groups.setdefault(file.parent.relative_to(root).as_posix(), []).append(file.stem)
    return groups


def _unreadable(override):
    if "=" not in override:
        return f"{override!r} is no override: they are key=value, and `--help` lists the keys"
    key, _, value = override.partition("=")
    return (
        f"{key} is {value}, which cannot be read: close every bracket and quote, and wrap the whole override "
        f"in single quotes to keep it from the shell, as in '{key}=[1,2]'"
    )


def _group_fault(word: str, groups: dict[str, list[str]]) -> str | None:
    """What is wrong with an override that chooses an option of a group."""
    key, _, value = word.partition("=")
    name = key.lstrip("+~")
    if not name:
        return f"{word!r} names no key: overrides are key=value, and `--help` lists the keys"
    if name not in groups:
        # Hydra's own groups have options that no file here lists
        unknown = "/" in name and not name.startswith("hydra/")
        return f"there is no group {name}{nearest(name, groups) or _options(groups)}" if unknown else None
    if key.startswith("~"):
        return None
    if key != name:
        return f"{word} chooses an option of a group: write it without the sign in front, {name}={value}"
    options = groups[name]
    if value in ("", "null"):
        return f"{name} is {value or 'empty'}: leave it out, or choose one{_options(options)}"
    if value not in options:
        return f"there is no {name}={value}{nearest(value, options)}{_options(options)}"
    return None


def _options(names):
    return f" (there are: {', '.join(names)})"


def _value_fault(word: str, refused: Exception, chosen: list[str], config_name: str) -> str:
    """What is wrong with one override that sets a value."""
    key, _, value = word.partition("=")
    typed = key.lstrip("+~")
    text = str(refused)
    tree = plain(compose_raw(chosen, config_name))
    cause = refused.__cause__ if isinstance(refused.__cause__, OmegaConfBaseException) else refused
    if isinstance(cause, OmegaConfBaseException):
        return describe(cause, tree, typed=typed, value=value)
    if "does not exist" in text or "is not an int" in text:
        return unknown_key(typed, tree)
    if isinstance(refused, MissingConfigException):
        return f"there is no {word}{nearest(value, refused.options or [])}{_options(refused.options or [])}"
    return f"{typed} is {value}: {text.splitlines()[0]}"
