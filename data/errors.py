"""The one exception of this package that a user is meant to read."""


class DataError(Exception):
    """A file, download or split that cannot be used; the message names it, the fault and the fix."""

    exit_code = 3
