"""Errors a user can act on. `exit_code` is the exit status the command line ends with."""


class RunDirError(Exception):
    """A run folder cannot be made, or another process is using it."""

    exit_code = 2


class CheckpointError(Exception):
    """A checkpoint is missing, damaged, or does not fit the model."""

    exit_code = 4


class NumericsError(Exception):
    """A loss or a gradient is not finite."""

    exit_code = 5


class ResourceError(Exception):
    """The machine lacks what was asked for: a device, memory, disk space."""

    exit_code = 6
