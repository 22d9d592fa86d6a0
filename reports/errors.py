"""The user-facing error of the report commands."""


class ReportError(Exception):
    """A path, key or option that a report command cannot use; the command ends with exit code 2."""

    exit_code = 2
