"""What a saved configuration may hold: plain data, whoever wrote it, and no secrets where we write it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import BUILDABLE, ConfigError

MAX_BYTES = 100_000  # the largest experiment's file has under 6,000
MAX_DEPTH = 20
# Hydra's names for what is to be called and how; every one of them, so that a new one is refused too
SPECIAL = re.compile(r"_\w+_")
ALLOWED = (*(f"{node}._target_" for node in BUILDABLE), "model.attention._partial_")
ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?(\w+)")
SECRET = re.compile(r"(^|_)(api_?key|key|token|secrets?|password|passwd|credentials?|auth)(_|$)", re.IGNORECASE)
_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(file: Path) -> dict[str, Any]:
    """The plain content of a YAML file as a run writes it; nothing in it is looked up, called or repeated.

    Raises ConfigError naming the file, and where one can be given the line.
    """
    try:
        raw = file.read_bytes()
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{file} has {len(raw):,} bytes, a configuration has at most {MAX_BYTES:,}")
        text = raw.decode("utf-8-sig")
        _check_events(text)
        tree: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        _check_keys(tree)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text: byte {error.start:,} is not UTF-8") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = " ".join(str(getattr(error, "msg", None) or error).split())
        raise ConfigError(f"{file} is no configuration that can be read: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds a list, a configuration is keys with values")
    return tree


def refuse_code(tree: Any) -> None:
    """ConfigError for Hydra's special keys (`_target_`, `_args_` …) anywhere but where `build()` reads them."""
    for key, _ in walk(tree):
        if SPECIAL.fullmatch(key.rpartition(".")[2]) and key not in ALLOWED:
            raise ConfigError(f"{key} is not allowed: of such keys there are only {', '.join(ALLOWED)}")


def refuse_lookups(tree: dict[str, Any]) -> None:
    """ConfigError for what a saved configuration never holds: Hydra's own section, and `${…}` in a value."""
    if "hydra" in tree:
        raise ConfigError("hydra is a section of the launcher, a saved configuration may not bring its own: remove it")
    for key, value in walk(tree):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{key} is {value!r}: a saved configuration holds plain values alone and looks nothing up, neither "
                "in the environment nor elsewhere; write the value itself"
            )


def refuse_secrets(tree: Any) -> None:
    """ConfigError for a value taken from an environment variable whose name says that it is a secret."""
    for key, value in walk(tree):
        names = ENVIRONMENT.findall(value) if isinstance(value, str) else ()
        for name in filter(SECRET.search, names):
            raise ConfigError(
                f"{key} would write the environment variable {name}, by its name a secret, into config.yaml: leave it "
                "out; Weights & Biases and Hugging Face read their keys from the environment themselves"
            )


def walk(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists, the mappings and lists too."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield f"{prefix}{name}", value
        yield from walk(value, f"{prefix}{name}.")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model": {"dim": 64}, "phases": [{"lr": 1}]} -> {"model.dim": 64, "phases.0.lr": 1}.

    Lists without mappings stay whole: a list of windows is one value.
    """
    if isinstance(config, dict) and config:
        items = config.items()
    elif isinstance(config, list) and any(isinstance(item, dict) for item in config):
        items = enumerate(config)
    else:
        return {prefix: config}
    flat = {}
    for key, value in items:
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _check_keys(tree):
    """ValueError for a key that is no text; OmegaConf takes numbers, truth values and null as well."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        if isinstance(tree, dict) and not isinstance(name, str):
            raise ValueError(f"the key {name!r} is no name")
        _check_keys(value)


def _check_events(text):
    """ValueError for the parts of YAML that no run writes, before anything is built from the text."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=_Parser):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        where = f"in line {event.start_mark.line + 1}"
        if documents > 1:
            raise ValueError(f"a second document begins {where}")
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels {where}")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"an anchor or alias (& or *) {where}: write the value at each place")
        # a tag names the type to build, which for `!!python/…` is a call
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None):
            raise ValueError(f"the tag {event.tag} {where}: only plain values are read")  # type: ignore[attr-defined]
