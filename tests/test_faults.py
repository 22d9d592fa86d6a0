"""docs/faults.md and the tests marked with its rows belong together."""

import re

from tests.helpers import ROOT

ROW = re.compile(r"^\| (\d+) \|(.*)\|$", re.MULTILINE)


def test_every_row_has_tests_and_every_marked_test_a_row():
    rows = [int(number) for number, _ in ROW.findall((ROOT / "docs" / "faults.md").read_text(encoding="utf-8"))]
    files = (ROOT / "tests").rglob("test_*.py")
    marked = {int(number) for file in files for number in re.findall(r"mark\.fault\((\d+)\)", file.read_text("utf-8"))}
    assert rows == sorted(set(rows))
    assert set(rows) == marked


def test_every_row_says_command_message_and_what_is_kept():
    for number, cells in ROW.findall((ROOT / "docs" / "faults.md").read_text(encoding="utf-8")):
        assert len([cell for cell in re.split(r"(?<!\\)\|", cells) if cell.strip()]) == 4, f"row {number}"
