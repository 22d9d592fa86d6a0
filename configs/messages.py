"""The words of a refusal: the key as the user typed it, its value, the limit, the nearest valid name."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CUTOFF = 0.7  # of difflib's ratio, for a name near enough to suggest
# OmegaConf's wording -> what the value must be
EXPECTED = {
    r"could not be converted to Integer": "a whole number",
    r"could not be converted to Float": "a number",
    r"is not a valid bool": "true or false",
    r"is not a ListConfig": "a list such as [1,2]",
    r"Cannot convert .* to string": "a string",
    r"is not a subclass of|Cannot assign .* to Dict": "a group of keys such as {name: value}",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean X?" for the known name nearest to `name`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=CUTOFF)
    return f", did you mean {matches[0]}?" if matches else ""


def unknown_key(key: str, tree: Mapping) -> str:
    """That there is no `key` (dotted) in `tree`, with the nearest that there is, or those beside it."""
    known = list(dotted_keys(tree))
    parent, _, name = key.rpartition(".")
    ranked = []
    for candidate in known:
        above, _, leaf = candidate.rpartition(".")
        likeness = _similarity(name, leaf)
        if likeness >= CUTOFF:
            # a misspelt name is likelier than a misplaced one
            ranked.append((above == parent, likeness, _similarity(parent, above), candidate))
    # the first of equals: what stands above in the tree
    best = max(ranked, key=lambda entry: entry[:3])[3] if ranked else ""
    return f"there is no configuration key {key}{f', did you mean {best}?' if best else _beside(key, known)}"


def dotted_keys(tree: Any, prefix: str = "") -> Iterable[str]:
    """Every key of a nested mapping, entries of lists of mappings by their number: a, a.b, a.c.0, a.c.0.d."""
    entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for name, value in entries:
        if isinstance(value, Mapping):
            yield f"{prefix}{name}"
            yield from dotted_keys(value, f"{prefix}{name}.")
        elif isinstance(tree, Mapping):
            yield f"{prefix}{name}"
            if isinstance(value, list):
                yield from dotted_keys(value, f"{prefix}{name}.")


def describe(error: OmegaConfBaseException, tree: Mapping, *, typed: str = "", value: str = "") -> str:
    """What OmegaConf refused, in one line.

    `tree`: the keys that there are; `typed`, `value`: the two sides of the override.
    """
    first = str(error.msg or error).splitlines()[0]
    key = re.sub(r"\[(\w+)\]", r".\1", error.full_key or str(error.key or "")).strip(".")
    inner = ""
    if re.fullmatch(r".*\.\d+", key) and "value: {}" in first:
        parent = key.rpartition(".")[0]
        count = len(OmegaConf.select(OmegaConf.create(dict(tree)), parent))
        return f"there is no {typed or key}: {parent} has {count} entries, numbered from 0"
    if typed and not f"{key}.".startswith(f"{typed}."):
        # inside a value that is itself a mapping or a list of them, the key is relative to it
        inner = key if not f"{typed}.".startswith(f"{key}.") else ""
        key = typed
    where = f"{key}: {inner}" if inner else key
    if re.search(r"not in (struct|')", first):
        if not inner:
            return unknown_key(key, tree)
        names = list(getattr(error.object_type, "__dataclass_fields__", ()))
        return f"there is no configuration key {inner} in {key}{nearest(inner, names) or _listed(names)}"
    if "is not Optional" in first:
        return f"{where} is null, it must have a value"
    if "Cannot merge" in first:
        is_list = first.endswith("ListConfig")
        kinds = ("a list", "a group of keys") if is_list else ("a group of keys", "a list")
        return f"{where} is {value}, which has {kinds[0]} where {kinds[1]} belongs"
    for pattern, expected in EXPECTED.items():
        if re.search(pattern, first):
            return f"{where} is {_value_in(first, value)}, it must be {expected}"
    return f"{where}: {first}" if where and where not in first else first


def plain(tree: Any) -> Any:
    """A configuration as Python values; what has no value and what cannot be resolved stays as it stands."""
    return OmegaConf.to_container(tree) if isinstance(tree, DictConfig | ListConfig) else tree


def with_keys(message: str, names: Iterable[str], where: str) -> str:
    """A constructor's message with the user's names of its options: `window` -> `model.attention.window`."""
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    # an option's name is followed by what is said of it; the same word elsewhere is English
    found = re.compile(rf"(?<![\w.])({words})(?= (?:is|has|of|-?\d))|(?<=option )({words})\b")
    text = found.sub(lambda match: f"{where}.{match[0]}", message) if words else message
    return text if text != message else f"{where}: {message}"


def _similarity(one, other):
    return difflib.SequenceMatcher(None, one, other).ratio()


def _beside(key, known):
    """The keys beside one that does not exist, under the deepest parent that does."""
    parent = key.rpartition(".")[0]
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    names = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    return _listed([name for name in names if "." not in name and not name.startswith("_")], parent)


def _listed(names, parent=""):
    return f" ({parent + ' has' if parent else 'there are'}: {', '.join(names)})" if names else ""


def _value_in(message, typed):
    """The refused value as OmegaConf quotes it, else as the user typed it."""
    wording = r"^Value '(?P<value>.*)' (of type '(?P<type>\w+)'|is not)|to string: '(?P<text>.*)'$"
    quoted = re.search(wording, message)
    if not quoted:
        return typed
    value = quoted["text"] if quoted["value"] is None else quoted["value"]
    return repr(value) if quoted["type"] == "str" else value
