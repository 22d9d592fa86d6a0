"""Exit codes of the errors a user can act on."""

import pytest

from training import errors


@pytest.mark.parametrize(
    ("name", "code"),
    [("RunDirError", 2), ("CheckpointError", 4), ("NumericsError", 5), ("ResourceError", 6)],
)
def test_exit_codes(name, code):
    assert getattr(errors, name).exit_code == code
