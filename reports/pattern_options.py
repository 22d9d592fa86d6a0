"""Values of `key=value` options: what cannot be used is refused with its name, its value and what would do."""

from __future__ import annotations

import re
from collections.abc import Iterable

from configs.messages import nearest
from reports.errors import ReportError

WHOLE_NUMBER = re.compile(r"-?\d+")


def whole_number(text: str, name: str, low: int, high: int) -> int:
    """ "64" -> 64; ReportError outside of low..high."""
    if not WHOLE_NUMBER.fullmatch(text) or not low <= int(text) <= high:
        raise ReportError(f"{name}={text}: expected a whole number from {low:,} to {high:,}")
    return int(text)


def whole_numbers(text: str, name: str, low: int, high: int) -> tuple[int, ...]:
    """ "[1,2]" -> (1, 2), "1" -> (1,); ReportError where one is outside of low..high."""
    entries = [entry.strip() for entry in text.removeprefix("[").removesuffix("]").split(",")]
    if not all(WHOLE_NUMBER.fullmatch(entry) and low <= int(entry) <= high for entry in entries):
        raise ReportError(f"{name}={text}: expected whole numbers from {low:,} to {high:,}, such as [1,2]")
    return tuple(map(int, entries))


def true_or_false(text: str, name: str) -> bool:
    """ "true" -> True."""
    return one_of(text.lower(), name, ("true", "false")) == "true"


def one_of(text: str, name: str, choices: Iterable[str]) -> str:
    """The text itself; ReportError with the nearest choice where it is none of them."""
    choices = tuple(choices)
    if text not in choices:
        raise ReportError(f"{name}={text}: expected one of {', '.join(choices)}{nearest(text, choices)}")
    return text


def only_known(arguments: Iterable[str], what: str, known: Iterable[str]) -> None:
    """ReportError naming the first `key=value` whose key `what` does not have."""
    known = tuple(known)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name not in known:
            raise ReportError(f"{argument}: {what} has no option {name}{nearest(name, known)} ({', '.join(known)})")
