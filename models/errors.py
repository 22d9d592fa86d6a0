"""What goes wrong with checkpoints of others."""


class PretrainedError(Exception):
    """A folder, file or hub name that cannot be loaded: the message names it, what was found, and the way out."""

    exit_code = 4


def first_line(error: Exception) -> str:
    """What an error says first, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
