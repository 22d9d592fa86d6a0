"""What goes wrong with checkpoints of others."""


class PretrainedError(Exception):
    """A folder, file or hub name that cannot be loaded: the message names it, what was found, and the way out."""

    exit_code = 4
