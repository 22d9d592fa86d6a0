"""What the report commands share at the terminal: output width, `key=value` options, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

PIPED_WIDTH = 160  # rich assumes 80 columns where there is no terminal and would cut every cell of a table


def console() -> Console:
    """A console as wide as the terminal; `PIPED_WIDTH` columns where the output goes to a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def take_option(arguments: list[str], name: str) -> str | None:
    """Remove every `name=value` from `arguments` and return the last value, None where there is none."""
    prefix = f"{name}="
    found = [argument for argument in arguments if argument.startswith(prefix)]
    arguments[:] = [argument for argument in arguments if not argument.startswith(prefix)]
    return found[-1][len(prefix) :] if found else None


def command_path(path: Path) -> str:
    """A path as it is typed here: from the current folder where it lies inside that."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run `main` and return its exit code: an error that carries `exit_code` is printed as one paragraph."""
    try:
        main(arguments)
    except Exception as error:
        code = getattr(type(error), "exit_code", None)
        if not isinstance(code, int):
            raise  # our bug: the traceback is wanted
        print(f"error: {error}", file=sys.stderr)
        return code
    return 0
